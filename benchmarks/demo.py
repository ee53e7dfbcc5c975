"""The demo in docs/quickstart.md: the time of `make demo` on this machine, and its output.

python benchmarks/demo.py      # takes minutes: runs the demo, writes the section of the page, prints a JSON line

Run `make demo` once before, so that downloads and the creation of smol-llava are not measured.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from all import ROOT, machine

PAGE = ROOT / "docs" / "quickstart.md"
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
    """Return the section of the page."""
    minutes, seconds = divmod(found["seconds"], 60)
    lines = "\n".join(found["table"])
    return PRINTED.format(minutes=minutes, seconds=seconds, cpu=found["cpu"], dtype=found["dtype"], table=lines)


def written(page: str, found: dict[str, Any]) -> str:
    """Return the text of the page with a new section. Raises ValueError if it has no markers."""
    start = "<!-- demo -->\n"
    before, found_start, rest = page.partition(start)
    _, found_end, after = rest.partition("<!-- end -->")
    if not (found_start and found_end):
        raise ValueError(f"{PAGE.name} has no part between  {start.strip()}  and  <!-- end -->")
    return f"{before}{start}{block(found)}<!-- end -->{after}"


def main() -> int:
    """Measure, update the page, and print the result."""
    found = measure()
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), found), encoding="utf-8")
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
