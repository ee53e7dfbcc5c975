"""The plots of one run: PNG files in plots/, and data URIs for the page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from milora_vl.report import plots, wording
from milora_vl.report.plots import Plot, draw
from milora_vl.report.run_page import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def make(run: Run) -> dict[str, Plot]:
    """Draw the plots that the run's files allow.

    `loss`, `forgetting`, `suite`, `protection` for protected inputs, `spectrum` for trained components, `scores-SUITE`.
    """
    drawn = {}
    targets = run.policy.get("targets", ())
    adapted = [str(target["method"]) for target in targets if target.get("rank")]
    colour = plots.method_colour(next(iter(adapted), "full")) or plots.INK
    folder = run.folder / "plots"
    folder.mkdir(exist_ok=True)

    def add(name: str, figure: Figure, words: str) -> None:
        drawn[name] = draw(folder, name, figure, words)

    if any("loss" in entry for entry in run.history):
        add("loss", plots.loss_figure(run.history, colour), wording.loss_words(run))
    if any("forgetting" in entry for entry in run.history):
        add("forgetting", plots.forgetting_figure(run.history, colour), wording.forgetting_words(run))
    if plots.suites_of(run.history):
        add("suite", plots.suite_figure(run.history), wording.suite_words(run))
    if protection := run.policy.get("protection"):
        shares = sorted({float(target["protect"]) for target in targets if target.get("protect")})
        add("protection", plots.protection_figure(protection, shares), wording.PROTECTION)
    if run.bands:
        words = "Singular values in descending order. " + " ".join(map(wording.layer_words, run.bands))
        add("spectrum", plots.spectrum_figure(run.bands), words)
    for comparison in run.comparisons:
        shown = [score for score in comparison.scores if score.any.unit == "fraction"]
        if shown:
            after = comparison.after
            words = "Correct answers before and after. " + " ".join(
                f"{score.label}: {wording.number(score.before)}, then {wording.number(score.after)}." for score in shown
            )
            names_of_both = ("base", "tuned" if after is None or after.which == "final" else after.which)
            add(f"scores-{comparison.suite}", plots.scores_figure(shown, names_of_both, colour), words)
    return drawn
