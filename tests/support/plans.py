"""A command line of the training up to its plan: no data, no weights."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import NamedTuple

from milora_vl.core.policy import Target
from milora_vl.models.base import Base
from milora_vl.train.plan.fit import fit
from milora_vl.train.plan.launch import read_launch
from milora_vl.train.plan.plan import Plan, make_plan
from milora_vl.train.plan.train_section import TrainSection, derive
from milora_vl.train.recipe.flags import parse
from milora_vl.train.recipe.merge import Settings, merge
from milora_vl.train.recipe.schema import Recipe, RecipeError


class Fitted(NamedTuple):
    """What the recipe of a command line is on its base model."""

    recipe: Recipe
    base: Base
    targets: Sequence[Target]
    warnings: Sequence[str]


def fitted(words: str | Sequence[str]) -> Fitted:
    """Return the recipe of a command line on its base model. Problems are at the flags or lines that set them."""
    found = _merged(words)
    with found.places():
        return Fitted(*fit(found))


def settings(words: str | Sequence[str]) -> Settings:
    """Return what recipe and flags say, without a look at the model. Their problems are an error."""
    found = _merged(words)
    if found.problems:
        raise RecipeError(problems=found.problems, source=found.source)
    return found


def _merged(words: str | Sequence[str]) -> Settings:
    return merge(parse(shlex.split(words) if isinstance(words, str) else words))


def section(words: str | Sequence[str]) -> TrainSection:
    """Return the arguments of the training of a command line."""
    found = fitted(words)
    return derive(found.recipe, found.base, found.targets, read_launch(found.recipe.train))


def plan(words: str | Sequence[str]) -> Plan:
    """Return the plan of a command line for one process."""
    found = _merged(words)
    with found.places():
        return make_plan(found, processes=1)
