"""The `eval:` section of a recipe: `python -m milora_eval run` in a process of its own, after training."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from milora_data.errors import UserError
from milora_vl.config import EvalConfig


def commands(config: EvalConfig, *, model: str, output_dir: Path) -> list[list[str]]:
    """One command per suite, without the interpreter, as a user would type it after `python`."""
    options = [] if config.data is None else ["--data", config.data]
    options += [] if config.limit is None else ["--limit", str(config.limit)]
    start = ["-m", "milora_eval", "run", "--model", model, "--adapter", str(output_dir)]
    return [[*start, "--suite", suite, *options, "--output_dir", str(output_dir)] for suite in config.suites]


def check(config: EvalConfig) -> None:
    """UserError for what would fail only after the training: an unknown suite, files that are not there."""
    if not config.suites:
        return
    if config.data is not None and not Path(config.data).is_dir():
        raise UserError(f"eval.data: no folder {config.data}\nthe evaluation would fail after the training")
    done = subprocess.run([sys.executable, "-m", "milora_eval", "ls"], capture_output=True, text=True)
    known = done.stdout.split()
    for suite in config.suites:
        if done.returncode == 0 and suite not in known:
            raise UserError(f"eval.suites: unknown suite {suite!r}\nsee: python -m milora_eval ls")


def run(command: list[str]) -> bool:
    """Run one of them, its output on this terminal's stderr; whether it came to its end."""
    return subprocess.run([sys.executable, *command], stdout=sys.stderr).returncode == 0
