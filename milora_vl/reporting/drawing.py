"""A figure drawn for every kind of page, and as files: PNG always, PDF where it may go into a paper."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from milora_data.page.pictures import data_uri
from milora_vl.reporting import plots
from milora_vl.reporting.plots import LOOKS, Look

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NARROW, _DARK = "(max-width: 600px)", "(prefers-color-scheme: dark)"


@dataclass(frozen=True, slots=True)
class Plot:
    """A plot inside the page: its light, wide form, (media query, form) of the others, and what it says in words."""

    uri: str
    sources: tuple[tuple[str, str], ...]
    alt: str


def draw(folder: Path, name: str, figure: Callable[[Look], Figure], alt: str, *, with_pdf: bool = False) -> Plot:
    """Draw a figure in all looks; write `name`.png (and .pdf) into `folder` as it is on a light, wide page."""
    images = {look: plots.png(figure(look)) for look in LOOKS}
    (folder / f"{name}.png").write_bytes(images[Look()])
    if with_pdf:
        figure(Look()).savefig(folder / f"{name}.pdf", metadata={"CreationDate": None})
    uris = {look: data_uri(image, "image/png") for look, image in images.items()}
    sources = (
        (f"{_NARROW} and {_DARK}", uris[Look(dark=True, narrow=True)]),
        (_NARROW, uris[Look(narrow=True)]),
        (_DARK, uris[Look(dark=True)]),
    )
    return Plot(uris[Look()], sources, alt)
