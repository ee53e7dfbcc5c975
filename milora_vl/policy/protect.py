"""The field `protect` of a rule: which singular directions of a weight its update stays out of, and how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from milora_data.errors import Problem

ProtectedBy = Literal["projection", "basis", "penalty"]
# Those whose update can stay outside. PiSSA trains the first directions themselves, a random part may hold some, and
# DoRA, OLoRA and MiCA change or start from them.
PROTECTING_METHODS = ("milora", "lora")


@dataclass(frozen=True, slots=True, kw_only=True)
class Protect:
    """Keep the update out of the `top` first singular directions of its weight, on both sides, while it trains.

    With V (in, k) and U (out, k) the first k right and left singular vectors of the base weight:

    `projection`: every step of the optimizer is followed by A <- A - (A V) V' and B <- B - U (U'B); `basis`: gradients
    are projected so too, before the optimizer sees them, which makes the training that of factors written as
    A (I - V V') and (I - U U') B, OPLoRA's (arXiv:2510.13003), while A and B stay plain. With SGD both are the same;
    Adam's moments hold what points into the directions under `projection`, nothing of it under `basis`.

    `penalty`: weight/2 (||A V||^2 + ||U'B||^2), decoupled as AdamW's weight decay is, so that Adam's second moment does
    not weaken it just where gradients are large, and losses stay comparable: after a step at learning rate lr, the
    share lr weight / (1 + lr weight) of what `projection` would remove (the penalty's proximal step, stable at any
    weight). At weight 1/lr that is half of it every step, and `projection` is the limit.
    """

    top: int
    by: ProtectedBy = "projection"
    weight: float | None = None

    @property
    def is_hard(self) -> bool:
        """Tell whether nothing of the update is left in the directions after a step."""
        return self.by != "penalty"

    def share(self, learning_rate: float) -> float:
        """Return which share of what lies in the directions is removed after a step.

        >>> Protect(top=8).share(2e-4), Protect(top=8, by="penalty", weight=5000.0).share(2e-4)
        (1.0, 0.5)
        """
        if self.weight is None:
            return 1.0
        return learning_rate * self.weight / (1 + learning_rate * self.weight)

    def __str__(self) -> str:
        """For tables."""
        return f"top {self.top} by {self.by}" + ("" if self.weight is None else f" {self.weight:g}")


def protect_problems(value: Any) -> list[Problem]:
    """What is wrong with a rule's `protect`, each with its place."""

    def wrong(field: str, message: str, hint: str = "") -> Problem:
        return Problem(message, "policy-protect", f".protect{field}", hint)

    if value is None:
        return []
    if not isinstance(value, Protect):
        return [wrong("", f"expected a mapping such as {{top: 64}} or {{top: 64, by: basis}}, got {value!r}")]
    found = []
    if isinstance(value.top, bool) or not isinstance(value.top, int) or value.top < 1:
        found.append(wrong(".top", f"expected how many directions, from 1, got {value.top!r}"))
    if value.by not in get_args(ProtectedBy):
        found.append(wrong(".by", f"expected one of {', '.join(get_args(ProtectedBy))}, got {value.by!r}"))
    elif value.by != "penalty" and value.weight is not None:
        found.append(wrong(".weight", f"by {value.by} cannot use it, it is for by: penalty"))
    elif value.by == "penalty" and not _is_positive(value.weight):
        found.append(
            wrong(
                ".weight",
                f"by penalty needs a number above 0, got {value.weight!r}",
                "1/learning rate halves what is inside at every step",
            )
        )
    return found


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")
