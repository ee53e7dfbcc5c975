"""What the encoder needs of a tokenizer: its BOS, EOS and blanks, and its chat template."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from milora_vl.common.errors import UserError

IGNORE = -100


def fast_backend(tokenizer: Any) -> Any:
    """Return the Rust tokenizer, which has the character offsets of the loss mask; resets padding and truncation."""
    if not tokenizer.is_fast:
        raise UserError(
            f"{type(tokenizer).__name__} returns no character offsets, which the loss mask needs",
            hint="load the fast tokenizer: AutoTokenizer.from_pretrained(..., use_fast=True)",
        )
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = False
    return backend


class TokenizerTraits(NamedTuple):
    """How a tokenizer changes a text."""

    backend: Any
    bos: list[int]  # the ids that it adds before a text
    blank: bool  # it adds a blank before a text, as SentencePiece does: a text must not be tokenized in parts


def tokenizer_traits(tokenizer: Any) -> TokenizerTraits:
    """Return the traits of a tokenizer by tokenizing a letter; called for each record, as a tokenizer may change."""
    backend = fast_backend(tokenizer)
    encoding = backend.encode("a")
    ids, tokens = encoding.ids, encoding.tokens
    first = 1 if tokens[0] == tokenizer.bos_token else 0
    return TokenizerTraits(backend, ids[:first], tokens[first].startswith("\u2581"))


def bos_ids(tokenizer: Any) -> list[int]:
    """Return the ids that the tokenizer adds before a text: its BOS, or nothing."""
    added = fast_backend(tokenizer).encode("").ids
    return added[:1] if added and added[0] == tokenizer.bos_token_id else []


def bos_text(tokenizer: Any) -> str:
    """Return the text of the BOS for a tokenizer that adds one before a text, else an empty string."""
    return str(tokenizer.bos_token) if bos_ids(tokenizer) else ""


def own_template(tokenizer: Any) -> str:
    """Return the tokenizer's own chat template (the default one if it has several); raises `UserError` without any."""
    template = tokenizer.chat_template
    if isinstance(template, Mapping):
        template = template.get("default")
    if not template:
        raise UserError(
            "the template chat_template is the tokenizer's own, and this tokenizer has no chat template",
            code="template-missing",
            hint="name another template, for example --template vicuna_v1",
        )
    return str(template)


def share_template(processor: Any) -> None:
    """Copy the chat template of a processor, if it has one, to its tokenizer: the processor's is the model's."""
    if processor.chat_template:
        processor.tokenizer.chat_template = processor.chat_template


def eos_text(tokenizer: Any) -> str:
    """Return the text of the tokenizer's end of sequence; raises `UserError` if it has none."""
    if tokenizer.eos_token is None:
        raise UserError("this tokenizer has no end-of-sequence token", hint="set tokenizer.eos_token")
    return str(tokenizer.eos_token)


def remember_legacy(tokenizer: Any) -> None:
    """Make `save_pretrained` write the tokenizer's `legacy` flag, which transformers 5 omits for Llama's tokenizer.

    Without the flag, a tokenizer with legacy=True is loaded with legacy=False and splits the text after `</s>`
    differently.
    """
    if "legacy" in vars(tokenizer):
        tokenizer.init_kwargs["legacy"] = tokenizer.legacy


def glue_after(special: str, tokenizer: Any) -> str:
    """Return the text between a special token and a text with which the text is tokenized as if it were alone.

    It is a blank for SentencePiece with legacy=False (which adds its own blank before the first text only), and empty
    otherwise. A text that starts with a blank needs no glue. Raises `UserError` if the special token strips blanks.
    """
    backend = fast_backend(tokenizer)
    special_id = tokenizer.convert_tokens_to_ids(special)

    def alone(text: str) -> list[int]:
        return list(backend.encode(text, add_special_tokens=False).ids)

    def behind(text: str) -> list[int]:
        return list(backend.encode(f"a: {special}{text}", add_special_tokens=False).ids)

    front = [*alone("a: "), special_id]
    if behind(" a") == front + alone(" a"):
        for glue in ("", " "):
            if all(behind(glue + text) == front + alone(text) for text in ("\na", "a")):
                return glue
    raise UserError(
        f"{special} changes the text around it in this tokenizer",
        hint=f'add it as AddedToken("{special}", special=True, normalized=False, lstrip=False, rstrip=False)',
    )
