"""What the encoder needs of a tokenizer: BOS, EOS, blanks, a cache of the tokens of words; loads tokenizers.

`Words` tokenizes SentencePiece text word by word: the same tokens as the tokenizer's, in a third of the time. In a
vocabulary like Llama's, no token contains a blank after its first character. A word is therefore tokenized
independently of its neighbours, and words repeat. The cache is not used if the vocabulary has other tokens, if a test
text gives other tokens, or if a text is cut at a position that is not before a blank.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from milora_vl.common.errors import UserError

IGNORE = -100
_WORD = re.compile(r" *[^ ]+| +")
_BLANK = "\u2581"
_TRIALS = ("a  b c. ", " word\n word\n\n", "\u4e2d\u6587 \u00e9\u0301 x", "<x> </x> a,b 12 345  \t 6")
_LETTER = "a"  # stands before a word inside a text
_MOST_WORDS = 300_000  # size of the cache, about 50 MB


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


class _Inside(dict[str, list[int]]):
    """The tokens of words that follow another word; a word that is new is tokenized."""

    def __init__(self, after: Callable[[str, str], list[int]]) -> None:
        self.after = after

    def __missing__(self, word: str) -> list[int]:
        if len(self) >= _MOST_WORDS:
            self.clear()
        ids = self[word] = self.after(_LETTER, word)
        return ids


class Words:
    """A cache of the tokens of words for one tokenizer."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend
        added = list(backend.get_added_tokens_decoder().values())
        marks = sorted((token.content for token in added), key=len, reverse=True)
        self._marks = re.compile(f"({'|'.join(map(re.escape, marks))})" if marks else "($^)")
        self._mark_ids = {mark: [backend.token_to_id(mark)] for mark in marks}
        self._first = lru_cache(_MOST_WORDS)(self._after)
        self._inside = _Inside(self._after)
        plain = not any(token.lstrip or token.rstrip or token.single_word or token.normalized for token in added)
        self.usable = plain and not any(_BLANK in piece.lstrip(_BLANK) for piece in backend.get_vocab(False))
        self.usable = self.usable and all(self._is_right(text) for text in _TRIALS)

    def encode(self, text: str, spans: Sequence[tuple[int, int]]) -> tuple[list[int], list[int]] | None:
        """Return ids and labels of `text`, whose supervised characters are `spans`; None if words do not suffice."""
        if _BLANK in text:  # SentencePiece would treat it as a blank
            return None
        ids: list[int] = []
        labels: list[int] = []
        before, last, num_marks = "", "", 0  # `before`: the added token before a stretch of words, "" at the start
        stretch_continues = False
        for start, end, supervised in _ranges(len(text), spans):
            for number, part in enumerate(self._marks.split(text[start:end])):
                if not part:
                    continue
                if number % 2:
                    tokens = self._mark_ids[part]
                    before, stretch_continues = part, False
                    num_marks += 1
                else:
                    if stretch_continues and (part[0] != " " or last == " "):
                        return None  # the cut is inside a word
                    tokens = self._stretch(part, None if stretch_continues else before)
                    last, stretch_continues = part[-1], True
                ids += tokens
                labels += tokens if supervised else [IGNORE] * len(tokens)
        # A mark that spans a cut was not seen above.
        return (ids, labels) if num_marks == len(self._marks.findall(text)) else None

    def _stretch(self, stretch: str, before: str | None) -> list[int]:
        words = _WORD.findall(stretch)
        ids = [] if before is None else list(self._first(before, words.pop(0)))
        for word in words:
            ids += self._inside[word]
        return ids

    def _after(self, before: str, word: str) -> list[int]:
        # The first word of a text, or after an added token, may get a blank from SentencePiece.
        return self._ids(before + word)[bool(before) :]

    def _ids(self, text: str) -> list[int]:
        return list(self.backend.encode(text, add_special_tokens=False).ids)

    def _is_right(self, text: str) -> bool:
        encoded = self.encode(text, [])
        return encoded is not None and encoded[0] == self._ids(text)


@lru_cache(maxsize=4)
def words_of(backend: Any, size: int) -> Words:
    """Return the cache of a tokenizer whose vocabulary has this size: new tokens need another one."""
    return Words(backend)


def _ranges(length: int, spans: Sequence[tuple[int, int]]) -> list[tuple[int, int, bool]]:
    """Return (start, end, supervised) of consecutive ranges that cover a text of `length` characters."""
    ranges, at = [], 0
    for start, end in spans:
        ranges += [(at, start, False), (start, end, True)]
        at = end
    return [*ranges, (at, length, False)]
