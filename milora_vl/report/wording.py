"""The sentences of a report: numbers of a run said in words, with their uncertainty."""

from __future__ import annotations

from milora_vl.report.run_page import Comparison, Layer, Metric, Run, Score, label

# What the questions of a suite are about, where its name does not say it.
_ABOUT = {"emoji": "questions about emoji it has never seen"}
METHODS = {"milora": "MiLoRA", "pissa": "PiSSA", "lora": "LoRA", "dora": "DoRA", "olora": "OLoRA", "mica": "MiCA"}


def percent(share: float) -> str:
    """A share with two digits or one decimal, whichever is more.

    >>> percent(0.0339), percent(0.5614), percent(0.000123)
    ('3.4 %', '56.1 %', '0.012 %')
    """
    return f"{100 * share:.1f} %" if abs(share) >= 0.01 else f"{100 * share:.2g} %"


def amount(value: float, unit: str) -> str:
    """A value of a metric: fractions as percent, points as they are."""
    return f"{100 * value:.1f} %" if unit == "fraction" else f"{value:,.1f}"


def number(metric: Metric | None) -> str:
    """A metric with its standard error.

    >>> number(Metric("mean", 0.6123, 0.0141))
    '61.2 % (±1.4)'
    """
    if metric is None:
        return "–"
    spread = "" if metric.stderr is None else f" (±{amount(metric.stderr, metric.unit).removesuffix(' %')})"
    return amount(metric.value, metric.unit) + spread


def gain(score: Score) -> str:
    """After minus before, in points, signed."""
    if score.gain is None:
        return "–"
    return f"{score.gain * (100 if score.any.unit == 'fraction' else 1):+,.1f}".replace("-", "−")


def duration(seconds: float | None) -> str:
    """Seconds for people.

    >>> duration(261.4), duration(7300), duration(12)
    ('4 min 21 s', '2 h 01 min', '12 s')
    """
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 1:
        return f"{rest} s"
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def methods(run: Run) -> list[str]:
    """The methods that train something, adapters first, as people write them."""
    found = dict.fromkeys(str(target["method"]) for target in run.policy.get("targets", ()))
    adapters = [METHODS.get(name, name) for name in found if name not in ("full", "frozen")]
    return adapters or (["full fine-tuning"] if "full" in found else [])


def title(run: Run) -> str:
    """What the page is about: the model and how it was tuned."""
    model = run.environment.get("model") or run.recipe.get("model") or run.folder.resolve().name
    how = " + ".join(methods(run))
    return f"{model}, tuned with {how}" if how else str(model)


def headline(run: Run) -> tuple[Comparison, Score] | None:
    """The number that the page opens with: of the first suite that has the tuned model's scores, else of the first."""
    ranked = sorted(run.comparisons, key=lambda comparison: comparison.after is None)
    found = [(comparison, score) for comparison in ranked for score in comparison.scores if score.is_headline]
    return found[0] if found else None


def summary(run: Run) -> str:
    """The result in one sentence."""
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
    return f"The fine-tuned model {verb} {number(score.after)}{of}{base}."


def _unevaluated(run: Run) -> str:
    steps = max((int(entry.get("step", 0)) for entry in run.history), default=0)
    if not steps and not run.environment.get("finished"):
        return "Nothing has been trained here yet."
    if "finished" in run.environment and not run.environment["finished"]:
        return f"Not finished: {steps:,} steps so far; not evaluated yet."
    count = run.environment.get("data", {}).get("train")
    epochs = max((float(entry.get("epoch") or 0) for entry in run.history), default=0.0)
    seen = f"{round(epochs * count):,} of {count:,}" if count and 0 < epochs < 1 else f"{count or 0:,}"
    words = (f" for {steps:,} steps" if steps else "") + (f" on {seen} records" if count else "")
    return f"Trained{words}; not evaluated yet."


def forgetting(comparison: Comparison) -> dict[str, float | str] | None:
    """The forgetting numbers of a suite, ready to be shown; None where they were not measured."""
    found = comparison.after.results.get("forgetting") if comparison.after else None
    if not found:
        return None
    cross, base = float(found["cross_entropy"]), float(found["base_entropy"])
    divergence = float(found.get("kl", cross - base))
    return {
        "cross_entropy": cross,
        "stderr": float(found.get("stderr") or 0),
        "base_entropy": base,
        "kl": divergence,
        "kl_stderr": float(found.get("kl_stderr") or 0),
        "share": percent(divergence / cross if cross else 0.0),
        "tokens": int(found.get("n_tokens", 0)),
        "text": _titles(str(found.get("text") or "")),
    }


