"""Settle the rules of a policy on a model: full paths, every field decided, all faults reported together."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from milora_vl.lora.layers import is_adaptable, matrix_shape, why_refused
from milora_vl.lora.weights import read_matrix
from milora_vl.policies.rules import FIELDS_OF_METHOD, PolicyError, Rule, SpectralRank, Target
from milora_vl.policies.selectors import Selector, SelectorError
from milora_vl.towers import find_towers


@dataclass(slots=True)
class _Plan:
    """What the rules so far say about one module. `alpha_at` is the rank in force when alpha was set."""

    fields: dict[str, Any] = field(default_factory=dict)
    alpha_at: int | SpectralRank | None = None
    rules: list[int] = field(default_factory=list)

    def apply(self, number: int, named: dict[str, Any]) -> None:
        """Take over the fields of rule `number`; a new method drops what it cannot use of earlier rules."""
        usable = FIELDS_OF_METHOD.get(named.get("method", self.fields.get("method", "")), None)
        if usable is not None:
            self.fields = {k: v for k, v in self.fields.items() if k == "method" or k in usable}
        self.fields |= named
        if "alpha" in named:
            self.alpha_at = self.fields.get("rank")
        self.rules.append(number)


def resolve(rules: Sequence[Rule], model: nn.Module) -> list[Target]:
    """Return one Target per module that trains, in model order. Raises PolicyError with all faults together."""
    selector = Selector(model, find_towers(model))
    problems: list[str] = []
    plans = _collect(rules, selector, problems)
    problems += _without_method(plans, rules)
    targets = []
    for path in selector.modules:
        if path in plans and plans[path].fields.get("method") not in ("frozen", None):
            targets.append((plans[path].rules[-1], path))
    settled = _settle(targets, plans, selector, problems)
    problems += _shared_weights(model, [t.path for t in settled])
    if problems:
        raise PolicyError("\n".join(dict.fromkeys(problems)))
    _warn_of_experts(selector, settled)
    return _without_nested(settled)


def _collect(rules: Sequence[Rule], selector: Selector, problems: list[str]) -> dict[str, _Plan]:
    plans: dict[str, _Plan] = defaultdict(_Plan)
    for number, rule in enumerate(rules):
        try:
            whole = rule.method in ("full", "frozen")
            paths = selector.match(rule.modules, whole_modules=whole, planned=plans.keys())
        except SelectorError as error:
            first, *rest = str(error).splitlines()
            problems.append("\n       ".join([f"policy[{number}].modules: {first}", *rest]))
            continue
        named = rule.named_fields()
        for path in paths:
            plans[path].apply(number, named)
        methods = {plans[path].fields["method"] for path in paths if "method" in plans[path].fields}
        for method, name in product(sorted(methods), named):
            if name != "method" and name not in FIELDS_OF_METHOD[method]:
                problems.append(f"policy[{number}].{name}: method {method} cannot use it")
    return plans


def _without_method(plans: dict[str, _Plan], rules: Sequence[Rule]) -> list[str]:
    """Rules of which no module has a method in the end: their fields would be ignored."""
    useful = {number for plan in plans.values() if "method" in plan.fields for number in plan.rules}
    matched = {number for plan in plans.values() for number in plan.rules}
    return [
        f'policy[{number}]: no rule gives a method to "{rules[number].modules}"' for number in sorted(matched - useful)
    ]


def _settle(
    targets: list[tuple[int, str]], plans: dict[str, _Plan], selector: Selector, problems: list[str]
) -> list[Target]:
    """Decide rank and alpha of every target; faults are grouped per rule, as one rule may mean hundreds of modules."""
    faults: dict[str, list[str]] = defaultdict(list)
    settled = []
    for number, path in targets:
        try:
            settled.append(_target(path, plans[path], selector))
        except PolicyError as error:
            faults[f"policy[{number}]{error}"].append(path)
    for text, paths in faults.items():
        more = f" and {len(paths) - 2:,} more" if len(paths) > 2 else ""
        problems.append(f"{text}: {', '.join(paths[:2])}{more}")
    return settled


def _target(path: str, plan: _Plan, selector: Selector) -> Target:
    module, fields, tower = selector.modules[path], plan.fields, selector.towers.tower_of(path)
    if fields["method"] == "full":
        shape = matrix_shape(module) if is_adaptable(module) else tuple(next(module.parameters()).shape)
        return Target(path=path, shape=shape, tower=tower, **fields)
    refused = why_refused(module)
    if refused is not None:
        raise PolicyError(f".modules: no adapter on {refused}")
    shape = matrix_shape(module)
    if "rank" not in fields:
        raise PolicyError(f".rank: method {fields['method']} needs a rank")
    rank = _rank(fields["rank"], module)
    if rank > min(shape) and fields["method"] != "lora":
        raise PolicyError(f".rank: {rank} is larger than min(out, in) = {min(shape)} of shape {shape}")
    alpha = _alpha(fields, plan, rank, module)
    return Target(path=path, shape=shape, tower=tower, **{**fields, "rank": rank, "alpha": alpha})


def _alpha(fields: dict[str, Any], plan: _Plan, rank: int, module: nn.Module) -> float:
    """The rank unless set; alpha set together with another rank than the final one keeps its scale alpha/rank."""
    if "alpha" not in fields:
        return float(rank)
    if plan.alpha_at is None or plan.alpha_at == fields["rank"]:
        return float(fields["alpha"])
    return float(fields["alpha"]) / _rank(plan.alpha_at, module) * rank


def _rank(rank: int | SpectralRank, module: nn.Module) -> int:
    """The rank itself, or the one the weight's spectrum gives; its upper bound where there are no weights (meta)."""
    if isinstance(rank, int):
        return rank
    largest = min(rank.max or min(matrix_shape(module)), min(matrix_shape(module)))
    if next(module.parameters()).is_meta:
        return largest
    sigma = torch.linalg.svdvals(read_matrix(module).float()).flip(0)
    return max(min(_count_minor(sigma, rank), largest), min(rank.min, largest))


