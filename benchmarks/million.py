"""Measure commands on a million records: LLaVA JSON with pictures drawn from 300 files, and the same as 200 shards.

python benchmarks/million.py --records 1000000 --output_dir FOLDER

Each command runs in a separate process. A line has its elapsed and processor time, and the peak of its resident
memory, alone and with its loader processes. A training makes 200 short steps of the tiny model with batches of similar
lengths; it is killed at step 150 and resumed. Prints a JSON line.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
from PIL import Image

PICTURES = 300
SHARDS = 200
STEPS, KILLED_AT, SAVED_EVERY = 200, 150, 50
WORDS = "a small red house stands beside the old tree near a river where children play with their dog".split()
KINDS = ("check", "train", "workers", "packed", "check-shards", "train-shards")


def main() -> int:
    """Run the chosen commands; return 1 if a resumed run has other losses than the undisturbed one."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--records", type=int, default=1_000_000)
    options.add_argument("--output_dir", type=Path, help="folder for data and runs [a temporary folder]")
    options.add_argument("--only", nargs="*", choices=KINDS, default=list(KINDS))
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="million-") as temporary:
        folder = chosen.output_dir or Path(temporary)
        write_data(folder, chosen.records, shards=any("shards" in kind for kind in chosen.only))
        result: dict[str, Any] = {"records": chosen.records}
        for kind in chosen.only:
            result[kind] = measured(kind, folder)
            print(kind, json.dumps(result[kind]), file=sys.stderr, flush=True)
    print(json.dumps(result))
    return int(not all(value.get("same_losses", True) for value in result.values() if isinstance(value, dict)))


def measured(kind: str, folder: Path) -> dict[str, Any]:
    """Return what one command needed."""
    data, pictures = str(folder / "train.json"), str(folder / "images")
    shards = str(folder / "shards" / "*.tar")
    if kind == "check":
        words = ["-m", "milora_data", "check", data, "--image_folder", pictures]
        return watched(words, folder / "check.log")
    if kind == "check-shards":
        return watched(["-m", "milora_data", "check", shards], folder / "check-shards.log")
    if kind == "train-shards":
        return training(folder, kind, ["--data_path", shards, "--streaming"])
    if kind == "packed":
        packing = ["--packing", "--max_length", "256"]
        return training(folder, kind, ["--data_path", data, "--image_folder", pictures, *packing])
    grouped = ["--data_path", data, "--image_folder", pictures, "--group_by_length", "True"]
    if kind == "workers":
        return training(folder, kind, [*grouped, "--dataloader_num_workers", "2"])
    return training(folder, kind, grouped)


def training(folder: Path, kind: str, words: Sequence[str]) -> dict[str, Any]:
    """Train without disturbance, then the same with a kill at step 150 and a resume."""
    steps = ["--max_steps", str(STEPS), "--save_steps", str(SAVED_EVERY), "--logging_steps", "1"]
    common = ["-m", "milora_vl.train", "--model", "tiny", "--rank", "4", "--per_device_train_batch_size", "2",
              "--use_cpu", "--disable_tqdm", *steps, *words]  # fmt: skip
    whole, killed = folder / f"{kind}-whole", folder / f"{kind}-killed"
    result = watched([*common, "--output_dir", str(whole)], folder / f"{kind}.log")
    watched([*common, "--output_dir", str(killed)], folder / f"{kind}-killed.log", kill_at=KILLED_AT)
    again = [*common, "--output_dir", str(killed), "--resume_from_checkpoint", "true"]
    resumed = watched(again, folder / f"{kind}-resumed.log")
    largest = {file.name: file.stat().st_size for file in (whole / f"checkpoint-{STEPS}").iterdir()}
    state = sum(size for name, size in largest.items() if name.startswith(("trainer_state", "stream", "rng", "sched")))
    return result | {"resumed": resumed, "state_kb": round(state / 1e3), "same_losses": losses(whole) == losses(killed)}


