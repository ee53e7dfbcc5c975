"""The schema of a study's YAML file: one task, several arms, learning rates and seeds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from milora_vl.common.errors import UserError, suggest
from milora_vl.common.strict_models import Strict
from milora_vl.core.calibration import VERSION as CALIBRATION_VERSION
from milora_vl.core.policy import Policy
from milora_vl.core.policy.rules import METHODS
from milora_vl.sweep.cells import Cell, arm_rules

FOLDER = Path(__file__).parent  # its YAML files are the studies
VERSION = 3  # increase it if the results of an unchanged cell may change
# The keys of an arm that are not fields of its adapter rules.
_OF_ARM = ("train", "learning_rates", "seeds", "rival", "chain")


class Study(Strict):
    """One file of studies. An arm sets fields of the adapter rules, or has its own `policy`.

    The `train` of an arm replaces `steps`, `weight_decay` and so on for this arm, and its `learning_rates` replace the
    rates of the study. An arm may have fewer `seeds`, and a `rival`. `losses_at` are steps at which the losses are
    measured, beside the last one.
    With `then`, a cell is a chain: it trains these tasks after `task`, as the `chain` of its arm says.
    `also` names arms whose cells are read from the CSV of another study with the same task and settings. `figure` is
    the plot of score over forgetting.
    """

    question: str
    task: str
    then: list[str] = Field(default_factory=list)
    steps: PositiveInt
    batch_size: PositiveInt
    warmup: float = Field(0.1, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    losses_at: list[PositiveInt] = Field(default_factory=list)
    policy: list[dict[str, Any]]
    arms: dict[str, dict[str, Any]]
    also: dict[str, list[str]] = Field(default_factory=dict)
    figure: ScoreFigure | None = None
    learning_rates: list[PositiveFloat]
    seeds: PositiveInt = 3
    reference: str  # read the curves of all arms at the losses of this one (`milora_vl/sweep/curves.py`)

    @model_validator(mode="after")
    def _arms_are_known(self) -> Study:
        named = [*self.arms, *(arm for arms in self.also.values() for arm in arms)]
        if self.reference not in named:
            raise ValueError(f"reference: no arm has the name {self.reference!r}; arms: {', '.join(named)}")
        for arm in self.arms:
            self.training(arm), self.rival(arm), self.chain(arm)
            Policy.parse(self.rules(arm, self.rates(arm)[0]))
        return self

    def rules(self, arm: str, learning_rate: float, seed: int = 0) -> list[dict[str, Any]]:
        """Return the policy of an arm at a learning rate; `seed` is for randomly drawn components."""
        fields = {name: value for name, value in self.arms[arm].items() if name not in _OF_ARM}
        return arm_rules(self.policy, fields, learning_rate=learning_rate, seed=seed)

    def training(self, arm: str) -> Training:
        """Return the training settings of an arm."""
        defaults = {name: getattr(self, name) for name in Training.model_fields}
        return Training.model_validate(defaults | self.arms[arm].get("train", {}))

    def rival(self, arm: str) -> Rival | None:
        """Return the term that the arm adds to its loss, if any."""
        return Rival.model_validate(self.arms[arm]["rival"]) if "rival" in self.arms[arm] else None

    def chain(self, arm: str) -> Chain:
        """Return how the arm trains one task after the other."""
        return Chain.model_validate(self.arms[arm].get("chain", {}))

    def rates(self, arm: str) -> list[float]:
        """Return the learning rates of an arm."""
        rates: list[float] = self.arms[arm].get("learning_rates", self.learning_rates)
        return rates

    def cells(self) -> list[Cell]:
        """Return the cells of all arms, learning rates and seeds: the first rate of every arm, seed by seed, first."""
        return [
            Cell(arm, self.rates(arm)[index], None, seed)
            for index in range(max(len(self.rates(arm)) for arm in self.arms))
            for seed in range(self.seeds)
            for arm in self.arms
            if seed < self.arms[arm].get("seeds", self.seeds) and index < len(self.rates(arm))
        ]

    def key(self, cell: Cell) -> str:
        """Return a hash of everything that determines the numbers of a cell; studies with equal cells share them."""
        training, rival = self.training(cell.method).model_dump(), self.rival(cell.method)
        rules = self.rules(cell.method, cell.learning_rate, cell.seed)
        content: list[Any] = [VERSION, self.task, None, training, rules, cell.seed]
        content += [self.losses_at] if self.losses_at else []
        content += [rival.model_dump()] if rival else []
        content += [CALIBRATION_VERSION] if protects(rules) else []
        content += [self.then, self.chain(cell.method).model_dump()] if self.then else []
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:20]


def protects(rules: Sequence[dict[str, Any]]) -> bool:
    """Return whether any rule protects inputs, by itself or by default of its method."""
    return any(rule.get("protect", METHODS[rule.get("method", "full")].protect) for rule in rules)


class ScoreFigure(Strict):
    """The plot of score over forgetting: its message, and the arms that it shows. The table has all arms."""

    title: str
    arms: list[str]


class Training(Strict):
    """The training settings of a study that an arm can change."""

    steps: PositiveInt
    batch_size: PositiveInt
    warmup: float
    weight_decay: float


class Chain(Strict):
    """The key `chain` of an arm: how the tasks of `then` follow the first one.

    - `start`: `new`: a new adapter on the base and all earlier updates. `further`: one adapter for all tasks. `joint`:
      one training on the records of all tasks, with the steps of all.
    - `earlier`: the number of records of each earlier task in the calibration.
    - `replay`: the share of the records of each earlier task that the training data contains.
    """

    start: Literal["new", "further", "joint"] = "new"
    earlier: NonNegativeInt = 0
    replay: float = Field(0.0, ge=0, le=1)


class Rival(Strict):
    """The key `rival` of an arm: a term of its loss, the KL from the base.

    - `kind`: `own` on the calibration, as `base_kl` has it; `off-target` on the answers of each batch, without the
      token that is right (Mask the Target, arXiv:2605.29498).
    - `weight`: the factor of the term; the loss of the answers has factor 1. Both are means over tokens.
    - `texts`: the number of texts in each step. The sources of the calibration take turns.
    - `every`: one step in so many has the term, so many times the weight.
    """

    kind: Literal["own", "off-target"]
    weight: PositiveFloat
    texts: PositiveInt = 2
    every: PositiveInt = 1


def chosen(name: str) -> list[str]:
    """Return the studies with this name: `curves.minilm`, or all tasks of `curves`.

    Raises UserError for an unknown name.
    """
    names = study_names()
    matches = [study for study in names if name in (study, study.partition(".")[0])]
    if not matches:
        near = suggest(name, [*names, *dict.fromkeys(study.partition(".")[0] for study in names)])
        raise UserError(
            f"unknown study {name!r}",
            hint=f"did you mean {near[0]}?" if near else f"known studies: {', '.join(names)}",
        )
    return matches


def study_names() -> list[str]:
    """Return the names of the studies, sorted."""
    return sorted(file.name.removesuffix(".yaml") for file in FOLDER.glob("*.yaml"))


def read_study(name: str) -> Study:
    """Read a study by name."""
    return Study.model_validate(yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8")))
