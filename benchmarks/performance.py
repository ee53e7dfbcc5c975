"""Generate docs/performance.md from benchmarks/results.json and the goals."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

import gpu
from goals import GOALS

GPU = Path(__file__).with_name("gpu.json")

KILLS = (
    ("kills", "`smol-llava`, one process"),
    ("kills_ddp", "`tiny`, DDP"),
    ("kills_zero3", "`tiny`, ZeRO-3"),
)


def page(results: dict[str, Any], sets: dict[str, Iterable[str]]) -> str:
    """Return the text of docs/performance.md. Raises SystemExit if the results come from several machines.

    `sets` holds the parts of `make bench` and of `make bench-quick`.
    """
    described = [entry["machine"] for entry in results.values()]
    if any(other != described[0] for other in described):
        raise SystemExit("the results come from different machines or versions: measure all of them again")
    dates = sorted({entry["date"] for entry in results.values()})
    loader = FileSystemLoader(Path(__file__).resolve().parent)
    environment = Environment(loader=loader, undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)
    environment.filters.update(figure=figure, time=duration)
    return environment.get_template("performance.md.j2").render(
        results=results,
        machine=described[0],
        dates=" to ".join(dict.fromkeys((dates[0], dates[-1]))),
        goals=GOALS,
        minutes={name: sum(results[part]["seconds"] for part in parts) for name, parts in sets.items()},
        kills=KILLS,
        **of_a_card(json.loads(GPU.read_text()) if GPU.is_file() else {}),
    )


def of_a_card(measured: dict[str, Any]) -> dict[str, Any]:
    """Return the rows of `make gpu` and the card's name; none of a run that tried it on a CPU."""
    found = {name: entry for name, entry in measured.items() if entry["machine"]["card"] != gpu.NO_CARD}
    return {"gpu": list(gpu.rows(found)), "card": next((entry["machine"]["card"] for entry in found.values()), "")}


def figure(value: float) -> str:
    """Return three significant digits; whole numbers from a hundred on."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """Return seconds, or minutes and seconds."""
    minutes, left = divmod(round(seconds), 60)
    return f"{minutes} min {left} s" if minutes else f"{seconds:.3g} s"
