"""A training that is killed at random moments, and resumed each time, against the same training left alone.

python benchmarks/kills.py --kills 20 --processes 2 --output_dir FOLDER -- --model smol-llava --deepspeed zero3 ...
What stands behind `--` is the command line of milora_vl.train; prints a JSON line.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil


def main() -> int:
    """Run both and compare their losses; 1 where they differ."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--kills", type=int, default=20)
    options.add_argument("--processes", type=int, default=1)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--output_dir", type=Path, required=True)
    options.add_argument("words", nargs="+")
    chosen = options.parse_args()
    whole, killed = chosen.output_dir / "whole", chosen.output_dir / "killed"
    start = time.monotonic()
    process = started(chosen.words, whole, chosen.processes)
    wait_for_checkpoint(process, whole, set())
    seconds = time.monotonic() - start
    assert process.wait() == 0, f"see {whole}.log"
    kills = kill_often(chosen, killed, seconds)
    before, after = losses(whole), losses(killed)
    told = {
        "processes": chosen.processes,
        "steps": len(before),
        "kills": len(kills),
        "kills_while_training": sum(kill["training"] for kill in kills),
        "kills_while_saving": sum(kill["saving"] for kill in kills),
        "final_loss": [before[-1], after[-1]],
        "largest_difference": max(abs(a - b) for a, b in zip(before, after, strict=True)),
    }
    print(json.dumps(told))
    return int(before != after)


def started(words: Sequence[str], run: Path, processes: int, *more: str) -> subprocess.Popen[bytes]:
    """The training; what it says is added to a file beside the run."""
    run.parent.mkdir(parents=True, exist_ok=True)
    alone = [sys.executable]
    several = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [*(alone if processes == 1 else several), "-m", "milora_vl.train", *words, "--output_dir", str(run)]
    with Path(f"{run}.log").open("ab") as log:
        return subprocess.Popen([*command, *more], stdout=log, stderr=log)


def kill_often(chosen: argparse.Namespace, run: Path, seconds: float) -> list[dict[str, bool]]:
    """Start, kill all its processes at a random moment, start again; in the end leave it alone.

    Every second kill aims at a checkpoint: it comes within 100 ms of the appearance of its folder. The others come
    within twice the `seconds` that a start takes up to its first checkpoint.
    """
    rng = random.Random(chosen.seed)
    kills: list[dict[str, bool]] = []
    while len(kills) < chosen.kills:
        process = started(chosen.words, run, chosen.processes, "--resume_from_checkpoint", "auto")
        here = set(run.glob("checkpoint-*"))
        if len(kills) % 2:
            wait_for_checkpoint(process, run, here)
            time.sleep(rng.uniform(0, 0.1))
        else:
            wait(process, rng.uniform(0, 2) * seconds)
        if process.poll() is not None:
            assert process.returncode == 0, f"see {run}.log"
            return kills
        # torchrun's workers lead sessions of their own
        for each in [*psutil.Process(process.pid).children(recursive=True), process]:
            each.kill()
        process.wait()
        new = set(run.glob("checkpoint-*")) - here
        saving = any(not (folder / "trainer_state.json").exists() for folder in new)
        kills.append({"training": bool(new), "saving": saving})
        print(f"kill {len(kills)}: {sorted(folder.name for folder in new)} {saving=}", file=sys.stderr)
    process = started(chosen.words, run, chosen.processes, "--resume_from_checkpoint", "auto")
    assert process.wait() == 0, f"see {run}.log"
    return kills


def wait_for_checkpoint(process: subprocess.Popen[bytes], run: Path, here: set[Path]) -> None:
    """Until there is a checkpoint that is not `here`, or the process ends."""
    while process.poll() is None and set(run.glob("checkpoint-*")) <= here:
        time.sleep(0.001)


def wait(process: subprocess.Popen[bytes], seconds: float) -> None:
    """Until the process ends or the time is over."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return


def losses(run: Path) -> list[float]:
    """The loss of every logged step."""
    log: list[dict[str, Any]] = json.loads((run / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return [entry["loss"] for entry in log if "loss" in entry]


if __name__ == "__main__":
    sys.exit(main())
