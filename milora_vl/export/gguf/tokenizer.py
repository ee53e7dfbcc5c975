"""The tokenizer in a GGUF file. llama.cpp splits texts by its own code, so only tokenizers that it has are written.

Two kinds: byte-level BPE (`gpt2` in llama.cpp, with the name of the rule that splits a text before merges), and
SentencePiece-like BPE with byte fallback (`llama`), where a score per token takes the place of the order of merges.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from milora_data.encode.tokens import bos_ids, fast_backend
from milora_vl.base.errors import UserError

if TYPE_CHECKING:
    from gguf import GGUFWriter

_QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_LLAMA_3 = _QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
# What splits a text before merges, as tokenizer.json says it -> the name in llama.cpp.
_SPLITS = {
    "bytes": "gpt-2",
    "digits bytes": "smollm",
    f"split {_QWEN} bytes": "qwen2",
    f"split {_LLAMA_3} bytes": "llama-bpe",
}
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def add_tokenizer(writer: GGUFWriter, tokenizer: Any, vocabulary: int) -> None:
    """Write the tokenizer for a model with `vocabulary` rows of embeddings; rows without a token get unused names.

    Raises UserError for a tokenizer whose splits llama.cpp would not repeat.
    """
    import gguf

    content = json.loads(fast_backend(tokenizer).to_str())
    model = content["model"]
    is_bytes = _split_of(content) is not None
    kind = gguf.TokenType
    tokens = [f"[PAD{i}]" for i in range(vocabulary)]
    types = [int(kind.UNUSED)] * vocabulary
    for token, place in model["vocab"].items():
        if place < vocabulary:
            tokens[place] = token
            types[place] = int(kind.BYTE if not is_bytes and _BYTE.fullmatch(token) else kind.NORMAL)
    for added in content["added_tokens"]:
        if added["id"] < vocabulary:
            tokens[added["id"]] = added["content"]
            types[added["id"]] = int(kind.CONTROL if added["special"] else kind.USER_DEFINED)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    if is_bytes:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(str(_split_of(content)))
        # llama.cpp refuses a file without merges; this one never applies, because no text has a symbol of two letters.
        writer.add_token_merges(merges or [f"{tokens[0] * 2} {tokens[0] * 2}"])
    else:
        _require_sentencepiece(content)
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(_scores(tokens, merges))
        writer.add_add_space_prefix(fast_backend(tokenizer).encode("a", add_special_tokens=False).tokens[0] != "a")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_add_bos_token(bool(bos_ids(tokenizer)))
    writer.add_add_eos_token(False)
    for name in ("bos", "eos", "pad"):
        number = getattr(tokenizer, f"{name}_token_id")
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    if tokenizer.unk_token_id is not None:
        writer.add_unk_token_id(tokenizer.unk_token_id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _split_of(content: dict[str, Any]) -> str | None:
    """Return llama.cpp's name for the split of a byte-level BPE; None for other tokenizers.

    Raises UserError for a split without a name here.
    """
    split = content["pre_tokenizer"]
    steps = split["pretokenizers"] if split and split["type"] == "Sequence" else [split] if split else []
    if content["model"]["type"] != "BPE" or not any(step["type"] == "ByteLevel" for step in steps):
        return None
    words = " ".join(_step(step) for step in steps)
    if words not in _SPLITS:
        raise _unknown(f"splits texts by {words[:80]!r}")
    return _SPLITS[words]


def _step(step: dict[str, Any]) -> str:
    if step["type"] == "ByteLevel" and not step["add_prefix_space"]:
        return "bytes"
    if step["type"] == "Digits" and step["individual_digits"]:
        return "digits"
    if step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        return f"split {step['pattern'].get('Regex', '')}"
    return json.dumps(step)


def _require_sentencepiece(content: dict[str, Any]) -> None:
    model = content["model"]
    if model["type"] != "BPE" or not model.get("byte_fallback"):
        raise _unknown(f"is of type {model['type']}" + ("" if model["type"] != "BPE" else " without byte fallback"))


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """Return a score per token: tokens that an earlier merge makes have a higher one, so that they are made first."""
    rank: dict[str, int] = {}
    for number, merge in enumerate(merges):
        rank.setdefault(merge.replace(" ", ""), number)
    return [-float(rank.get(token, len(merges))) for token in tokens]


def _unknown(what: str) -> UserError:
    return UserError(
        f"the tokenizer {what}, and this export does not know llama.cpp's name for that",
        code="export-gguf-tokenizer",
        where="--to",
        hint="use --to merged, then convert_hf_to_gguf.py of llama.cpp",
    )
