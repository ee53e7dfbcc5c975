"""The schema of a study's YAML file: one task, several arms, learning rates and seeds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError

from milora_vl.common.cli.command_line import suggest
from milora_vl.common.errors import Problem, UserError
from milora_vl.common.strict_models import Strict, problems_of
from milora_vl.common.yaml_text import read_mapping
from milora_vl.core.calibration import VERSION as CALIBRATION_VERSION
from milora_vl.core.policy import Policy
from milora_vl.core.policy.policy import SpectralRank
from milora_vl.sweep.cells import Cell, arm_rules

FOLDER = Path(__file__).parent  # its YAML files are the studies
VERSION = 2  # increase it if the results of an unchanged cell may change
# The keys of an arm that are not fields of its adapter rules.
_OF_ARM = ("train", "learning_rates", "seeds", "ranks", "rival", "scale", "osf", "pictures", "rows", "chain")


class Study(Strict):
    """One file of studies. An arm sets fields of the adapter rules, or has its own `policy`.

    The `train` of an arm replaces `steps`, `weight_decay` and so on for this arm, and its `learning_rates` replace the
    rates of the study. An arm may have fewer `seeds`, `ranks` from singular values, a `rival`, another number of
    calibration `pictures`, other `rows` of a fixed A, and a `scale`, by which the finished adapter is multiplied; with
    `osf: true`, PEFT's OSF adapts the layers of its rules.
    With `then`, a cell is a chain: it trains these tasks after `task`, as the `chain` of its arm says.
    `also` names arms whose cells are read from the CSV of another study with the same task and settings. `figure` is
    the plot of score over forgetting. `search_seeds` is the number of seeds for the search over learning rates; only
    the best rate by validation loss runs all seeds.
    """

    question: str
    task: str
    then: list[str] = Field(default_factory=list)
    steps: PositiveInt
    batch_size: PositiveInt
    warmup: float = Field(0.1, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    policy: list[dict[str, Any]]
    arms: dict[str, dict[str, Any]]
    also: dict[str, list[str]] = Field(default_factory=dict)
    figure: ScoreFigure | None = None
    learning_rates: list[PositiveFloat]
    seeds: PositiveInt = 3
    search_seeds: PositiveInt | None = None  # None: all seeds
    reference: str  # read the curves of all arms at the losses of this one (`milora_vl/sweep/curves.py`)
    overlap: PositiveInt | None = None  # measure the share of the update in this number of first singular directions

    def rules(self, arm: str, learning_rate: float, seed: int = 0) -> list[dict[str, Any]]:
        """Return the policy of an arm at a learning rate; `seed` is for randomly drawn components."""
        fields = {name: value for name, value in self.arms[arm].items() if name not in _OF_ARM}
        return arm_rules(self.policy, fields, learning_rate=learning_rate, seed=seed)

    def training(self, arm: str) -> Training:
        """Return the training settings of an arm."""
        defaults = {name: getattr(self, name) for name in Training.model_fields}
        return Training.model_validate(defaults | self.arms[arm].get("train", {}))

    def ranks(self, arm: str) -> SpectralRank | None:
        """Return how the ranks of an arm follow from the singular values; None if its rules have them."""
        return SpectralRank(**self.arms[arm]["ranks"]) if "ranks" in self.arms[arm] else None

    def rival(self, arm: str) -> Rival | None:
        """Return the term that the arm adds to its loss, if any."""
        return Rival.model_validate(self.arms[arm]["rival"]) if "rival" in self.arms[arm] else None

    def rows(self, arm: str) -> Rows | None:
        """Return what decides the rows of the arm's fixed A in place of its method, if anything."""
        return Rows.model_validate(self.arms[arm]["rows"]) if "rows" in self.arms[arm] else None

    def chain(self, arm: str) -> Chain:
        """Return how the arm trains one task after the other."""
        return Chain.model_validate(self.arms[arm].get("chain", {}))

    def rates(self, arm: str) -> list[float]:
        """Return the learning rates of an arm."""
        rates: list[float] = self.arms[arm].get("learning_rates", self.learning_rates)
        return rates

    def cells(self, seeds: range) -> list[Cell]:
        """Return the cells of all arms and learning rates for some seeds, seed by seed."""
        return [
            Cell(arm, rate, None, seed)
            for seed in seeds
            for arm in self.arms
            if seed < self.arms[arm].get("seeds", self.seeds)
            for rate in self.rates(arm)
        ]

    def key(self, cell: Cell, *, of_training: bool = False) -> str:
        """Return a hash of everything that determines the numbers of a cell; studies with equal cells share them.

        `of_training`: without the scale of the finished adapter.
        """
        training = self.training(cell.method).model_dump()
        rules = self.rules(cell.method, cell.learning_rate, cell.seed)
        content: list[Any] = [VERSION, self.task, self.overlap, training, rules, cell.seed]
        parts = (self.ranks(cell.method), self.rival(cell.method), self.rows(cell.method))
        content += [part.model_dump() for part in parts if part is not None]
        if any(rule.get("protect") for rule in rules):
            content.append(CALIBRATION_VERSION)
        arm = self.arms[cell.method]
        content += ["osf"] if arm.get("osf") else []
        content += [{"pictures": arm["pictures"]}] if "pictures" in arm else []
        content += [self.then, self.chain(cell.method).model_dump()] if self.then else []
        content += [arm["scale"]] if "scale" in arm and not of_training else []
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:20]


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

    - `start`: `new`: a new adapter on the base and all earlier updates. `further`: one adapter for all tasks. `apart`:
      one adapter for each task, all on the base; their updates are added. `joint`: one training on the records of all
      tasks, with the steps of all.
    - `earlier`: the number of records of each earlier task in the calibration.
    - `is_sum`: these records and the texts of the base are one source of the calibration, not one each.
    - `replay`: the share of the records of each earlier task that the training data contains.
    """

    start: Literal["new", "further", "apart", "joint"] = "new"
    earlier: NonNegativeInt = 0
    is_sum: bool = False
    replay: float = Field(0.0, ge=0, le=1)


class Rival(Strict):
    """The key `rival` of an arm, for tasks of language models.

    - `kind`: `rest`: KL from the base to the model on the answer tokens, over all tokens but the right one
      (arXiv:2605.29498). `own`: KL from the base on the calibration, whose sources take turns. `mix`: these
      texts as further records.
    - `weight`: the factor of the term; the loss of the answers has factor 1. All are means over tokens.
    - `texts`: the number of texts in each step, for `own` and `mix`.
    - `every`: one step in so many has the term, so many times the weight.
    """

    kind: Literal["rest", "own", "mix"]
    weight: PositiveFloat
    texts: PositiveInt = 2
    every: PositiveInt = 1


class Rows(Strict):
    """The key `rows` of an arm: its fixed A has the first rows of the gradient, or of W, off some directions.

    `off_weight` is the part of W's first right singular vectors that the rows keep off, beside the protected inputs of
    the rules: a number is their share of the squared singular values, `half` half of all directions.
    """

    of: Literal["gradient", "weight"]
    off_weight: Literal["half"] | PositiveFloat | None = None


def chosen(name: str) -> list[str]:
    """Return the studies with this name: `components.minilm`, or all tasks of `components`.

    Raises UserError for an unknown name.
    """
    names = study_names()
    matches = [study for study in names if name in (study, study.partition(".")[0])]
    if not matches:
        near = suggest(name, [*names, *dict.fromkeys(study.partition(".")[0] for study in names)])
        raise UserError(
            f"unknown study {name!r}",
            code="study-unknown",
            hint=f"did you mean {near[0]}?" if near else f"known studies: {', '.join(names)}",
        )
    return matches


def study_names() -> list[str]:
    """Return the names of the studies, sorted."""
    return sorted(file.name.removesuffix(".yaml") for file in FOLDER.glob("*.yaml"))


def read_study(name: str) -> Study:
    """Read a study by name. Raises UserError with all problems in its file."""
    source = f"study {name}"
    content = read_mapping((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"), source)
    return parse_study(content, source)


def parse_study(content: Mapping[str, Any], source: str) -> Study:
    """Return a study from nested mappings. Raises UserError with all problems in it."""
    try:
        study = Study.model_validate(content)
    except ValidationError as error:
        raise UserError(problems=_placed(problems_of(error, Study, "study"), source), source=source) from None
    problems: list[Problem] = []
    named = [*study.arms, *(arm for arms in study.also.values() for arm in arms)]
    if study.reference not in named:
        problems.append(
            Problem(
                f"no arm has the name {study.reference!r}",
                "study-reference",
                where=f"{source}: reference",
                hint=f"arms: {', '.join(named)}",
            )
        )
    for arm in study.arms:
        try:
            study.training(arm), study.ranks(arm), study.rival(arm), study.rows(arm), study.chain(arm)
            Policy.parse(study.rules(arm, study.rates(arm)[0]))
        except (ValidationError, UserError) as error:
            of_arm = error.problems if isinstance(error, UserError) else problems_of(error, Training, "study")
            problems += _placed(of_arm, f"{source}: arm {arm}")
    if problems:
        raise UserError(problems=problems, source=source)
    return study


def _placed(problems: Sequence[Problem], place: str) -> list[Problem]:
    wheres = (": ".join(filter(None, (place, str(problem.where).removeprefix(".")))) for problem in problems)
    return [replace(problem, where=where) for problem, where in zip(problems, wheres, strict=True)]
