"""A training that is killed at random moments, and resumed each time, against the same training left alone.

python benchmarks/kills.py --kills 20 --processes 2 --output_dir FOLDER -- --model smol-llava --deepspeed zero3 ...
What stands behind `--` is the command line of milora_vl.train; prints a JSON line.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import socket
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")


def main() -> int:
    """Run both and compare their losses; 1 where they differ."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--kills", type=int, default=20)
    options.add_argument("--processes", type=int, default=1)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--output_dir", type=Path, help="where the two runs are kept [a temporary folder]")
    options.add_argument("words", nargs="+")
    chosen = options.parse_args()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    CONTEXT.set_forkserver_preload(["milora_vl.train.run", "milora_vl.train.trainer", "peft", "deepspeed"])
    with tempfile.TemporaryDirectory(prefix="kills-") as temporary:
        return compare(chosen, chosen.output_dir or Path(temporary))


def compare(chosen: argparse.Namespace, folder: Path) -> int:
    """Train twice in `folder`, alone and killed, and print what came out; 1 where the losses differ."""
    whole, killed = folder / "whole", folder / "killed"
    start = time.monotonic()
    training = Training(chosen.words, whole, chosen.processes)
    wait_for_checkpoint(training, whole, set())
    seconds = time.monotonic() - start
    training.ends()
    kills = kill_often(chosen, killed, seconds)
    before, after = losses(whole), losses(killed)
    told = {
        "processes": chosen.processes,
        "losses": len(before),
        "kills": len(kills),
        "kills_after_a_new_checkpoint": sum(kill["new"] for kill in kills),
        "kills_while_saving": sum(kill["saving"] for kill in kills),
        "final_loss": [before[-1], after[-1]],
        "largest_difference": max(abs(a - b) for a, b in zip(before, after, strict=True)),
    }
    print(json.dumps(told))
    return int(before != after)


class Training:
    """The processes of one training. They are forked from one that has imported everything: a start costs a second."""

    def __init__(self, words: Sequence[str], run: Path, processes: int) -> None:
        run.parent.mkdir(parents=True, exist_ok=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        places = [place(rank, processes, port) if processes > 1 else {} for rank in range(processes)]
        command = [*words, "--output_dir", str(run)]
        self.processes = [CONTEXT.Process(target=train, args=(command, each, f"{run}.log")) for each in places]
        for process in self.processes:
            process.start()

    def ends(self, seconds: float | None = None) -> bool:
        """Whether all have ended after that time; AssertionError where one has failed."""
        for process in self.processes:
            process.join(seconds)
        codes = [process.exitcode for process in self.processes]
        assert not any(codes), f"exit codes {codes}; see the log beside the run"
        return codes == [0] * len(codes)

    def kill(self) -> None:
        """SIGKILL for all of them."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()


def place(rank: int, processes: int, port: int) -> dict[str, str]:
    """What torchrun tells a process."""
    said = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    return {name: str(value) for name, value in said.items()} | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def train(words: Sequence[str], environment: Mapping[str, str], log: str) -> None:
    """In a process of its own: milora_vl.train."""
    os.environ.update(environment)
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    from milora_vl.train.command import main as milora_train

    code = milora_train(words)
    sys.stdout.flush()
    os._exit(code)  # gloo sometimes aborts at interpreter exit, after everything is done


def kill_often(chosen: argparse.Namespace, run: Path, seconds: float) -> list[dict[str, bool]]:
    """Start, kill all its processes at a random moment, start again; in the end leave it alone.

    Every second kill aims at a checkpoint: it comes within 100 ms of the appearance of its folder. The others come
    within the `seconds` that a start takes up to its first checkpoint, so some before the training has begun.
    """
    rng = random.Random(chosen.seed)
    kills: list[dict[str, bool]] = []
    while len(kills) < chosen.kills:
        training = Training([*chosen.words, "--resume_from_checkpoint", "auto"], run, chosen.processes)
        here = set(run.glob("checkpoint-*"))
        if len(kills) % 2:
            wait_for_checkpoint(training, run, here)
            time.sleep(rng.uniform(0, 0.1))
        else:
            wait_for_checkpoint(training, run, here, at_most=rng.uniform(0, seconds))
        if training.ends(0):
            return kills
        training.kill()
        new = set(run.glob("checkpoint-*")) - here
        saving = any(not (folder / "trainer_state.json").exists() for folder in new)
        kills.append({"new": bool(new), "saving": saving})
        print(f"kill {len(kills)}: {sorted(folder.name for folder in new)} {saving=}", file=sys.stderr)
    Training([*chosen.words, "--resume_from_checkpoint", "auto"], run, chosen.processes).ends()
    return kills


def wait_for_checkpoint(training: Training, run: Path, here: set[Path], at_most: float = float("inf")) -> None:
    """Until there is a checkpoint that is not `here`, the training ends, or the seconds are over."""
    end = time.monotonic() + at_most
    while not training.ends(0) and set(run.glob("checkpoint-*")) <= here and time.monotonic() < end:
        time.sleep(0.001)


def losses(run: Path) -> list[float]:
    """The loss of every logged step."""
    log: list[dict[str, Any]] = json.loads((run / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return [entry["loss"] for entry in log if "loss" in entry]


if __name__ == "__main__":
    sys.exit(main())
