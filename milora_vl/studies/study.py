"""A study as its YAML file says it: one task, several arms, learning rates and seeds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field, PositiveFloat, PositiveInt, ValidationError

import llava_recipes
from milora_data.command import suggest
from milora_data.errors import UserError
from milora_vl.config import Strict
from milora_vl.sweep.cells import Cell, arm_rules
from milora_vl.training import yaml_file


class Study(Strict):
    """One file of llava_recipes/studies. An arm names fields of the adapter rules, or a `policy` of its own.

    Its `train` replaces `steps`, `weight_decay` and so on for that arm. `search_seeds`: with how many seeds every
    learning rate is tried; the best one by validation loss then gets the others.
    """

    question: str
    task: str
    steps: PositiveInt
    batch_size: PositiveInt
    warmup: float = Field(0.1, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    policy: list[dict[str, Any]]
    arms: dict[str, dict[str, Any]]
    learning_rates: list[PositiveFloat]
    seeds: PositiveInt = 3
    search_seeds: PositiveInt | None = None  # None: all of them
    overlap: PositiveInt | None = None  # measure the share of the update in the first so many singular directions

    def rules(self, arm: str, learning_rate: float) -> list[dict[str, Any]]:
        """The policy of an arm at a learning rate."""
        fields = {name: value for name, value in self.arms[arm].items() if name != "train"}
        return arm_rules(self.policy, fields, learning_rate=learning_rate)

    def training(self, arm: str) -> Training:
        """How an arm trains."""
        own = {name: getattr(self, name) for name in Training.model_fields}
        return Training.model_validate(own | self.arms[arm].get("train", {}))

    def cells(self, seeds: range) -> list[Cell]:
        """The cells of all arms and learning rates for some seeds, seed by seed."""
        return [Cell(arm, rate, None, seed) for seed in seeds for rate in self.learning_rates for arm in self.arms]


class Training(Strict):
    """The part of a study that an arm may change."""

    steps: PositiveInt
    batch_size: PositiveInt
    warmup: float
    weight_decay: float


def chosen(name: str) -> list[str]:
    """The studies that a name means: `components.minilm`, or all tasks of `components`. UserError where none is."""
    names = llava_recipes.names("study")
    found = [study for study in names if name in (study, study.partition(".")[0])]
    if not found:
        near = suggest(name, [*names, *dict.fromkeys(study.partition(".")[0] for study in names)])
        hint = f"did you mean {near[0]} ?" if near else f"studies: {', '.join(names)}"
        raise UserError(f"no study {name!r}\n{hint}")
    return found


def read_study(name: str) -> Study:
    """Read a study by name, or from a file. UserError with everything that is wrong in it."""
    source = f"study {name}"
    content, _ = yaml_file.read(llava_recipes.read(name, "study"), source)
    return parse_study(content, source)


def parse_study(content: Mapping[str, Any], source: str) -> Study:
    """A study from nested mappings. UserError with everything that is wrong in it."""
    try:
        study = Study.model_validate(content)
        for arm in study.arms:
            study.training(arm)
    except ValidationError as error:
        wrong = [f"  {'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()]
        raise UserError("\n".join([f"{source}:", *wrong])) from None
    return study
