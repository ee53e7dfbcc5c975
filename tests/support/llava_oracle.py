"""LLaVA's own preprocessing (llava-torch) as the truth for ids and labels, and Llama tokenizers to run it with."""

from __future__ import annotations

import copy
import shutil
import tempfile
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

Ids = list[int]


@cache
def llava_train() -> Any:
    """Return the module llava.train.train, which still looks for a name that transformers 5 dropped."""
    pytest.importorskip("llava")
    import transformers.trainer

    if not hasattr(transformers.trainer, "ALL_LAYERNORM_LAYERS"):
        transformers.trainer.ALL_LAYERNORM_LAYERS = []
    import llava.train.train

    return llava.train.train


def llava_ids(record: dict[str, Any], tokenizer: Any, version: str = "v1") -> tuple[Ids, Ids]:
    """Return ids and labels of LLaVA's preprocess for one record; a picture is -200 in the ids, -100 in the labels."""
    train = llava_train()
    train.conversation_lib.default_conversation = train.conversation_lib.conv_templates[version]
    sources = [copy.deepcopy(record["conversations"])]
    if "image" in record:
        sources = train.preprocess_multimodal(sources, SimpleNamespace(is_multimodal=True, mm_use_im_start_end=False))
    made = train.preprocess(sources, tokenizer, has_image="image" in record)
    # The model itself ignores the labels of pictures (prepare_inputs_labels_for_multimodal).
    labels = [-100 if label == -200 else label for label in made["labels"][0].tolist()]
    return made["input_ids"][0].tolist(), labels


@cache
def llama_tokenizer(kind: str) -> Any:
    """Return a 32k SentencePiece tokenizer of Llama's kind: `legacy`, `new` (legacy=False) or `prepend`.

    `prepend` is the form of older tokenizer.json files (a normalizer that always puts a blank in front).
    """
    pytest.importorskip("mistral_common")
    import mistral_common
    from transformers import LlamaTokenizerFast  # which transformers 5 calls LlamaTokenizer

    with tempfile.TemporaryDirectory() as folder:
        model = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
        shutil.copy(model, Path(folder) / "tokenizer.model")
        tokenizer = LlamaTokenizerFast.from_pretrained(folder, legacy=kind != "new", add_bos_token=True)
    if kind == "prepend":
        tokenizer = _with_prepend(tokenizer)
    tokenizer.pad_token = tokenizer.unk_token  # LLaVA's choice for vicuna
    tokenizer.model_max_length = 100_000
    return tokenizer


def _with_prepend(tokenizer: Any) -> Any:
    from tokenizers import normalizers
    from transformers import PreTrainedTokenizerFast

    backend = tokenizer.backend_tokenizer
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = None
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    made.legacy = True  # LLaVA asks for it
    return made


@cache
def byte_bpe() -> Any:
    """Return a small byte-level BPE tokenizer of GPT-2's kind: it puts nothing in front, and its EOS is <|im_end|>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|im_start|>", "<|im_end|>", "<image>"],
        show_progress=False,
    )
    backend.train_from_iterator([str(llava_train.__doc__), Path(__file__).read_text(encoding="utf-8")], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )


def original_llava(hf: Any, processor: Any, folder: Path, vocabulary: int | None = None) -> Any:
    """Return LLaVA's own class with the weights of a small HF LLaVA; the CLIP tower is put into `folder`/clip.

    The tower is not loaded yet, as after LLaVA's own constructor. The vocabulary, unless another is given, ends where
    HF's `<image>` begins, as in the published checkpoints.
    """
    pytest.importorskip("llava")
    from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
    from transformers import CLIPImageProcessor, CLIPVisionModel

    clip = CLIPVisionModel(hf.config.vision_config)
    clip.load_state_dict(hf.model.vision_tower.state_dict())
    clip.save_pretrained(folder / "clip")
    picture = processor.image_processor
    CLIPImageProcessor(size=dict(picture.size), crop_size=dict(picture.crop_size)).save_pretrained(folder / "clip")
    vocabulary = vocabulary or hf.config.image_token_id
    settings = {k: v for k, v in hf.config.text_config.to_dict().items() if k not in ("model_type", "vocab_size")}
    settings |= {
        "vocab_size": vocabulary,
        "mm_vision_tower": str(folder / "clip"),
        "mm_hidden_size": hf.config.vision_config.hidden_size,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "tokenizer_model_max_length": 2048,
    }
    model = LlavaLlamaForCausalLM(LlavaConfig(**settings)).eval()
    state = {f"model.{key}": t for key, t in hf.model.language_model.state_dict().items()}
    state["model.embed_tokens.weight"] = state["model.embed_tokens.weight"][:vocabulary]
    state["lm_head.weight"] = hf.lm_head.weight[:vocabulary]
    for name, tensor in hf.model.multi_modal_projector.state_dict().items():
        state["model.mm_projector." + name.replace("linear_1", "0").replace("linear_2", "2")] = tensor
    missing, unknown = model.load_state_dict(state, strict=False)
    assert not missing, missing
    assert not unknown, unknown
    return model
