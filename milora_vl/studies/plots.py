"""The figure of the study of layers; the other figures are the same as in a sweep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from milora_vl.report.plots import PlotStyle, styled
from milora_vl.studies.decay import Layer
from milora_vl.sweep.plots import colour_of, mark_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def layers_figure(layers: Sequence[Layer], style: PlotStyle) -> Figure:
    """Draw how much each layer's adapter helps over the decay of its spectrum, with one marker per kind of layer."""
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(layer.kind for layer in layers))
    with styled(style):
        figure = Figure(figsize=(style.width, 4.2), layout="constrained")
        axis = figure.subplots()
        for place, kind in enumerate(kinds):
            of_kind = [layer for layer in layers if layer.kind == kind]
            axis.plot(
                [layer.decay for layer in of_kind], [layer.help for layer in of_kind], ls="", ms=7,
                marker=mark_of(place), color=colour_of(place, style), label=kind,
            )  # fmt: skip
        axis.set(xlabel="decay exponent of the spectrum", ylabel="validation loss saved by the layer’s adapter alone")
        figure.legend(loc="outside upper left", ncols=2 if style.narrow else 4, handletextpad=0.2)
    return figure
