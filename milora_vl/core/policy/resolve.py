"""Resolve a policy on a model into one Target per module: selectors, rank, alpha, method; unused rules, tied weights.

1. `Selector` finds the modules that the field `modules` of a rule selects:

       language                    the linear layers in the blocks of a tower (all linear layers of the projector)
       language.*                  all modules of a tower, with embeddings and head; for full and frozen also norms
       language.layers[0-3].mlp    one family (attention, mlp) in the blocks 0 to 3, both included
       language.q_proj             modules with this name, or a longer suffix of the path (self_attn.q_proj)
       *.lm_head                   a glob over full paths, or an exact path

2. `_collect` applies the rules in order; the `_Plan` of a module holds the fields that its rules have set so far.
3. `_resolve_targets` computes rank and alpha of each module and returns a Target.

All problems are collected and raised together.
"""

from __future__ import annotations

import difflib
import re
import warnings
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from itertools import product
from typing import Any

from torch import nn

from milora_vl.common.errors import Key, Problem
from milora_vl.core.policy.rules import METHODS, PolicyError, Rule, Target, label_of, what_trains
from milora_vl.core.policy.towers import TOWERS, Towers, find_towers, output_head
from milora_vl.core.weights.matrices import is_adaptable, is_linear, matrix_shape, why_refused

_TOWER_SELECTOR = re.compile(
    rf"(?P<tower>{'|'.join(TOWERS)})(?:\.layers\[(?P<first>-?\d+)(?:-(?P<last>-?\d+))?\])?(?:\.(?P<tail>[\w.]+|\*))?"
)
NO_ADAPTER_ON_EXPERTS = (
    "They get no adapter: the inputs of down_proj are inside the module, where no hook sees them, so no A can be "
    "chosen for them (PEFT's target_parameters adds a plain LoRA)."
)


