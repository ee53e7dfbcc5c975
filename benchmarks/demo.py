"""The demo in the README: the time of `make demo` on this machine, and its output.

python benchmarks/demo.py            # takes minutes: runs the demo, writes the README's section, prints a JSON line
python benchmarks/demo.py --readme   # writes the README's section from benchmarks/results.json

Run `make demo` once before, so that downloads and the creation of smol-llava are not measured.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from all import RESULTS, ROOT, machine

README = ROOT / "README.md"
PRINTED = """\
`make demo` took {minutes} minutes {seconds} seconds on two cores ({cpu}), in {dtype}. It printed

```
{table}
...
report: runs/demo/report.html
```
"""


def measure() -> dict[str, Any]:
    """Run the demo; return its time, its table and the numbers for the summary."""
    (ROOT / "runs").mkdir(exist_ok=True)
    with TemporaryDirectory(dir=ROOT / "runs") as folder:
        start = time.perf_counter()
        done = subprocess.run(
            ["make", "demo", f"RUN={folder}/demo"], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
        )
        seconds = time.perf_counter() - start
        recipe = yaml.safe_load((Path(folder) / "demo" / "recipe.yaml").read_text(encoding="utf-8"))
    return {
        "command": "make demo", "seconds": round(seconds), "cpu": machine()["cpu"], "dtype": recipe["dtype"],
        "table": table(done.stdout),
    }  # fmt: skip


def table(printed: str) -> list[str]:
    """Return the lines of the score table in the demo's output. Raises ValueError if there is no table."""
    lines = [line.rstrip() for line in printed.splitlines()]
    head = next((place for place, line in enumerate(lines) if "baseline" in line and "tuned" in line), None)
    if head is None:
        raise ValueError(f"the demo printed no table of scores:\n{printed}")
    last = next(place for place, line in enumerate(lines) if "text forgetting" in line)
    return lines[head : last + 1]


def block(found: dict[str, Any]) -> str:
    """Return the README's section."""
    minutes, seconds = divmod(found["seconds"], 60)
    lines = "\n".join(found["table"])
    return PRINTED.format(minutes=minutes, seconds=seconds, cpu=found["cpu"], dtype=found["dtype"], table=lines)


def written(readme: str, found: dict[str, Any]) -> str:
    """Return the README's text with a new section. Raises ValueError if it has no markers."""
    start = "<!-- demo -->\n"
    before, found_start, rest = readme.partition(start)
    _, found_end, after = rest.partition("<!-- end -->")
    if not (found_start and found_end):
        raise ValueError(f"README.md has no part between  {start.strip()}  and  <!-- end -->")
    return f"{before}{start}{block(found)}<!-- end -->{after}"


def main() -> int:
    """Measure, update the README, and print the result."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--readme", action="store_true", help="only write the README's section from results.json")
    stored = options.parse_args().readme
    found = json.loads(RESULTS.read_text(encoding="utf-8"))["demo"]["result"] if stored else measure()
    README.write_text(written(README.read_text(encoding="utf-8"), found), encoding="utf-8")
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
