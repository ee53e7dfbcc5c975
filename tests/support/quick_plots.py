"""No pictures of plots: most tests want a run with its report, but to draw the report takes longer than the training.

Our code makes each figure and Matplotlib does not draw it: the page has a small blank picture. The fixture `real_plots`
gives a test the plots that a user gets.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from milora_vl.report import plots

_PNG = plots.png


@cache
def _blank() -> bytes:
    from matplotlib.figure import Figure

    return _PNG(Figure(figsize=(0.2, 0.2)))


def blank(figure: Any) -> bytes:
    """Return a small picture instead of the figure."""
    return _blank()


def replace() -> None:
    """Draw nothing from now on."""
    plots.png = blank


def restore() -> None:
    """Draw as for a user from now on."""
    plots.png = _PNG