class Selector:
    """The modules of one model by path, and the ways to select them: exact path, glob, tower, tower and name."""

    def __init__(self, model: nn.Module, towers: Towers) -> None:
        self.towers = towers
        self.modules = dict(model.named_modules())
        head = output_head(model)
        self.head = next((path for path, module in self.modules.items() if module is head), None) if head else None

    def match(self, text: str, *, whole_modules: bool, planned: Collection[str] = ()) -> list[str]:
        """Return the paths that the selector `text` matches, in model order.

        `whole_modules` (method full and frozen) also matches modules without a matrix, such as norms. Modules in
        `planned`, which an earlier rule has selected, always match.
        Raises PolicyError with candidates if nothing matches, or if a range of layers does not exist.
        """
        selector = None if text in self.modules else _TOWER_SELECTOR.fullmatch(text)
        if selector is not None:
            self._require_blocks(selector)
            paths = self._by_tower(selector, whole_modules)
        else:
            matching = [path for path in self.modules if fnmatchcase(path, text)]
            paths = [path for path in matching if path in planned or self._is_selectable(path, whole_modules)]
        if not paths:
            hint = self._hint(text, whole_modules)
            raise PolicyError(f'no module matches "{text}"', code="policy-no-match", hint=hint)
        return paths

    def experts(self) -> list[str]:
        """Return the modules that hold the experts of a mixture in 3-D weights, which get no adapter."""
        return [
            path
            for path, module in self.modules.items()
            if not isinstance(module, nn.Conv1d)
            and any(parameter.ndim == 3 for parameter in module.parameters(recurse=False))
            and self.towers.family_of(path) == "mlp"
        ]

    def _require_blocks(self, selector: re.Match[str]) -> None:
        if selector["first"] is None:
            return
        first, last = int(selector["first"]), int(selector["last"] or selector["first"])
        blocks = self._blocks(str(selector["tower"]))
        if not 0 <= first <= last < max(blocks.values(), default=0):
            message, hint = f"no layers [{first}-{last}] in {selector['tower']}", f"its blocks are {_listed(blocks)}"
            raise PolicyError(message, code="policy-no-match", hint=hint)

    def _blocks(self, tower: str) -> dict[str, int]:
        """Return the length of each list of blocks in a tower; an encoder-decoder has two lists."""
        stacks = {str(name): paths for name, paths in self.towers.stacks.items()}.get(tower, ())
        return {path: len(list(self.modules[path].children())) for path in stacks}

    def _is_selectable(self, path: str, whole_modules: bool) -> bool:
        module = self.modules[path]
        if is_adaptable(module):
            return True
        return whole_modules and path != "" and next(module.parameters(recurse=False), None) is not None

    def _by_tower(self, selector: re.Match[str], whole_modules: bool) -> list[str]:
        tower, tail = str(selector["tower"]), selector["tail"]
        inside = [path for path in self.modules if self.towers.tower_of(path) == tower]
        if tail == "*":
            paths, tail = [path for path in inside if self._is_selectable(path, whole_modules)], None
        else:
            paths = [path for path in inside if self._in_tower(path, tower, whole_modules)]
        if selector["first"] is not None:
            blocks = range(int(selector["first"]), int(selector["last"] or selector["first"]) + 1)
            paths = [p for p in paths if self.towers.block_of(p) in blocks]
        if tail in ("attention", "mlp"):
            return [p for p in paths if self.towers.family_of(p) == tail]
        return [p for p in paths if tail is None or p.endswith(f".{tail}")]

    def _in_tower(self, path: str, tower: str, whole_modules: bool) -> bool:
        """Return True if the name of a tower alone selects the module: linear layers in blocks, all of a projector."""
        if tower == "projector" and whole_modules:
            return self._is_selectable(path, True)
        module = self.modules[path]
        if not is_linear(module) or path == self.head:
            return False
        if tower not in self.towers.stacks:
            return True
        is_gate = min(matrix_shape(module)) == 1 and not whole_modules  # one component is all of it
        return not is_gate and self.towers.block_of(path) is not None

    def _hint(self, text: str, whole_modules: bool) -> str:
        lines = []
        if not whole_modules and any(fnmatchcase(p, text) for p in self.modules):
            kinds = sorted({type(m).__name__ for p, m in self.modules.items() if fnmatchcase(p, text)})
            lines.append(f"it matches modules of type {', '.join(kinds[:4])}, which adapters do not support")
        experts = self.experts()
        if experts:
            lines.append(f"{experts[0]} holds experts as 3-D weights. {NO_ADAPTER_ON_EXPERTS}")
            lines.append(f"to train them in full, select the module:  {{modules: {experts[0]}, method: full}}")
        if self.towers.layout == "unknown":
            lines.append("this model has a vision part but no known layout: select its modules by full path or glob")
        for tower in self.towers.stacks:
            lines.append(f"this model's {tower} blocks are {_listed(self._blocks(tower))}")
        inside = [path for path in self.modules if self.towers.tower_of(path) == "projector"]
        projector = [path for path in inside if self._is_selectable(path, False)]
        if projector:
            lines.append(f"its projector is {', '.join(projector[:4])}")
        paths = {path for path in self.modules if self._is_selectable(path, whole_modules)}
        near = difflib.get_close_matches(text, sorted({*self._names(), *paths} - {text}), n=3, cutoff=0.5)
        if near:
            lines.append(f"did you mean  {'  or  '.join(near)}?")
        return "\n".join(lines)

    def _names(self) -> list[str]:
        names: set[str] = set()
        for tower in TOWERS:
            layers = [path for path in self.modules if self.towers.tower_of(path) == tower]
            layers = [path for path in layers if self._in_tower(path, tower, False)]
            names |= {tower} if layers else set()
            names |= {f"{tower}.{self.towers.family_of(path) or path.split('.')[-1]}" for path in layers}
            names |= {f"{tower}.{path.split('.')[-1]}" for path in layers}
        return sorted(names)


def _listed(blocks: Mapping[str, int]) -> str:
    return ", ".join(f"{path}[0-{count - 1}]" for path, count in blocks.items()) or "none"


