"""Coarse plots: most tests want a run with its report, but to draw the report takes longer than the short training.

All code of ours that makes a figure runs in all styles. Matplotlib draws the figure for light, wide pages alone, with
few dots per inch. The fixture `real_plots` gives a test the plots that a user gets.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from milora_vl.report import plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COARSE = 40  # dots per inch
_PNG, _DPI = plots.png, plots._DPI


def quick_png(figure: Figure) -> bytes:
    """Return the figure in the first style as PNG, and the same small PNG for the others."""
    from matplotlib.colors import to_hex

    style = plots.PLOT_STYLES[0]
    is_first = figure.get_figwidth() == style.width and to_hex(figure.get_facecolor()) == style.paper
    return _PNG(figure) if is_first else blank()


@cache
def blank() -> bytes:
    from matplotlib.figure import Figure

    return _PNG(Figure(figsize=(0.2, 0.2)))


def replace() -> None:
    """Draw coarsely from now on."""
    plots.png, plots._DPI = quick_png, _COARSE


def restore() -> None:
    """Draw as for a user from now on."""
    plots.png, plots._DPI = _PNG, _DPI
