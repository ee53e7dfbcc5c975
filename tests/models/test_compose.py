"""`milora_vl.compose`: any tower and any causal language model become a LLaVA that goes through both stages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from milora_vl import compose
from milora_vl.chat import __main__ as chat
from milora_vl.models.base import tower_config
from milora_vl.models.tiny import tiny_tokenizer
from milora_vl.train import __main__ as train
from support.problems import raises_code, raises_problem

WIDTHS: dict[str, int] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def language(kind: str, folder: Path) -> Path:
    """A tiny random language model and its tokenizer, as a folder."""
    import transformers

    configs: dict[str, Any] = {
        "gpt2": transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=512, vocab_size=261),
        "qwen2": transformers.Qwen2Config(
            **WIDTHS, num_key_value_heads=1, vocab_size=300, tie_word_embeddings=True, max_position_embeddings=512
        ),
        "llama": transformers.LlamaConfig(**WIDTHS, vocab_size=261),
    }
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(configs[kind]).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tower(kind: str, folder: Path) -> str:
    """A tiny random tower as a folder, or a name of timm's."""
    import transformers

    if kind.startswith("timm/"):
        return kind
    configs: dict[str, Any] = {
        "siglip": transformers.SiglipVisionConfig(**WIDTHS, image_size=32, patch_size=8),
        "dinov2": transformers.Dinov2Config(**WIDTHS, image_size=28, patch_size=7),
        "clip": transformers.CLIPVisionConfig(**WIDTHS, image_size=32, patch_size=8),
    }
    transformers.AutoModel.from_config(configs[kind]).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("vision", "text", "tokens"),
    [
        ("siglip", "gpt2", 16),  # no class token, Conv1D, learned positions
        pytest.param("dinov2", "qwen2", 16, marks=pytest.mark.slow),
        pytest.param("timm/test_vit", "llama", 100, marks=pytest.mark.slow),
    ],
)
def test_both_stages_and_what_comes_out(
    vision: str, text: str, tokens: int, tiny_data: Path, tmp_path: Path, capfd: Any
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    base = tmp_path / "base"
    parts = ["--vision", tower(vision, tmp_path / "tower"), "--language", str(language(text, tmp_path / "language"))]
    if vision.startswith("timm/"):
        parts += ["--vision_weights", "random"]
    assert compose.main([*parts, "--output_dir", str(base)]) == 0
    config = json.loads((base / "config.json").read_text())
    assert config["image_seq_length"] == tokens
    with raises_code("output-exists", message="exists; it is not overwritten"):
        compose.main([*parts, "--output_dir", str(base)])

    records = [record for record in json.loads((tiny_data / "train.json").read_text()) if "image" in record]
    captions = [{**record, "conversations": record["conversations"][:2]} for record in records]
    (tiny_data / "captions.json").write_text(json.dumps(captions))
    shared = [
        "--model", str(base), "--image_folder", str(tiny_data / "images"), "--max_steps", "2",
        "--per_device_train_batch_size", "4", "--use_cpu", "--disable_tqdm", "--max_length", "400",
    ]  # fmt: skip
    stage1 = ["--tune_mm_mlp_adapter", "True", "--version", "plain", "--learning_rate", "1e-3"]
    stage1 += ["--data_path", str(tiny_data / "captions.json"), "--output_dir", str(tmp_path / "stage1")]
    assert train.main([*shared, *stage1]) == 0
    stage2 = ["--projector_weights", str(tmp_path / "stage1"), "--rank", "2", "--learning_rate", "1e-3"]
    stage2 += ["--data_path", str(tiny_data / "train.json"), "--output_dir", str(tmp_path / "stage2")]
    assert train.main([*shared, *stage2]) == 0
    learnt = load_file(tmp_path / "stage1" / "mm_projector.safetensors")["multi_modal_projector.linear_1.weight"]
    adapter = load_file(tmp_path / "stage2" / "adapter_model.safetensors")
    tuned = next(w for name, w in adapter.items() if name.endswith("multi_modal_projector.linear_1.weight"))
    assert 0 < float((tuned - learnt).abs().max()) < 1e-2  # it continued from stage 1

    model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base), tmp_path / "stage2")
    assert torch.isfinite(model(input_ids=torch.tensor([[5, 6, 7]])).logits).all()
    capfd.readouterr()
    asked = [
        "--adapter",
        str(tmp_path / "stage2"),
        "--image",
        str(tiny_data / "images" / "0.png"),
        "--max_new_tokens",
        "3",
    ]
    assert chat.main(["--model", str(base), *asked, "What colour is it?"]) == 0


@pytest.mark.parametrize(
    "name", ["test_vit", "test_convnext", "swin_tiny_patch4_window7_224", "deit_tiny_distilled_patch16_224"]
)
def test_timms_features_become_tokens_in_their_places(name: str) -> None:
    """In every layout of timm, a change in one corner of the picture is not a change of channels everywhere."""
    import timm

    from milora_vl.models.timm_tower import as_map

    encoder: Any = timm.create_model(name, pretrained=False, num_classes=0).eval()
    size = timm.get_pretrained_cfg(name).input_size[-1]
    with torch.no_grad():
        features = encoder.forward_features(torch.zeros(1, 3, size, size))
    found = as_map(encoder, features)
    assert found.shape[:2] == (1, encoder.num_features)
    assert found.shape[2] == found.shape[3] == tower_config(f"timm/{name}").grid
    last = (
        features[0, -1, -1]
        if name.startswith("swin")
        else features[0, -1]
        if features.dim() == 3
        else features[0, :, -1, -1]
    )
    assert torch.equal(found[0, :, -1, -1], last)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            ["--vision", "timm/vit_tyni", "--language", "tiny-text"],
            "timm has no model 'vit_tyni'\nsimilar: vit",
        ),
        (["--vision", "./nowhere", "--language", "tiny-text"], "./nowhere: no such folder"),
        (
            ["--vision", "tiny", "--language", "tiny-text"],
            "tiny: not a vision tower that another model can use",
        ),
        (
            ["--vision", "timm/test_vit", "--language", "tiny"],
            "tiny: this is already a vision-language model",
        ),
        (
            ["--vision", "timm/test_vit", "--language", "tiny-text", "--projector", "none.bin"],
            "none.bin: no projector weights",
        ),
        (
            ["--vision", "tiny-text", "--language", "tiny-text"],
            "tiny-text: not a vision tower that another model can use: llama",
        ),
    ],
)
def test_parts_that_do_not_fit_are_named(parts: list[str], message: str, tmp_path: Path) -> None:
    with raises_problem(says=message):
        compose.main([*parts, "--vision_weights", "random", "--output_dir", str(tmp_path / "base")])
    assert not (tmp_path / "base").exists()


def test_new_rows_are_the_mean_of_those_of_their_own_matrix(tmp_path: Path) -> None:
    """An untied head gets its own mean, not the mean of the embeddings: else a new token may be the likeliest."""
    from transformers import AutoModelForCausalLM

    folder = language("llama", tmp_path / "language")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(50)
    model.save_pretrained(folder)
    words = ["--vision", tower("siglip", tmp_path / "tower"), "--language", str(folder)]
    compose.main([*words, "--output_dir", str(tmp_path / "llava")])
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "llava"))
    for old, end in (("lm_head.weight", "lm_head.weight"), ("model.embed_tokens.weight", "embed_tokens.weight")):
        (grown,) = (tensor for name, tensor in after.items() if name.endswith(end))
        count = len(before[old])
        torch.testing.assert_close(grown[count:], before[old].mean(0).expand(len(grown) - count, -1))
