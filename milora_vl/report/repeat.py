"""The commands that repeat, evaluate and use a run, as a user types them."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from milora_vl.common.cli.console import command_line
from milora_vl.common.evaluator_protocol import EvaluationRequest, QuestionSet, evaluator, is_file
from milora_vl.core.adapter.folders import has_config, holds_text_model, holds_weights, newest_checkpoint
from milora_vl.report.read_run import Json, RunFiles, tasks_of


@dataclass(frozen=True, slots=True)
class Commands:
    as_typed: str
    repeat: str
    evaluate: str
    forgetting: str
    analyze: str
    chat: str
    report: str
    earlier: tuple[str, ...] = ()  # evaluate this run on the tasks of earlier ones that have no score yet


def commands(run: RunFiles) -> Commands:
    # The run's own weights, or its newest checkpoint while the run is unfinished.
    weights = run.folder if holds_weights(run.folder) else newest_checkpoint(run.folder) or run.folder
    base = str(run.environment.get("model") or run.recipe.get("model") or "MODEL")
    is_full = (weights / "config.json").is_file() and not has_config(weights)  # a complete model, beside its base
    flags: list[str | Path] = ["--model", weights] if is_full else ["--model", base, "--adapter", weights]
    of_base: list[str | Path] = ["--base", base] if is_full else []
    # This page would not find files beside a checkpoint, and they would be removed with it.
    is_apart = weights != run.folder
    into_run: list[str | Path] = ["--output_dir", run.folder] if is_apart else []
    into_analysis: list[str | Path] = ["--output_dir", run.folder / "analysis"] if is_apart else []
    questions, dtype = _last_questions(run)
    evaluation = EvaluationRequest(
        model=weights if is_full else base, adapter=None if is_full else weights, base=base if is_full else None,
        questions=questions, dtype=dtype, output_dir=run.folder,
    )  # fmt: skip
    question: list[str | Path] = ["QUESTION"]
    if not holds_text_model(weights):
        question = ["--image", _picture(run), "What is this?"]
    argv = run.environment.get("command") or ()
    if argv and Path(argv[0]).name in ("train.py", "__main__.py"):  # with -m, Python keeps only a file name
        as_typed = command_line("milora_vl.train", *argv[1:])
    else:
        as_typed = shlex.join(argv)
    return Commands(
        as_typed=as_typed,
        repeat=command_line(
            "milora_vl.train", "--recipe", run.folder / "recipe.yaml", "--output_dir", f"{run.folder}-again"
        ),
        evaluate=command_line(*evaluator().command(evaluation)),
        forgetting=command_line("milora_vl.forgetting", *flags, *of_base, *into_run),
        analyze=command_line("milora_vl.analyze", weights, *of_base, *into_analysis),
        chat=command_line("milora_vl.chat", *flags, *question),
        report=command_line("milora_vl.report", run.folder),
        earlier=tuple(
            command_line(*evaluator().command(of_task))
            for task, of_task in of_earlier(run.folder, evaluation).items()
            if not any(folder == task and score.after for folder, score in run.earlier)
        ),
    )


def questions_of(recipe: Mapping[str, Any]) -> QuestionSet | None:
    """Return the questions that the recipe of a run names; None if it names none.

    These are its suites, else the test set of the demo's data, else the held-out records.
    """
    config, data = recipe.get("eval") or {}, recipe.get("data") or {}
    pictures = data.get("image_folder")
    for suite in (config.get("suites") or [])[:1]:
        return QuestionSet(suite, config.get("data") or (pictures if is_file(suite) else None))
    path, held_out = str(data.get("path")), str(data.get("eval_path"))
    if Path(path).parent.name == "emoji" or Path(path).with_name("captions_val.json").is_file():
        return QuestionSet("emoji", str(Path(path).parent))
    return QuestionSet(benchmarks=held_out, data=pictures) if is_file(held_out) else None


def of_earlier(folder: Path, request: EvaluationRequest) -> dict[Path, EvaluationRequest]:
    """Return an evaluation like `request` on the questions of each run that the run in `folder` came after.

    A run without known questions has none.
    """
    found = {}
    for task in tasks_of(folder)[:-1]:
        if (questions := questions_of(task)) is not None:
            asked = replace(questions, limit=(task.get("eval") or {}).get("limit"))
            found[Path(task["run"])] = replace(request, questions=asked, template=task.get("template"), with_base=False)
    return found


def _last_questions(run: RunFiles) -> tuple[QuestionSet, str | None]:
    """Return the questions and the data type of the last evaluation, whose answers another one can reuse.

    Without one, the questions are those that the recipe names.
    """
    data, planned = run.recipe.get("data") or {}, run.recipe.get("eval") or {}
    sides = [side for each in run.comparisons for side in (each.after, each.before) if side]
    if not sides:
        asked = questions_of(run.recipe) or QuestionSet(benchmarks="HELD_OUT.json", data=data.get("image_folder"))
        return asked, None
    last: Json = sides[0].results
    limit, dtype = last.get("limit"), (last.get("generation") or {}).get("dtype")
    own = [b["name"] for b in last.get("benchmarks", ()) if str(b.get("reference", "")).startswith("data:")]
    if own:
        files = last.get("questions") or {}
        names = ",".join(files[name]["file"] if name in files else f"{name}.json" for name in own)
        return QuestionSet(benchmarks=names, data=data.get("image_folder"), limit=limit), dtype
    records = Path(data["path"]).parent if isinstance(data.get("path"), str) else "DATA"
    return QuestionSet(run.comparisons[0].suite, str(planned.get("data") or records), limit), dtype


def _picture(run: RunFiles) -> str | Path:
    sides = [side for each in run.comparisons for side in (each.after, each.before) if side]
    files = (Path(line["image_file"]) for side in sides for line in side.answers if line.get("image_file"))
    if (file := next(files, None)) is None:
        return "PICTURE"
    return file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file
