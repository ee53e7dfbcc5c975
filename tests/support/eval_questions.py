"""A few questions in the format of `python -m milora_data emoji`, for the tests of the evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

COLOURS = {"red": (220, 20, 20), "green": (20, 180, 20), "blue": (20, 20, 220), "white": (240, 240, 240)}


def record(
    kind: str, name: str, question: str, answers: list[str], *, image: str | None, before: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Return one record; `before` holds earlier questions and answers, alternating."""
    texts = [*before, question, answers[0]]
    if image is not None:
        texts[0] = f"<image>\n{texts[0]}"
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    made: dict[str, Any] = {"id": f"{kind}-{name}", "type": kind, "answers": answers, "conversations": turns}
    if image is not None:
        made["image"] = image
    return made


def write_questions(folder: Path) -> Path:
    """Write test.json: 20 questions about 4 pictures and 2 without."""
    (folder / "images").mkdir(parents=True)
    records = []
    for index, (name, rgb) in enumerate(COLOURS.items()):
        image = f"{name}.png"
        Image.new("RGB", (30 + index, 40), rgb).save(folder / "images" / image)
        options = [*COLOURS][index:] + [*COLOURS][:index]
        listed = ", ".join(options[:-1]) + f" or {options[-1]}"
        lines = "".join(f"\n{letter}. {option}" for letter, option in zip("ABCD", options, strict=True))
        yes = "Yes" if name != "blue" else "No"
        records += [
            record("colour", name, "What color is it?", [name], image=image),
            record("yes_no", name, "Is it mostly bright?", [yes], image=image),
            record("choice", name, f"Which of these is it: {listed}?\nShort.", [name, f"a {name}"], image=image),
            record("choice_letter", name, f"Which is it?{lines}\nLetter.", ["A"], image=image),
            record("multi_turn", name, "And its color?", [name], image=image, before=("What kind?", "square")),
        ]
    records += [record("text_only", name, f"Is {name} a color?", ["Yes"], image=None) for name in ("red", "square")]
    (folder / "test.json").write_text(json.dumps(records))
    return folder
