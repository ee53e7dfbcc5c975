"""`python -m studies`: run one of the studies in docs/studies."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from milora_vl.common.atomic_write import locked
from milora_vl.common.cli.console import amount, next_step, run
from milora_vl.common.cli.parser import Command, flag, option, positive, shared
from milora_vl.sweep.runner import usable_cores
from studies import page, runner
from studies.study import Study, chosen, read_study, study_names
from studies.tasks import require_task

COMMAND = Command(
    "studies",
    "Run many small trainings that answer one question.",
    """\
A study is a question and a task, QUESTION.TASK: curves.minilm. The question alone means all its tasks.
Run the same command again to resume.

examples:
  python -m studies --list
  python -m studies curves.minilm --plan
  python -m studies curves
""",
    inputs=(
        option("study", nargs="?", metavar="STUDY", help="question or question.task; without it, the list is shown"),
        flag("--list", "show the studies, then stop"),
    ),
    settings=(
        option("--jobs", type=positive, help="number of parallel cells (default: one per core, up to 4)"),
        flag("--plan", "show the cells to run, then stop"),
        shared("retry"),
    ),
    outputs=(
        shared("output_dir", default=Path("runs/studies"), about="output folder (default: %(default)s)"),
        option(
            "--docs",
            type=Path,
            metavar="FOLDER",
            help="write finished cells into the CSV files and figures in this folder, and run none",
        ),
        shared("format"),
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code. Raises UserError for an unknown study."""
    options = COMMAND.parse(argv)
    if options.list or options.study is None:
        _list(options.format == "json")
        return 0
    code = 0
    for name in chosen(options.study):
        code |= _run_one(name, read_study(name), options)
    return code


def _list(as_json: bool) -> None:
    questions = {name: read_study(name).question for name in study_names()}
    lines: list[str] = []
    for question, names in groupby(questions, key=questions.__getitem__):
        lines += [question, *(f"  {name}" for name in names)]
    sys.stdout.write((json.dumps(questions, ensure_ascii=False) if as_json else "\n".join(lines)) + "\n")
    next_step("studies", next(iter(questions)), "--plan")


def _run_one(name: str, study: Study, options: argparse.Namespace) -> int:
    folder = runner.Folder(options.output_dir / name, study)
    jobs = options.jobs or min(usable_cores(), 4)
    cells = study.cells()
    left = len(folder.to_run(cells, retry=options.retry))
    estimate = folder.time_left(cells, left, jobs)
    sys.stderr.write(
        f"{name}: {amount(len(cells), 'cell')}, {left:,} to run, {jobs} at a time{estimate}\n{folder.folder}\n"
    )
    if options.plan:
        next_step("studies", name)
        return 0
    if options.docs:
        sys.stderr.write(f"docs: {page.document(name, folder, options.docs)}\n")
        return 0
    for task in (study.task, *study.then):
        require_task(task)  # before the workers start
    folder.folder.mkdir(parents=True, exist_ok=True)
    with locked(folder.folder, "study", "wait until it has finished"):
        failed = runner.run_study(folder, jobs, retry=options.retry)
        written, table = page.write(folder, f"python -m studies {name}")
    as_json = json.dumps({"study": name, "arms": [dict(zip(table.header, row, strict=True)) for row in table.rows]})
    sys.stdout.write(f"{as_json if options.format == 'json' else table.markdown()}\n")
    sys.stderr.write(f"page: {written}\n")
    next_step(
        "studies",
        *((name, "--retry") if failed else (name, "--docs", "FOLDER")),
    )
    return 1 if failed else 0


if __name__ == "__main__":
    run(main)
