"""The sentences of a report: title, summary, numbers with their uncertainty."""

from __future__ import annotations

from milora_vl.common.evaluator import Gain
from milora_vl.core.policy.rules import label_of
from milora_vl.report.plots import SCORE, suites_of
from milora_vl.report.run_page import Comparison, Json, Layer, Metric, Run, Score, label

# Descriptions of questions, for suites whose name is not enough.
_ABOUT = {"emoji": "questions about emoji that training did not contain"}

PROTECTION = (
    "The share of the energy of each layer's inputs that lies in its protected directions. There the update is zero, "
    "before and after any training."
)


def percent(share: float) -> str:
    """Return a share in percent, with one decimal from 1 % on, else with two digits.

    >>> percent(0.0339), percent(0.5614), percent(0.000123)
    ('3.4 %', '56.1 %', '0.012 %')
    """
    return f"{100 * share:.1f} %" if abs(share) >= 0.01 else f"{100 * share:.2g} %"


def lowered_shares(policy: Json) -> str:
    """Return a sentence about layers that protect less than their rule asks for; empty if there are none.

    >>> targets = [{"path": "q", "protect": 0.95}, {"path": "k", "protect": 0.95}]
    >>> lowered_shares({"targets": targets, "protection": {"q": {"energy": 0.91}, "k": {"energy": 0.96}}})
    'Layers that protect less than their rule asks for, so that their rank fits: 1 of 2; the lowest share is 91.0 %.'
    """
    asked = {target["path"]: target.get("protect", 0) for target in policy.get("targets", ())}
    found = {path: protection["energy"] for path, protection in policy.get("protection", {}).items()}
    lowered = [share for path, share in found.items() if share < asked[path]]
    if not lowered:
        return ""
    return (
        "Layers that protect less than their rule asks for, so that their rank fits: "
        f"{len(lowered):,} of {len(found):,}; the lowest share is {percent(min(lowered))}."
    )


def amount(value: float, unit: str) -> str:
    """Return the value of a metric as text: fractions as percent, points unchanged."""
    return f"{100 * value:.1f} %" if unit == "fraction" else f"{value:,.1f}"


def number(metric: Metric | None) -> str:
    """Return a metric with its standard error.

    >>> number(Metric("mean", 0.6123, 0.0141))
    '61.2 % (±1.4)'
    """
    if metric is None:
        return "–"
    # A standard error of 0 comes from equal scores and is not informative.
    spread = "" if not metric.stderr else f" (±{amount(metric.stderr, metric.unit).removesuffix(' %')})"
    return amount(metric.value, metric.unit) + spread


def gain(score: Score) -> str:
    """Return the signed change in points."""
    if score.gain is None:
        return "–"
    return points(score.gain, score)


def duration(seconds: float | None) -> str:
    """Return a duration as text.

    >>> duration(261.4), duration(7300), duration(12)
    ('4 min 21 s', '2 h 01 min', '12 s')
    """
    if seconds is None:
        return "–"
    minutes, remaining = divmod(round(seconds), 60)
    if minutes < 1:
        return f"{remaining} s"
    return f"{minutes} min {remaining:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def method_name(method: str, protect: float) -> str:
    """Return the name of a method with the share that it protects.

    >>> method_name("milora", 0.0), method_name("milora", 0.95)
    ('MiLoRA', 'MiLoRA, off 95 % of the inputs')
    """
    return label_of(method) + (f", off {100 * protect:g} % of the inputs" if protect else "")


def methods(run: Run) -> list[str]:
    """Return the names of the methods that train something; adapters take precedence over full training."""
    kinds = dict.fromkeys((str(t["method"]), t.get("protect") or 0.0) for t in run.policy.get("targets", ()))
    adapters = [method_name(*kind) for kind in kinds if kind[0] not in ("full", "frozen")]
    return adapters or (["full fine-tuning"] if kinds else [])


def title(run: Run) -> str:
    """Return the title of the page: the model and its methods."""
    model = run.environment.get("model") or run.recipe.get("model") or run.folder.resolve().name
    names = " + ".join(methods(run))
    return f"{model}, tuned with {names}" if names else str(model)


def headline(run: Run) -> tuple[Comparison, Score] | None:
    """Return the first headline score, preferring suites with scores of the tuned model; None without scores."""
    ranked = sorted(run.comparisons, key=lambda comparison: comparison.after is None)
    headlines = [(comparison, score) for comparison in ranked for score in comparison.scores if score.is_headline]
    return headlines[0] if headlines else None


