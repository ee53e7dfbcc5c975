"""The rules of a policy: methods, the fields of a rule with their checks, `Target`, and the default rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from pydantic import Field, PositiveInt, ValidationError

from milora_vl.common.errors import UserError
from milora_vl.common.strict_models import Strict, problems_of

if TYPE_CHECKING:  # torch takes a second, and --help needs only the names below
    from milora_vl.core.svd import Part

RuleMethod = Literal["milora", "lora", "pissa", "random", "dora", "full", "frozen"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """The declaration of one method.

    - `label`: its name in reports and model cards.
    - `trains`: what it trains without protected inputs, one line; `what_trains` has the words for all rules.
    - `protect`: the share of a rule that sets none.
    - `fields`: the fields that it uses beside `modules` and `method`. Other fields in its rule are an error.
    - `part`: the singular triplets that start A0 (r, in) and B0 (out, r): "minor", "principal" or "random". Without
      `protect` both train, and a frozen copy, the anchor, is subtracted, so that step 0 equals the base. None: PEFT
      initializes the adapter, or there is no adapter.
    - `is_baseline`: all adapters of a policy use this method, or none does.
    """

    label: str
    trains: str
    fields: frozenset[str]
    protect: float = 0.0
    part: Part | None = None
    is_baseline: bool = False


_ADAPTER = frozenset({"rank", "alpha", "rslora", "dropout", "learning_rate", "weight_decay"})
METHODS: dict[str, Method] = {
    "milora": Method(
        label="MiLoRA",
        trains="A and B, from the minor singular triplets: the last r of the weight (arXiv:2406.09044)",
        fields=_ADAPTER | {"protect"},
        protect=0.95,  # docs/results.md
        part="minor",
    ),
    "lora": Method(
        label="LoRA", trains="A and B, as PEFT starts them: A at random, B at zero", fields=_ADAPTER | {"protect"}
    ),
    "pissa": Method(
        label="PiSSA",
        trains="A and B, from the principal singular triplets: the first r (arXiv:2404.02948)",
        fields=_ADAPTER | {"protect"},
        part="principal",
    ),
    "random": Method(
        label="random",
        trains="A and B, from r randomly drawn singular triplets",
        fields=_ADAPTER | {"seed", "protect"},
        part="random",
    ),
    "dora": Method(
        label="DoRA",
        trains="A and B of a LoRA, and the norm of each row of the weight (arXiv:2402.09353)",
        fields=_ADAPTER,
        is_baseline=True,
    ),
    "full": Method(label="full", trains="the weight itself", fields=frozenset({"learning_rate", "weight_decay"})),
    "frozen": Method(label="frozen", trains="nothing", fields=frozenset()),
}
assert tuple(METHODS) == get_args(RuleMethod)


def label_of(method: str, protect: float = 0.0) -> str:
    """Return the name of a method for a reader. A name that this version does not know stays unchanged.

    >>> label_of("milora", 0.95), label_of("pissa"), label_of("newer")
    ('protected MiLoRA', 'PiSSA', 'newer')
    """
    label = METHODS[method].label if method in METHODS else method
    return f"protected {label}" if protect else label


def what_trains(method: str, protect: float | None = None) -> str:
    """Return in words what a rule with this method and share (None: its default) trains; "" for an unknown method.

    >>> what_trains("milora", 0.95)
    'new directions only; 95 % of what ordinary text and pictures use stays untouched'
    >>> what_trains("full")
    'the weight itself'
    """
    if method not in METHODS:
        return ""
    row = METHODS[method]
    protect = row.protect if protect is None else protect
    if not protect:
        return row.trains
    return f"new directions only; {100 * protect:g} % of what ordinary text and pictures use stays untouched"


class PolicyError(UserError):
    """Problems of a policy. `where` is the dotted key, for example `policy[2].rank`."""


Number = int | float


class Rule(Strict):
    """The settings for the modules that `modules` selects. A field of None keeps the value of earlier rules.

    Creating one raises PolicyError with all problems of its values.
    """

    modules: str = Field(min_length=1, description="a tower, a selector or a glob", examples=["language"])
    method: RuleMethod | None = None
    rank: PositiveInt | None = Field(default=None, description="a positive integer")
    alpha: Number | None = Field(default=None, gt=0, description="a number above 0")
    rslora: bool | None = Field(default=None, description="true or false")
    dropout: Number | None = Field(default=None, ge=0, lt=1, description="a number from 0, below 1")
    seed: int | None = Field(default=None, ge=0, lt=2**32, description="an integer from 0 to 2**32 - 1")
    protect: Number | None = Field(default=None, ge=0, lt=1, description="a share from 0, below 1")
    learning_rate: Number | None = Field(default=None, gt=0, description="a number above 0")
    weight_decay: Number | None = Field(default=None, ge=0, description="a number from 0")

    if not TYPE_CHECKING:  # for type checkers, the arguments are the fields

        def __init__(self, **values: Any) -> None:
            try:
                super().__init__(**values)
            except ValidationError as error:
                raise PolicyError(problems=problems_of(error, type(self), "policy")) from None

    def in_force(self) -> dict[str, Any]:
        """Return the rule as a mapping, as in YAML, with the share that its method protects by default."""
        share = {} if self.method is None else {"protect": METHODS[self.method].protect}
        return share | self.model_dump(exclude_defaults=True)


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
    seed: int = 0
    protect: float = 0.0  # the share of the layer's input energy that the update leaves alone; 0: not protected
    learning_rate: float | None = None
    weight_decay: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

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
    def is_decomposed(self) -> bool:
        return self.part is not None

    @property
    def has_fixed_A(self) -> bool:
        """Return True if A stays at its start, off the protected inputs, and B trains from zero at PEFT's rank r."""
        return self.protect > 0

    @property
    def has_anchor(self) -> bool:
        """Return True if a frozen copy of the initial factors is subtracted, so that PEFT's rank is 2r."""
        return self.is_decomposed and not self.has_fixed_A

    @property
    def adapter_size(self) -> int:
        """Return the number of trained parameters of an adapter: r (in + out), with exceptions.

        A fixed A leaves B, and DoRA trains one more number for each row of the weight.
        """
        rows, columns = self.shape
        assert self.rank is not None
        if self.has_fixed_A:
            return self.rank * rows
        return self.rank * (rows + columns) + (rows if self.method == "dora" else 0)


RuleDict = dict[str, Any]

# MiLoRA off the protected inputs (docs/results.md). Rank and rate of the language tower are from the paper's
# LLaVA-1.5-7B (arXiv:2406.09044, Table 11).
DEFAULT_RULES: tuple[RuleDict, ...] = (
    {"modules": "language", "method": "milora", "rank": 128, "alpha": 128, "dropout": 0.05, "learning_rate": 2e-4},
    {"modules": "projector", "method": "milora", "rank": 64, "alpha": 64, "dropout": 0.05, "learning_rate": 2e-4},
)
# A projector with random weights cannot learn its task at rank 64; LLaVA's first stage has this rate.
UNALIGNED_PROJECTOR: RuleDict = {"modules": "projector", "method": "full", "learning_rate": 1e-3}
# A projector without linear layers takes no adapter; LLaVA's second stage has this rate.
FULL_PROJECTOR: RuleDict = {"modules": "projector", "method": "full", "learning_rate": 2e-5}


def without_projector(rules: Sequence[Mapping[str, Any]]) -> list[RuleDict]:
    """Return the default rules for a model without a projector.

    >>> [rule["modules"] for rule in without_projector(DEFAULT_RULES)]
    ['language']
    """
    return [dict(rule) for rule in rules if rule["modules"] != "projector"]
