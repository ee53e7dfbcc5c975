"""The fields of a rule (rank, alpha, dropout, protect, ...) with their checks; `Target`, its result for a module."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, PositiveInt, ValidationError, model_validator

from milora_vl.base.errors import Problem, UserError
from milora_vl.base.strict_models import Strict, problems_of
from milora_vl.policy.methods import METHODS, RuleMethod

if TYPE_CHECKING:  # torch takes a second, and --help needs only the names below
    from milora_vl.svd import Part


class PolicyError(UserError):
    """Problems of a policy. `where` is the dotted key, for example `policy[2].rank`."""


class RulePart(Strict):
    """A rule, or a mapping inside a rule. Creating one raises PolicyError with all problems of its values."""

    if not TYPE_CHECKING:  # for type checkers, the arguments are the fields

        def __init__(self, **values: Any) -> None:
            try:
                super().__init__(**values)
            except ValidationError as error:
                problems = problems_of(error, type(self), "policy")
                raise PolicyError(problems=[_with_code_of_field(problem) for problem in problems]) from None


def _with_code_of_field(problem: Problem) -> Problem:
    """Return the problem of a rule with the code of its field: policy-rank for `.rank` and `.rank.energy`."""
    field = problem.where.split(".")[1] if problem.where else ""
    is_own = field in ("rank", "protect") and problem.code == "policy-value"
    return replace(problem, code=f"policy-{field}") if is_own else problem


Number = int | float


class SpectralRank(RulePart):
    """A rank that depends on the singular values of each weight, within min..max. Exactly one field of three is set.

    - `energy`: the largest r whose minor components hold at most this share of ||W||_F^2.
    - `threshold`: the number of components with sigma at most this share of the largest sigma.
    - `budget`: the number of trainable parameters for all modules of the rule together. Components with the smallest
      sigma/sigma_max come first.
    """

    energy: Number | None = Field(default=None, gt=0, le=1, description="a share above 0, at most 1")
    threshold: Number | None = Field(default=None, gt=0, le=1, description="a share above 0, at most 1")
    budget: int | None = Field(default=None, gt=0, description="a number of parameters")
    min: int = Field(default=1, gt=0, description="a positive integer")
    max: int | None = Field(default=None, gt=0, description="a positive integer")

    @model_validator(mode="after")
    def _has_one_measure(self) -> SpectralRank:
        count = [self.energy, self.threshold, self.budget].count(None)
        if count != 2:
            raise ValueError(f"expected exactly one of energy, threshold and budget, got {3 - count}")
        if self.max is not None and self.max < self.min:
            raise ValueError(f"expected min <= max, got min {self.min}, max {self.max}")
        return self


class FloorSigma(RulePart):
    """Raise the singular values of the adapter to at least `floor` times the median singular value of its weight."""

    floor: Number = Field(gt=0, le=1, description="a share of the median, up to 1")


class Protect(RulePart):
    """Keep the update orthogonal to some directions. Exactly one of `top` and `inputs` is set.

    A and B stand for the parameters that train: of a method with an anchor they are the differences from it.

    `inputs` keeps the update orthogonal to the input directions that hold this share of the layer's activation energy
    on calibration text: V (in, k) holds the first eigenvectors of C = E[x x'], and A V = 0 at the start and after every
    optimizer step. Inputs along V then pass the layer unchanged. `max` is a limit for k. With `offload`, V stays in
    CPU memory, and each projection copies the V of one layer to the device.

    `top` keeps the update orthogonal to the first `top` singular directions of the weight, on both sides. V (in, k) and
    U (out, k) are the first k right and left singular vectors of the base weight. `by` is one of:

    - `projection`: after every optimizer step, A <- A - (A V) V' and B <- B - U (U'B).
    - `basis`: the gradients are projected too, before the optimizer reads them. This trains the factors A (I - V V')
      and (I - U U') B of OPLoRA (arXiv:2510.13003), while A and B are stored as plain factors. With SGD both ways are
      equal. Adam's moments contain the protected components under `projection`, and none under `basis`.
    - `penalty`: add weight/2 (||A V||^2 + ||U'B||^2) to the loss, decoupled from the gradient like AdamW's weight
      decay. Adam's second moment then does not weaken it, and losses stay comparable. It is computed as a proximal
      step, which is stable for any weight: a step at learning rate lr removes the share lr weight / (1 + lr weight) of
      the protected components. A weight of 1/lr removes half of them per step; `projection` is the limit.
    """

    top: int | None = Field(default=None, gt=0, description="a positive number of directions")
    by: Literal["projection", "basis", "penalty"] = "projection"
    weight: Number | None = Field(default=None, gt=0, description="a number above 0")
    inputs: Number | None = Field(default=None, gt=0, lt=1, description="a share above 0, below 1")
    max: int | None = Field(default=None, gt=0, description="a positive number of directions")
    offload: bool = Field(default=False, description="true or false")

    @model_validator(mode="after")
    def _has_one_kind(self) -> Protect:
        if (self.top is None) == (self.inputs is None):
            number = "neither" if self.top is None else "both"
            raise PolicyError(
                f"expected exactly one of top and inputs, got {number}",
                code="policy-protect",
                hint="for example  protect: {inputs: 0.9}",
            )
        if self.inputs is None and self.max is not None:
            raise PolicyError(
                "only inputs uses it", code="policy-protect", where=".max", hint="top is the number of directions"
            )
        if self.inputs is None and self.offload:
            raise PolicyError(
                "only inputs uses it", code="policy-protect", where=".offload", hint="a smaller top needs less memory"
            )
        if self.inputs is not None and self.by != "projection":
            raise PolicyError(
                f"inputs are protected by projection only, got {self.by}",
                code="policy-protect",
                where=".by",
                hint="remove it; by belongs to top",
            )
        return self

    @model_validator(mode="after")
    def _has_weight_if_penalty(self) -> Protect:
        if self.by == "penalty" and self.weight is None:
            message = "by: penalty needs a number above 0, got None"
            hint = "1 / learning rate removes half of the protected components per step"
        elif self.by != "penalty" and self.weight is not None:
            message, hint = f"by: {self.by} does not use it, only by: penalty does", "remove it"
        else:
            return self
        raise PolicyError(message, code="policy-protect", where=".weight", hint=hint)

    @property
    def kind(self) -> Literal["top", "inputs"]:
        """Return which directions are protected: singular directions of the weight, or inputs of the layer."""
        return "inputs" if self.top is None else "top"

    @property
    def is_hard(self) -> bool:
        """Return True if a step leaves no component in the protected directions."""
        return self.by != "penalty"

    def share(self, learning_rate: float) -> float:
        """Return the share of the protected components that is removed after a step.

        >>> Protect(top=8).share(2e-4), Protect(top=8, by="penalty", weight=5000.0).share(2e-4)
        (1.0, 0.5)
        """
        if self.weight is None:
            return 1.0
        return learning_rate * self.weight / (1 + learning_rate * self.weight)

    def __str__(self) -> str:
        """Return the text for tables.

        >>> str(Protect(top=64)), str(Protect(inputs=0.9, max=512))
        ('top 64 by projection', '90 % of the inputs, at most 512')
        """
        if self.inputs is not None:
            return f"{100 * self.inputs:g} % of the inputs" + ("" if self.max is None else f", at most {self.max}")
        return f"top {self.top} by {self.by}" + ("" if self.weight is None else f" {self.weight:g}")


Sigma = Literal["keep", "none"] | FloorSigma


class Rule(RulePart):
    """The settings for the modules that `modules` selects. A field of None keeps the value of earlier rules."""

    modules: str = Field(min_length=1, description="a tower, a selector or a glob", examples=["language"])
    method: RuleMethod | None = None
    rank: PositiveInt | SpectralRank | None = Field(
        default=None, description="a positive integer, {energy: x}, {threshold: x} or {budget: N}"
    )
    alpha: Number | None = Field(default=None, gt=0, description="a number above 0")
    rslora: bool | None = Field(default=None, description="true or false")
    dropout: Number | None = Field(default=None, ge=0, lt=1, description="a number from 0, below 1")
    sigma: Sigma | None = Field(default=None, description="keep, none or {floor: share of the median, up to 1}")
    seed: int | None = Field(
        default=None, ge=0, lt=2**32, description="an integer from 0 to 2**32 - 1"
    )  # of method random
    protect: Protect | None = Field(default=None, description="a mapping such as {inputs: 0.9} or {top: 64}")
    learning_rate: Number | None = Field(default=None, gt=0, description="a number above 0")
    weight_decay: Number | None = Field(default=None, ge=0, description="a number from 0")

    def named_fields(self) -> dict[str, Any]:
        """Return the fields this rule sets, without `modules`."""
        return {name: value for name, value in self if name != "modules" and value is not None}


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

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as the values of JSON."""
        pairs = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {
            name: value.model_dump(exclude_none=True) if isinstance(value, RulePart) else value for name, value in pairs
        }

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
