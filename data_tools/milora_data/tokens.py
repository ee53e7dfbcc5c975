"""What the encoder needs to know of a tokenizer, asked of the tokenizer itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from milora_data.errors import UserError


def fast_backend(tokenizer: Any) -> Any:
    """Return the Rust tokenizer itself, free of what earlier calls left in it: five times faster than its wrapper.

    Raises `UserError` for a tokenizer without one: character offsets are what the mask is made from.
    """
    if not tokenizer.is_fast:
        raise UserError(
            f"{type(tokenizer).__name__} tells no character offsets, which the mask is made from\n"
            "load the fast tokenizer: AutoTokenizer.from_pretrained(..., use_fast=True)"
        )
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = False
    return backend


IGNORE = -100


class Habits(NamedTuple):
    """What a tokenizer does to a text."""

    backend: Any
    bos: list[int]  # what it puts in front of it
    blank: bool  # it puts a blank in front of it, as SentencePiece does: such texts must not be cut


def habits(tokenizer: Any) -> Habits:
    """Return what the tokenizer does to a text, by trying it out: once a record, so that no change goes unseen."""
    backend = fast_backend(tokenizer)
    tried = backend.encode("a")
    ids, tokens = tried.ids, tried.tokens
    first = 1 if tokens[0] == tokenizer.bos_token else 0
    return Habits(backend, ids[:first], tokens[first].startswith("\u2581"))


def bos_ids(tokenizer: Any) -> list[int]:
    """Return what the tokenizer itself puts in front of a text: its BOS, or nothing."""
    added = fast_backend(tokenizer).encode("").ids
    return added[:1] if added and added[0] == tokenizer.bos_token_id else []


def bos_text(tokenizer: Any) -> str:
    """Return the text of the BOS for a tokenizer that puts one in front of a text, else nothing."""
    return str(tokenizer.bos_token) if bos_ids(tokenizer) else ""


def own_template(tokenizer: Any) -> str:
    """Return the tokenizer's own chat template; raises `UserError` if it has none."""
    if not tokenizer.chat_template:
        raise UserError("this tokenizer has no chat template of its own\nname one of ours with --template")
    return str(tokenizer.chat_template)


def eos_text(tokenizer: Any) -> str:
    """Return the text of the tokenizer's end of sequence; raises `UserError` if it has none."""
    if tokenizer.eos_token is None:
        raise UserError("this tokenizer has no end-of-sequence token; set tokenizer.eos_token")
    return str(tokenizer.eos_token)


def remember_legacy(tokenizer: Any) -> None:
    """Make `save_pretrained` write the tokenizer's `legacy` flag, which transformers 5 forgets for Llama's.

    Without it a tokenizer with legacy=True comes back with legacy=False and splits the text behind `</s>` differently.
    """
    if "legacy" in vars(tokenizer):
        tokenizer.init_kwargs["legacy"] = tokenizer.legacy


def glue_after(special: str, tokenizer: Any) -> str:
    """Return what must stand between the special token and a text so that the text is tokenized as if it stood alone.

    A blank for SentencePiece with legacy=False (which puts its own blank in front of the first text only), nothing for
    all others. A text that starts with a blank needs none. Raises `UserError` where the special token eats blanks.
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
        f"{special} changes the text around it in this tokenizer\n"
        f'add it as AddedToken("{special}", special=True, normalized=False, lstrip=False, rstrip=False)'
    )


def load_tokenizer(name_or_path: str) -> Any:
    """Return the tokenizer of a folder or a hub name; raises `UserError` if there is none."""
    if not Path(name_or_path).is_dir() and (name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1):
        raise UserError(
            f"no such folder: {name_or_path}\nname a folder with tokenizer.json in it, or a model of the hub"
        )
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"no tokenizer at {name_or_path}\n{reason}\nname a folder with tokenizer.json in it") from None