@dataclass(frozen=True, slots=True)
class RankTooLarge(Problem):
    """A rank larger than a matrix. `rank` and `largest` give other code both numbers."""

    rank: int = 0
    largest: int = 0

    @classmethod
    def of(cls, rank: int, largest: int, shape: tuple[int, int]) -> RankTooLarge:
        message = (
            f"{rank} is larger than {'min(out, in)' if largest == min(shape) else 'in'} = {largest} of shape {shape}"
        )
        hint = f"use a rank of at most {largest}"
        return cls(message, "policy-rank-too-large", Key.of("rank"), hint, rank=rank, largest=largest)


@dataclass(slots=True)
class _Plan:
    """The fields that the rules have set for one module so far.

    `alpha_at` is the rank that a rule set together with alpha: their scale stays. None: alpha counts at any rank.
    `rules` holds the numbers of all rules that selected the module.
    """

    fields: dict[str, Any] = field(default_factory=dict)
    alpha_at: int | None = None
    rules: list[int] = field(default_factory=list)

    def apply(self, number: int, named: dict[str, Any]) -> None:
        """Apply the fields of rule `number`. A new method drops earlier fields that it does not use."""
        method = named.get("method", self.fields.get("method"))
        if method is not None:
            self.fields = {name: value for name, value in self.fields.items() if _is_used(method, name)}
        self.fields |= named
        if "alpha" in named:
            self.alpha_at = named.get("rank")
        self.rules.append(number)


def resolve(rules: Sequence[Rule], model: nn.Module) -> list[Target]:
    """Return one Target per module that trains, in model order. Raises PolicyError with all problems, also for none."""
    selector = Selector(model, find_towers(model))
    problems: list[Problem] = []
    plans = _collect(rules, selector, problems)
    problems += _without_method(plans, rules)
    resolved = _resolve_targets(plans, selector, problems)
    problems += _mixed_baselines(resolved)
    problems += _shared_weights(model, resolved)
    if not resolved and not problems:
        message = "all modules that the rules select are frozen at the end, so nothing would train"
        hint = "order the rules so that frozen comes before what trains"
        problems.append(Problem(message, "policy-nothing-trains", Key.of("policy"), hint))
    if problems:
        raise PolicyError(problems=list(dict.fromkeys(problems)))
    _warn_of_experts(selector, resolved)
    return _without_nested(resolved)


def _collect(rules: Sequence[Rule], selector: Selector, problems: list[Problem]) -> dict[str, _Plan]:
    plans: dict[str, _Plan] = defaultdict(_Plan)
    for number, rule in enumerate(rules):
        try:
            whole_modules = rule.method in ("full", "frozen")
            paths = selector.match(rule.modules, whole_modules=whole_modules, planned=plans.keys())
        except PolicyError as error:
            problems += [problem.inside("policy", number, "modules") for problem in error.problems]
            continue
        named = {name: value for name, value in rule if name != "modules" and value is not None}
        for path in paths:
            plans[path].apply(number, named)
        methods = {plans[path].fields["method"] for path in paths if "method" in plans[path].fields}
        for method, name in product(sorted(methods), named):
            if not _is_used(method, name):
                using = ", ".join(method for method, row in METHODS.items() if name in row.fields)
                where = Key(("policy", number, name))
                hint = f"remove {name} from the rule" + (f", or use a method that has it: {using}" if using else "")
                problems.append(Problem(f"method {method} cannot use it", "policy-unused-field", where, hint))
    return plans


def _is_used(method: str, name: str) -> bool:
    return name == "method" or name in METHODS[method].fields


def _without_method(plans: dict[str, _Plan], rules: Sequence[Rule]) -> list[Problem]:
    """Return a problem for each rule whose modules all end without a method: its fields would be ignored."""
    useful = {number for plan in plans.values() if "method" in plan.fields for number in plan.rules}
    matched = {number for plan in plans.values() for number in plan.rules}
    return [
        Problem(
            f'no rule gives a method to "{rule.modules}"',
            where=Key(("policy", number)),
            hint=f"add a method, one of {', '.join(METHODS)}",
        )
        for number, rule in enumerate(rules)
        if number in matched - useful
    ]


