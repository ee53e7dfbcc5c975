"""A command line of the training up to its plan: no data, no weights."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import NamedTuple

from milora_vl.core.policy import Target
from milora_vl.models.base import Base
from milora_vl.train.__main__ import parse
from milora_vl.train.join_settings import Settings, join_settings
from milora_vl.train.launch import Launch, launch_of
from milora_vl.train.plan import Run, fit, make_run
from milora_vl.train.settings import Recipe


class Fitted(NamedTuple):
    """What the recipe of a command line is on its base model."""

    recipe: Recipe
    base: Base
    targets: Sequence[Target]
    warnings: Sequence[str]


def fitted(words: str | Sequence[str]) -> Fitted:
    """Return the recipe of a command line on its base model. Problems are at the flags or keys that set them."""
    found = settings(words)
    with found.places():
        return Fitted(*fit(found))


def settings(words: str | Sequence[str]) -> Settings:
    """Return what recipe and flags say, without a look at the model."""
    return join_settings(parse(shlex.split(words) if isinstance(words, str) else words))


def section(words: str | Sequence[str]) -> Launch:
    """Return the arguments of the training of a command line."""
    found = fitted(words)
    return launch_of(found.recipe, found.base, found.targets, settings(words).request)


def plan(words: str | Sequence[str]) -> Run:
    """Return the plan of a command line for one process."""
    found = settings(words)
    with found.places():
        return make_run(found, is_started=False)
