"""One line of a policy (Rule) and what it comes to for one module (Target); a rule is checked when it is made."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from milora_data.errors import Problem, UserError
from milora_vl.policy.protect import PROTECTING_METHODS, Protect, protect_problems

if TYPE_CHECKING:  # torch takes a second, and --help needs only the names below
    from milora_vl.svd import Part

RuleMethod = Literal["milora", "pissa", "random", "lora", "full", "frozen", "dora", "olora", "mica"]
METHODS: tuple[RuleMethod, ...] = get_args(RuleMethod)
PART_OF_METHOD: dict[str, Part] = {"milora": "minor", "pissa": "principal", "random": "random"}
# Baselines: all adapters of a policy are of this method, or none.
WHOLE_RUN_METHODS = ("dora", "olora", "mica")
# Methods that start from given factors of the weight, whose copy is subtracted again.
ANCHORED_METHODS = (*PART_OF_METHOD, "olora")

# The fields each method uses beside `modules` and `method`; any other one in its rule is an error.
_ADAPTER_FIELDS = frozenset({"rank", "alpha", "rslora", "dropout", "learning_rate", "weight_decay"})
FIELDS_OF_METHOD: dict[str, frozenset[str]] = {
    **{method: _ADAPTER_FIELDS | {"sigma"} for method in PART_OF_METHOD},
    **dict.fromkeys(("lora", *WHOLE_RUN_METHODS), _ADAPTER_FIELDS),
    "full": frozenset({"learning_rate", "weight_decay"}),
    "frozen": frozenset(),
}
FIELDS_OF_METHOD |= {method: FIELDS_OF_METHOD[method] | {"protect"} for method in PROTECTING_METHODS}
FIELDS_OF_METHOD["random"] |= {"seed"}


class PolicyError(UserError):
    """Problems of a policy, each with its dotted place: `policy[2].rank`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpectralRank:
    """A rank found from the singular values of each weight, kept within min..max.

    `energy`: the largest r whose minor components hold at most that share of ||W||^2; `threshold`: the components
    with sigma at most that share of the largest; `budget`: as many trainable parameters for all modules of the rule
    together, spent on the components with the smallest such share first.
    """

    energy: float | None = None
    threshold: float | None = None
    budget: int | None = None
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
    rslora: bool | None = None
    dropout: float | None = None
    sigma: Sigma | None = None
    seed: int | None = None  # of the components that `random` draws
    protect: Protect | None = None
    learning_rate: float | None = None
    weight_decay: float | None = None

    def __post_init__(self) -> None:
        problems = list(_rule_problems(self))
        if problems:
            raise PolicyError(problems=problems)

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
    rslora: bool = False
    dropout: float = 0.0
    sigma: Sigma = "keep"
    seed: int = 0
    protect: Protect | None = None
    learning_rate: float | None = None
    weight_decay: float | None = None

    @property
    def scaling(self) -> float:
        """Return alpha/rank, the s of the paper; alpha/sqrt(rank) with rsLoRA (arXiv:2312.03732). Adapters only."""
        assert self.rank is not None
        assert self.alpha is not None
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)

    @property
    def part(self) -> Part | None:
        """Return which singular components train; None for methods that start from no such part."""
        return PART_OF_METHOD.get(self.method)

    @property
    def has_anchor(self) -> bool:
        """Tell whether a frozen copy of the initial factors is subtracted, so that the stored rank is 2r."""
        return self.method in ANCHORED_METHODS


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: object, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _rule_problems(rule: Rule) -> list[Problem]:
    """What is wrong with the values of a rule; `where` is the field, `.rank` and the like."""

    def wrong(field: str, expected: str, got: object, hint: str = "") -> Problem:
        return Problem(f"expected {expected}, got {got!r}", "policy-value", f".{field}", hint)

    found = []
    if not isinstance(rule.modules, str) or not rule.modules:
        found.append(wrong("modules", "a tower, a selector or a glob", rule.modules))
    if rule.method is not None and rule.method not in METHODS:
        found.append(wrong("method", f"one of {', '.join(METHODS)}", rule.method))
    found += _rank_problems(rule.rank)
    if rule.sigma not in (None, "keep", "none") and not (
        isinstance(rule.sigma, FloorSigma) and _is_number(rule.sigma.floor) and 0 < rule.sigma.floor <= 1
    ):
        found.append(wrong("sigma", "keep, none or {floor: share of the median, up to 1}", rule.sigma))
    if rule.seed is not None and not (_is_count(rule.seed, least=0) and rule.seed < 2**32):
        found.append(wrong("seed", "a whole number from 0, below 2**32", rule.seed))
    found += protect_problems(rule.protect)
    if rule.rslora not in (None, True, False):
        found.append(wrong("rslora", "true or false", rule.rslora))
    limits = {"alpha": (0, None), "dropout": (None, 1), "learning_rate": (0, None), "weight_decay": (None, None)}
    for name, (above, below) in limits.items():
        value = getattr(rule, name)
        if value is None:
            continue
        if not _is_number(value) or value < 0 or (above == 0 and value == 0) or (below is not None and value >= below):
            text = f"a number {'above 0' if above == 0 else 'from 0'}" + (f", below {below}" if below else "")
            hint = "YAML reads 2e-4 as text: write 2.0e-4" if isinstance(value, str) else ""
            found.append(wrong(name, text, value, hint))
    return found


def _rank_problems(rank: Any) -> list[Problem]:
    def wrong(message: str, field: str = ".rank") -> Problem:
        return Problem(message, "policy-rank", field)

    if rank is None or _is_count(rank):
        return []
    if not isinstance(rank, SpectralRank):
        return [wrong(f"expected a positive integer, {{energy: x}}, {{threshold: x}} or {{budget: N}}, got {rank!r}")]
    found = []
    shares = [value for value in (rank.energy, rank.threshold) if value is not None]
    if len(shares) + (rank.budget is not None) != 1:
        found.append(wrong("give exactly one of energy, threshold and budget"))
    if rank.budget is not None and not _is_count(rank.budget):
        found.append(wrong(f"expected a number of parameters, got {rank.budget!r}", ".rank.budget"))
    if any(not _is_number(value) or not 0 < value <= 1 for value in shares):
        found.append(wrong(f"energy and threshold are shares above 0, at most 1, got {shares}"))
    if not _is_count(rank.min) or not (rank.max is None or (_is_count(rank.max) and rank.max >= rank.min)):
        found.append(wrong(f"min and max are integers from 1 with min <= max, got min {rank.min}, max {rank.max}"))
    return found
