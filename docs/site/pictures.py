"""Draw the pictures of docs/how-it-works.md into docs/pictures: `python docs/site/pictures.py`.

The spectrum belongs to a real weight, in docs/pictures/weight.csv. `--measure` writes that file and layers.csv again,
with the extra `demo`: singular values of the weight, the share of its inputs' energy along each right singular vector,
and for each layer the share along the last of them over an even share, on 1,024 tokens of each of three books.
The cloud of inputs is drawn at random; its row goes through the code that training uses.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle
from torch import Tensor, nn

from milora_vl import load_model
from milora_vl.core.adapter.fixed_a import off_inputs
from milora_vl.core.calibration.activations import energy_limits
from milora_vl.core.calibration.bases import first_directions
from milora_vl.forgetting.measure import general_text
from milora_vl.report.plots import INK, page_figure, png, write_csv

FOLDER = Path(__file__).resolve().parents[1] / "pictures"
WEIGHT, RANK, TOKENS = "model.layers.15.mlp.up_proj", 64, 1024
# The colours of Okabe and Ito; words repeat what they say.
TRAINS, FROZEN, INPUTS, ADDED = "#0072B2", "#D9D9D9", "#E69F00", "#E3A5C7"
WIDTH = 5.0  # inches, with text of 9 points: readable on a page of 380 pixels
LINES = "#8A8A8A"
ARROW = "-|>,head_length=5,head_width=2.5"


def towers() -> Figure:
    """LLaVA's towers, coloured by what trains."""
    with canvas(4.1) as (figure, axes):
        words(axes, 2.5, 3.98, "answer")
        arrow(axes, (2.5, 3.6), (2.5, 3.88))
        box(axes, 0.2, 2.6, 4.6, 1.0, "white", "")
        words(axes, 0.35, 3.4, "language tower: 32 blocks of", ha="left")
        for x, name in ((0.35, "attention"), (2.6, "MLP")):
            layer(axes, x, 2.72, 2.05, name, "rank 128")
        layer(axes, 0.2, 1.75, 2.5, "projector", "rank 64")
        box(axes, 0.2, 0.9, 2.5, 0.5, FROZEN, "vision tower")
        box(axes, 3.2, 0.9, 1.6, 0.5, FROZEN, "embeddings")
        words(axes, 1.45, 0.55, "picture")
        words(axes, 4.0, 0.55, "question")
        for x, low, high in (
            (1.45, 0.65, 0.9),
            (1.45, 1.4, 1.75),
            (1.45, 2.25, 2.6),
            (4.0, 0.65, 0.9),
            (4.0, 1.4, 2.6),
        ):
            arrow(axes, (x, low), (x, high))
        legend(axes, 0.15, ((FROZEN, "frozen"), (TRAINS, "trains: an adapter on each linear layer")))
    return figure


