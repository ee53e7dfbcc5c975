"""Train smol-llava for an hour while things go wrong, beside the same training left alone: equal losses, flat memory.

python benchmarks/soak.py --minutes 60 --output_dir FOLDER       (as root: it mounts a small file system)

The disturbed training writes to a file system with room for four checkpoints. Every few minutes it is killed (SIGKILL),
or the file system is filled until the training ends and then freed; it is resumed each time. A program that computes
for some seconds and rests for some competes for the cores. The undisturbed training runs at the same time, so both also
compete with each other. At the end the losses of all steps that the disturbed training has made are compared. Prints a
JSON line; exit code 1 if a loss differs or the memory of the undisturbed training grows.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import mean
from typing import Any, Literal

import psutil

from kills import CONTEXT, losses
from milora_vl.cli import command_line as cli

# The demo's training in short steps and without protection, which each early start would calibrate again. The rate is
# constant, so that the number of steps need not be known: both are stopped when the time is over. Both also share a
# cache of factors, so a start after an early kill is quick.
TRAINING = (
    "--model smol-llava --attn_implementation eager --template vicuna_v1 --max_length 512 --rank 32 "
    "--data_path data/emoji/train.json --image_folder data/emoji/images --train_sampling_strategy group_by_length "
    "--per_device_train_batch_size 1 --learning_rate 1e-3 --lr_scheduler_type constant --max_steps 100000 --use_cpu "
    "--logging_steps 1 --save_steps 2 --save_total_limit 2 --disable_tqdm"
)
CHECKPOINTS_ON_DISK = 4  # two are kept, one is being written, and one of room
SAMPLED_EVERY = 2.0  # seconds
GREW_AT_MOST = 0.05  # of the memory, from the second quarter of the time to the last
ENDED_BY_SIGTERM = 128 + signal.SIGTERM
Fate = Literal["killed", "disk full"]


def main() -> int:
    """Run both trainings and compare them; return 1 if the losses differ or the memory grows."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--minutes", type=float, default=60)
    options.add_argument("--between", type=float, nargs=2, default=(120, 300), help="seconds from a start to a fault")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--output_dir", type=Path, help="folder for the two runs [a temporary folder]")
    chosen = options.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # another number of threads rounds differently
    CONTEXT.set_forkserver_preload(["milora_vl.train.run", "milora_vl.train.trainer", "peft"])
    with tempfile.TemporaryDirectory(prefix="soak-") as temporary:
        folder = chosen.output_dir or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        return soak(folder, 60 * chosen.minutes, tuple(chosen.between), random.Random(chosen.seed))


def soak(folder: Path, seconds: float, between: tuple[float, float], draw: random.Random) -> int:
    """Train in `folder` for this time, print the result, and return the exit code."""
    alone, disk = folder / "alone", folder / "disk"
    undisturbed = Training(alone, folder / "alone.log")
    size = size_of(undisturbed.wait_for_checkpoint(0))
    end = time.monotonic() + seconds
    with small_disk(disk, CHECKPOINTS_ON_DISK * size) as mounted, competitor():
        run = disk / "run"
        attempts = disturb(run, folder / "disturbed.log", disk if mounted else None, end, between, draw)
        last = newest(run)
        assert last is not None, f"no start has reached a checkpoint; see {folder / 'disturbed.log'}"
        after = losses(last)
    undisturbed.wait_for_checkpoint(len(after))
    code = undisturbed.stop()
    assert code == ENDED_BY_SIGTERM, f"the undisturbed training ended with {code}; see {folder / 'alone.log'}"
    before = losses(alone)[: len(after)]
    tenths = quantiles(undisturbed.memory, 10)
    growth = mean(quantiles(undisturbed.memory, 4)[-1:]) / mean(quantiles(undisturbed.memory, 4)[1:2]) - 1
    peaks = [max(attempt["memory_mb"]) for attempt in attempts]
    told = {
        "minutes": round(seconds / 60, 1),
        "losses": len(after),
        "starts": len(attempts),
        "kills": sum(attempt["fate"] == "killed" for attempt in attempts),
        "full_disks": sum(attempt["fate"] == "disk full" for attempt in attempts),
        "steps_made_again": sum(attempt["lost"] for attempt in attempts),
        "final_loss": [before[-1], after[-1]],
        "largest_difference": max(abs(a - b) for a, b in zip(before, after, strict=True)),
        "memory_mb_by_tenths": tenths,
        "memory_growth": round(growth, 4),
        "peaks_mb_of_starts": peaks,
    }
    print(json.dumps(told))
    return int(before != after or growth > GREW_AT_MOST)


