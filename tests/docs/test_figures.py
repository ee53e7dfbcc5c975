"""The pages have the numbers of the studies, and README and those that advise no measured number beside them.

The pictures of docs/how-it-works.md and README's chart are drawn without labels over each other.
"""

from __future__ import annotations

import re
import runpy
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from studies import figures

PICTURES = runpy.run_path(str(figures.ROOT / "docs" / "site" / "pictures.py"))["PICTURES"]

CODE = re.compile(r"^```.*?^```$|`[^`\n]+`", re.MULTILINE | re.DOTALL)
# A ratio below one, a factor, a percentage, or a mean with its interval.
MEASURED = re.compile(r"(?<![\w.])0\.\d+|\d ?(?:times|x)\b|\d ?%(?! intervals)|±")


@pytest.mark.parametrize("page", figures.PAGES, ids=lambda page: page.name)
def test_the_numbers_of_a_page_are_those_of_the_studies(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert figures.written(text) == text, "python -m studies.figures writes the page again"


@pytest.mark.parametrize(
    "page", [page for page in figures.PAGES if page.name != "results.md"], ids=lambda page: page.name
)
def test_no_measured_number_is_typed(page: Path) -> None:
    typed = CODE.sub("", figures.BLOCK.sub("", page.read_text(encoding="utf-8")))
    assert [line for line in typed.splitlines() if MEASURED.search(line)] == []


def test_a_changed_number_is_written_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(figures.FIGURES, "table", lambda: "| 0.5 |\n")
    page = "a\n<!-- figures: table -->\n| {} |\n<!-- end -->\nb\n"
    assert figures.written(page.format("0.4")) == page.format("0.5")


def test_the_chart_has_each_training_and_the_mean_of_each_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header = "method,learning_rate,rank,seed,validation_loss,score,forgetting," + ",".join(figures.PROBES)
    rows = (
        "ours,0.001,,0,1.0,0.3,0.1,1,2,4",
        "ours,0.001,,1,1.2,0.5,0.2,1,2,4",
        "ours,0.002,,0,0.9,0.4,0.4,1,2,4",
        "lora,0.001,,0,0.9,0.4,0.3,2,2,2",
    )
    (tmp_path / "some.csv").write_text("\n".join((header, *rows)), encoding="utf-8")
    text = [",".join(line.split(",")[:7]) for line in (header, *rows)]
    (tmp_path / "text.csv").write_text("\n".join(text), encoding="utf-8")
    monkeypatch.setattr(figures, "DOCS", tmp_path)
    arms = {"ours": figures.OURS, "lora": "LoRA"}
    monkeypatch.setattr(figures, "IN_SHORT", [figures.TaskFiles(one, 1, 1, (one,), arms) for one in ("text", "some")])
    of_text, of_pictures, *_ = figures.chart().axes
    points, means = (line.get_xydata().tolist() for line in of_text.lines[:2])
    assert points == [[1.0, 0.1], [1.2, 0.2], [0.9, 0.4]]
    assert means == [pytest.approx([1.1, 0.15]), [0.9, 0.4]]
    assert of_pictures.lines[1].get_ydata().tolist() == pytest.approx([2, 2]), "the mean of three probes"
    assert len(of_text.lines) == 4


@pytest.mark.parametrize("draw", [figures.chart, *PICTURES.values()], ids=lambda draw: draw.__name__)
def test_no_label_is_over_another_or_outside(draw: Callable[[], Figure]) -> None:
    figure = draw()
    FigureCanvasAgg(figure).draw()
    axes = figure.axes
    ticks = [(axis, tick) for one in axes for axis in (one.xaxis, one.yaxis) for tick in axis.get_major_ticks()]
    beyond = {
        label
        for axis, tick in ticks
        if not min(axis.get_view_interval()) <= tick.get_loc() <= max(axis.get_view_interval())
        for label in (tick.label1, tick.label2)
    }
    hidden = {
        label for one in axes if not one.axison for axis in (one.xaxis, one.yaxis) for label in axis.findobj(Text)
    }
    shown = set(figure.findobj(Text)) - beyond - hidden
    boxes = [(text.get_text(), text.get_window_extent()) for text in shown if text.get_text() and text.get_visible()]
    assert [(a, b) for (a, one), (b, other) in combinations(boxes, 2) if one.overlaps(other)] == []
    assert [name for name, box in boxes if box.x0 < 0 or box.x1 > figure.bbox.x1] == []
    assert len(boxes) > 5


def test_the_page_shows_every_picture() -> None:
    page = (figures.ROOT / "docs" / "how-it-works.md").read_text(encoding="utf-8")
    assert re.findall(r"\]\(pictures/(\w+)\.png\)", page) == ["towers", "boxes", "spectrum", "cloud", "steps"]
    assert all((figures.ROOT / "docs" / "pictures" / f"{name}.png").is_file() for name in PICTURES)