def _resolve_targets(plans: dict[str, _Plan], selector: Selector, problems: list[Problem]) -> list[Target]:
    """Return a Target for each path. Equal problems of one rule are merged: a rule can select hundreds of modules."""
    paths_of_problem: dict[Problem, list[str]] = defaultdict(list)
    resolved = []
    for path in selector.modules:
        if path not in plans or plans[path].fields.get("method") in ("frozen", None):
            continue
        try:
            resolved.append(_target(path, plans[path], selector))
        except PolicyError as error:
            for problem in error.problems:
                paths_of_problem[problem.inside("policy", plans[path].rules[-1])].append(path)
    too_large = [problem for problem in paths_of_problem if isinstance(problem, RankTooLarge)]
    # A rule has one rank for matrices of several shapes: the smallest of them represents all.
    smallest: dict[str | Key, Problem] = {}
    for largest in sorted(too_large, key=lambda problem: problem.largest):
        smallest.setdefault(largest.where, largest)
    for problem, paths in paths_of_problem.items():
        if problem in too_large and problem is not smallest[problem.where]:
            continue
        more = f" and {len(paths) - 2:,} more" if len(paths) > 2 else ""
        problems.append(replace(problem, message=f"{problem.message}: {', '.join(paths[:2])}{more}"))
    return resolved


def _target(path: str, plan: _Plan, selector: Selector) -> Target:
    module, fields, tower = selector.modules[path], plan.fields, selector.towers.tower_of(path)
    method = METHODS[fields["method"]]
    if fields["method"] == "full":
        shape = matrix_shape(module) if is_adaptable(module) else tuple(next(module.parameters()).shape)
        return Target(path=path, shape=shape, tower=tower, **fields)
    refused = why_refused(module, fields["method"])
    if refused is not None:
        hint = "use method: full, or do not select the module"
        raise PolicyError(f"no adapter on {refused}", code="policy-no-adapter", where=Key.of("modules"), hint=hint)
    if "rank" not in fields:
        raise PolicyError(f"method {fields['method']} needs a rank", where=Key.of("rank"), hint="for example  rank: 64")
    shape, rank, share = matrix_shape(module), fields["rank"], fields.get("protect", method.protect)
    largest = min(shape) if method.part is not None else shape[1] if share else rank
    if rank > largest:
        raise PolicyError(problems=[RankTooLarge.of(rank, largest, shape)])
    if share and isinstance(module, nn.Embedding):
        hint = "set  protect: 0  for it, or do not select it"
        raise PolicyError("an embedding has no input directions to protect", where=Key.of("protect"), hint=hint)
    return Target(path=path, shape=shape, tower=tower, **{**fields, "alpha": _alpha(plan), "protect": share})


def _alpha(plan: _Plan) -> float:
    """Return alpha; the default is the rank, which gives a scaling of 1.

    If a rule set alpha and rank together, and a later rule changes the rank, alpha changes too, so that the scaling
    stays: alpha/rank, or alpha/sqrt(rank) with rsLoRA. An alpha without a rank beside it counts at the final rank, so
    that the order of the two rules has no effect.
    """
    rank, alpha = plan.fields["rank"], plan.fields.get("alpha")
    if alpha is None:
        return float(rank)
    growth = 1.0 if plan.alpha_at is None else rank / plan.alpha_at
    return float(alpha) * (growth**0.5 if plan.fields.get("rslora") else growth)


def _mixed_baselines(targets: Sequence[Target]) -> list[Problem]:
    """Return a problem if a baseline is mixed with other methods: PEFT's DoRA is for all modules of an adapter."""
    methods = sorted({t.method for t in targets if t.rank is not None})
    baseline = next((method for method in methods if METHODS[method].is_baseline), None)
    if baseline is None or len(methods) == 1:
        return []
    others = ", ".join(method for method in methods if method != baseline)
    message = f"{baseline} is a baseline for a whole run, it does not mix with {others}"
    hint = f"use {baseline} in all rules that have an adapter"
    return [Problem(message, "policy-mixed-baseline", Key.of("policy"), hint)]


