"""Small text models of what an export to GGUF writes, tokenizers of each kind, and llama.cpp itself."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

SIZES = {
    "vocab_size": 261,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
KINDS = ("llama", "llama-tied", "llama-llama3", "llama-linear", "mistral", "qwen2", "qwen3")


def text_model(kind: str) -> nn.Module:
    """A causal language model of random weights; `kind` is a model_type, and after a dash what is special."""
    from transformers import AutoConfig, AutoModelForCausalLM

    name, _, special = kind.partition("-")
    settings: dict[str, Any] = dict(SIZES)
    if name == "qwen3":
        settings["head_dim"] = 32
    if special == "llama3":
        settings["rope_parameters"] = LLAMA_3
    elif special == "linear":
        settings["rope_parameters"] = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    settings["tie_word_embeddings"] = special == "tied"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **settings))
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms of random models are constant
            parameter += 0.02 * torch.randn_like(parameter)
    return model.eval()


WORDS = "The quick brown fox, it's 12345 metres! Grüße  an\n\n die  Welt: don't\tstop."


def tokenizer_of(kind: str) -> Any:
    """A trained tokenizer: byte-level as GPT-2's, SmolLM's, Qwen's or Llama 3's, or with byte fallback as Llama 2's."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    from milora_vl.export.gguf.tokenizer import _LLAMA_3, _QWEN

    special = ["<unk>", "<s>", "</s>"]
    if kind == "llama":
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        trainer = trainers.BpeTrainer(
            vocab_size=420, special_tokens=[*special, *(f"<0x{i:02X}>" for i in range(256))], show_progress=False
        )
        tokenizer.train_from_iterator([WORDS.replace("ü", "u")] * 3, trainer)
        content = json.loads(tokenizer.to_str())
        content["added_tokens"] = [row for row in content["added_tokens"] if not row["content"].startswith("<0x")]
        tokenizer = Tokenizer.from_str(json.dumps(content))
    else:
        splits = {
            "gpt2": [],
            "smollm": [pre_tokenizers.Digits(individual_digits=True)],
            "qwen2": [pre_tokenizers.Split(Regex(_QWEN), "isolated")],
            "llama3": [pre_tokenizers.Split(Regex(_LLAMA_3), "isolated")],
        }[kind]
        own = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind in ("gpt2", "smollm"))
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, own]) if splits else own
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=420, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator([WORDS] * 3, trainer)
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


TEMPLATE = "{{ bos_token }}{% for m in messages %}USER: {{ m.content }} ASSISTANT:{% endfor %}"


# A letter: half a character would give no answer. What is measured are the probabilities before the bias.
FORCED = [[64, 100.0]]


class LlamaCpp:
    """llama.cpp with one model; skips the test where no build of it is installed."""

    def __init__(self, model: Path, *, lora: Path | None = None, mmproj: Path | None = None) -> None:
        xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp comes with: pip install xllamacpp")
        settings = xllamacpp.CommonParams()
        settings.model.path = str(model)
        settings.n_ctx, settings.n_parallel, settings.n_gpu_layers = 512, 1, 0
        settings.warmup, settings.verbosity = False, -1
        settings.use_jinja, settings.chat_template = True, TEMPLATE
        settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        if lora is not None:
            settings.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(lora), 1.0)]
        if mmproj is not None:
            settings.mmproj.path = str(mmproj)
        self.server = xllamacpp.Server(settings)

    def after(self, prompt: str) -> Tensor:
        """The log probabilities of the next token."""
        asked = {"prompt": prompt, "n_predict": 1, "temperature": 0, "n_probs": 1000, "cache_prompt": False}
        got = self.server.handle_completions({**asked, "logit_bias": FORCED})
        return probabilities(got["choices"][0]["logprobs"]["content"][0])

    def text(self, prompt: str, tokens: int) -> str:
        """A greedy answer."""
        asked = {"prompt": prompt, "n_predict": tokens, "temperature": 0, "cache_prompt": False}
        return str(self.server.handle_completions(asked)["choices"][0]["text"])

    def about_picture(self, url: str, question: str) -> Tensor:
        """The log probabilities of the first token of an answer about a picture (a data URL)."""
        parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
        asked = {"messages": [{"role": "user", "content": parts}], "max_tokens": 1, "temperature": 0, "logprobs": True}
        more = {"logit_bias": FORCED, "top_logprobs": 1000, "cache_prompt": False}
        got = self.server.handle_chat_completions({**asked, **more})
        return probabilities(got["choices"][0]["logprobs"]["content"][0])

    def ids(self, text: str) -> list[int]:
        """The token ids of a text."""
        body = json.dumps({"content": text, "add_special": True}).encode()
        request = urllib.request.Request(
            f"{self.server.listening_address}/tokenize", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=20) as reply:
            return list(json.load(reply)["tokens"])


def probabilities(token: dict[str, Any]) -> Tensor:
    """The log probabilities of all tokens by their ids."""
    values = {entry["id"]: entry["logprob"] for entry in token["top_logprobs"]}
    return torch.tensor([values[i] for i in range(len(values))])
