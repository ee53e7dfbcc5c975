"""Write report.html of a run from its files, with all pictures and plots; again after a command has added files."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from milora_data.cards import Card, credit_lines, data_uri, fitted, thumbnail
from milora_data.keys import digest, file_key
from milora_vl.common.cli import page as pages
from milora_vl.common.cli.table import Table
from milora_vl.common.errors import UserError
from milora_vl.core.policy.rules import label_of
from milora_vl.report import tables
from milora_vl.report.plots import plots_of, suites_of
from milora_vl.report.read_run import Json, RunFiles, Score, SuiteScores, is_fraction, label, read_run
from milora_vl.report.repeat import commands
from milora_vl.report.tables import amount, change, number, percent, points

# A question with the answers of the base model and of the tuned one, as predictions.jsonl has them.
Asked = tuple[Json | None, Json | None]
# Outcome of a question in a stored comparison, which is its CSS class too (base.css), in words.
OUTCOMES = {
    "kept": "right before and after",
    "gained": "newly right",
    "lost": "no longer right",
    "never": "wrong before and after",
}
# Descriptions of questions, for benchmarks whose name is not enough.
_ABOUT = {"emoji": "questions about emoji that training did not contain"}
GALLERY_SIZE = 24
_PICTURES = 2_000_000  # maximum size of all data URIs, in characters


def write_report(folder: Path) -> Path:
    """Write report.html and plots/ into a run folder, replacing older ones, and return the path of the page.

    Raises UserError if the folder contains no file of a run, or if a file cannot be parsed.
    """
    return write_page(read_run(folder))


def write_page(run: RunFiles) -> Path:
    """Write the page and the plots of a run and return the path of the page. All text from its files is escaped."""
    page = run.folder / "report.html"
    pages.write(page, pages.render(Path(__file__).with_name("report.html.j2"), _content(run)))
    return page


def try_write_report(run: Path, warn: Callable[[str], object]) -> Path | None:
    """Write report.html of a run and return its path. On any error, warn and return None: the results must not fail."""
    try:
        return write_report(run)
    except (UserError, OSError) as error:  # for example a full disk
        warn(f"no report: {error}")
    except Exception:
        warn(f"no report; run python -m milora_vl.report {run} to see why\n{traceback.format_exc(limit=1)}")
    return None


def regenerate_report(folder: Path) -> None:
    """Regenerate the report if `folder` is a run folder, and print its path or the reason of failure on stderr."""
    if (folder / "recipe.yaml").is_file():
        page = try_write_report(folder, lambda text: sys.stderr.write(f"{text}\n"))
        sys.stderr.write(f"report:  {page}\n" if page is not None else "")


def _content(run: RunFiles) -> dict[str, Any]:
    recipe, plots, found = run.folder / "recipe.yaml", plots_of(run), run.headline()
    return {
        "run": run,
        "title": title(run),
        "lede": summary(run),
        "headline": found,
        "interval": _interval(run, found[1]) if found else "",
        "suites": [_suite(comparison) for comparison in run.comparisons],
        "outcome_class": {words: css for css, words in OUTCOMES.items()},
        "earlier": tables.earlier_table(run),
        "gallery": gallery(run),
        "held_out": _held_out(run),
        "forgotten": forgotten(run),
        "forgetting_table": tables.forgetting_table(forgotten(run) or {}, run.forgetting),
        "scales": tables.scales_table(run.scales),
        "analysis": _analysis(run.folder / "analysis"),
        "plots": plots,
        "during_training": suites_of(run.history),
        "tasks": tables.tasks_table(run),
        "policy": tables.policy_table(run),
        "protection": tables.protection_table(run),
        "commands": commands(run),
        "versions": _versions(run.environment),
        "recipe": recipe.read_text(encoding="utf-8") if recipe.is_file() else "",
        "credits": credits_of(run),
        **{function.__name__: function for function in (amount, change, duration, label, percent, points)},
    }


def title(run: RunFiles) -> str:
    model = run.environment.get("model") or run.recipe.get("model") or run.folder.resolve().name
    kinds = dict.fromkeys((str(t["method"]), t.get("protect") or 0.0) for t in run.policy.get("targets", ()))
    adapters = [label_of(*kind) for kind in kinds if kind[0] not in ("full", "frozen")]
    names = " + ".join(adapters or (["full fine-tuning"] if kinds else []))
    return f"{model}, tuned with {names}" if names else str(model)


def summary(run: RunFiles) -> str:
    """Return the result in a few sentences: the headline, its gain, and the earlier tasks."""
    found = run.headline()
    if found is None:
        return _unevaluated(run)
    comparison, score = found
    if is_fraction(score.any):
        about = _ABOUT.get(score.benchmark, f"{score.benchmark} questions")
        verb, of = "correctly answers", f" of the {about}"
        if not score.any["name"].startswith(("accuracy", "mean", "overall")):
            verb, of = "reaches", f" ({label(score.any['name'])}) on the {about}"
    else:
        verb, of = "scores", f" ({label(score.any['name'])}) on {score.benchmark}"
    if not score.after:
        return f"The base model {verb} {number(score.before)}{of}; the fine-tuned model has not been evaluated yet."
    base = f"the base model {number(score.before)}" if score.before else "the base model has not been evaluated"
    words = [f"The fine-tuned model {verb} {number(score.after)}{of}; {base}."]
    if run.gain is not None:
        majority = amount(score.any, score.any.get("baseline") or 0.0)
        than = "the base model" if run.gain["over"] == "base" else f"the most frequent answer, {majority}"
        more = "less" if run.gain["value"] < 0 else "more"
        by = points(score.any, abs(run.gain["value"]), sign="")
        words.append(f"That is {by} points {more} than {than} ({_interval(run, score)}).")
    words += [
        f"On {old.benchmark} it has {number(old.after)}, and had {number(old.before)} after {folder}."
        for folder, old in run.earlier
        if old.after and old.benchmark != score.benchmark
    ]
    return " ".join(filter(None, [*words, tables.cut(comparison, score.benchmark)]))


def _interval(run: RunFiles, score: Score) -> str:
    if run.gain is None or run.gain["low"] is None:
        return "too few questions for an interval"
    return f"95 % interval {points(score.any, run.gain['low'])} to {points(score.any, run.gain['high'])}"


def _unevaluated(run: RunFiles) -> str:
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


def duration(seconds: float) -> str:
    """Return a duration as text.

    >>> duration(261.4), duration(7300), duration(12)
    ('4 min 21 s', '2 h 01 min', '12 s')
    """
    minutes, remaining = divmod(round(seconds), 60)
    if minutes < 1:
        return f"{remaining} s"
    return f"{minutes} min {remaining:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def forgotten(run: RunFiles) -> Json | None:
    """Return the forgetting that an evaluation measured, of `text` and of `pictures`; None if none did."""
    measured = (each.after.results.get("forgetting") for each in run.comparisons if each.after)
    found = next(filter(None, measured), None)
    return found and {"text": found, "pictures": found.get("pictures")}


def _suite(comparison: SuiteScores) -> dict[str, Any]:
    side = comparison.after or comparison.before
    assert side is not None
    return {
        "name": comparison.suite,
        "has_before": comparison.before is not None,
        "has_after": comparison.after is not None,
        "outcomes": outcomes(comparison),
        "table": Table(**side.results["table"]),
    }


def questions(comparison: SuiteScores) -> list[Asked]:
    before, after = (
        {line["question_key"]: line for line in (side.answers if side else ())}
        for side in (comparison.before, comparison.after)
    )
    return [(before.get(key), after.get(key)) for key in {**after, **before}]


def outcomes(comparison: SuiteScores) -> dict[str, int]:
    """Return the number of questions by outcome, over the benchmarks of a suite; empty without scored ones."""
    counts = [entry["outcomes"] for entry in comparison.paired.values() if entry["outcomes"]]
    return {words: sum(each[name] for each in counts) for name, words in OUTCOMES.items()} if counts else {}


def gallery(run: RunFiles) -> dict[str, Any] | None:
    """Return cards of some questions of the headline's suite; None without questions.

    The keys of the questions choose them, so the choice does not depend on the model.
    """
    found = run.headline()
    items = questions(found[0]) if found else []
    chosen = sorted(items, key=lambda item: digest([(item[1] or item[0] or {})["question_key"]]))[:GALLERY_SIZE]
    cards = [answer_card({"before": before, "after": after}) for before, after in chosen]
    return {"total": len(items), "cards": fitted(cards, _PICTURES)} if items else None


def answer_card(answers: Mapping[str, Json | None], kinds: Sequence[str] = ()) -> Card:
    """Return the card of a question from its stored answers, by the name of who gave them; one of them at least."""
    line = next(filter(None, reversed(list(answers.values()))))
    asked = [("context", f"{role}: {_words(text)}\n") for role, text in line.get("context", ())]
    said = [
        (who, a["prediction"], None if a["correct"] is None else float(a["correct"])) for who, a in answers.items() if a
    ]
    truths = list(dict.fromkeys(map(str, line.get("answers", ()))))[:10]
    return Card(
        " · ".join(filter(None, (label(str(line.get(key) or "")) for key in ("benchmark", "type", "id")))),
        [*asked, ("question", _words(line["question"]))],
        list(_pictures_of(line)),
        [*said, ("truth", " / ".join(truths) or "–", None)],
        kinds,
    )


def _words(text: str) -> str:
    return text.replace("<image>", "").strip()


def _pictures_of(line: Json) -> Iterator[tuple[str, bytes | None]]:
    """Yield the pictures of a question; a file with another content than what was asked about is not shown."""
    files = [file for file in (line.get("image_file"), *line.get("more_images", ())) if file]
    for file, key in zip_longest(files, line.get("content", ())[: len(files)]):
        jpeg = thumbnail(Path(file)) if file_key(file) == key else None
        yield (Path(file).name if jpeg else "picture not found"), jpeg


def _held_out(run: RunFiles) -> list[Card]:
    """Return cards of the held-out records that the run learns worst."""
    cards = []
    for line in run.held_out:
        base = "" if line["base_loss"] is None else f", with the adapter off {line['base_loss']:.2f}"
        answers = [("answer", line["answer"], None), ("the model's answer", line["reply"].strip(), None)]
        title = f"loss {line['loss']:.2f}{base} · {line['id']} · {line['source']}"
        cards.append(Card(title, [("question", _words(line["question"]))], list(_pictures_of(line)), answers))
    return fitted(cards, _PICTURES)


def _analysis(folder: Path) -> tuple[Table, dict[str, str]] | None:
    """Return the table and the figures, by caption, that `milora_vl.analyze` wrote; None without them."""
    if not (folder / "summary.json").is_file():
        return None
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    files = {figure["caption"]: folder / f"{figure['name']}.png" for figure in summary["figures"]}
    drawn = {caption: data_uri(file.read_bytes(), "image/png") for caption, file in files.items()}
    return Table(**summary["table"]), drawn


def _short(value: object) -> object:
    return f"{value:g}" if isinstance(value, float) else value


def _versions(known: Json) -> list[tuple[str, str]]:
    """Return the rows about machine and software, and about resumptions with the settings that they changed."""
    rows = [(name, known.get(name)) for name in ("device", "started", "finished", "seed", "base")]
    for entry in known.get("resumed", ()):
        changed = [f"{key} {_short(old)} -> {_short(new)}" for key, (old, new) in entry.get("changed", {}).items()]
        rows.append(("resumed", f"{entry['at']} from {entry['from']}" + f", with {', '.join(changed)}" * bool(changed)))
    git = known.get("git")
    if isinstance(git, Mapping):
        git = f"{str(git.get('commit'))[:12]}{', with local changes' if git.get('changed') else ''}"
    rows += [("milora-vl commit", git), *known.get("versions", {}).items()]
    return [(name, str(value)) for name, value in rows if value not in (None, "")]


def credits_of(run: RunFiles) -> list[str]:
    path = (run.recipe.get("data") or {}).get("path") or []
    folders = [Path(entry["path"]).parent for entry in path] if isinstance(path, list) else [Path(path).parent]
    sides = [side for each in run.comparisons for side in (each.before, each.after) if side]
    files = {line["image_file"] for side in sides for line in side.answers[:50] if line.get("image_file")}
    for file in sorted(files):
        folders += [Path(file).parent, Path(file).parent.parent]
    return credit_lines(folder for folder in folders if folder.resolve() != run.folder.resolve())
