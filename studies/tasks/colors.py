"""Names of colors ("dusty teal") with lightness and hue ("dark cyan").

From the color survey of xkcd (CC0), which matplotlib ships.
"""

from __future__ import annotations

from colorsys import rgb_to_hls

import torch
from matplotlib.colors import XKCD_COLORS, to_rgb

HUES = (
    "red", "orange", "yellow", "lime", "green", "mint", "cyan", "azure", "blue", "violet", "magenta", "pink",
)  # fmt: skip
GRAY = 0.12  # smallest saturation of a hue


def named_hues() -> list[tuple[str, str]]:
    """Return unique names with lightness and hue, in a fixed random order."""
    named = sorted((name.removeprefix("xkcd:"), _hue(*to_rgb(value))) for name, value in XKCD_COLORS.items())
    order = torch.randperm(len(named), generator=torch.Generator().manual_seed(0)).tolist()
    return [named[index] for index in order]


def _hue(red: float, green: float, blue: float) -> str:
    """Return the nearest of twelve hues or gray, after dark, medium or light (a third of the range each)."""
    hue, lightness, saturation = rgb_to_hls(red, green, blue)
    name = "gray" if saturation < GRAY else HUES[round(hue * len(HUES)) % len(HUES)]
    return f"{('dark', 'medium', 'light')[min(int(lightness * 3), 2)]} {name}"
