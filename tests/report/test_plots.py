from __future__ import annotations

import csv
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from milora_vl.report import figures, plots
from milora_vl.report.plots import PLOT_STYLES, PlotStyle
from milora_vl.report.run_page import Layer, Metric, Run, Score, read_run
from support.fake_run import log_history, make_run

pytestmark = pytest.mark.usefixtures("real_plots")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return read_run(make_run(tmp_path_factory.mktemp("plots") / "run", num_questions=40))


def opened(figure: Any) -> Image.Image:
    """The drawn picture; a warning of matplotlib's (nothing to show, no room) fails the test."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return Image.open(io.BytesIO(plots.png(figure)))


@pytest.mark.parametrize("style", PLOT_STYLES)
def test_every_plot_is_as_wide_as_its_style_and_stands_on_its_paper(run: Run, style: PlotStyle) -> None:
    draws: list[Callable[[], Any]] = [
        lambda: plots.loss_figure(run.history, style),
        lambda: plots.spectrum_figure(run.layers, style),
        lambda: plots.scores_figure(run.comparisons[0].scores, style),
    ]
    for draw in draws:
        image = opened(draw())
        assert image.width == round(200 * style.width)
        paper = "#" + image.convert("RGB").crop((2, 2, 3, 3)).tobytes().hex()
        assert all(abs(int(paper[i : i + 2], 16) - int(style.paper[i : i + 2], 16)) < 6 for i in (1, 3, 5))


def test_short_and_odd_runs_can_be_drawn() -> None:
    layer = Layer("a.b", "language", (4, 4), (1.0, 0.5, 0.0, 0.0), (2, 4), "milora", None)
    rest = Layer("a.c", "vision", (1, 9), (0.0,), None, "frozen", None)
    opened(plots.loss_figure([{"step": 1, "loss": 2.0}]))
    opened(plots.loss_figure([*log_history()[:3], {"step": 9, "eval_loss": 1.0}]))
    opened(plots.spectrum_figure([layer, rest]))
    opened(plots.scores_figure([Score("pope", "accuracy", None, Metric("accuracy", 0.5), True)]))
    opened(plots.scores_figure([Score("pope", "accuracy", Metric("accuracy", 1.0, 0.1, baseline=0.5), None, True)]))


def test_smoothing_keeps_a_straight_line() -> None:
    line = [float(i) for i in range(50)]
    assert plots._smooth(line) == pytest.approx(line)


def test_smoothing_calms_noise() -> None:
    noise = [float(i % 2) for i in range(60)]
    assert max(plots._smooth(noise)[5:-5]) < 0.6


def test_each_plot_has_its_numbers_beside_it(run: Run) -> None:
    made = figures.make(run)
    folder = run.folder / "plots"
    assert set(made) == {"loss", "spectrum", "scores-emoji"}
    assert {file.name for file in folder.iterdir()} == {f"{name}.{end}" for name in made for end in ("png", "csv")}
    assert len(rows(folder / "loss.csv")) == 105
    trained = [row for row in rows(folder / "spectrum.csv") if row["tower"] == "language" and row["trained"] == "True"]
    assert [int(row["component"]) for row in trained] == list(range(545, 577))
    scores = rows(folder / "scores-emoji.csv")
    assert {row["which"] for row in scores} == {"before", "after"}
    mean = next(metric for name, metric in run.comparisons[0].after.metrics if metric.name == "mean over types")  # type: ignore[union-attr]
    assert any(float(row["value"]) == mean.value for row in scores if row["metric"] == "mean over types")


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))
