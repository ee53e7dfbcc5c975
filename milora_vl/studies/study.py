"""A study as its YAML file says it: one task, several arms, learning rates and seeds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from pydantic import Field, PositiveFloat, PositiveInt, ValidationError
from torch import nn

import llava_recipes
from milora_data.command import suggest
from milora_data.errors import UserError
from milora_vl.policy import Policy, PolicyError
from milora_vl.recipe import yaml_file
from milora_vl.recipe.schema import Strict
from milora_vl.sweep.cells import Cell, arm_rules

VERSION = 1  # raise it when the same cell may come out otherwise
# What an arm says beside fields of its adapter rules.
_OF_ARM = ("train", "learning_rates")


class Study(Strict):
    """One file of llava_recipes/studies. An arm names fields of the adapter rules, or a `policy` of its own.

    Its `train` replaces `steps`, `weight_decay` and so on for that arm, its `learning_rates` those of the study.
    `each` is a rule whose every module is an arm of its own, by its path. `search_seeds`: with how many seeds every
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
    each: dict[str, Any] | None = None
    learning_rates: list[PositiveFloat]
    seeds: PositiveInt = 3
    search_seeds: PositiveInt | None = None  # None: all of them
    overlap: PositiveInt | None = None  # measure the share of the update in the first so many singular directions

    def rules(self, arm: str, learning_rate: float, seed: int = 0) -> list[dict[str, Any]]:
        """The policy of an arm at a learning rate; the seed is for components that are drawn at random."""
        fields = {name: value for name, value in self.arms[arm].items() if name not in _OF_ARM}
        return arm_rules(self.policy, fields, learning_rate=learning_rate, seed=seed)

    def training(self, arm: str) -> Training:
        """How an arm trains."""
        own = {name: getattr(self, name) for name in Training.model_fields}
        return Training.model_validate(own | self.arms[arm].get("train", {}))

    def rates(self, arm: str) -> list[float]:
        """The learning rates that are tried for an arm."""
        found: list[float] = self.arms[arm].get("learning_rates", self.learning_rates)
        return found

    def cells(self, seeds: range) -> list[Cell]:
        """The cells of all arms and learning rates for some seeds, seed by seed."""
        return [Cell(arm, rate, None, seed) for seed in seeds for arm in self.arms for rate in self.rates(arm)]

    def key(self, cell: Cell) -> str:
        """What a cell's numbers depend on, as a hash: studies that share a cell train it once."""
        training = self.training(cell.method).model_dump()
        rules = self.rules(cell.method, cell.learning_rate, cell.seed)
        content = [VERSION, self.task, self.overlap, training, rules, cell.seed]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:20]

    def with_each(self, model: nn.Module) -> Study:
        """Return the study with an arm for every module that `each` names; PolicyError where it names none."""
        if self.each is None:
            return self
        targets = Policy.parse_and_resolve([self.each], model)
        arms = {target.path: {"policy": [*self.policy, self.each | {"modules": target.path}]} for target in targets}
        return self.model_copy(update={"arms": self.arms | arms, "each": None})


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
    """Read a study by name. UserError with everything that is wrong in it."""
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
    for arm in study.arms:
        try:
            Policy.parse(study.rules(arm, study.rates(arm)[0]))
        except (PolicyError, UserError) as error:
            raise UserError(f"{source}: arm {arm}: {error}") from None
    return study
