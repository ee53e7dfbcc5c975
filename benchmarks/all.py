"""Run every benchmark, one at a time, each in its own process: `make bench-full`.

python benchmarks/all.py [--full] [--only NAME ...] [--quick] [--page]

Each result is written to benchmarks/results.json with a description of the machine; docs/performance.md shows them.
Without --full, the parts that take an hour are left out (`make bench`): a training on text, the start, the demo, a 7B
at full size. --only measures some parts again and keeps the others; --quick measures the headline rows
(`make bench-quick`); --page only writes the page.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.performance import page
from benchmarks.timing import ROOT, apart, timed
from milora_vl.sweep.runner import usable_cores

RESULTS, PAGE = ROOT / "benchmarks" / "results.json", ROOT / "docs" / "performance.md"
PARTS = {
    "svd": "svd.py headline",
    "svd_llama": "svd.py llama",
    "smollm2": "svd.py model",
    "cache_7b": "svd.py model --model 7b-block --rank 128 --alone",
    "step": "step.py",
    "loss": "step.py --loss",
    "whole_training": "whole_training.py --data pictures --way milora hf hf-tuned trl",
    "whole_training_text": "whole_training.py --data text --steps 5",
    "start": "start.py",
    "base_kl": "start.py --base_kl",
    "data": "data.py",
    "eval": "eval.py",
    "plan": "plan.py",
    "full_size": "plan.py --full_size",
    "demo": "demo.py",
}
LONG = ("whole_training_text", "start", "demo", "full_size")  # an hour
QUICK = ("smollm2", "step", "loss", "whole_training")
SETS = {"bench": [name for name in PARTS if name not in LONG], "bench-quick": QUICK}


def main() -> int:
    """Measure, write the results and the page; return 1 if a script failed."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--only", nargs="+", choices=PARTS, default=SETS["bench"], metavar="NAME")
    options.add_argument("--full", action="store_const", dest="only", const=list(PARTS), help="all parts")
    options.add_argument("--quick", action="store_const", dest="only", const=QUICK, help="the headline rows")
    options.add_argument("--page", action="store_true", help="write docs/performance.md from the stored results")
    chosen = options.parse_args()
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    failed = []
    for name in [] if chosen.page else chosen.only:
        print(f"{name}: python benchmarks/{PARTS[name]}", file=sys.stderr)
        script, *words = PARTS[name].split()
        seconds, measured = timed(lambda s=script, w=words: apart(s, *w))
        if measured is None:
            failed.append(name)
            continue
        results[name] = {
            "command": f"python benchmarks/{PARTS[name]}",
            "date": date.today().isoformat(),
            "seconds": round(seconds, 1),
            "machine": machine(),
            "result": measured,
        }
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    for name in failed:
        print(f"failed: python benchmarks/{PARTS[name]}", file=sys.stderr)
    missing = [name for name in PARTS if name not in results]
    if missing:
        print(f"no page yet, not measured: {', '.join(missing)}", file=sys.stderr)
        return 1
    PAGE.write_text(page(results, SETS), encoding="utf-8")
    return 1 if failed else 0


def machine() -> dict[str, Any]:
    """Return a description of this machine, on which the figures depend."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine()
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = {name: version(name) for name in ("torch", "transformers", "peft")}
    return {
        "cpu": model,
        "cores": usable_cores(),
        "memory_gib": round(memory),
        "python": platform.python_version(),
    } | versions


if __name__ == "__main__":
    sys.exit(main())