def losses(run: Path) -> list[float]:
    """Return the logged losses of a run."""
    log = json.loads((run / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in log if "loss" in entry]


def watched(words: Sequence[str], log: Path, *, kill_at: int | None = None) -> dict[str, Any]:
    """Run Python with these words; return times in seconds and memory in MB. `kill_at` is a step of a training."""
    start = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    peaks = Peaks(process.pid)
    peaks.start()
    first: dict[str, float] | None = None
    assert process.stdout is not None
    with log.open("w") as file:
        for line in process.stdout:
            file.write(line)
            file.flush()
            if line.startswith("step "):
                first = first or {"first_step_after": time.monotonic() - start, "first_step_cpu": peaks.cpu}
                if kill_at is not None and line.startswith(f"step {kill_at}/"):
                    peaks.kill()
    code = process.wait()
    result = {"code": code, "seconds": round(time.monotonic() - start, 1), **peaks.result()}
    return result | {name: round(seconds, 1) for name, seconds in (first or {}).items()}


class Peaks(threading.Thread):
    """Watch a process and its children."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.process = psutil.Process(pid)
        self.main = self.child = self.cpu = 0.0

    def run(self) -> None:
        """Sample until the process has ended."""
        while True:
            try:
                times = self.process.cpu_times()
                self.cpu = max(self.cpu, times.user + times.system)
                self.main = max(self.main, self.process.memory_info().rss)
                for child in self.process.children(recursive=True):
                    self.child = max(self.child, child.memory_full_info().uss)
            except psutil.Error:
                if not self.process.is_running() or self.process.status() == psutil.STATUS_ZOMBIE:
                    return
            time.sleep(0.1)

    def kill(self) -> None:
        """Kill the process and its children, as a lost machine would."""
        for process in [self.process, *self.process.children(recursive=True)]:
            process.send_signal(signal.SIGKILL)

    def result(self) -> dict[str, Any]:
        """Return the processor time of the process, its peak, and the largest memory of one child alone."""
        own = {"cpu_seconds": round(self.cpu, 1), "peak_mb": round(self.main / 1e6)}
        return own if not self.child else own | {"per_child_mb": round(self.child / 1e6)}


def write_data(folder: Path, count: int, *, shards: bool) -> None:
    """Write pictures, train.json and, with `shards`, the same records as tar files, unless they are there."""
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    for number in range(PICTURES):
        colour = tuple(draw.randrange(256) for _ in range(3))
        Image.new("RGB", (20 + number % 30, 20 + number % 17), colour).save(images / f"{number}.png")
    if not (folder / "train.json").is_file():
        with (folder / "partial.json").open("w") as file:
            for number, record in enumerate(records(count)):
                file.write(("[" if number == 0 else ",\n") + json.dumps(record))
            file.write("]\n")
        (folder / "partial.json").replace(folder / "train.json")
    if shards and not (folder / "shards").is_dir():
        partial = folder / "partial-shards"
        partial.mkdir(exist_ok=True)
        contents = [(images / f"{number}.png").read_bytes() for number in range(PICTURES)]
        rest = records(count)
        for shard in range(SHARDS):
            with tarfile.open(partial / f"{shard:03}.tar", "w") as archive:
                for _ in range(count // SHARDS):
                    record = next(rest)
                    picture = int(record.pop("image", "0.png").removesuffix(".png"))
                    # webdataset needs the same columns in every sample, so records of text alone have a picture here
                    if "<image>" not in record["conversations"][0]["value"]:
                        record["conversations"][0]["value"] += "\n<image>"
                    add(archive, f"{record['id']}.json", json.dumps(record).encode())
                    add(archive, f"{record['id']}.png", contents[picture])
        partial.replace(folder / "shards")


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    """Add a file to an archive."""
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))


def records(count: int) -> Iterator[dict[str, Any]]:
    """Yield LLaVA's records: one or two turns with 3 to 40 words, nine of ten with a picture."""
    draw = random.Random(1)
    for number in range(count):
        conversations = []
        for turn in range(draw.randint(1, 2)):
            picture = "<image>\n" if turn == 0 and number % 10 else ""
            asked = f"{picture}Say {number} in {' '.join(draw.choices(WORDS, k=draw.randint(3, 8)))}."
            conversations += [
                {"from": "human", "value": asked},
                {"from": "gpt", "value": " ".join(draw.choices(WORDS, k=draw.randint(3, 40)))},
            ]
        record = {"id": f"{number:07}", "conversations": conversations}
        yield record | {"image": f"{draw.randrange(PICTURES)}.png"} if number % 10 else record


if __name__ == "__main__":
    sys.exit(main())
