"""Write report.html of a run from its files, with all pictures and plots; again after a command has added files."""

from __future__ import annotations

import hashlib
import json
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from milora_data.keys import file_key
from milora_data.pictures.load import credit_lines, data_uri, fitting, thumbnail
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
    pictures = [thumbnail(Path(line["images"][0]) if line["images"] else None) for line in run.held_out]
    recipe, plots, found = run.folder / "recipe.yaml", plots_of(run), run.headline()
    return {
        "run": run,
        "title": title(run),
        "lede": summary(run),
        "headline": found,
        "interval": _interval(run, found[1]) if found else "",
        "suites": [_suite(comparison, plots) for comparison in run.comparisons],
        "outcome_class": {words: css for css, words in OUTCOMES.items()},
        "earlier": tables.earlier_table(run),
        "gallery": gallery(run),
        "held_out": list(zip(run.held_out, fitting(pictures, _PICTURES), strict=True)),
        "forgotten": forgotten(run),
        "forgetting_table": tables.forgetting_table(run.forgetting),
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
    """Return the forgetting on general text that an evaluation measured; None if none did."""
    measured = (each.after.results.get("forgetting") for each in run.comparisons if each.after)
    return next(filter(None, measured), None)


def _suite(comparison: SuiteScores, plots: Mapping[str, str]) -> dict[str, Any]:
    return {
        "name": comparison.suite,
        "has_before": comparison.before is not None,
        "has_after": comparison.after is not None,
        "plot": plots.get(f"scores-{comparison.suite}".replace("/", "-")),
        "outcomes": outcomes(comparison),
        "tables": tables.score_tables(comparison),
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


def sample(items: Sequence[Asked], count: int) -> list[Asked]:
    """Return `count` representative questions; the choice is deterministic.

    The questions are sorted by type and outcome, and taken at equal distances. Every type and outcome then has about
    the same share as in all questions.
    """

    def shuffle(item: Asked) -> str:
        line = item[1] or item[0] or {}
        return hashlib.sha256(line["question_key"].encode()).hexdigest()

    def order(item: Asked) -> tuple[Any, ...]:
        line = item[1] or item[0] or {}
        marks = [-1.0 if answer is None or answer["correct"] is None else answer["correct"] for answer in item[::-1]]
        return str(line.get("type") or line.get("benchmark")), *marks, shuffle(item)

    count, ordered = min(count, len(items)), sorted(items, key=order)
    return sorted((ordered[(2 * i + 1) * len(items) // (2 * count)] for i in range(count)), key=shuffle)


def gallery(run: RunFiles) -> dict[str, Any] | None:
    """Return a sample of the questions of the headline's suite, with pictures as data URIs; None without questions."""
    found = run.headline()
    items = questions(found[0]) if found else []
    if not items:
        return None
    chosen = sample(items, GALLERY_SIZE)
    lines = [after or before or {} for before, after in chosen]
    uris = fitting([thumbnail(_picture_of(line)) for line in lines], _PICTURES)
    cards = [(after or before, before, after, uri) for (before, after), uri in zip(chosen, uris, strict=True)]
    return {"total": len(items), "cards": cards}


def _picture_of(line: Json) -> str | None:
    """Return the picture of an answer; None if the file now has another content than what was asked about."""
    file = line.get("image_file")
    return file if file and file_key(file) in line.get("content", ())[:1] else None


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
