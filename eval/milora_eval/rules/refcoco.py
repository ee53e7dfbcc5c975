"""RefCOCO: parse boxes in answers, and compute their overlap. Follows lmms_eval/tasks/refcoco/utils_rec.py."""

from __future__ import annotations

import re
from collections.abc import Sequence

Box = tuple[float, float, float, float]
NULL_BOX: Box = (0.0, 0.0, 0.0, 0.0)
_NUMBER = r"(-?\d+(?:\.\d+)?)"
_BOX = re.compile(rf"\[\s*{_NUMBER},\s*{_NUMBER},\s*{_NUMBER},\s*{_NUMBER}\s*\]")


def box_of(text: str) -> Box:
    """Return the first [left, top, right, bottom] of an answer, or NULL_BOX.

    >>> box_of("It is at [0.1, 0.2, 0.5, 0.6].")
    (0.1, 0.2, 0.5, 0.6)
    """
    found = _BOX.search(text)
    if found is None:
        return NULL_BOX
    left, top, right, bottom = map(float, found.groups())
    return left, top, right, bottom


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the intersection over union of two boxes (left, top, right, bottom); 0 if both are empty."""
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    return width * height / union if union else 0.0
