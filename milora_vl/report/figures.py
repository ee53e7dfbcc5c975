"""The plots of one run: PNG files in plots/, and data URIs for the page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from milora_vl.report import plots, wording
from milora_vl.report.plots import Plot, draw
from milora_vl.report.run_page import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def make(run: Run) -> dict[str, Plot]:
    """Draw the plots that the run's files allow: `loss`, `forgetting`, `suite`, `spectrum` and `scores-SUITE`."""
    drawn = {}
    folder = run.folder / "plots"
    folder.mkdir(exist_ok=True)

    def add(name: str, figure: Figure, words: str) -> None:
        drawn[name] = draw(folder, name, figure, words)

    if any("loss" in entry for entry in run.history):
        add("loss", plots.loss_figure(run.history), wording.loss_words(run))
    if any("forgetting" in entry for entry in run.history):
        add("forgetting", plots.forgetting_figure(run.history), wording.forgetting_words(run))
    if plots.suites_of(run.history):
        add("suite", plots.suite_figure(run.history), wording.suite_words(run))
    layers = [layer for layer in run.layers if layer.sigma]
    if layers:
        words = "Singular values in descending order. " + " ".join(map(wording.layer_words, layers))
        add("spectrum", plots.spectrum_figure(layers), words)
    for comparison in run.comparisons:
        shown = [score for score in comparison.scores if score.any.unit == "fraction"]
        if shown:
            after = comparison.after
            words = "Correct answers before and after. " + " ".join(
                f"{score.label}: {wording.number(score.before)}, then {wording.number(score.after)}." for score in shown
            )
            names_of_both = ("base", "tuned" if after is None or after.which == "final" else after.which)
            add(f"scores-{comparison.suite}", plots.scores_figure(shown, names_of_both), words)
    return drawn
