"""Feed hostile files to every reader and count what happens: exceptions, time, memory, files, code.

python benchmarks/fuzz.py [--cases 20000] [--only NAME] [--seed 0]   prints a JSON line; exit code 1 if there is a fault
Each target runs in a separate process. Needs the development packages: make setup
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from hypothesis import HealthCheck, Phase, given, seed, settings

from support import fuzz_targets

SHOWN = 8  # faults of one kind


def main() -> int:
    """Run all targets and print the counts."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--cases", type=int, default=20_000)
    options.add_argument("--only", default="")
    options.add_argument("--seed", type=int, default=0)
    chosen = options.parse_args()
    targets = [target for target in fuzz_targets.targets() if chosen.only in target.name]
    total = sum(target.share for target in targets)
    counts, num_faults = {}, 0
    for number, target in enumerate(targets):
        cases = max(1, round(chosen.cases * target.share / total + 0.5))
        start = time.monotonic()
        with multiprocessing.get_context("fork").Pool(1) as pool:
            done = pool.apply_async(run, (number, chosen.only, cases, chosen.seed))
            try:
                num_cases, faults = done.get(timeout=cases * 2 + 600)
            except multiprocessing.TimeoutError:
                num_cases, faults = 0, Counter({"the process died or hangs": 1})
        counts[target.name] = num_cases
        num_faults += len(faults)
        took = time.monotonic() - start
        print(f"{target.name:28} {num_cases:7,} cases  {took:6.1f} s  {len(faults)} kinds of faults", file=sys.stderr)
        for fault, times in faults.most_common(SHOWN):
            print(f"    {times} x {fault}", file=sys.stderr)
    print(json.dumps({"cases": sum(counts.values()), "faults": num_faults, "by_target": counts}))
    return 1 if num_faults else 0


def run(number: int, only: str, cases: int, start: int) -> tuple[int, Counter[str]]:
    """Return the number of cases of one target and its faults, each with an example of its input."""
    target = [target for target in fuzz_targets.targets() if only in target.name][number]
    faults: dict[str, int] = Counter()
    count = 0
    _limit_memory()
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        (home / "scratch").mkdir()
        tempfile.tempdir = str(home / "scratch")
        os.environ["MPLCONFIGDIR"] = str(home / "scratch" / "matplotlib")
        os.environ["MILORA_CACHE"] = str(home / "scratch" / "cache")
        from matplotlib import font_manager  # noqa: F401 - it looks for fonts with another program, once

        # Every case counts, so hypothesis neither shrinks nor repeats.
        phases = (Phase.generate,)
        checks = list(HealthCheck)

        @seed(start)
        @settings(max_examples=cases, database=None, deadline=None, phases=phases, suppress_health_check=checks)
        @given(drawn=target.inputs)
        def each(drawn: Any) -> None:
            nonlocal count
            count += 1
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                fault = fuzz_targets.run_case(target, drawn, home)
            if fault:
                line = fault.splitlines()[0][:160]
                if line not in faults:
                    print(f"  {target.name}: {fault[:1500]}\n    input: {repr(drawn)[:300]}", file=sys.stderr)
                faults[line] += 1

        each()
    return count, Counter(faults)


def _limit_memory() -> None:
    """Let an allocation of many GiB fail at once instead of filling the machine."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + (6 << 30), resource.RLIM_INFINITY))


if __name__ == "__main__":
    sys.exit(main())
