"""The time that `import milora_vl` adds to `import torch`, and the time of each --help: medians of fresh processes.

python benchmarks/imports.py [--repeats 7]    prints a JSON line
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time

from milora_vl.__main__ import MENU


def main() -> None:
    """Measure alternately and print the figures."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--repeats", type=int, default=7)
    repeats = options.parse_args().repeats
    torch, both = alternating(["-c", "import torch"], ["-c", "import torch, milora_vl"], repeats)
    helps = {name: seconds(["-m", "milora_vl", name, "--help"]) for name in MENU.modules}
    print(json.dumps({"torch": torch, "torch_and_milora_vl": both, "added": both - torch, "help": helps}))


def alternating(one: list[str], other: list[str], repeats: int) -> tuple[float, float]:
    """Return the median seconds of two commands, run alternately."""
    pairs = [(seconds(one), seconds(other)) for _ in range(repeats)]
    return statistics.median(pair[0] for pair in pairs), statistics.median(pair[1] for pair in pairs)


def seconds(arguments: list[str]) -> float:
    """Return the seconds of one fresh Python process."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
