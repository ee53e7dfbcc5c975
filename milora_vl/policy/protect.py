"""The field `protect` of a rule: the singular directions of a weight that its update must not change, and how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from milora_data.errors import Problem

ProtectedBy = Literal["projection", "basis", "penalty"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Protect:
    """Keep the update orthogonal to the first `top` singular directions of its weight, on both sides.

    V (in, k) and U (out, k) are the first k right and left singular vectors of the base weight. `by` is one of:

    - `projection`: after every optimizer step, A <- A - (A V) V' and B <- B - U (U'B).
    - `basis`: the gradients are projected too, before the optimizer reads them. This trains the factors A (I - V V')
      and (I - U U') B of OPLoRA (arXiv:2510.13003), while A and B are stored as plain factors. With SGD both ways are
      equal. Adam's moments contain the protected components under `projection`, and none under `basis`.
    - `penalty`: add weight/2 (||A V||^2 + ||U'B||^2) to the loss, decoupled from the gradient like AdamW's weight
      decay. Adam's second moment then does not weaken it, and losses stay comparable. It is computed as a proximal
      step, which is stable for any weight: a step at learning rate lr removes the share lr weight / (1 + lr weight) of
      the protected components. A weight of 1/lr removes half of them per step; `projection` is the limit.
    """

    top: int
    by: ProtectedBy = "projection"
    weight: float | None = None

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
        """Return the text for tables, for example `top 64 by projection`."""
        return f"top {self.top} by {self.by}" + ("" if self.weight is None else f" {self.weight:g}")


def protect_problems(value: Any) -> list[Problem]:
    """Return the problems of a rule's `protect`, each with its place."""

    def wrong(field: str, message: str, hint: str = "") -> Problem:
        return Problem(message, "policy-protect", f".protect{field}", hint)

    if value is None:
        return []
    if not isinstance(value, Protect):
        return [wrong("", f"expected a mapping such as {{top: 64}} or {{top: 64, by: basis}}, got {value!r}")]
    problems = []
    if isinstance(value.top, bool) or not isinstance(value.top, int) or value.top < 1:
        problems.append(wrong(".top", f"expected a positive number of directions, got {value.top!r}"))
    if value.by not in get_args(ProtectedBy):
        problems.append(wrong(".by", f"expected one of {', '.join(get_args(ProtectedBy))}, got {value.by!r}"))
    elif value.by != "penalty" and value.weight is not None:
        problems.append(wrong(".weight", f"by: {value.by} does not use it, only by: penalty does", "remove it"))
    elif value.by == "penalty" and not _is_positive(value.weight):
        problems.append(
            wrong(
                ".weight",
                f"by: penalty needs a number above 0, got {value.weight!r}",
                "1 / learning rate removes half of the protected components per step",
            )
        )
    return problems


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")
