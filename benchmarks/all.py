"""Every benchmark in one go, each in a process of its own, one at a time: `make bench`.

python benchmarks/all.py [--only NAME ...] [--page]

Results go to benchmarks/results.json as they come, with the machine's description; docs/performance.md is made of them.
--only measures some parts again and keeps the others; --page writes the page and measures nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from goals import GOALS, REASONS, Goal

HERE = Path(__file__).resolve().parent
RESULTS, PAGE = HERE / "results.json", HERE.parent / "docs" / "performance.md"
PARTS = {
    "imports": "imports.py",
    "svd": "svd.py headline",
    "svd_7b": "svd.py llama --size 7b",
    "smollm2": "init_model.py",
    "cache_7b": "init_model.py --model 7b-block --rank 128",
    "step": "step.py",
    "step_bf16": "step.py --dtype bfloat16",
    "step_bf16_checkpointing": "step.py --dtype bfloat16 --checkpointing",
    "data": "data.py",
    "loader": "loader.py",
    "eval": "eval.py",
    "full_size": "full_size.py",
}

TEMPLATE = """# Performance

What we want to reach and what was measured. Every ratio is from one run of one script, both sides in turns in it, but
for caches, the loader and the scoring of answers, where one side comes after the other; the loader and the training are
measured alone, not beside each other. `make bench` measures all of it again and writes this page. Figures vary by some
percent from run to run, on a busy machine by more. Measured on {cpu}, {cores} cores, {memory_gib} GiB, Python {python},
torch {torch}, transformers {transformers}, peft {peft}, {dates}.

| what | against | goal | measured | |
|---|---|---|---|---|
{rows}
{missed}
## Commands

| | took |
|---|---|
{commands}

No figure here is from a GPU. `benchmarks/svd.py` and `benchmarks/step.py` take `--device cuda`.
"""


def main() -> int:
    """Measure, write results and page; 1 if a script failed."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="NAME")
    options.add_argument("--page", action="store_true", help="write docs/performance.md from the results there are")
    chosen = options.parse_args()
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    failed = []
    for name in [] if chosen.page else chosen.only:
        print(f"{name}: python benchmarks/{PARTS[name]}", file=sys.stderr)
        start = time.perf_counter()
        measured = measure(PARTS[name])
        if measured is None:
            failed.append(name)
            continue
        results[name] = {
            "command": f"python benchmarks/{PARTS[name]}",
            "date": date.today().isoformat(),
            "seconds": round(time.perf_counter() - start, 1),
            "machine": machine(),
            "result": measured,
        }
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    PAGE.write_text(page(results), encoding="utf-8")
    for name in failed:
        print(f"failed: python benchmarks/{PARTS[name]}", file=sys.stderr)
    return 1 if failed else 0


def measure(command: str) -> Any:
    """Run one script; what its last line of output says, or None if it failed."""
    done = subprocess.run([sys.executable, *command.split()], cwd=HERE, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine()
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = {name: version(name) for name in ("torch", "transformers", "peft")}
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_gib": round(memory),
        "python": platform.python_version(),
    } | versions


def page(results: dict[str, Any]) -> str:
    """The text of docs/performance.md."""
    described = [entry["machine"] for entry in results.values()]
    if any(other != described[0] for other in described):
        raise SystemExit("the results come from different machines or versions: measure all of them again")
    facts = described[0]
    dates = sorted({entry["date"] for entry in results.values()})
    return TEMPLATE.format(
        **facts,
        dates=" to ".join(dict.fromkeys((dates[0], dates[-1]))),
        rows="\n".join(row(goal, results[goal.part]["result"]) for goal in GOALS if goal.part in results),
        missed=missed(results),
        commands="\n".join(f"| `{entry['command']}` | {entry['seconds']:.0f} s |" for entry in results.values()),
    )


def row(goal: Goal, result: Any) -> str:
    """One line of the table."""
    value = goal.value(result)
    bound = f"{'≤' if goal.at_most else '≥'} {goal.goal:.4g}{goal.unit}"
    verdict = "✓" if goal.is_met(value) else "missed"
    return f"| {goal.what} | {goal.against} | {bound} | {value:.3g}{goal.unit} | {verdict} |"


def missed(results: dict[str, Any]) -> str:
    """Why goals are missed; nothing if none is."""
    lines = [
        f"- {goal.what}: {REASONS.get(goal.what, 'not yet understood')}"
        for goal in GOALS
        if goal.part in results and not goal.is_met(goal.value(results[goal.part]["result"]))
    ]
    return "\n".join(["", "## Missed", "", *lines, ""]) if lines else ""


if __name__ == "__main__":
    sys.exit(main())