def _count_minor(ascending: Tensor, rank: SpectralRank) -> int:
    if rank.threshold is not None:
        return int((ascending <= rank.threshold * ascending[-1]).sum())
    energy = ascending.double().square().cumsum(0)
    return int((energy <= (rank.energy or 0.0) * energy[-1]).sum())


def _shared_weights(model: nn.Module, paths: list[str]) -> list[str]:
    """Targets whose weight another module shares: stock PEFT would merge and save them wrongly."""
    owners: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)].append(name.rpartition(".")[0])
    shared = {path: others for others in owners.values() if len(set(others)) > 1 for path in others}
    return [
        f"{path} shares its weight with {next(o for o in shared[path] if o != path)}: untie them before, "
        "or leave it to no rule"
        for path in paths
        if path in shared
    ]


def _warn_of_experts(selector: Selector, targets: Sequence[Target]) -> None:
    """Mixtures of experts keep these as one 3-D parameter, which is no layer that an adapter could sit on."""
    blocks = {(t.tower, selector.towers.block_of(t.path)) for t in targets if t.method != "frozen"}
    experts = [
        path
        for path, module in selector.modules.items()
        if not isinstance(module, nn.Conv1d)
        and any(parameter.ndim == 3 for parameter in module.parameters(recurse=False))
        and (selector.towers.tower_of(path), selector.towers.block_of(path)) in blocks
        and selector.towers.family_of(path) == "mlp"
    ]
    if experts:
        warnings.warn(
            f"{len(experts):,} modules hold experts as 3-D weights (first: {experts[0]}): "
            "no adapter can sit on them, they stay as they are",
            stacklevel=4,
        )


def _without_nested(targets: list[Target]) -> list[Target]:
    """Drop targets inside a module that trains as a whole: its copy holds them already."""
    whole = [t.path for t in targets if t.method == "full"]
    return [t for t in targets if not any(t.path.startswith(f"{path}.") for path in whole)]
