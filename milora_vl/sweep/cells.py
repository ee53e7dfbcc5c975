"""The cells of a sweep: one training each, as a recipe of its own that `python -m milora_vl.train` runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from milora_data.command import suggest
from milora_data.errors import UserError
from milora_vl.recipe.hf_arguments import overridden
from milora_vl.recipe.policy_edits import ADAPTERS, PolicyEdits, edited, is_adapter
from milora_vl.recipe.schema import EvalConfig, Recipe, SweepConfig

# Names for --methods beside those of milora_vl.train: fields of the adapter rules, and of `train:`.
VARIANTS: dict[str, dict[str, Any]] = {
    **{name: {"method": name} for name in (*ADAPTERS, "full")},
    "minor-flat": {"method": "milora", "sigma": "none"},  # the minor directions without their singular values
    "lora-decay": {"method": "lora", "train": {"weight_decay": 0.1}},
}
_EDITS = ("method", "rank", "alpha", "dropout")


@dataclass(frozen=True, slots=True)
class Cell:
    """One training. `rank` is None where the method has none, or the recipe's own is kept."""

    method: str
    learning_rate: float
    rank: int | None
    seed: int

    @property
    def name(self) -> str:
        """The name of its folder."""
        rank = "" if self.rank is None else f"-r{self.rank}"
        return f"{self.method}{rank}-lr{self.learning_rate:g}-seed{self.seed}"

    @property
    def arm(self) -> tuple[str, int | None]:
        """What is compared: the method at one rank."""
        return self.method, self.rank


def make_cells(
    recipe: Recipe, methods: Sequence[str], rates: Sequence[float], ranks: Sequence[int] | None, seeds: int
) -> list[Cell]:
    """Return every cell, seed by seed, so that an early look sees all methods. UserError for unknown methods."""
    known = variants(recipe)
    for name in methods:
        if name not in known:
            near = suggest(name, known)
            hint = f"did you mean {near[0]} ?" if near else f"known: {', '.join(known)}"
            raise UserError(f"--methods {name}: no such method\n{hint}\n(a recipe may name its own: sweep.variants)")
    first = int(recipe.train.get("seed", 42))
    cells = []
    for seed, rate, method in product(range(first, first + seeds), rates, methods):
        has_rank = known[method].get("method") != "full" and "rank" not in known[method]
        chosen: Sequence[int | None] = ranks if ranks and has_rank else [None]
        cells += [Cell(method, rate, rank, seed) for rank in chosen]
    if len({cell.name for cell in cells}) < len(cells):
        raise UserError("--lrs: rates that agree in six digits would be one cell")
    return cells


def variants(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Every name for --methods with its fields; a recipe's own win. UserError for one without a known method."""
    found = {**VARIANTS, **recipe.sweep.variants}
    for name, fields in found.items():
        if "/" in name or name.startswith("."):
            raise UserError(
                f"sweep.variants.{name}: its cells are folders of this name, which cannot hold a / or begin with ."
            )
        if "policy" not in fields and fields.get("method") not in (*ADAPTERS, "full"):
            raise UserError(
                f"sweep.variants.{name}: method {fields.get('method')!r}, expected {', '.join((*ADAPTERS, 'full'))}"
            )
    return found


def recipe_of(recipe: Recipe, cell: Cell) -> Recipe:
    """Return the recipe of one cell. UserError with everything that is wrong in it."""
    fields = dict(variants(recipe)[cell.method])
    train = dict(recipe.train)
    for over in (recipe.sweep.train, fields.pop("train", {}), {"seed": cell.seed}):
        train = {**overridden(train, over), **over}
    if cell.rank is not None:
        fields["rank"] = cell.rank
    rules = arm_rules(recipe.policy, fields, learning_rate=cell.learning_rate, seed=cell.seed)
    content: Mapping[str, Any] = recipe.model_dump() | {
        "policy": rules, "train": train, "eval": EvalConfig().model_dump(), "sweep": SweepConfig().model_dump()
    }  # fmt: skip
    return Recipe.parse(content, f"{cell.name} of the sweep")


def arm_rules(
    policy: Sequence[dict[str, Any]] | None, fields: Mapping[str, Any], *, learning_rate: float, seed: int
) -> list[dict[str, Any]]:
    """Return the rules of one arm: `fields` replace those of the adapter rules, its `policy` all rules before that.

    Every seed draws random components of its own, or the interval over seeds would not tell how much a draw matters.
    UserError for fields that no rule takes.
    """
    given: dict[str, Any] = {name: fields[name] for name in _EDITS if not isinstance(fields.get(name), Mapping | None)}
    rules = edited(fields.get("policy", policy), PolicyEdits(learning_rate=learning_rate, **given))
    others = {name: value for name, value in fields.items() if name not in given and name != "policy"}
    adapters = [rule for rule in rules if is_adapter(rule)]
    if others and not adapters:
        raise UserError(
            f"{', '.join(others)}: no use here, no rule makes an adapter (give the arm a policy of its own)"
        )
    for rule in adapters:
        rule.update(others)
        if rule.get("method") == "random":
            rule.setdefault("seed", seed)
    return rules
