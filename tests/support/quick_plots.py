"""No pictures of plots: most tests want a run with its report, but to draw the report takes longer than the training.

Our code makes each figure, for light, wide pages, and Matplotlib does not draw it: the page has a small blank picture.
The fixture `real_plots` gives a test the plots that a user gets.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

from milora_vl.report import plots
from milora_vl.report.plots import PLOT_STYLES, PlotStyle, png

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ALL = plots.png_of_each_style


def blank_of_each_style(figure: Callable[[PlotStyle], Figure]) -> dict[PlotStyle, bytes]:
    """Make the figure for the first style; return the same small PNG for each."""
    figure(PLOT_STYLES[0])
    return dict.fromkeys(PLOT_STYLES, blank())


@cache
def blank() -> bytes:
    from matplotlib.figure import Figure

    return png(Figure(figsize=(0.2, 0.2)))


def replace() -> None:
    """Draw nothing from now on."""
    plots.png_of_each_style = blank_of_each_style


def restore() -> None:
    """Draw as for a user from now on."""
    plots.png_of_each_style = _ALL
