"""The methods of a rule (milora, lora, full, frozen, ...) and their initial factors; docs/add-a-method.md adds one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:  # torch takes a second, and --help needs only the names below
    from torch import Generator, Tensor

    from milora_vl.core.svd import Part

    # (W, r, s, generator) -> (A0, B0): the factors A0 (r, in) and B0 (out, r) for the weight W (out, in), in float32 or
    # float64, at rank r; s is the scale of the update s (B A - B0 A0) x. The generator is on the CPU; its seed depends
    # on the module and on the field `seed`.
    Start = Callable[[Tensor, int, float, Generator], tuple[Tensor, Tensor]]

RuleMethod = Literal["milora", "gradient", "lora", "pissa", "random", "dora", "olora", "mica", "full", "frozen"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """The declaration of one method.

    - `label`: its name in reports and model cards.
    - `trains`: what it trains without protected inputs, one line; `what_trains` has the words for all rules.
    - `fixed_rows`: where the rows of A lie in a rule with `protect`, which fixes A.
    - `protect`: the share of a rule that sets none.
    - `fields`: the fields that it uses beside `modules` and `method`. Other fields in its rule are an error.
    - `start`: the initial factors A0 (r, in) and B0 (out, r) of a weight. Either the singular triplets that they hold
      ("minor", "principal", "random"), or a function that returns them, see `Start`. A frozen copy of both,
      the anchor, is subtracted, so that step 0 equals the base. None: PEFT initializes the adapter, or there is no
      adapter.
    - `fixes_A`: A never changes, with or without protected inputs.
    - `is_baseline`: all adapters of a policy use this method, or none does.
    """

    label: str
    trains: str
    fields: frozenset[str]
    fixed_rows: str = ""
    protect: float = 0.0
    start: Part | Start | None = None
    fixes_A: bool = False
    is_baseline: bool = False

    def __post_init__(self) -> None:
        assert self.part is not None or "sigma" not in self.fields, "sigma scales the singular values of a part"
        assert bool(self.fixed_rows) == ("protect" in self.fields), "a rule with protect says where A lies"

    @property
    def part(self) -> Part | None:
        """Return which singular triplets start the adapter, or None if something else does."""
        return self.start if isinstance(self.start, str) else None


def olora(W: Tensor, rank: int, scaling: float, generator: Generator) -> tuple[Tensor, Tensor]:
    """Return R[:r] and Q[:, :r] for W = Q R, as `olora_init` of PEFT (arXiv:2406.01775)."""
    import torch

    Q, R = torch.linalg.qr(W)
    return R[:rank], Q[:, :rank]


_ADAPTER = frozenset({"rank", "alpha", "rslora", "dropout", "learning_rate", "weight_decay"})
METHODS: dict[str, Method] = {
    "milora": Method(
        label="MiLoRA",
        trains="A and B, from the minor singular triplets: the last r of the weight (arXiv:2406.09044)",
        fields=_ADAPTER | {"sigma", "protect"},
        fixed_rows="at minor directions",
        start="minor",
    ),
    "gradient": Method(
        label="gradient",
        trains="B, from zero; A is fixed along the task's gradient",
        fields=_ADAPTER | {"protect"},
        fixed_rows="along the task's gradient",
        protect=0.95,  # docs/studies/fixed-a.md
        fixes_A=True,
    ),
    "lora": Method(
        label="LoRA",
        trains="A and B, as PEFT starts them: A at random, B at zero",
        fields=_ADAPTER | {"protect"},
        fixed_rows="at random directions",
    ),
    "pissa": Method(
        label="PiSSA",
        trains="A and B, from the principal singular triplets: the first r (arXiv:2404.02948)",
        fields=_ADAPTER | {"sigma", "protect"},
        fixed_rows="at principal directions",
        start="principal",
    ),
    "random": Method(
        label="random",
        trains="A and B, from r randomly drawn singular triplets",
        fields=_ADAPTER | {"sigma", "seed", "protect"},
        fixed_rows="at randomly drawn singular directions",
        start="random",
    ),
    "dora": Method(
        label="DoRA",
        trains="A and B of a LoRA, and the norm of each row of the weight (arXiv:2402.09353)",
        fields=_ADAPTER,
        is_baseline=True,
    ),
    "olora": Method(
        label="OLoRA",
        trains="A and B, from the first r rows of R and columns of Q, for W = Q R (arXiv:2406.01775)",
        fields=_ADAPTER,
        start=olora,
        is_baseline=True,
    ),
    "mica": Method(
        label="MiCA",
        trains="A, from zero; B is fixed at the last r left singular vectors (arXiv:2604.01694)",
        fields=_ADAPTER,
        is_baseline=True,
    ),
    "full": Method(label="full", trains="the weight itself", fields=frozenset({"learning_rate", "weight_decay"})),
    "frozen": Method(label="frozen", trains="nothing", fields=frozenset()),
}
assert tuple(METHODS) == get_args(RuleMethod)


def label_of(method: str) -> str:
    """Return the name of a method for a reader. A name that this version does not know stays unchanged.

    >>> label_of("pissa"), label_of("newer")
    ('PiSSA', 'newer')
    """
    return METHODS[method].label if method in METHODS else method


def what_trains(method: str, protect: float | None = None) -> str:
    """Return in words what a rule with this method and share (None: its default) trains; "" for an unknown method.

    >>> what_trains("milora", 0.95)
    'A fixed at minor directions, off 95 % of the inputs; B trains'
    >>> what_trains("full")
    'the weight itself'
    """
    if method not in METHODS:
        return ""
    row = METHODS[method]
    protect = row.protect if protect is None else protect
    return f"A fixed {row.fixed_rows}, off {100 * protect:g} % of the inputs; B trains" if protect else row.trains
