"""Rules and policies: what happens to which modules. A later rule overrides the fields it names (design of recipes).

A rule is checked on its own when it is made, against the model in `Policy.resolve`; all errors come together.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import yaml
from torch import nn

from milora_vl.svd import Part

RuleMethod = Literal["milora", "pissa", "random", "lora", "full", "frozen"]
METHODS: tuple[RuleMethod, ...] = get_args(RuleMethod)
PART_OF_METHOD: dict[str, Part] = {"milora": "minor", "pissa": "principal", "random": "random"}
WHOLE_RUN_METHODS = ("dora", "olora", "mica")

# The fields each method uses beside `modules` and `method`; any other one in its rule is an error.
_ADAPTER_FIELDS = frozenset({"rank", "alpha", "dropout", "learning_rate", "weight_decay"})
FIELDS_OF_METHOD: dict[str, frozenset[str]] = {
    **{method: _ADAPTER_FIELDS | {"sigma"} for method in PART_OF_METHOD},
    "lora": _ADAPTER_FIELDS,
    "full": frozenset({"learning_rate", "weight_decay"}),
    "frozen": frozenset(),
}


class PolicyError(ValueError):
    """One or more faults of a policy, each with its dotted place: `policy[2].rank: ...`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpectralRank:
    """A rank found from the singular values of each weight, kept within min..max.

    `energy`: the largest r whose minor components hold at most that share of ||W||^2; `threshold`: the components
    with sigma at most that share of the largest.
    """

    energy: float | None = None
    threshold: float | None = None
    min: int = 1
    max: int | None = None


@dataclass(frozen=True, slots=True)
class FloorSigma:
    """No singular value of the adapter below `floor` times the median singular value of its weight."""

    floor: float


Sigma = Literal["keep", "none"] | FloorSigma


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What happens to the modules that `modules` names; fields left None are not touched by this rule."""

    modules: str
    method: RuleMethod | None = None
    rank: int | SpectralRank | None = None
    alpha: float | None = None
    dropout: float | None = None
    sigma: Sigma | None = None
    learning_rate: float | None = None
    weight_decay: float | None = None

    def __post_init__(self) -> None:
        problems = list(_rule_problems(self))
        if problems:
            raise PolicyError("\n".join(problems))

    def named_fields(self) -> dict[str, Any]:
        """Return the fields this rule sets, without `modules`."""
        pairs = ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self) if f.name != "modules")
        return {name: value for name, value in pairs if value is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A module that trains: its full path, the shape (out, in) of its matrix, and all fields settled."""

    path: str
    shape: tuple[int, ...]
    tower: str | None
    method: RuleMethod
    rank: int | None = None
    alpha: float | None = None
    dropout: float = 0.0
    sigma: Sigma = "keep"
    learning_rate: float | None = None
    weight_decay: float | None = None

    @property
    def scaling(self) -> float:
        """Return alpha/rank, the s of the paper. Only for targets with an adapter."""
        assert self.rank is not None
        assert self.alpha is not None
        return self.alpha / self.rank

    @property
    def part(self) -> Part | None:
        """Return which singular components train: None for `lora` and `full`."""
        return PART_OF_METHOD.get(self.method)


@dataclass(frozen=True, slots=True)
class Policy:
    """Rules in order. What no rule matches is frozen."""

    rules: tuple[Rule, ...]

    @staticmethod
    def parse(source: str | Sequence[Mapping[str, Any] | Rule] | Policy) -> Policy:
        """Read rules from YAML text or from a list of mappings.

        Raises PolicyError with all faults together: unknown keys (with the nearest known one), wrong types, values
        out of range.

        >>> Policy.parse("- {modules: language, method: milora, rank: 8}").rules[0].rank
        8
        """
        if isinstance(source, Policy):
            return source
        items = _load_yaml(source) if isinstance(source, str) else source
        if isinstance(items, Mapping) or not isinstance(items, Sequence) or isinstance(items, str):
            raise PolicyError(f"policy: expected a list of rules, got {type(items).__name__}")
        rules, problems = [], []
        for number, item in enumerate(items):
            try:
                rules.append(item if isinstance(item, Rule) else _parse_rule(item))
            except PolicyError as error:
                problems += [f"policy[{number}]{line}" for line in str(error).splitlines()]
        if not items:
            problems.append("policy: no rules, so nothing would train")
        if problems:
            raise PolicyError("\n".join(problems))
        return Policy(tuple(rules))

    def resolve(self, model: nn.Module) -> list[Target]:
        """Settle the rules on `model`: one Target per module that trains, in model order.

        Raises PolicyError with all faults together: rules that match nothing, fields their method cannot use, ranks
        larger than a matrix.
        """
        from milora_vl.resolve import resolve

        return resolve(self.rules, model)

    def to_list(self) -> list[dict[str, Any]]:
        """Return the rules as plain data, as in YAML."""
        return [{"modules": r.modules, **{k: _plain(v) for k, v in r.named_fields().items()}} for r in self.rules]


