"""The commands that repeat, evaluate and use a run, as a user would type them."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from milora_data.command import command_line
from milora_vl.adapters.folders import holds_text_model
from milora_vl.report.run_page import Run


@dataclass(frozen=True, slots=True)
class Commands:
    """One line each. `repeat` writes into a new folder, because nothing overwrites a run."""

    as_typed: str
    repeat: str
    evaluate: str
    forgetting: str
    analyze: str
    chat: str
    report: str


def commands(run: Run) -> Commands:
    """What made this run, and what to type next."""
    recipe = run.folder / "recipe.yaml"
    model, base = _model(run)
    where: list[str | Path] = ["--with_base", "--output_dir", run.folder]
    return Commands(
        as_typed=_as_typed(run.environment.get("command") or ()),
        repeat=command_line("milora_vl.train", "--recipe", recipe, "--output_dir", f"{run.folder}-again"),
        evaluate=command_line("milora_eval", "run", *model, *base, *_suite(run), *where),
        forgetting=command_line("milora_vl.forgetting", *model, *base),
        analyze=command_line("milora_vl.analyze", run.folder, *base),
        chat=command_line("milora_vl.chat", *model, *_question(run)),
        report=command_line("milora_vl.report", run.folder),
    )


def steps(run: Run) -> list[tuple[str, str]]:
    """What to type for what, in the order of the work."""
    typed = commands(run)
    made = [("made by", typed.as_typed)] if typed.as_typed else []
    rest = [
        ("train again", typed.repeat),
        ("evaluate", typed.evaluate),
        ("ask", typed.chat),
        ("this page", typed.report),
    ]
    return made + rest


def _as_typed(argv: Sequence[str]) -> str:
    """The command line of the training; run with -m, Python leaves only a file name as its first word."""
    if not argv:
        return ""
    if Path(argv[0]).name in ("train.py", "__main__.py"):
        return command_line("milora_vl.train", *argv[1:])
    return shlex.join(argv)


def _model(run: Run) -> tuple[list[str | Path], list[str | Path]]:
    """The flags that load this run's model, and those that name the base where the first do not.

    A full fine-tuning is a model of its own; everything else sits on its base.
    """
    base = str(run.environment.get("model") or run.recipe.get("model") or "MODEL")
    if (run.folder / "config.json").is_file() and not (run.folder / "adapter_config.json").is_file():
        return ["--model", run.folder], ["--base", base]
    return ["--model", base, "--adapter", run.folder], []


def _suite(run: Run) -> list[str | Path]:
    """The suite and its data: those of the last evaluation, of the recipe, or what goes with the training data."""
    planned, data = run.recipe.get("eval") or {}, run.recipe.get("data") or {}
    path = data.get("path") if isinstance(data.get("path"), str) else None
    names = [comparison.suite for comparison in run.comparisons] + list(planned.get("suites") or ())
    records = Path(path).parent if path else Path("DATA")
    is_emoji = records.name == "emoji" or (records / "captions_val.json").is_file()
    own = _own_questions(run)
    if own or not (names or is_emoji):  # records of one's own are a benchmark, where they were held out of the training
        folder = ["--data", str(data["image_folder"])] if data.get("image_folder") else []
        return ["--benchmarks", own or str(data.get("eval_path") or "HELD_OUT.json"), *folder, *_settings(run)]
    words = ["--suite", names[0] if names else "emoji", "--data", str(planned.get("data") or records)]
    return [*words, *_settings(run)]


def _own_questions(run: Run) -> str:
    """The file of one's own that the last evaluation asked, as far as the results tell: they know its name."""
    entries = [entry for results in _results(run)[:1] for entry in results.get("benchmarks", ())]
    own = [str(entry["name"]) for entry in entries if str(entry.get("reference", "")).startswith("data:")]
    data = run.recipe.get("data") or {}
    files = {Path(path).stem: path for path in (data.get("path"), data.get("eval_path")) if isinstance(path, str)}
    return ",".join(files.get(name, f"{name}.json") for name in own)


def _results(run: Run) -> list[Mapping[str, Any]]:
    return [side.results for comparison in run.comparisons for side in (comparison.after, comparison.before) if side]


def _settings(run: Run) -> list[str | Path]:
    """What the last evaluation was told beyond its data: the same again finds its answers and asks nothing twice."""
    done = _results(run)
    if not done:
        return []
    dtype, limit = (done[0].get("generation") or {}).get("dtype"), done[0].get("limit")
    return [*(["--dtype", dtype] if dtype else []), *(["--limit", str(limit)] if limit else [])]


def _question(run: Run) -> list[str | Path]:
    return ["QUESTION"] if holds_text_model(run.folder) else ["--image", _picture(run), "What is this?"]


def _picture(run: Run) -> str | Path:
    """A picture that was asked about, else a word in its place."""
    for comparison in run.comparisons:
        for side in (comparison.after, comparison.before):
            for line in side.predictions if side else ():
                if line.get("image_file"):
                    file = Path(str(line["image_file"]))
                    here = Path.cwd()
                    return file.relative_to(here) if file.is_relative_to(here) else file
    return "PICTURE"