def _shared_weights(model: nn.Module, targets: Sequence[Target]) -> list[Problem]:
    """Return a problem for each target whose weight another module shares: stock PEFT merges and saves it wrongly.

    If only whole modules train, PEFT is not used, and the rules must select all modules that share the weight.
    """
    paths = [target.path for target in targets]
    is_whole = all(target.rank is None for target in targets)
    owners: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)].append(name.rpartition(".")[0])
    harmful = [o for o in owners.values() if len(set(o)) > 1 and not (is_whole and set(o) <= set(paths))]
    shared = {path: others for others in harmful for path in others}
    hint = "untie the weights first, or select neither module"
    return [
        Problem(f"shares its weight with {next(o for o in shared[path] if o != path)}", where=path, hint=hint)
        for path in paths
        if path in shared
    ]


def _warn_of_experts(selector: Selector, targets: Sequence[Target]) -> None:
    towers = selector.towers
    blocks = {(t.tower, towers.block_of(t.path)) for t in targets}
    experts = [path for path in selector.experts() if (towers.tower_of(path), towers.block_of(path)) in blocks]
    if experts:
        warnings.warn(
            f"{len(experts):,} modules hold experts as 3-D weights (first: {experts[0]}). "
            f"{NO_ADAPTER_ON_EXPERTS} Attention and shared layers are trained; `full` trains the experts.",
            stacklevel=4,
        )


def _without_nested(targets: list[Target]) -> list[Target]:
    """Drop targets inside a module that trains in full: PEFT's copy of that module contains them."""
    full = [t.path for t in targets if t.method == "full"]
    return [t for t in targets if not any(t.path.startswith(f"{path}.") for path in full)]


def frozen_towers(base: nn.Module, targets: Sequence[Target]) -> list[str]:
    towers, trained = find_towers(base), {target.tower for target in targets}
    present = {"language": towers.language, "projector": towers.projector, "vision": towers.vision}
    return [tower for tower in TOWERS if present[tower] is not None and tower not in trained]


def policy_rows(
    rules: Sequence[Mapping[str, Any]],
    targets: Sequence[Target],
    sizes: Mapping[str, int],
    base: nn.Module,
    energies: Mapping[str, float],
) -> list[tuple[str, ...]]:
    """Return one row per rule that is the last one about some modules, with its selector as written.

    The targets have resolved rates. `sizes` maps the path of a target to its number of trained parameters, `energies`
    its measured share of energy. A rule about layers that earlier rules set apart shows the range of a value.
    """
    selector, last, by_path = Selector(base, find_towers(base)), dict[str, int](), {t.path: t for t in targets}
    for number, rule in enumerate(rules):
        whole = rule.get("method") in ("full", "frozen")
        last |= dict.fromkeys(selector.match(rule["modules"], whole_modules=whole, planned=last.keys()), number)
    rows: list[tuple[str, ...]] = []
    for number, rule in enumerate(rules):
        group = [by_path[path] for path, other in last.items() if other == number and path in by_path]
        if not group:
            continue
        rows.append(
            (
                rule["modules"],
                f"{len(group):,}",
                " ".join(sorted({label_of(target.method, target.protect) for target in group})),
                _span([target.rank for target in group if target.rank]),
                _span([target.alpha for target in group if target.alpha]),
                f"{sum(sizes[target.path] for target in group):,}",
                _span([target.learning_rate or 0.0 for target in group]),
                _span([100 * energies[target.path] for target in group if target.path in energies], "{:.2g}", " %"),
                what_trains(group[0].method, group[0].protect),
            )
        )
    return rows


def _span(values: Sequence[float], form: str = "{:g}", unit: str = "") -> str:
    if not values:
        return "-"
    low, high = form.format(min(values)), form.format(max(values))
    return (low if low == high else f"{low} - {high}") + unit
