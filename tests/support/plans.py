"""A command line of the training up to its plan: no data, no weights."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from milora_vl.train.plan.fit import Fitted, fit
from milora_vl.train.plan.launch import read_launch
from milora_vl.train.plan.plan import Plan, make_plan
from milora_vl.train.plan.train_section import TrainSection, derive
from milora_vl.train.recipe.command_line import parse
from milora_vl.train.recipe.merge import merge_recipe
from milora_vl.train.recipe.places import at_their_places
from milora_vl.train.recipe.schema import Recipe, RecipeError


def fitted(words: str | Sequence[str]) -> Fitted:
    """Return the recipe of a command line on its base model. Problems are at the flags or lines that set them."""
    request = parse(shlex.split(words) if isinstance(words, str) else words)
    with at_their_places(request):
        return fit(merge_recipe(request))


@dataclass(frozen=True)
class Settings:
    """What recipe and flags say."""

    recipe: Recipe
    notes: list[str]
    warnings: list[str]


def settings(words: str | Sequence[str]) -> Settings:
    """Return what recipe and flags say, without a look at the model. Their problems are an error."""
    request = parse(shlex.split(words) if isinstance(words, str) else words)
    found = merge_recipe(request)
    if found.recipe is None or found.problems:
        with at_their_places(request):
            raise RecipeError(problems=found.problems, source=found.source)
    return Settings(found.recipe, found.notes, found.warnings)


def section(words: str | Sequence[str]) -> TrainSection:
    """Return the arguments of the training of a command line."""
    found = fitted(words)
    return derive(found, read_launch(found.recipe.train))


def plan(words: str | Sequence[str]) -> Plan:
    """Return the plan of a command line for one process."""
    request = parse(shlex.split(words) if isinstance(words, str) else words)
    with at_their_places(request):
        return make_plan(request, merge_recipe(request), processes=1)
