"""Cards: a question with its pictures and the answers to it, as every page shows it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from milora_data.pictures.load import credit_lines, fitting
from milora_vl.common.cli.page import MAX_BYTES, render, write


@dataclass(frozen=True, slots=True)
class Card:
    """The content of one card: `text` has pieces, each with a style (question, context, learnt, given, picture).

    `pictures` has a caption and a small JPEG (None: cannot be shown) for each. `answers` are (who, text, how much of it
    is right, or None). A page filters its cards by `kinds`.
    """

    title: str
    text: Sequence[tuple[str, str]]
    pictures: Sequence[tuple[str, Any]] = ()
    answers: Sequence[tuple[str, str, float | None]] = ()
    kinds: Sequence[str] = ()


def fitted(cards: Sequence[Card], budget: int) -> list[Card]:
    """Return the cards with their pictures as URIs ("" for none), which take at most `budget` characters."""
    uris = iter(fitting([jpeg for card in cards for _, jpeg in card.pictures], budget))
    return [replace(card, pictures=[(caption, next(uris)) for caption, _ in card.pictures]) for card in cards]


def write_cards(
    page: Path, cards: Sequence[Card], *, kind: str, title: str, lede: str, note: str, credited: Iterable[Path]
) -> None:
    """Write a page of cards that can be filtered and searched, with the licences that the `credited` folders name."""
    text = sum(len(str((card.text, card.answers))) + 400 for card in cards)
    content = {
        "kind": kind,
        "title": title,
        "lede": lede,
        "note": note,
        "cards": fitted(cards, max(MAX_BYTES * 9 // 10 - text, MAX_BYTES // 3)),
        "credits": credit_lines(credited),
    }
    write(page, render(Path(__file__).with_name("cards.html.j2"), content))