def summary(run: Run) -> str:
    """Return the result in one sentence."""
    best = headline(run)
    if best is None:
        return _unevaluated(run)
    comparison, score = best
    if score.any.unit == "fraction":
        about = _ABOUT.get(comparison.suite, f"{score.benchmark} questions")
        verb, of = "correctly answers", f" of the {about}"
        if not score.name.startswith(("accuracy", "mean", "overall")):
            verb, of = "reaches", f" ({score.label}) on the {about}"
    else:
        verb, of = "scores", f" ({score.label}) on {score.benchmark}"
    if not score.after:
        return f"The base model {verb} {number(score.before)}{of}; the fine-tuned model has not been evaluated yet."
    base = f"; the base model {number(score.before)}" if score.before else "; the base model has not been evaluated"
    words = [f"The fine-tuned model {verb} {number(score.after)}{of}{base}.", gain_words(comparison, score)]
    return " ".join(filter(None, [*words, cut_words(comparison, score.benchmark)]))


def gain_words(comparison: Comparison, score: Score) -> str:
    """Return the difference to the better of the base and the most frequent answer in one sentence; or an empty text.

    `score` is the first of the comparison.
    """
    if (found := comparison.gain) is None:
        return ""
    of_majority = "" if score.any.baseline is None else amount(score.any.baseline, score.any.unit)
    than = {"base": "the base model", "majority": f"the most frequent answer, {of_majority}"}[found.over]
    more = "less" if found.value < 0 else "more"
    return f"That is {points(abs(found.value), score, sign='')} points {more} than {than} ({interval(found, score)})."


def interval(found: Gain, score: Score) -> str:
    """Return the interval of a gain as text."""
    if found.low is None or found.high is None:
        return "too few questions for an interval"
    return f"95 % interval {points(found.low, score)} to {points(found.high, score)}"


def points(value: float, score: Score, sign: str = "+") -> str:
    """Return a difference of a score in points."""
    return f"{value * (100 if score.any.unit == 'fraction' else 1):{sign},.1f}".replace("-", "−")


def cut_words(comparison: Comparison, benchmark: str) -> str:
    """Return how many answers were cut at the token limit, in one sentence; empty if none was."""
    parts = []
    for side, who in ((comparison.before, "the base model"), (comparison.after, "the fine-tuned model")):
        results: Json = side.results if side else {}
        entry: Json = next((entry for entry in results.get("benchmarks", ()) if entry["name"] == benchmark), {})
        if cut := entry.get("truncated"):
            limit = results["generation"]["max_new_tokens"][benchmark]
            parts.append(f"{cut:,} of the {entry['n']:,} answers of {who} were cut at {limit:,} tokens")
    return f"{' and '.join(parts)}." if parts else ""


def _unevaluated(run: Run) -> str:
    steps = max((int(entry.get("step", 0)) for entry in run.history), default=0)
    if not steps and not run.environment.get("finished"):
        return "This run has not trained yet."
    if "finished" in run.environment and not run.environment["finished"]:
        return f"Not finished: {steps:,} steps so far; not evaluated yet."
    count = run.environment.get("data", {}).get("train")
    epochs = max((float(entry.get("epoch") or 0) for entry in run.history), default=0.0)
    records = f"{round(epochs * count):,} of {count:,}" if count and 0 < epochs < 1 else f"{count or 0:,}"
    words = (f" for {steps:,} steps" if steps else "") + (f" on {records} records" if count else "")
    return f"Trained{words}; not evaluated yet."


def forgetting(comparison: Comparison) -> dict[str, float | str] | None:
    """Return the forgetting numbers of a suite for the page; None if they were not measured."""
    measured = comparison.after.results.get("forgetting") if comparison.after else None
    if not measured:
        return None
    cross, base = float(measured["cross_entropy"]), float(measured["base_entropy"])
    divergence = float(measured.get("kl", cross - base))
    return {
        "cross_entropy": cross,
        "stderr": float(measured.get("stderr") or 0),
        "base_entropy": base,
        "kl": divergence,
        "kl_stderr": float(measured.get("kl_stderr") or 0),
        "share": percent(divergence / cross if cross else 0.0),
        "tokens": int(measured.get("n_tokens", 0)),
        "text": str(measured.get("text") or "").replace("_", " "),
    }


