"""SentencePiece by words, remembered: the same pieces as the tokenizer's, in a third of the time.

A SentencePiece vocabulary of Llama's kind has no piece that goes on behind a blank within it. So what stands between
two blanks is tokenized as it would be anywhere else, and words repeat. Where a vocabulary is of another kind, or a
trial differs, or a text is cut elsewhere than in front of a blank, the tokenizer does all the work itself.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

from milora_data.tokens import IGNORE

_WORD = re.compile(r" *[^ ]+| +")
_BLANK = "\u2581"
_TRIALS = ("a  b c. ", " word\n word\n\n", "\u4e2d\u6587 \u00e9\u0301 x", "<x> </x> a,b 12 345  \t 6")
_MOST_WORDS = 300_000  # remembered: some 50 MB


class Words:
    """The pieces of words of one tokenizer."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend
        self.size = backend.get_vocab_size()
        added = list(backend.get_added_tokens_decoder().values())
        marks = sorted((token.content for token in added), key=len, reverse=True)
        self._marks = re.compile(f"({'|'.join(map(re.escape, marks))})" if marks else "($^)")
        self._mark_ids = {mark: [backend.token_to_id(mark)] for mark in marks}
        self._inside: dict[str, list[int]] = {}
        self._first: dict[tuple[str, str], list[int]] = {}
        plain = not any(token.lstrip or token.rstrip or token.single_word or token.normalized for token in added)
        self.usable = plain and not any(_BLANK in piece.lstrip(_BLANK) for piece in backend.get_vocab(False))
        self.usable = self.usable and all(self._is_right(text) for text in _TRIALS)

    def encode(self, text: str, spans: Sequence[tuple[int, int]]) -> tuple[list[int], list[int]] | None:
        """Return ids and labels of `text`, of which the characters of `spans` are learnt; None where it cannot."""
        if _BLANK in text:  # it would be taken for a blank
            return None
        ids: list[int] = []
        labels: list[int] = []
        before, last, num_marks = "", "", 0  # the mark in front of a stretch of words, "" at the start of the text
        stretch_goes_on = False
        for start, end, learnt in _ranges(len(text), spans):
            for number, part in enumerate(self._marks.split(text[start:end])):
                if not part:
                    continue
                if number % 2:
                    made = self._mark_ids[part]
                    before, stretch_goes_on = part, False
                    num_marks += 1
                else:
                    if stretch_goes_on and (part[0] != " " or last == " "):
                        return None
                    made = self._pieces(part, None if stretch_goes_on else before)
                    last, stretch_goes_on = part[-1], True
                ids += made
                labels += made if learnt else [IGNORE] * len(made)
        return (ids, labels) if num_marks == len(self._marks.findall(text)) else None

    def _pieces(self, stretch: str, before: str | None) -> list[int]:
        words = _WORD.findall(stretch)
        made: list[int] = []
        if before is not None:
            made += self._at_start(before, words.pop(0))
        inside = self._inside
        for word in words:
            found = inside.get(word)
            made += self._learn(word) if found is None else found
        return made

    def _at_start(self, before: str, word: str) -> list[int]:
        found = self._first.get((before, word))
        if found is None:
            found = self._ids(before + word)[bool(before) :]
            self._first[before, word] = found
        return found

    def _learn(self, word: str) -> list[int]:
        if len(self._inside) >= _MOST_WORDS:
            self._inside.clear()
            self._first.clear()
        found = self._inside[word] = self._ids("a" + word)[1:]
        return found

    def _ids(self, text: str) -> list[int]:
        return list(self.backend.encode(text, add_special_tokens=False).ids)

    def _is_right(self, text: str) -> bool:
        made = self.encode(text, [])
        return made is not None and made[0] == self._ids(text)


_known: WeakKeyDictionary[Any, Words] = WeakKeyDictionary()


def words_of(tokenizer: Any, backend: Any) -> Words:
    """Return the words of a tokenizer, remembered as long as it lives and gets no new tokens."""
    found = _known.get(tokenizer)
    if found is None or found.backend is not backend or found.size != backend.get_vocab_size():
        found = _known[tokenizer] = Words(backend)
    return found


def _ranges(length: int, spans: Sequence[tuple[int, int]]) -> list[tuple[int, int, bool]]:
    found, at = [], 0
    for start, end in spans:
        found += [(at, start, False), (start, end, True)]
        at = end
    return [*found, (at, length, False)]
