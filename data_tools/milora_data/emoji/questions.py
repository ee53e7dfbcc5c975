"""Questions about emoji in LLaVA's format: seven kinds about a picture, one without.

Each record is a LLaVA record with two more keys: `type`, and `answers`, the correct answers to the last question.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from milora_data.emoji.catalogue import COLOURS, KINDS, Emoji
from milora_data.encode.templates import LETTER, SHORT

IN_A_WORD, BY_LETTER = f"\n{SHORT}", f"\n{LETTER}"
NAMING = ("What is this?", "What does the picture show?", "What is the name of the thing in the picture?")
CATEGORY = ("What kind of thing is this?", "What kind of thing does the picture show?")
COLOUR = ("What is the main color?", "Which color is most of the picture?", "What color is this mostly?")
WHICH = "Which of these is in the picture"
OPTIONS = 4
TEXT_SHARE = 0.6  # fraction of the named training emoji that have a text-only record

RecordDict = dict[str, Any]
Turns = list[tuple[str, str]]


@dataclass(slots=True)
class Pool:
    """The emoji that questions may mention. Distractors come from the same split, so test names stay unseen."""

    emojis: Sequence[Emoji]
    rng: random.Random

    def other_names(self, emoji: Emoji, count: int, *, hard: int) -> list[str]:
        """Return `count` names of other things, the first `hard` of them of the same kind."""
        taken = {emoji.name, *emoji.aliases}
        others = [
            other for other in self.emojis if other.named and not taken.intersection((other.name, *other.aliases))
        ]
        same = [other.name for other in others if other.kind == emoji.kind]
        different = [other.name for other in others if other.kind != emoji.kind]
        picked = self.rng.sample(sorted(set(same)), min(hard, len(set(same))))
        return picked + self.rng.sample(sorted(set(different)), count - len(picked))


def a(name: str) -> str:
    """Return a name with its article: `a dog`, `an owl`, `grapes`."""
    if name.endswith("s") and not name.endswith(("ss", "us", "is", "as")):
        return name
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def naming(emoji: Emoji, pool: Pool) -> tuple[Turns, list[str]] | None:
    """`What is this?`: the name; the aliases are also correct."""
    if not emoji.named:
        return None
    return [(pool.rng.choice(NAMING) + IN_A_WORD, emoji.name)], [emoji.name, *emoji.aliases]


def category(emoji: Emoji, pool: Pool) -> tuple[Turns, list[str]] | None:
    """`What kind of thing is this?`: animal, food, vehicle, ...: it can be answered for new pictures too."""
    return [(pool.rng.choice(CATEGORY) + IN_A_WORD, emoji.kind)], [emoji.kind]


def colour(emoji: Emoji, pool: Pool) -> tuple[Turns, list[str]] | None:
    """`What is the main color?`, for pictures with a dominant colour."""
    if emoji.colour is None:
        return None
    answers = [emoji.colour, "gray"] if emoji.colour == "grey" else [emoji.colour]
    return [(pool.rng.choice(COLOUR) + IN_A_WORD, emoji.colour)], answers


def yes_no(emoji: Emoji, pool: Pool) -> tuple[Turns, list[str]] | None:
    """`Is this an animal?`, `Does the picture show a fox?`, `Is it mostly red?`; half of the answers are no.

    A wrong name has the same kind as the right one, so the kind alone does not reveal the answer.
    """
    rng = pool.rng
    truth = rng.random() < 0.5
    about = rng.choice(["kind", "kind"] + ["name"] * (2 * emoji.named) + ["colour"] * (emoji.colour is not None))
    if about == "kind":
        kind = emoji.kind if truth else rng.choice([kind for kind in KINDS if kind != emoji.kind])
        question = f"Does the picture show {a(kind)}?"
    elif about == "name":
        name = emoji.name if truth else pool.other_names(emoji, 1, hard=1)[0]
        question = f"Does the picture show {a(name)}?"
    else:
        word = emoji.colour if truth else rng.choice([word for word in COLOURS if word != emoji.colour])
        question = f"Is the picture mostly {word}?"
    answer = "Yes" if truth else "No"
    return [(question + IN_A_WORD, answer)], [answer]


def choice(emoji: Emoji, pool: Pool) -> tuple[Turns, list[str]] | None:
    """`Which of these is in the picture: ...?`; the answer is the text of the option."""
    options = _options(emoji, pool)
    listed = ", ".join(a(option) for option in options[:-1]) + f" or {a(options[-1])}"
    right = _label(emoji)
    return [(f"{WHICH}: {listed}?" + IN_A_WORD, right)], [right, a(right)]


def choice_letter(emoji: Emoji, pool: Pool) -> tuple[Turns, list[str]] | None:
    """The same with lettered options; the answer is the letter (LLaVA's multiple-choice prompt)."""
    options = _options(emoji, pool)
    lines = "".join(f"\n{letter}. {option}" for letter, option in zip("ABCD", options, strict=True))
    letter = "ABCD"[options.index(_label(emoji))]
    return [("What is in the picture?" + lines + BY_LETTER, letter)], [letter]


def multi_turn(emoji: Emoji, pool: Pool) -> tuple[Turns, list[str]] | None:
    """Two questions about one picture: its kind, then its colour, a choice of names, or a yes/no question."""
    follow = [yes_no] + [colour] * (emoji.colour is not None) + [choice] * emoji.named
    first, second = category(emoji, pool), pool.rng.choice(follow)(emoji, pool)
    return (first[0] + second[0], second[1]) if first and second else None


def text_only(emoji: Emoji, pool: Pool) -> tuple[Turns, list[str]] | None:
    """No picture: the kind of a named thing, or a yes/no question about it."""
    if not emoji.named:
        return None
    if pool.rng.random() < 0.5:
        return [(f"What kind of thing is {a(emoji.name)}?" + IN_A_WORD, emoji.kind)], [emoji.kind]
    truth = pool.rng.random() < 0.5
    kind = emoji.kind if truth else pool.rng.choice([kind for kind in KINDS if kind != emoji.kind])
    answer = "Yes" if truth else "No"
    return [(f"Is {a(emoji.name)} {a(kind)}?" + IN_A_WORD, answer)], [answer]


TYPES: dict[str, Callable[[Emoji, Pool], tuple[Turns, list[str]] | None]] = {
    "naming": naming,
    "category": category,
    "colour": colour,
    "yes_no": yes_no,
    "choice": choice,
    "choice_letter": choice_letter,
    "multi_turn": multi_turn,
    "text_only": text_only,
}


# Question types per training picture. Yes/no answers carry only one bit, so there are three of them; naming is repeated
# because few pictures have a name.
ASKED = ("naming", "naming", "category", "colour", "yes_no", "yes_no", "yes_no", "choice", "choice_letter")


def training_records(emojis: Sequence[Emoji], seed: int) -> list[RecordDict]:
    """Return shuffled conversations of one to four questions about each emoji, as in ASKED, and text-only records.

    Questions about one picture share a record, as in LLaVA-1.5's mixture, so that its tokens are processed once. Each
    type may come first, so the model learns it from the picture and not only from earlier answers.
    """
    rng = random.Random(seed)
    pool = Pool(emojis, rng)
    records: list[RecordDict] = []
    for emoji in emojis:
        asked = {}
        for kind in rng.sample(ASKED, len(ASKED)):
            if record := _record(kind, emoji, pool):
                asked[record["conversations"][0]["value"]] = record  # no question twice
        conversations = _conversations(list(asked.values()), rng)
        if rng.random() < TEXT_SHARE and (record := _record("text_only", emoji, pool)):
            conversations.append(record)
        records += [{**record, "id": f"{emoji.code}-{i}"} for i, record in enumerate(conversations)]
    rng.shuffle(records)
    return records


def _conversations(asked: Sequence[RecordDict], rng: random.Random) -> list[RecordDict]:
    """Join the questions about one picture, in order, into conversations of one to four questions."""
    joined, start = [], 0
    while start < len(asked):
        part = asked[start : start + rng.choice((1, 2, 3, 4))]
        turns = [turn for record in part for turn in record["conversations"]]
        turns = [turns[0], *({**turn, "value": turn["value"].removeprefix("<image>\n")} for turn in turns[1:])]
        kind = part[0]["type"] if len(part) == 1 else "multi_turn"
        joined.append({**part[-1], "type": kind, "conversations": turns})
        start += len(part)
    return joined


def held_out_records(emojis: Sequence[Emoji], per_type: int, seed: int, known: Collection[str]) -> list[RecordDict]:
    """Return `per_type` questions of each type (fewer if there are not enough pictures).

    Within a type, the answers (kinds, colours, yes and no) alternate, so that no answer dominates. Naming asks only for
    `known` names, which training uses for other pictures.
    """
    records: list[RecordDict] = []
    for kind in TYPES:
        rng = random.Random(f"{seed}:{kind}")
        pool = Pool(emojis, rng)
        asked = [record for emoji in rng.sample(list(emojis), len(emojis)) if (record := _record(kind, emoji, pool))]
        if kind == "naming":
            asked = [record for record in asked if not set(known).isdisjoint(record["answers"])]
        records += _balanced(asked)[:per_type]
    return records


def captions(emojis: Sequence[Emoji], variants: Sequence[str], seed: int) -> list[RecordDict]:
    """Return stage-1 records: one caption for each picture of each emoji, in various forms.

    `variants` are patterns for file names, such as `{code}.png`. Captions are short and contain colour and kind, so
    that most supervised tokens are colour, kind and name.
    """
    rng = random.Random(seed)
    records = []
    for emoji in emojis:
        for pattern in variants:
            image = pattern.format(code=emoji.code)
            turns = [
                {"from": "human", "value": "<image>"},
                {"from": "gpt", "value": rng.choice(_caption_forms(emoji))},
            ]
            records.append({"id": f"caption-{image}", "image": image, "conversations": turns})
    rng.shuffle(records)
    return records


def _caption_forms(emoji: Emoji) -> list[str]:
    """Return captions with colour, kind and name; usually the name comes last, as it reveals the kind."""
    name, kind, word = emoji.name, emoji.kind, emoji.colour or "colorful"
    forms = [
        f"{word} {kind}".capitalize() + ".",
        f"Kind: {kind}. Color: {word}.",
        f"{a(kind)}, mostly {word}".capitalize() + ".",
    ]
    if len(name.split()) <= 4:  # longer names describe details of faces and persons that few picture tokens can show
        forms = [
            f"{word} {kind}: {name}".capitalize() + ".",
            f"Color: {word}. Kind: {kind}. Name: {name}.",
            f"{a(kind)}, mostly {word}: {a(name)}".capitalize() + ".",
            f"Mostly {word}. It is {a(kind)}, {a(name)}.",
            f"Kind: {kind}. Color: {word}. Name: {name}.",
            f"{a(name)}, mostly {word}".capitalize() + ".",
        ]
    return forms


def _record(kind: str, emoji: Emoji, pool: Pool) -> RecordDict | None:
    question = TYPES[kind](emoji, pool)
    if question is None:
        return None
    turns, answers = question
    record: RecordDict = {"id": f"{kind}-{emoji.code}", "type": kind, "answers": answers}
    if kind != "text_only":
        record["image"] = emoji.file
        turns = [(f"<image>\n{turns[0][0]}", turns[0][1]), *turns[1:]]
    record["conversations"] = [
        {"from": role, "value": text} for turn in turns for role, text in zip(("human", "gpt"), turn, strict=True)
    ]
    return record


def _balanced(records: Sequence[RecordDict]) -> list[RecordDict]:
    """Order records so that answers alternate: the first record of each answer, then the second of each, ...

    All answers to choices count as one answer; otherwise choices would dominate a type with several question forms.
    """
    strata: dict[str, list[RecordDict]] = defaultdict(list)
    for record in records:
        is_choice = record["conversations"][-2]["value"].removeprefix("<image>\n").startswith(WHICH)
        strata[WHICH if is_choice else record["answers"][0]].append(record)
    return [record for turn in zip_longest(*strata.values()) for record in turn if record is not None]


def _label(emoji: Emoji) -> str:
    """Return the text of the option for an emoji: its name, or its kind if the picture does not show the name."""
    return emoji.name if emoji.named else emoji.kind


def _options(emoji: Emoji, pool: Pool) -> list[str]:
    if emoji.named:
        options = [emoji.name, *pool.other_names(emoji, OPTIONS - 1, hard=1)]
    else:
        options = [emoji.kind, *pool.rng.sample([kind for kind in KINDS if kind != emoji.kind], OPTIONS - 1)]
    return pool.rng.sample(options, len(options))