def loss_words(run: Run) -> str:
    """Return the first and last losses, as caption and alternative text of the loss curve."""
    logged = [entry for entry in run.history if "loss" in entry]
    train = [float(entry["loss"]) for entry in logged]
    evaluated = [float(entry["eval_loss"]) for entry in run.history if "eval_loss" in entry]
    steps = max((int(entry["step"]) for entry in run.history), default=0)
    if not train:
        return ""
    tail = train[-max(1, len(train) // 10) :]
    first = f" (mean of the first {logged[0]['step']:,} steps)" if logged[0]["step"] > 1 else ""
    words = f"Over {steps:,} steps the training loss went from {train[0]:.2f}{first} to {sum(tail) / len(tail):.2f}"
    words += " (mean of the last tenth)" if len(tail) > 1 else ""
    return f"{words}; on the evaluation records it is {evaluated[-1]:.2f} at the end." if evaluated else f"{words}."


def forgetting_words(run: Run) -> str:
    """Return the caption of the forgetting curve of the training; empty if it was not measured."""
    entries = [entry for entry in run.history if "forgetting" in entry]
    if not entries:
        return ""
    last = entries[-1]
    return (
        f"Forgetting on general text during training, in nats per token: {last['forgetting']:.3f} "
        f"(±{last['forgetting_stderr']:.3f}) at step {last['step']:,}. The loss on the text itself changed by "
        f"{last['forgetting_loss_change']:+.3f}."
    )


def suite_words(run: Run) -> str:
    """Return the caption of the scores during training; empty if none were measured."""
    last = {key: value for entry in run.history for key, value in entry.items()}
    scores = ", ".join(f"{name} {last[f'{SCORE}{name}']:.1f}" for name in suites_of(run.history))
    return f"Scores of a small suite during training; at the last step: {scores}." if scores else ""


def forgetting_rows(forgetting: Json) -> list[list[str]]:
    """Return the rows of `python -m milora_vl.forgetting`, one per probe: name, numbers with errors, size."""
    names = {"text": "general text", "samples": "the base model's own text", "pictures": "answers about pictures"}
    return [
        [
            names[name] if name != "pictures" else f"{names[name]} ({probe['text']})",
            _with_error(probe["kl"], probe["kl_stderr"]),
            _with_error(probe["cross_entropy"], probe["stderr"]),
            f"{probe['base_entropy']:.3f}",
            _with_error(probe["loss_change"], probe["loss_change_stderr"], sign="+"),
            f"{probe['n_tokens']:,} in {probe['n_documents']:,}",
        ]
        for name in names
        if (probe := forgetting.get(name))
    ]


def score_changes(forgetting: Json) -> list[str]:
    """Return one sentence per score of `python -m milora_vl.forgetting --suite`."""
    return [
        f"{score['benchmark']}, {label(score['metric'])}: {score['before']:.3f} before, {score['after']:.3f} after"
        + (
            "."
            if score["was_good"]
            else "; the base model was no better than a fixed answer, so this score does not measure forgetting."
        )
        for score in forgetting.get("scores", ())
    ]


def _with_error(value: float, error: float | None, sign: str = "") -> str:
    return f"{value:{sign}.3f}" + ("" if error is None else f" ± {error:.3f}")


def layer_words(layer: Layer) -> str:
    """Return one sentence about a layer of the spectrum plot."""
    name = f"{layer.tower}, {layer.path} ({' × '.join(str(side) for side in layer.shape)})"
    if layer.note:
        return f"{name}: {layer.note}."
    if layer.trained is None or layer.energy is None:
        return f"{name}: {layer.status}."
    low, high = layer.trained
    band = f"σ from {layer.sigma[low]:.3g} down to {layer.sigma[high - 1]:.3g}"
    return f"{name}: {layer.status}, {band}, together {percent(layer.energy)} of ‖W‖²."


def spectrum_words(run: Run) -> str:
    """Return what the shaded band of the spectrum plot means in this run."""
    if "milora" in {layer.method for layer in run.bands}:
        return (
            "MiLoRA does not change the large ones, which are assumed to hold most of the knowledge of the model. It "
            "trains the smallest: the shaded band. Training starts from exactly the outputs of the base model "
            "(arXiv:2406.09044)."
        )
    return "PiSSA trains the largest: the shaded band (arXiv:2404.02948)."