class Training:
    """A training in a process of its own, resumed if it has a checkpoint, whose memory is sampled."""

    def __init__(self, run: Path, log: Path) -> None:
        self.run, self.memory, self._log = run, list[int](), log
        words = [*TRAINING.split(), "--output_dir", str(run), "--resume_from_checkpoint", "auto"]
        words += ["--factor_cache", str(log.with_name("factors"))]
        self.process = CONTEXT.Process(target=train, args=(words, str(log)))
        self.process.start()
        threading.Thread(target=self._sample, daemon=True).start()

    def _sample(self) -> None:
        """Keep the resident memory in MB, every two seconds from the first step of this process on."""
        assert self.process.pid is not None
        process, start = psutil.Process(self.process.pid), self._log.stat().st_size if self._log.is_file() else 0
        while self.process.exitcode is None:
            try:
                if self.memory or b"\nstep " in self._log.read_bytes()[start:]:
                    self.memory.append(round(process.memory_info().rss / 1e6))
            except (psutil.Error, FileNotFoundError):
                pass
            time.sleep(SAMPLED_EVERY)

    def wait_for_checkpoint(self, step: int) -> Path:
        """Wait for a complete checkpoint of this step or a later one, and return it."""
        while not (found := newest(self.run)) or int(found.name.removeprefix("checkpoint-")) < step:
            assert self.process.exitcode is None, f"the training ended with {self.process.exitcode}; see {self._log}"
            time.sleep(0.5)
        return found

    def stop(self) -> int:
        """End the training after its current step, with a checkpoint; return its exit code."""
        self.process.terminate()
        return self.ends()

    def ends(self) -> int:
        """Wait for the end; return the exit code, or minus the signal that ended it."""
        self.process.join()
        assert self.process.exitcode is not None
        return self.process.exitcode


def train(words: list[str], log: str) -> None:
    """Train in this process, and exit as the command does."""
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    from milora_vl.train.command import main as milora_train

    cli.run(lambda _: milora_train(words))


def disturb(
    run: Path, log: Path, disk: Path | None, end: float, between: tuple[float, float], draw: random.Random
) -> list[dict[str, Any]]:
    """Start the training again and again until `end`; return what happened to each start."""
    attempts: list[dict[str, Any]] = []
    while True:
        training = Training(run, log)
        fault_at = min(time.monotonic() + draw.uniform(*between), end)
        while training.process.exitcode is None and time.monotonic() < fault_at:
            time.sleep(0.05)
        fate: Fate | None = None
        if training.process.exitcode is None and time.monotonic() < end:
            if disk is not None and len(attempts) % 3 == 2:
                fate = "disk full"
                fill(disk, training)
            else:
                fate = "killed"
                training.process.kill()
        code = training.stop() if fate is None else training.ends()
        # SIGTERM ends a start that has not made its first step without a checkpoint.
        expected = {None: (ENDED_BY_SIGTERM, -signal.SIGTERM), "killed": (-signal.SIGKILL,), "disk full": (1,)}[fate]
        assert code in expected, f"the training ended with {code} instead of {expected}; see {log}"
        made = last_step(log)
        found = newest(run)
        saved = int(found.name.removeprefix("checkpoint-")) if found else 0
        attempts.append({"fate": fate, "lost": max(made - saved, 0), "memory_mb": training.memory or [0]})
        print(f"start {len(attempts)}: {fate}, step {made}, checkpoint {saved}", file=sys.stderr, flush=True)
        if fate is None:
            return attempts


def fill(disk: Path, training: Training) -> None:
    """Fill the file system until the training has ended, then free it."""
    filler = disk / "filler"
    with filler.open("ab", buffering=0) as file:
        while training.process.exitcode is None:
            try:
                file.write(bytes(1 << 16))
            except OSError:
                time.sleep(0.2)  # rotated checkpoints free some room, which is filled again
    filler.unlink()


def last_step(log: Path) -> int:
    """Return the number of the last step that a log shows."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("step ")]
    return int(lines[-1].split()[1].partition("/")[0]) if lines else 0


def newest(run: Path) -> Path | None:
    """Return the newest complete checkpoint."""
    folders = [folder for folder in run.glob("checkpoint-*") if (folder / "trainer_state.json").is_file()]
    return max(folders, key=lambda folder: int(folder.name.removeprefix("checkpoint-")), default=None)


def size_of(folder: Path) -> int:
    """Return the bytes of all files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def quantiles(samples: list[int], parts: int) -> list[int]:
    """Return the mean of each of so many equal parts of the samples."""
    edges = [len(samples) * part // parts for part in range(parts + 1)]
    return [round(mean(samples[first:last] or samples)) for first, last in itertools.pairwise(edges)]


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[bool]:
    """Mount a file system of `size` bytes in memory; without root the folder is an ordinary one, never full."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True)
    if done.returncode:
        print("not mounted, so the disk is never filled: this needs root", file=sys.stderr)
    try:
        yield done.returncode == 0
    finally:
        if done.returncode == 0:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextmanager
def competitor() -> Iterator[None]:
    """A program that computes for some seconds on one core and rests for some, all the time."""
    program = "import random, time\nwhile True:\n t = time.monotonic() + random.uniform(2, 20)\n"
    program += " while time.monotonic() < t: pass\n time.sleep(random.uniform(2, 20))"
    process = subprocess.Popen([sys.executable, "-c", program])
    try:
        yield
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    sys.exit(main())
