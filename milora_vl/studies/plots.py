"""The figure of the study of layers; the others are those of a sweep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from milora_vl.report.plots import Look, styled
from milora_vl.studies.decay import Layer
from milora_vl.sweep.plots import MARKS, colour_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def layers_figure(found: Sequence[Layer], look: Look) -> Figure:
    """Draw how much each layer's adapter helps over the decay of its spectrum, a mark a kind of layer."""
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(layer.kind for layer in found))
    with styled(look):
        figure = Figure(figsize=(look.width, 4.2), layout="constrained")
        axis = figure.subplots()
        for place, kind in enumerate(kinds):
            own = [layer for layer in found if layer.kind == kind]
            axis.plot(
                [layer.decay for layer in own], [layer.help for layer in own], ls="", ms=7,
                marker=MARKS[place % len(MARKS)], color=colour_of(place, look), label=kind,
            )  # fmt: skip
        axis.set(xlabel="decay exponent of the spectrum", ylabel="validation loss saved by the layer’s adapter alone")
        figure.legend(loc="outside upper left", ncols=2 if look.narrow else 4, handletextpad=0.2)
    return figure
