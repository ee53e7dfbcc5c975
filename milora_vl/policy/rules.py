"""One line of a policy (Rule) and its result for one module (Target). A rule is validated when it is created."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from milora_data.errors import Problem, UserError
from milora_vl.policy.methods import METHODS, RuleMethod
from milora_vl.policy.protect import Protect, protect_problems

if TYPE_CHECKING:  # torch takes a second, and --help needs only the names below
    from milora_vl.svd import Part


class PolicyError(UserError):
    """Problems of a policy. `where` is the dotted key, for example `policy[2].rank`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpectralRank:
    """A rank that depends on the singular values of each weight, within min..max. Exactly one field of three is set.

    - `energy`: the largest r whose minor components hold at most this share of ||W||_F^2.
    - `threshold`: the number of components with sigma at most this share of the largest sigma.
    - `budget`: the number of trainable parameters for all modules of the rule together. Components with the smallest
      sigma/sigma_max come first.
    """

    energy: float | None = None
    threshold: float | None = None
    budget: int | None = None
    min: int = 1
    max: int | None = None


@dataclass(frozen=True, slots=True)
class FloorSigma:
    """Raise the singular values of the adapter to at least `floor` times the median singular value of its weight."""

    floor: float


Sigma = Literal["keep", "none"] | FloorSigma


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """The settings for the modules that `modules` selects. A field of None keeps the value of earlier rules."""

    modules: str
    method: RuleMethod | None = None
    rank: int | SpectralRank | None = None
    alpha: float | None = None
    rslora: bool | None = None
    dropout: float | None = None
    sigma: Sigma | None = None
    seed: int | None = None  # for method random: which components are drawn
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
    """A module that trains: its full path, the shape (out, in) of its matrix, and the values of all fields."""

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
        """Return s = alpha/rank, or alpha/sqrt(rank) with rsLoRA (arXiv:2312.03732). Only adapters have a scaling."""
        assert self.rank is not None
        assert self.alpha is not None
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)

    @property
    def part(self) -> Part | None:
        """Return which singular components train, or None for methods that do not use a part of the weight."""
        return METHODS[self.method].part

    @property
    def has_anchor(self) -> bool:
        """Return True if a frozen copy of the initial factors is subtracted, so that PEFT's rank is 2r."""
        return METHODS[self.method].start is not None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: object, minimum: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum


def _rule_problems(rule: Rule) -> list[Problem]:
    """Return the problems of a rule's values; `where` is the field, for example `.rank`."""

    def wrong(field: str, expected: str, got: object, hint: str = "") -> Problem:
        return Problem(f"expected {expected}, got {got!r}", "policy-value", f".{field}", hint)

    problems = []
    if not isinstance(rule.modules, str) or not rule.modules:
        problems.append(wrong("modules", "a tower, a selector or a glob", rule.modules))
    if rule.method is not None and rule.method not in METHODS:
        problems.append(wrong("method", f"one of {', '.join(METHODS)}", rule.method))
    problems += _rank_problems(rule.rank)
    if rule.sigma not in (None, "keep", "none") and not (
        isinstance(rule.sigma, FloorSigma) and _is_number(rule.sigma.floor) and 0 < rule.sigma.floor <= 1
    ):
        problems.append(wrong("sigma", "keep, none or {floor: share of the median, up to 1}", rule.sigma))
    if rule.seed is not None and not (_is_count(rule.seed, minimum=0) and rule.seed < 2**32):
        problems.append(wrong("seed", "an integer from 0 to 2**32 - 1", rule.seed))
    problems += protect_problems(rule.protect)
    if rule.rslora not in (None, True, False):
        problems.append(wrong("rslora", "true or false", rule.rslora))
    limits = {"alpha": (0, None), "dropout": (None, 1), "learning_rate": (0, None), "weight_decay": (None, None)}
    for name, (above, below) in limits.items():
        value = getattr(rule, name)
        if value is None:
            continue
        if not _is_number(value) or value < 0 or (above == 0 and value == 0) or (below is not None and value >= below):
            text = f"a number {'above 0' if above == 0 else 'from 0'}" + (f", below {below}" if below else "")
            hint = "YAML reads 2e-4 as text: write 2.0e-4" if isinstance(value, str) else ""
            problems.append(wrong(name, text, value, hint))
    return problems


def _rank_problems(rank: Any) -> list[Problem]:
    def wrong(message: str, field: str = ".rank") -> Problem:
        return Problem(message, "policy-rank", field)

    if rank is None or _is_count(rank):
        return []
    if not isinstance(rank, SpectralRank):
        return [wrong(f"expected a positive integer, {{energy: x}}, {{threshold: x}} or {{budget: N}}, got {rank!r}")]
    problems = []
    shares = [value for value in (rank.energy, rank.threshold) if value is not None]
    count = len(shares) + (rank.budget is not None)
    if count != 1:
        problems.append(wrong(f"expected exactly one of energy, threshold and budget, got {count}"))
    if rank.budget is not None and not _is_count(rank.budget):
        problems.append(wrong(f"expected a number of parameters, got {rank.budget!r}", ".rank.budget"))
    if any(not _is_number(value) or not 0 < value <= 1 for value in shares):
        problems.append(wrong(f"expected energy and threshold to be shares above 0, at most 1, got {shares}"))
    if not _is_count(rank.min) or not (rank.max is None or (_is_count(rank.max) and rank.max >= rank.min)):
        message = f"expected integers from 1 with min <= max, got min {rank.min}, max {rank.max}"
        problems.append(wrong(message))
    return problems