def _plain(value: Any) -> Any:
    if isinstance(value, SpectralRank):
        pairs = dataclasses.asdict(value).items()
        return {k: v for k, v in pairs if v is not None and (k, v) != ("min", 1)}
    return {"floor": value.floor} if isinstance(value, FloorSigma) else value


def _load_yaml(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise PolicyError(f"policy: not valid YAML: {error}") from error


def _parse_rule(item: object) -> Rule:
    if not isinstance(item, Mapping):
        raise PolicyError(f": a rule is a mapping such as {{modules: language, method: milora}}, got {item!r}")
    known = [f.name for f in dataclasses.fields(Rule)]
    problems = [f".{key}: {_unknown(str(key), known)}" for key in item if key not in known]
    if "modules" not in item:
        problems.append(".modules: missing")
    fields = {key: value for key, value in item.items() if key in known}
    for name, reader in (("rank", _parse_rank), ("sigma", _parse_sigma)):
        try:
            if name in fields:
                fields[name] = reader(fields[name])
        except PolicyError as error:
            problems += str(error).splitlines()
            del fields[name]
    try:
        rule = Rule(**{"modules": "?", **fields})
    except PolicyError as error:
        problems += str(error).splitlines()
    if problems:
        raise PolicyError("\n".join(problems))
    return rule


def _unknown(key: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1)
    return f"unknown key, did you mean {near[0]!r}?" if near else f"unknown key, known are {', '.join(known)}"


def _parse_rank(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    if "budget" in value:
        raise PolicyError(".rank.budget: not available in this version; use an integer, {energy: x} or {threshold: x}")
    known = [f.name for f in dataclasses.fields(SpectralRank)]
    problems = [f".rank.{key}: {_unknown(str(key), known)}" for key in value if key not in known]
    if problems:
        raise PolicyError("\n".join(problems))
    return SpectralRank(**value)


def _parse_sigma(value: Any) -> Any:
    if isinstance(value, Mapping) and set(value) == {"floor"}:
        return FloorSigma(value["floor"])
    return value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _rule_problems(rule: Rule) -> list[str]:
    found = []
    if not isinstance(rule.modules, str) or not rule.modules:
        found.append(f".modules: expected a tower, a selector or a glob, got {rule.modules!r}")
    if rule.method in WHOLE_RUN_METHODS:
        found.append(f".method: {rule.method} is a baseline for a whole run, not available in this version")
    elif rule.method is not None and rule.method not in METHODS:
        found.append(f".method: expected one of {', '.join(METHODS)}, got {rule.method!r}")
    found += _rank_problems(rule.rank)
    if rule.sigma not in (None, "keep", "none") and not (
        isinstance(rule.sigma, FloorSigma) and _is_number(rule.sigma.floor) and 0 < rule.sigma.floor <= 1
    ):
        found.append(f".sigma: expected keep, none or {{floor: share of the median, up to 1}}, got {rule.sigma!r}")
    limits = {"alpha": (0, None), "dropout": (None, 1), "learning_rate": (0, None), "weight_decay": (None, None)}
    for name, (above, below) in limits.items():
        value = getattr(rule, name)
        if value is None:
            continue
        text = f"a number {'above 0' if above == 0 else 'from 0'}" + (f", below {below}" if below else "")
        if not _is_number(value) or value < 0 or (above == 0 and value == 0) or (below is not None and value >= below):
            hint = " (YAML reads 2e-4 as text: write 2.0e-4)" if isinstance(value, str) else ""
            found.append(f".{name}: expected {text}, got {value!r}{hint}")
    return found


def _rank_problems(rank: Any) -> list[str]:
    if rank is None or _is_count(rank):
        return []
    if not isinstance(rank, SpectralRank):
        return [f".rank: expected a positive integer, {{energy: x}} or {{threshold: x}}, got {rank!r}"]
    found = []
    shares = [value for value in (rank.energy, rank.threshold) if value is not None]
    if len(shares) != 1:
        found.append(".rank: give exactly one of energy and threshold")
    if any(not _is_number(value) or not 0 < value <= 1 for value in shares):
        found.append(f".rank: energy and threshold are shares above 0, at most 1, got {shares}")
    if not _is_count(rank.min) or not (rank.max is None or (_is_count(rank.max) and rank.max >= rank.min)):
        found.append(f".rank: min and max are integers from 1 with min <= max, got min {rank.min}, max {rank.max}")
    return found
