from __future__ import annotations

import io
import warnings
from typing import Any

import pytest
from PIL import Image

from milora_vl.report import plots
from milora_vl.report.read_run import RunFiles, read_run
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
    assert opened(plots.loss_figure(run.history)).width == round(200 * plots.WIDTH)


def test_short_and_odd_runs_can_be_drawn() -> None:
    opened(plots.loss_figure([{"step": 1, "loss": 2.0}]))
    opened(plots.loss_figure([*log_history()[:3], {"step": 9, "eval_loss": 1.0}]))
    opened(plots.steps_figure([{"step": 1, "forgetting": 0.1, "forgetting_stderr": 0.0}], {"": "forgetting"}, "nats"))
