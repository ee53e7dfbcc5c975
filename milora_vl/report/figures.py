"""The plots of one run: PNG and CSV files in plots/, and data URIs for the page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from milora_vl.report import plots, wording
from milora_vl.report.plots import Plot, draw
from milora_vl.report.run_page import Comparison, Layer, Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def make(run: Run) -> dict[str, Plot]:
    """Draw the plots that the run's files allow: `loss`, `forgetting`, `suite`, `spectrum` and `scores-SUITE`."""
    drawn = {}

    def add(name: str, figure: Figure, words: str) -> None:
        drawn[name] = draw(_folder(run), name, figure, words)

    if any("loss" in entry for entry in run.history):
        _loss_csv(run)
        add("loss", plots.loss_figure(run.history), wording.loss_words(run))
    if any("forgetting" in entry for entry in run.history):
        _history_csv(run, "forgetting", ["forgetting", "forgetting_stderr", "forgetting_loss_change"])
        add("forgetting", plots.forgetting_figure(run.history), wording.forgetting_words(run))
    names = plots.suites_of(run.history)
    if names:
        _history_csv(run, "suite", [f"{plots.SCORE}{name}{end}" for name in names for end in ("", "_stderr")])
        add("suite", plots.suite_figure(run.history), wording.suite_words(run))
    layers = [layer for layer in run.layers if layer.sigma]
    if layers:
        _spectrum_csv(run, layers)
        words = "Singular values in descending order. " + " ".join(map(wording.layer_words, layers))
        add("spectrum", plots.spectrum_figure(layers), words)
    for comparison in run.comparisons:
        shown = [score for score in comparison.scores if score.any.unit == "fraction"]
        if shown:
            name, after = f"scores-{comparison.suite}", comparison.after
            _scores_csv(run, name, comparison)
            words = "Correct answers before and after. " + " ".join(
                f"{score.label}: {wording.number(score.before)}, then {wording.number(score.after)}." for score in shown
            )
            names_of_both = ("base", "tuned" if after is None or after.which == "final" else after.which)
            add(name, plots.scores_figure(shown, names_of_both), words)
    return drawn


def _history_csv(run: Run, name: str, keys: Sequence[str]) -> None:
    columns = ["step", *keys]
    rows = [[entry.get(key, "") for key in columns] for entry in run.history if keys[0] in entry]
    plots.write_csv(_file(run, f"{name}.csv"), columns, rows)


def _loss_csv(run: Run) -> None:
    keys = ("step", "epoch", "loss", "eval_loss", "learning_rate")
    rows = [[entry.get(key, "") for key in keys] for entry in run.history if "loss" in entry or "eval_loss" in entry]
    plots.write_csv(_file(run, "loss.csv"), keys, rows)


def _spectrum_csv(run: Run, layers: Sequence[Layer]) -> None:
    rows = [
        (layer.tower, layer.path, index + 1, sigma, bool(layer.trained and index in range(*layer.trained)))
        for layer in layers
        for index, sigma in enumerate(layer.sigma)
    ]
    plots.write_csv(_file(run, "spectrum.csv"), ("tower", "path", "component", "sigma", "trained"), rows)


def _scores_csv(run: Run, name: str, comparison: Comparison) -> None:
    rows = [
        (score.benchmark, score.name, which, metric.value, metric.stderr, metric.n, metric.baseline)
        for score in comparison.scores
        for which, metric in (("before", score.before), ("after", score.after))
        if metric
    ]
    header = ("benchmark", "metric", "which", "value", "stderr", "n", "majority_baseline")
    plots.write_csv(_file(run, f"{name}.csv"), header, rows)


def _file(run: Run, name: str) -> Path:
    return _folder(run) / name


def _folder(run: Run) -> Path:
    folder = run.folder / "plots"
    folder.mkdir(exist_ok=True)
    return folder