def _titles(names: str) -> str:
    """Names of texts for people.

    >>> _titles("alice_in_wonderland + origin_of_species")
    'Alice In Wonderland and Origin Of Species'
    """
    *others, last = [name.replace("_", " ").title() if "_" in name else name for name in names.split(" + ")]
    return f"{', '.join(others)} and {last}" if others else last


def loss_words(run: Run) -> str:
    """First and last losses: the caption and the alternative text of the loss curve."""
    train = [float(entry["loss"]) for entry in run.history if "loss" in entry]
    tested = [float(entry["eval_loss"]) for entry in run.history if "eval_loss" in entry]
    steps = max((int(entry["step"]) for entry in run.history), default=0)
    if not train:
        return ""
    tail = train[-max(1, len(train) // 10) :]
    words = f"Over {steps:,} steps the training loss went from {train[0]:.2f} to {sum(tail) / len(tail):.2f}"
    words += " (mean of the last tenth)" if len(tail) > 1 else ""
    return f"{words}; on the evaluation records it is {tested[-1]:.2f} at the end." if tested else f"{words}."


def forgetting_words(run: Run) -> str:
    """How forgetting went during the training: the caption of its curve; nothing where it was not measured."""
    found = [entry for entry in run.history if "forgetting" in entry]
    if not found:
        return ""
    last = found[-1]
    return (
        f"Forgetting on general text while it trained, in nats a token: {last['forgetting']:.3f} "
        f"(±{last['forgetting_stderr']:.3f}) at step {last['step']:,}. The loss on the text itself changed by "
        f"{last['forgetting_loss_change']:+.3f}."
    )


def forgetting_rows(run: Run) -> list[list[str]]:
    """What `python -m milora_vl.forgetting` measured, a row a probe: name, numbers with errors, size."""
    names = {"text": "general text", "samples": "the base model's own text", "pictures": "answers about pictures"}
    return [
        [
            f"{names[name]}" if name != "pictures" else f"{names[name]} ({found['text']})",
            _with_error(found["kl"], found["kl_stderr"]),
            _with_error(found["cross_entropy"], found["stderr"]),
            f"{found['base_entropy']:.3f}",
            _with_error(found["loss_change"], found["loss_change_stderr"], sign="+"),
            f"{found['n_tokens']:,} in {found['n_documents']:,}",
        ]
        for name in names
        if (found := run.forgetting.get(name))
    ]


def score_changes(run: Run) -> list[str]:
    """The scores that `python -m milora_vl.forgetting --suite` compared, a sentence each."""
    return [
        f"{score['benchmark']}, {label(score['metric'])}: {score['before']:.3f} before, {score['after']:.3f} after"
        + ("." if score["was_good"] else "; the base model was no better than a fixed answer, so this says nothing.")
        for score in run.forgetting.get("scores", ())
    ]


def _with_error(value: float, error: float | None, sign: str = "") -> str:
    return f"{value:{sign}.3f}" + ("" if error is None else f" ± {error:.3f}")


def layer_words(layer: Layer) -> str:
    """One sentence on a layer of the spectrum plot."""
    name = f"{layer.tower}, {layer.path} ({' × '.join(str(side) for side in layer.shape)})"
    if layer.note:
        return f"{name}: {layer.note}."
    if layer.trained is None or layer.energy is None:
        return f"{name}: {layer.status}."
    low, high = layer.trained
    band = f"σ from {layer.sigma[low]:.3g} down to {layer.sigma[high - 1]:.3g}"
    share = "" if high - low == len(layer.sigma) else f", together {percent(layer.energy)} of ‖W‖²"
    return f"{name}: {layer.status}, {band}{share}."


def spectrum_words(run: Run) -> str:
    """What the shaded band of the spectrum plot means in this run."""
    bands = {layer.method for layer in run.layers if layer.trained}
    if "milora" in bands:
        return (
            "MiLoRA leaves the large ones as they are, where most of what the model knows is thought to sit, and "
            "trains the smallest: the shaded band. Training starts from exactly the "
            "outputs of the base model (arXiv:2406.09044)."
        )
    if "pissa" in bands:
        return "PiSSA trains the largest: the shaded band (arXiv:2404.02948)."
    return "What is shaded trains; a layer without a shaded band is frozen or trained beside its components."
