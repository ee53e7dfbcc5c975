"""The modules of ours that a dry run and a training of one step import: python benchmarks/modules.py

Prints a JSON line {"dry_run": N, "train": N}. The model is `tiny`, and the records are written to a temporary folder.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

TURNS = [{"from": "human", "value": "What is 1 + 1?"}, {"from": "gpt", "value": "2"}]
WORDS = ["--model", "tiny-text", "--rank", "2", "--device", "cpu", "--max_steps", "1", "--save_strategy", "no"]
KINDS = {"dry_run": ["--dry-run"], "train": []}
CODE = """
import sys
from milora_vl.train.__main__ import main
assert main(sys.argv[1:]) == 0
ours = [name for name in sys.modules if name.split(".")[0] in ("milora_vl", "milora_data", "milora_eval")]
sys.stdout.write("\\n" + " ".join(ours))
"""


def imported(kind: str) -> list[str]:
    """Return the names of our modules that a dry run or a training imports."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "train.json")
        data.write_text(json.dumps([{"id": str(n), "conversations": TURNS} for n in range(8)]), encoding="utf-8")
        words = [*WORDS, "--data_path", str(data), "--output_dir", str(Path(folder, "run")), *KINDS[kind]]
        done = subprocess.run([sys.executable, "-c", CODE, *words], stdout=subprocess.PIPE, text=True, check=True)
    return sorted(done.stdout.splitlines()[-1].split())


if __name__ == "__main__":
    print(json.dumps({kind: len(imported(kind)) for kind in KINDS}))
