"""docs/reproduce.md: the recipes have the paper's hyperparameters, and every command trains the layers it names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from milora_vl.core.policy import Policy
from milora_vl.train.settings import Recipe
from support.plans import fitted, settings

PAGE = re.sub(
    r"\\\n\s*", "", (Path(__file__).resolve().parents[2] / "docs" / "reproduce.md").read_text(encoding="utf-8")
)


def trainings() -> Iterator[tuple[int, list[str]]]:
    """Yield devices and flags of each row: of its command, or of the command above `Other rows` with more flags."""
    devices, flags = 0, ""
    command = r"(?:torchrun --nproc_per_node (\d+) -m milora_vl\.train|milora train) (.+)"
    for match in re.finditer(rf"^{command}$|^Other rows: ((?:.+\n)+)", PAGE, re.MULTILINE):
        if match[2]:
            devices, flags = int(match[1] or 1), match[2]
            yield devices, flags.split()
        else:
            yield from ((devices, f"{flags} {more}".split()) for more in re.findall(r"`([^`]+)`", match[3]))


TRAININGS = list(trainings())
# The paper's tables of hyperparameters: r, alpha (of LoRA: twice r), dropout, rate, schedule, warm-up, records a step,
# epochs, the linear layers of a block that train.
PAPER = {
    "milora-paper-llava-1.5-7b": (128, 128, 0.05, 2e-4, "cosine", 0.03, 128, 1, 7),
    "paper-commonsense": (32, 32, 0.05, 3e-4, "linear", 100, 16, 3, 5),
    "paper-math": (64, 64, 0.05, 3e-4, "linear", 100, 16, 3, 5),
    "paper-instructions": (32, 32, 0.05, 3e-4, "linear", 100, 16, 3, 5),
    "paper-pissa-setup": (128, 128, 0.0, 2e-5, "cosine", 0.03, 128, 1, 7),
}
PARTS = {"pissa": "principal", "random": "random", "lora": None, "dora": None}


def recipe(flags: list[str]) -> Recipe:
    return settings(flags).recipe


def value(flags: list[str], name: str, otherwise: str) -> str:
    return flags[flags.index(name) + 1] if name in flags else otherwise


@cache
def base(model: str, of: str) -> Any:
    """Return the meta model of a name, composed as in a recipe."""
    return fitted(["--recipe", of, "--model", model]).base.meta


def language_targets(flags: list[str]) -> list[Any]:
    chosen = recipe(flags)
    found = Policy.parse(chosen.policy or []).resolve(base(chosen.model, value(flags, "--recipe", "")))
    return [target for target in found if target.tower == "language"]


@pytest.mark.parametrize("name", PAPER)
def test_a_recipe_is_the_papers_table(name: str) -> None:
    rank, alpha, dropout, rate, schedule, warmup, records, epochs, layers = PAPER[name]
    devices, flags = next((devices, flags) for devices, flags in TRAININGS if value(flags, "--recipe", "") == name)
    train = recipe(flags).train
    language = language_targets(flags)
    assert {(t.rank, t.alpha, t.dropout, t.part, t.protect) for t in language} == {(rank, alpha, dropout, "minor", 0)}
    assert len({target.path.split(".")[-1] for target in language}) == layers
    assert train["learning_rate"] == rate
    assert (train["lr_scheduler_type"], train["warmup_steps"], train["num_train_epochs"]) == (schedule, warmup, epochs)
    per_device = train["per_device_train_batch_size"] * train.get("gradient_accumulation_steps", 1)
    assert per_device * devices == records


@pytest.mark.parametrize("flags", [flags for _, flags in TRAININGS], ids=" ".join)
def test_a_command_trains_the_part_of_its_method_with_the_papers_scale(flags: list[str]) -> None:
    method = value(flags, "--method", "milora")
    language = language_targets(flags)
    assert {target.part for target in language} == {PARTS.get(method, "minor")}
    is_doubled = method in ("lora", "dora") and value(flags, "--recipe", "") != "paper-pissa-setup"
    assert {target.alpha / target.rank for target in language} == {2.0 if is_doubled else 1.0}
