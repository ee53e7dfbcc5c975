"""The demo as the README shows it: how long `make demo` took here, and what it printed.

python benchmarks/demo.py            # minutes: runs it in a folder of its own, writes demo.json and the README's parts
python benchmarks/demo.py --readme   # writes the README's parts from demo.json

`make demo` must have run before, so that downloads and the making of smol-llava are not measured.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from datetime import date
from tempfile import TemporaryDirectory
from typing import Any

from all import HERE, machine

RESULTS, README = HERE / "demo.json", HERE.parent / "README.md"
PRINTED = """\
`make demo` took {minutes} minutes {seconds} seconds on two cores ({cpu}). It printed

```
{table}
...
report: runs/demo/report.html
```
"""
SUMMARY = """\
| | before | after | majority answer |
|---|---|---|---|
| accuracy | {before} % | {after} % | {rote} % |
| forgetting (nats per token) | 0 | {forgetting} | |
"""


def measure() -> dict[str, Any]:
    """Run the demo; its time, its table and the numbers that the summary needs."""
    with TemporaryDirectory(dir=HERE.parent / "runs") as folder:
        start = time.perf_counter()
        done = subprocess.run(
            ["make", "demo", f"RUN={folder}/demo"], cwd=HERE.parent, stdout=subprocess.PIPE, text=True, check=True
        )
        seconds = time.perf_counter() - start
    return {
        "command": "make demo", "date": date.today().isoformat(), "seconds": round(seconds), "machine": machine(),
        "table": table(done.stdout),
    }  # fmt: skip


def table(printed: str) -> list[str]:
    """The lines of the table of scores in what the demo printed; ValueError where there is none."""
    lines = [line.rstrip() for line in printed.splitlines()]
    head = next((place for place, line in enumerate(lines) if "baseline" in line and "tuned" in line), None)
    if head is None:
        raise ValueError(f"the demo printed no table of scores:\n{printed}")
    last = next(place for place, line in enumerate(lines) if "text forgetting" in line)
    return lines[head : last + 1]


def cells(found: dict[str, Any], name: str) -> list[str]:
    """The cells of one row of the table."""
    row = next(line for line in found["table"] if line.strip().startswith(name))
    return re.findall(r"[+-]?\d[\d,.]*(?: ± \d[\d.]*)?", row.replace(name, ""))


def blocks(found: dict[str, Any]) -> dict[str, str]:
    """The README's two parts."""
    _, rote, before, after, _ = cells(found, "mean over types")
    minutes, seconds = divmod(found["seconds"], 60)
    return {
        "demo": PRINTED.format(
            minutes=minutes, seconds=seconds, cpu=found["machine"]["cpu"], table="\n".join(found["table"])
        ),
        "demo in short": SUMMARY.format(
            before=before, after=after, rote=rote, forgetting=cells(found, "text forgetting")[-1].removeprefix("+")
        ),
    }


def written(readme: str, found: dict[str, Any]) -> str:
    """The README's text with its two parts made anew."""
    for name, block in blocks(found).items():
        start = f"<!-- {name} -->\n"
        before, found_start, rest = readme.partition(start)
        _, found_end, after = rest.partition("<!-- end -->")
        if not (found_start and found_end):
            raise ValueError(f"README.md has no part between  {start.strip()}  and  <!-- end -->")
        readme = f"{before}{start}{block}<!-- end -->{after}"
    return readme


def main() -> int:
    """Measure, keep, and write the README."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--readme", action="store_true", help="write the README's parts from demo.json alone")
    if not options.parse_args().readme:
        RESULTS.write_text(json.dumps(measure(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    README.write_text(written(README.read_text(encoding="utf-8"), found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
