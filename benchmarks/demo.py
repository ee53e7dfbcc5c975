"""The demo in docs/quickstart.md: the time of `make demo` on this machine, and its output.

python benchmarks/demo.py      # takes minutes: runs the demo, writes the section of the page, prints a JSON line

Run `make demo` once before, so that downloads, the creation of smol-llava and its calibration are not measured.
"""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml

from benchmarks.all import machine
from benchmarks.timing import ROOT, timed

PAGE = ROOT / "docs" / "quickstart.md"
TABLE = re.compile(r"^.*baseline.*tuned.*\n(?:.*\n)*?.*picture forgetting.*$", re.MULTILINE)
BLOCK = re.compile(r"(<!-- demo -->\n).*?(<!-- end -->)", re.DOTALL)
PRINTED = """\
`make demo` took {minutes} minutes {seconds} seconds on two cores ({cpu}), in {dtype}, with pictures and
model there already. It printed

```
{table}
...
report: runs/demo/report.html
```
"""


def main() -> None:
    """Run the demo, write its time and its table of scores into the page, and print the result."""
    (ROOT / "runs").mkdir(exist_ok=True)
    with TemporaryDirectory(dir=ROOT / "runs") as folder:
        command = ["make", "demo", f"RUN={folder}/demo"]
        seconds, done = timed(lambda: subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True))
        dtype = yaml.safe_load((Path(folder) / "demo" / "recipe.yaml").read_text(encoding="utf-8"))["dtype"]
    table = TABLE.search(done.stdout)
    assert table, f"the demo printed no table of scores:\n{done.stdout}"
    lines = [line.rstrip() for line in table[0].splitlines()]
    minutes, rest = divmod(round(seconds), 60)
    section = PRINTED.format(minutes=minutes, seconds=rest, cpu=machine()["cpu"], dtype=dtype, table="\n".join(lines))
    page, count = BLOCK.subn(lambda found: f"{found[1]}{section}{found[2]}", PAGE.read_text(encoding="utf-8"))
    assert count == 1, f"{PAGE.name} has no part between  <!-- demo -->  and  <!-- end -->"
    PAGE.write_text(page, encoding="utf-8")
    print(json.dumps({"seconds": round(seconds), "cpu": machine()["cpu"], "dtype": dtype, "table": lines}))


if __name__ == "__main__":
    main()
