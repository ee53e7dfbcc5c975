"""The cells of a sweep, one training each: their recipes, names, seeds and rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from milora_vl.common.errors import UserError, suggest
from milora_vl.core.policy.rules import METHODS, label_of
from milora_vl.train.join_settings import edited, is_adapter
from milora_vl.train.settings import ADAPTERS, RENAMED, EvalConfig, PolicyEdits, Recipe, SweepConfig, value_of

# Names for --methods, with fields of the adapter rules and of `train:`.
VARIANTS: dict[str, dict[str, Any]] = {
    **{name: {"method": name} for name in (*ADAPTERS, "full")},
    "milora-paper": {"method": "milora", "protect": 0.0},
}
NAMES = {
    name: label_of(fields["method"], fields.get("protect", METHODS[fields["method"]].protect))
    for name, fields in VARIANTS.items()
}
CellNumbers = Mapping[str, Any]
"""What a finished cell has measured, and which cell it is: the columns of cells.csv."""
PICTURES = "forgetting_pictures"  # the column with a cell's forgetting about pictures
_EDITS = ("method", "protect", "rank", "alpha", "dropout")


@dataclass(frozen=True, slots=True)
class Cell:
    method: str
    learning_rate: float
    rank: int | None
    seed: int

    @property
    def name(self) -> str:
        rank = "" if self.rank is None else f"-r{self.rank}"
        return f"{self.method}{rank}-lr{self.learning_rate!r}-seed{self.seed}"

    @property
    def label(self) -> str:
        return self.method if self.rank is None else f"{self.method} r={self.rank}"

    @property
    def arm(self) -> tuple[str, int | None]:
        return self.method, self.rank


def make_cells(
    recipe: Recipe, methods: Sequence[str], rates: Sequence[float], ranks: Sequence[int] | None, seeds: int
) -> list[Cell]:
    """Return all cells, seed by seed, so that the first results cover all methods.

    Raises UserError for unknown methods.
    """
    known = variants(recipe)
    for name in methods:
        if name not in known:
            near = suggest(name, known)
            guess = f"did you mean {near[0]}?" if near else f"known methods: {', '.join(known)}"
            hint = f"{guess}\n(a recipe can define more in sweep.variants)"
            raise UserError(f"unknown method {name!r}", where="--methods", hint=hint)
    first = int(value_of(recipe.train, "seed"))
    cells = []
    for seed, rate, method in product(range(first, first + seeds), rates, methods):
        has_rank = known[method].get("method") != "full" and "rank" not in known[method]
        chosen: Sequence[int | None] = ranks if ranks and has_rank else [None]
        cells += [Cell(method, rate, rank, seed) for rank in chosen]
    return cells


def variants(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Return every name for --methods with its fields; the recipe's variants override the built-in ones.

    Raises UserError for a variant with an invalid name or without a known method.
    """
    known = {**VARIANTS, **recipe.sweep.variants}
    for name, fields in known.items():
        if "/" in name or name.startswith("."):
            message = "its cells are folders of this name, which cannot hold a / or begin with ."
            raise UserError(message, where=f"sweep.variants.{name}", hint="use letters, digits, - and _")
        if "policy" not in fields and fields.get("method") not in (*ADAPTERS, "full"):
            message = f"unknown method {fields.get('method')!r}; expected one of: {', '.join((*ADAPTERS, 'full'))}"
            raise UserError(message, where=f"sweep.variants.{name}")
    return known


def recipe_of(recipe: Recipe, cell: Cell) -> Recipe:
    fields = dict(variants(recipe)[cell.method])
    train = dict(recipe.train)
    for over in (recipe.sweep.train, fields.pop("train", {}), {"seed": cell.seed}):
        train = {name: value for name, value in train.items() if name not in {RENAMED.get(key) for key in over}} | over
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
    """Return the rules of one arm. Its `policy` replaces all rules, then `fields` replace fields of the adapter rules.

    Each seed draws different random components, so that the interval over seeds includes the effect of the draw.
    Raises UserError for fields that apply to no rule.
    """
    edits: dict[str, Any] = {name: fields[name] for name in _EDITS if not isinstance(fields.get(name), Mapping | None)}
    rules = list[dict[str, Any]](
        edited(fields.get("policy", policy), PolicyEdits(learning_rate=learning_rate, **edits))
    )
    others = {name: value for name, value in fields.items() if name not in edits and name != "policy"}
    adapters = [rule for rule in rules if is_adapter(rule)]
    if others and not adapters:
        message = "no effect: no rule makes an adapter"
        raise UserError(message, where=", ".join(others), hint="give the arm its own policy")
    for rule in adapters:
        rule.update(others)
        if "method" in rule and "seed" in METHODS[rule["method"]].fields:
            rule.setdefault("seed", seed)
    return rules