def spectrum() -> Figure:
    """The spectrum of a weight: the parts of PiSSA and MiLoRA, its inputs, and two ways to write one model."""
    sigma, energy = (column("weight.csv", name) for name in ("sigma", "input_energy"))
    ends = column("layers.csv", "last_over_even")
    count = len(sigma)
    with page_figure(5.6, WIDTH) as figure, mpl.rc_context({"font.size": 9}):
        top, middle, bottom = figure.subplots(3, height_ratios=(5, 3.4, 5.2))
        places = range(count)
        top.fill_between(places, sigma, color=FROZEN, lw=0)
        top.fill_between(places[: RANK + 1], sigma[: RANK + 1], color=INPUTS, lw=0)
        top.fill_between(places[-RANK - 1 :], sigma[-RANK - 1 :], color=TRAINS, lw=0)
        top.plot(places, sigma, color=INK, lw=1)
        top.set(xlim=(0, count), ylim=(0, None), xticks=[])
        top.set_title(f"A weight W has {count} directions. How much it amplifies each:", fontsize=9, loc="left")
        top.annotate(f"PiSSA trains\nthe first {RANK}", (RANK * 0.55, sigma[RANK // 2]), (100, 0.82 * sigma[0]), **TO)
        top.annotate(
            f"MiLoRA trains\nthe last {RANK}", (count - RANK / 2, sigma[-RANK // 2]), (count - 5, 0.62 * sigma[0]),
            ha="right", **TO,
        )  # fmt: skip
        bins = [100 * sum(energy[first : first + RANK]) for first in range(0, count, RANK)]
        starts = [first + RANK / 2 for first in range(0, count, RANK)]
        bars = middle.bar(starts, bins, RANK * 0.86, color=[INPUTS, *[FROZEN] * (len(bins) - 2), TRAINS])
        middle.bar_label(bars, [f"{value:.0f} %" for value in bins], padding=1, fontsize=9)
        middle.set(xlim=(0, count), ylim=(0, 1.25 * max(bins)), xticks=[], yticks=[])
        middle.spines["left"].set_visible(False)
        above = f"In {sum(end > 1 for end in ends)} of {len(ends)} layers the last {RANK} get more than an even share."
        middle.set_xlabel(above, fontsize=9, loc="left")
        middle.set_title(f"How much of ordinary text comes in along each {RANK} of them:", fontsize=9, loc="left")
        _forms(bottom)
    return figure


def _forms(axes: Axes) -> None:
    plain(axes, (0, 5), (0, 2.15))
    words(axes, 0, 1.98, "MiLoRA, two ways to write the same model:", ha="left", weight="normal")
    for y, label in ((1.1, "the\npaper"), (0.3, "here")):
        words(axes, 0.28, y + 0.25, label)
    box(axes, 0.65, 1.1, 1.5, 0.5, FROZEN, "W − B₀A₀")
    words(axes, 2.3, 1.35, "+")
    box(axes, 2.45, 1.1, 0.75, 0.5, TRAINS, "B A")
    words(axes, 3.3, 1.35, "base changed", ha="left")
    box(axes, 0.65, 0.3, 1.5, 0.5, FROZEN, "W")
    words(axes, 2.3, 0.55, "+")
    box(axes, 2.45, 0.3, 0.75, 0.5, TRAINS, "B A")
    words(axes, 3.3, 0.55, "−")
    box(axes, 3.4, 0.3, 0.75, 0.5, FROZEN, "B₀A₀")
    words(axes, 4.22, 0.55, "base\nuntouched", ha="left")
    words(axes, 0.65, 0.1, "A₀, B₀: the start of A and B. Frozen, subtracted.", ha="left")


def boxes() -> Figure:
    """LoRA, MiLoRA and the default: what is frozen, what trains, what is stored."""
    rows = ("A starts as", "B starts as", "trains", "reads", "stored")
    kinds = (
        ("LoRA", TRAINS, ("random rows", "zero", "A and B", "all inputs", "A and B\n(rank r)")),
        ("MiLoRA (paper)", TRAINS, ("last r of W", "last r of W", "A and B", "all inputs", "A, B, A₀, B₀\n(rank 2r)")),
        (
            "protected MiLoRA",
            FROZEN,
            ("last r of W,\nV removed", "zero", "B", "about 5 % of\nordinary inputs", "A and B\n(rank r)"),
        ),
    )
    with canvas(5.3) as (figure, axes):
        for number, (name, colour, cells) in enumerate(kinds):
            x = 0.05 + 1.66 * number
            axes.add_patch(Rectangle((x, 0.4), 1.58, 4.85, fill=False, ec=LINES, lw=0.8))
            words(axes, x + 0.79, 5.08, name, weight="bold")
            box(axes, x + 0.08, 3.9, 0.5, 1.0, FROZEN, "W")
            words(axes, x + 0.67, 4.4, "+")
            box(axes, x + 0.77, 3.9, 0.2, 1.0, TRAINS, "B")
            box(axes, x + 1.01, 4.68, 0.5, 0.22, colour, "A")
            if name.startswith("MiLoRA"):
                words(axes, x + 0.67, 3.62, "−")
                box(axes, x + 0.77, 3.51, 0.74, 0.22, FROZEN, "B₀ A₀")
            for place, (title, text) in enumerate(zip(rows, cells, strict=True)):
                y = 3.28 - 0.6 * place
                words(axes, x + 0.79, y, title, color="#666666")
                words(axes, x + 0.79, y - 0.11, text, va="top")
        legend(axes, 0.15, ((FROZEN, "frozen"), (TRAINS, "trains")))
    return figure


def cloud() -> Figure:
    """Ordinary inputs as a cloud, V as its long axis, and a row of A before and after V is removed."""
    turn = torch.tensor(0.45)
    directions = torch.tensor([[turn.cos(), turn.sin()], [-turn.sin(), turn.cos()]])
    points = torch.randn(250, 2, generator=torch.Generator().manual_seed(1))
    points = (points - points.mean(0)) / points.std(0) * torch.tensor([0.95, 0.05]).sqrt() @ directions
    C = points.T @ points
    V, _ = first_directions(C, 0.9, len(C))
    V = V * V[0].sign()
    before = torch.tensor([[0.5, 0.87]])
    after, _ = off_inputs(before, V)
    with page_figure(3.1, WIDTH) as figure, mpl.rc_context({"font.size": 9}):
        titles = ("a row of A", "the same, V removed")
        for axes, row, title in zip(figure.subplots(1, 2), (before, after), titles, strict=True):
            unit = (row / row.norm())[0]
            share = float((unit @ C @ unit) / C.trace())
            plain(axes, (-2.7, 2.7), (-3.3, 2.9))
            axes.set_aspect("equal")
            axes.scatter(*points.T.tolist(), s=5, color=LINES, lw=0)
            ends = 2.5 * V[:, 0]
            axes.plot(*torch.stack([-ends, ends], dim=1).tolist(), color=INPUTS, lw=2)
            axes.text(*(ends + torch.tensor([0.0, 0.22])).tolist(), "V", color="#8A5F00", weight="bold", ha="center")
            read = (points @ unit)[:, None] * unit
            axes.scatter(*read.T.tolist(), s=9, color=TRAINS, lw=0, zorder=3)
            arrow(axes, (0, 0), (2.3 * unit).tolist(), TRAINS, 1.5)
            axes.text(*(2.3 * unit + torch.tensor([0.2, -0.1])).tolist(), "A", color=TRAINS, weight="bold")
            words(axes, 0, 2.75, title)
            words(axes, 0, -3.1, f"reads {100 * share:.0f} % of the energy")
        words(figure.axes[0], -2.7, -1.9, "ordinary\ninputs", ha="left", color="#555555")
        words(figure.axes[1], 0.35, -0.95, "blue: what\nA reads", ha="left", color=TRAINS)
    return figure


def steps() -> Figure:
    """Eight steps of a training, with base_kl in the fourth and the eighth."""
    with canvas(4.3) as (figure, axes):
        words(axes, 0.1, 4.15, "eight steps", ha="left", color="#666666")
        arrow(axes, (0.85, 4.15), (4.85, 4.15), "#666666")
        for step in range(1, 9):
            x = 0.1 + 0.605 * (step - 1)
            box(axes, x, 3.42, 0.54, 0.55, TRAINS, "task\nloss")
            if step % 4 == 0:
                words(axes, x + 0.27, 3.31, "+")
                box(axes, x - 0.1, 2.75, 0.7, 0.45, ADDED, "base_kl")
        axes.plot([4.235, 0.1], [2.75, 2.4], color=LINES, lw=0.8)
        axes.plot([4.935, 4.9], [2.75, 2.4], color=LINES, lw=0.8)
        axes.add_patch(Rectangle((0.1, 0.05), 4.8, 2.35, fill=False, ec=LINES, lw=0.8))
        words(axes, 0.25, 2.17, "base_kl reads two texts of the base, twice:", ha="left")
        box(axes, 0.25, 0.65, 0.75, 0.9, "white", "two\ntexts")
        box(axes, 1.4, 1.2, 1.5, 0.6, TRAINS, "adapter on:\nthe tuned model")
        box(axes, 1.4, 0.3, 1.5, 0.6, FROZEN, "adapter off:\nthe base")
        box(axes, 3.35, 0.6, 1.4, 0.9, ADDED, "how different is\nthe next word?\n(KL)")
        for y in (1.5, 0.6):
            arrow(axes, (1.0, 1.1 + (y - 1.05) / 4), (1.4, y))
            arrow(axes, (2.9, y), (3.35, 1.05 + (y - 1.05) / 4))
    return figure


PICTURES: dict[str, Callable[[], Figure]] = {
    "towers": towers, "spectrum": spectrum, "boxes": boxes, "cloud": cloud, "steps": steps,
}  # fmt: skip
TO = {"arrowprops": {"arrowstyle": "-", "lw": 0.8}, "va": "center"}


def column(file: str, name: str) -> list[float]:
    """Return the numbers of a column of a CSV file."""
    with (FOLDER / file).open(encoding="utf-8", newline="") as opened:
        return [float(row[name]) for row in csv.DictReader(opened)]


def measure() -> None:
    """Write docs/pictures/weight.csv and layers.csv."""
    model, tokenizer = load_model("smollm2", dtype=torch.float32)
    layers = {path: layer for path, layer in model.model.named_modules(prefix="model") if isinstance(layer, nn.Linear)}
    sums = {path: torch.zeros(layer.in_features, layer.in_features) for path, layer in layers.items()}

    def hook(path: str) -> Callable[[nn.Module, tuple[Tensor]], None]:
        def add(_: nn.Module, inputs: tuple[Tensor]) -> None:
            rows = inputs[0][0]
            rows = rows * energy_limits(rows).sqrt()[:, None]
            sums[path] += rows.T @ rows

        return add

    for path, layer in layers.items():
        layer.register_forward_pre_hook(hook(path))
    with torch.no_grad():
        for book in general_text().values():
            ids = tokenizer(book, return_tensors="pt")["input_ids"][0, :TOKENS]
            for part in ids.split(256):
                model(part[None])
    ends = []
    for path, layer in layers.items():
        _, S, Vh = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
        shares = ((Vh @ sums[path]) * Vh).sum(dim=1) / sums[path].trace()
        even = RANK / layer.in_features
        ends.append((path, f"{shares[-RANK:].sum() / even:.3f}"))
        if path == WEIGHT:
            rows = [(f"{s:.4f}", f"{share:.6f}") for s, share in zip(S.tolist(), shares.tolist(), strict=True)]
            write_csv(FOLDER / "weight.csv", ("sigma", "input_energy"), rows)
    write_csv(FOLDER / "layers.csv", ("layer", "last_over_even"), ends)


@contextmanager
def canvas(height: float) -> Iterator[tuple[Figure, Axes]]:
    """Yield a figure whose axes count in inches, from its lower left corner."""
    with page_figure(height, WIDTH) as figure, mpl.rc_context({"font.size": 9}):
        figure.set_layout_engine("none")
        axes = figure.add_axes((0, 0, 1, 1))
        plain(axes, (0, WIDTH), (0, height))
        yield figure, axes


def plain(axes: Axes, x: tuple[float, float], y: tuple[float, float]) -> None:
    axes.set(xlim=x, ylim=y)
    axes.set_axis_off()


def box(axes: Axes, x: float, y: float, width: float, height: float, colour: str, text: str) -> None:
    axes.add_patch(Rectangle((x, y), width, height, fc=colour, ec=INK, lw=0.8))
    light = colour == TRAINS
    words(axes, x + width / 2, y + height / 2, text, color="white" if light else INK)


def layer(axes: Axes, x: float, y: float, width: float, name: str, rank: str) -> None:
    """Draw frozen weights and their adapter."""
    box(axes, x, y, width, 0.5, FROZEN, "")
    words(axes, x + (width - 0.85) / 2, y + 0.25, name)
    box(axes, x + width - 0.85, y, 0.85, 0.5, TRAINS, f"+ B A\n{rank}")


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = INK, lw: float = 1.0) -> None:
    patch = FancyArrowPatch(
        tuple(start), tuple(end), arrowstyle=ARROW, color=colour, lw=lw, shrinkA=0, shrinkB=0, zorder=4
    )
    axes.add_patch(patch)


def words(axes: Axes, x: float, y: float, text: str, ha: str = "center", va: str = "center", **style: str) -> None:
    axes.text(x, y, text, ha=ha, va=va, linespacing=1.15, **style)


def legend(axes: Axes, y: float, entries: tuple[tuple[str, str], ...]) -> None:
    x = 0.2
    for colour, text in entries:
        axes.add_patch(Rectangle((x, y - 0.08), 0.22, 0.16, fc=colour, ec=INK, lw=0.8))
        words(axes, x + 0.3, y, text, ha="left")
        x += 1.1


def main() -> None:
    if "--measure" in sys.argv[1:]:
        measure()
    for name, draw in PICTURES.items():
        (FOLDER / f"{name}.png").write_bytes(png(draw()))


if __name__ == "__main__":
    main()
