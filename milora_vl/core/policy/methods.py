"""The methods of a rule (milora, lora, full, frozen, ...), and what each trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

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

    def __post_init__(self) -> None:
        assert self.part is not None or "sigma" not in self.fields, "sigma scales the singular values of a part"


_ADAPTER = frozenset({"rank", "alpha", "rslora", "dropout", "learning_rate", "weight_decay"})
METHODS: dict[str, Method] = {
    "milora": Method(
        label="MiLoRA",
        trains="A and B, from the minor singular triplets: the last r of the weight (arXiv:2406.09044)",
        fields=_ADAPTER | {"sigma", "protect"},
        protect=0.95,  # docs/studies/default.md
        part="minor",
    ),
    "lora": Method(
        label="LoRA",
        trains="A and B, as PEFT starts them: A at random, B at zero",
        fields=_ADAPTER | {"protect"},
    ),
    "pissa": Method(
        label="PiSSA",
        trains="A and B, from the principal singular triplets: the first r (arXiv:2404.02948)",
        fields=_ADAPTER | {"sigma", "protect"},
        part="principal",
    ),
    "random": Method(
        label="random",
        trains="A and B, from r randomly drawn singular triplets",
        fields=_ADAPTER | {"sigma", "seed", "protect"},
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
# Methods that wrote adapters once: name -> PEFT's rank divided by the rank in milora.json.
RETIRED = {"gradient": 1, "mica": 1, "olora": 2}


def label_of(method: str) -> str:
    """Return the name of a method for a reader. A name that this version does not know stays unchanged.

    >>> label_of("pissa"), label_of("newer")
    ('PiSSA', 'newer')
    """
    return METHODS[method].label if method in METHODS else method


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
