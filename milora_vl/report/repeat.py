"""The commands that repeat, evaluate and use a run, as a user types them."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from milora_vl.common.cli.command_line import command_line
from milora_vl.common.evaluator import EvaluationRequest, QuestionSet, evaluator
from milora_vl.core.adapter.checkpoints import holds_weights, newest_checkpoint
from milora_vl.core.adapter.folders import has_config, holds_text_model
from milora_vl.report.run_page import Run, tasks_of


@dataclass(frozen=True, slots=True)
class Commands:
    """One command line each. `repeat` writes into a new folder, because a run is never overwritten."""

    as_typed: str
    repeat: str
    evaluate: str
    forgetting: str
    analyze: str
    chat: str
    report: str
    earlier: tuple[str, ...] = ()  # evaluate this run on the tasks of earlier ones that have no score yet


def commands(run: Run) -> Commands:
    """Return the command of this run and the commands that use it."""
    recipe = run.folder / "recipe.yaml"
    weights = _weights(run)
    model, adapter, base = _model(run, weights)
    flags: list[str | Path] = ["--model", model]
    flags += ["--adapter", adapter] if adapter else []
    of_base: list[str | Path] = ["--base", base] if base else []
    # This page would not find files beside a checkpoint, and they would be removed with it.
    apart = weights != run.folder
    into_run: list[str | Path] = ["--output_dir", run.folder] if apart else []
    into_analysis: list[str | Path] = ["--output_dir", run.folder / "analysis"] if apart else []
    evaluation = _evaluation(run, model, adapter, base)
    return Commands(
        as_typed=_as_typed(run.environment.get("command") or ()),
        repeat=command_line("milora_vl.train", "--recipe", recipe, "--output_dir", f"{run.folder}-again"),
        evaluate=command_line(*evaluator().command(evaluation)),
        forgetting=command_line("milora_vl.forgetting", *flags, *of_base, *into_run),
        analyze=command_line("milora_vl.analyze", weights, *of_base, *into_analysis),
        chat=command_line("milora_vl.chat", *flags, *_question(run)),
        report=command_line("milora_vl.report", run.folder),
        earlier=tuple(
            command_line(*evaluator().command(of_task))
            for task, of_task in of_earlier(run.folder, evaluation).items()
            if not any(each.run == task and each.score.after for each in run.earlier)
        ),
    )


def steps(typed: Commands) -> list[tuple[str, str]]:
    """Return (purpose, command) pairs in the order of work."""
    original = [("original command", typed.as_typed)] if typed.as_typed else []
    return [
        *original,
        ("train again", typed.repeat),
        ("evaluate", typed.evaluate),
        ("ask", typed.chat),
        ("this page", typed.report),
    ]


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


def is_file(suite: str) -> bool:
    """Return whether an entry of `eval.suites` is a file of own questions."""
    return Path(suite).suffix in (".json", ".jsonl")


def _as_typed(argv: Sequence[str]) -> str:
    """Return the command line of the training. With -m, Python keeps only a file name as its first word."""
    if not argv:
        return ""
    if Path(argv[0]).name in ("train.py", "__main__.py"):
        return command_line("milora_vl.train", *argv[1:])
    return shlex.join(argv)


def _weights(run: Run) -> Path:
    """Return the folder of the weights: the run's own, or its newest checkpoint while the run is unfinished."""
    return run.folder if holds_weights(run.folder) else newest_checkpoint(run.folder) or run.folder


def _model(run: Run, weights: Path) -> tuple[str | Path, Path | None, str | None]:
    """Return the model of this run, its adapter (or projector), and its base model if that is a separate model.

    A full fine-tuning is a complete model; an adapter or projector also needs its base model.
    """
    base = str(run.environment.get("model") or run.recipe.get("model") or "MODEL")
    if (weights / "config.json").is_file() and not has_config(weights):
        return weights, None, base
    return base, weights, None


def _evaluation(run: Run, model: str | Path, adapter: Path | None, base: str | None) -> EvaluationRequest:
    """Return an evaluation as the last one, whose answers it can reuse, else one of the questions in the recipe."""
    planned, data = run.recipe.get("eval") or {}, run.recipe.get("data") or {}
    pictures = data.get("image_folder")
    last = next((results for results in _results(run)), {})
    limit, dtype = last.get("limit"), (last.get("generation") or {}).get("dtype")
    if custom := _custom_benchmarks(run):
        questions = QuestionSet(benchmarks=custom, data=pictures, limit=limit)
    elif run.comparisons:
        records = Path(data["path"]).parent if isinstance(data.get("path"), str) else "DATA"
        questions = QuestionSet(run.comparisons[0].suite, str(planned.get("data") or records), limit)
    else:
        questions = questions_of(run.recipe) or QuestionSet(benchmarks="HELD_OUT.json", data=pictures)
    return EvaluationRequest(
        model=model, adapter=adapter, base=base, questions=questions, dtype=dtype, output_dir=run.folder
    )


def _custom_benchmarks(run: Run) -> str:
    """Return the files of the user's benchmarks in the last evaluation. The results contain only their names."""
    entries = [entry for results in _results(run)[:1] for entry in results.get("benchmarks", ())]
    custom = [str(entry["name"]) for entry in entries if str(entry.get("reference", "")).startswith("data:")]
    data, planned = run.recipe.get("data") or {}, run.recipe.get("eval") or {}
    paths = [data.get("path"), data.get("eval_path"), *(planned.get("suites") or ())]
    files = {Path(path).stem: path for path in paths if isinstance(path, str)}
    return ",".join(files.get(name, f"{name}.json") for name in custom)


def _results(run: Run) -> list[Mapping[str, Any]]:
    return [side.results for comparison in run.comparisons for side in (comparison.after, comparison.before) if side]


def _question(run: Run) -> list[str | Path]:
    return ["QUESTION"] if holds_text_model(_weights(run)) else ["--image", _picture(run), "What is this?"]


def _picture(run: Run) -> str | Path:
    """Return a picture of the evaluation, or a placeholder."""
    for comparison in run.comparisons:
        for side in (comparison.after, comparison.before):
            for line in side.predictions if side else ():
                if line.get("image_file"):
                    file = Path(str(line["image_file"]))
                    here = Path.cwd()
                    return file.relative_to(here) if file.is_relative_to(here) else file
    return "PICTURE"
