from __future__ import annotations

import io
import warnings
from typing import Any

import pytest
from PIL import Image

from milora_vl.report import plots
from milora_vl.report.read_run import RunFiles, Score, read_run
from support.fake_run import log_history, make_run

pytestmark = pytest.mark.usefixtures("real_plots")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFiles:
    return read_run(make_run(tmp_path_factory.mktemp("plots") / "run", num_questions=40))


def opened(figure: Any) -> Image.Image:
    """The drawn picture; a warning of matplotlib's (nothing to show, no room) fails the test."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return Image.open(io.BytesIO(plots.png(figure)))


def test_every_plot_is_as_wide_as_the_page(run: RunFiles) -> None:
    for figure in (plots.loss_figure(run.history), plots.scores_figure(run.comparisons[0].scores())):
        assert opened(figure).width == round(200 * plots.WIDTH)


def test_short_and_odd_runs_can_be_drawn() -> None:
    opened(plots.loss_figure([{"step": 1, "loss": 2.0}]))
    opened(plots.loss_figure([*log_history()[:3], {"step": 9, "eval_loss": 1.0}]))
    opened(plots.steps_figure([{"step": 1, "forgetting": 0.1, "forgetting_stderr": 0.0}], {"": "forgetting"}, "nats"))
    half, whole = {"name": "accuracy", "value": 0.5}, {"name": "accuracy", "value": 1.0, "stderr": 0.1, "baseline": 0.5}
    opened(plots.scores_figure([Score("pope", None, half)]))
    opened(plots.scores_figure([Score("pope", whole, None)]))


def test_rows_of_several_benchmarks_have_their_names() -> None:
    metrics = [{"name": "accuracy", "value": 0.5}, {"name": "answer in first line", "value": 0.4}]
    one = [Score("old", None, metric) for metric in metrics]
    assert plots.names_of(one) == ["accuracy", "answer in first line"]
    two = [*one, Score("new", None, metrics[0])]
    (axis,) = plots.scores_figure(two).axes
    words = [label.get_text() for label in axis.get_yticklabels()]
    assert words == ["old: accuracy", "old: answer in first line", "new: accuracy"]
