"""One `milora_eval scales`: a model at several sizes of its update, each with its scores and its text forgetting."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftModel

from milora_eval.answers.questions import EvaluationPlan, Items
from milora_eval.answers.target import EvalTarget, named
from milora_eval.benchmark import Metric
from milora_eval.evaluate import add_forgetting, evaluate, results_folder
from milora_eval.scores.results import Results, metrics_of
from milora_eval.scores.table import value
from milora_vl.common.atomic_write import write_json
from milora_vl.common.cli.table import Table
from milora_vl.common.errors import at_flag
from milora_vl.forgetting.measure import can_recover_base
from milora_vl.interop.load_model import load_by_flags, require_scalable
from milora_vl.interop.scale import Update
from milora_vl.report.plots import WIDTH, draw, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FILE, PLOT = "scales.json", "scales.png"


@dataclass(frozen=True, slots=True)
class ScalePoint:
    """One size of the update: the headline of each benchmark, and the KL on general text in nats per token."""

    scale: float
    scores: dict[str, Metric]
    forgetting: float
    forgetting_stderr: float | None


def scan(
    scales: Sequence[float],
    target: EvalTarget,
    plan: EvaluationPlan,
    items: Items,
    output_dir: Path,
    forgetting_tokens: int,
) -> list[ScalePoint]:
    """Evaluate every scale, from small to large. Raises UserError if the update has no scale."""
    model: Any
    with at_flag("--model"):
        model, processor = load_by_flags(target.model, target.adapter, target.dtype, target.device)
    base: Any = None
    if not can_recover_base(model):
        with at_flag("--base" if target.base else "--model"):
            base, _ = load_by_flags(target.base or target.model, None, target.dtype, target.device)
    if isinstance(model, PeftModel) and target.adapter is not None:
        require_scalable(model.get_base_model(), target.adapter)
    update = Update(model, None if base is None else base.state_dict())
    points = []
    for scale in scales:
        update.set(scale)
        sized = replace(plan, which=named(target.which, scale), model_name=target.model, adapter=target.adapter)
        if scale == 0:  # the base model, whose answers `run --with_base` stores too
            sized = replace(plan, which="base", model_name=target.base or target.model)
        done = evaluate(model, processor, replace(sized, scale=scale or 1.0), items, output_dir)
        assert done is not None  # a single shard is always complete
        sys.stderr.write(f"scale {scale:g}: measuring forgetting\n")
        folder = results_folder(output_dir, plan.suite, done["which"])
        key = str(done["generation"]["key"])
        kept = add_forgetting(folder, model, processor, base, key, forgetting_tokens) if scale else {"kl": 0.0}
        points.append(ScalePoint(scale, headlines(done), kept["kl"], kept.get("kl_stderr")))
    return points


def headlines(results: Results) -> dict[str, Metric]:
    """Return the first metric of each benchmark."""
    first: dict[str, Metric] = {}
    for (benchmark, _), metric in metrics_of(results).items():
        first.setdefault(benchmark, metric)
    return first


def write(points: Sequence[ScalePoint], output_dir: Path, suite: str, which: str) -> Path:
    """Write scales.json and scales.png to the folder of the suite, and return it."""
    folder = output_dir / "eval" / suite
    write_json(folder / FILE, {"which": which, "points": [asdict(point) for point in points]})
    draw(folder, PLOT.removesuffix(".png"), figure(points), "score over forgetting by scale")
    return folder


def table(points: Sequence[ScalePoint], suite: str) -> Table:
    """Return one row for each scale: forgetting, and the headline of each benchmark."""
    names = list(points[0].scores)
    header = ("scale", "text forgetting", *(f"{name}: {points[0].scores[name].name}" for name in names))
    rows = [
        (f"{p.scale:g}", _nats(p), *(value(p.scores[name]) if name in p.scores else "" for name in names))
        for p in points
    ]
    note = "text forgetting: KL divergence from the base model on general text, nats per token"
    return Table(header, tuple(rows), note, f"suite {suite}: sizes of the update")


def _nats(point: ScalePoint) -> str:
    error = "" if point.forgetting_stderr is None else f" ± {point.forgetting_stderr:.4f}"
    return f"{point.forgetting:.4f}{error}"


def figure(points: Sequence[ScalePoint]) -> Figure:
    """Draw the score over forgetting, one line per benchmark, with the scale at each point."""
    from matplotlib.figure import Figure

    with styled():
        drawn = Figure(figsize=(WIDTH, 4.0), layout="constrained")
        axis = drawn.subplots()
        x = [point.forgetting for point in points]
        for mark, name in zip("osD^vPX<>*" * 9, points[0].scores, strict=False):
            metrics = [point.scores[name] for point in points]
            factor = 100.0 if metrics[0].unit == "fraction" else 1.0
            y = [factor * metric.value for metric in metrics]
            errors = [factor * (metric.stderr or 0.0) for metric in metrics]
            axis.errorbar(x, y, yerr=errors, marker=mark, lw=1.6, elinewidth=0.8, label=f"{name}: {metrics[0].name}")
            for point, height in zip(points, y, strict=True):
                axis.annotate(
                    f"{point.scale:g}",
                    (point.forgetting, height),
                    xytext=(5, 5),
                    textcoords="offset points",
                    fontsize=8,
                )
        axis.set(xlabel="text forgetting, nats per token (scale at each point)", ylabel="score")
        axis.set_xlim(left=min(0.0, *x))
        axis.legend(loc="best")
    return drawn
