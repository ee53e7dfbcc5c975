"""Train on two machines that are namespaces of this one, lose one of them in the middle, and resume.

sudo python benchmarks/two_machines.py --output_dir FOLDER

Each machine has its own network stack, host name, processes and file systems: a cache of its own at the same path, and
with --private_output no view of the output folder. Both are started by the job for SLURM that the package ships, with
an `srun` that enters the namespaces, and by `deepspeed` with a host file. Needs root, iproute2 and util-linux. Prints a
JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

NAMES = ("milora-a", "milora-b")
ADDRESSES = ("10.203.17.1", "10.203.17.2")
STEPS = 12
# What the logs must say.
SILENT = "another process of this run does not answer"
REFUSED = "the processes find different checkpoints"
INCOMPLETE = "has the random states of 1 of 2 processes"


def main() -> int:
    """Run all trainings; return 1 if one of them differs from the undisturbed one."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--output_dir", type=Path, help="folder for caches and runs [a temporary folder]")
    options.add_argument("--only", nargs="*", help="killed, unplugged, private, deepspeed [all]")
    chosen = options.parse_args()
    if reason := missing():
        print(f"two machines need {reason}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="two-machines-") as temporary:
        folder = (chosen.output_dir or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        with machines(folder):
            result = Trial(folder).run(chosen.only or ["killed", "unplugged", "private", "deepspeed"])
    print(json.dumps(result))
    return int(not all(value.get("ok", True) for value in result.values() if isinstance(value, dict)))


def missing() -> str | None:
    """Return what this machine lacks for the namespaces, or None."""
    if os.geteuid():
        return "root"
    programs = [name for name in ("ip", "unshare", "nsenter", "mount") if shutil.which(name) is None]
    if programs:
        return f"the programs {', '.join(programs)}"
    probe = subprocess.run(["unshare", "--mount", "--uts", "--pid", "--net", "--fork", "true"], capture_output=True)
    return None if probe.returncode == 0 else "the right to create namespaces"


@contextmanager
def machines(folder: Path) -> Iterator[None]:
    """Create both networks with a cable between them, and the files of both machines. Then remove the networks."""
    for name in NAMES:
        subprocess.run(["ip", "netns", "del", name], capture_output=True)  # of a run that was killed
        (folder / name / "cache").mkdir(parents=True, exist_ok=True)
        (folder / name / "empty").mkdir(exist_ok=True)
    for name in ("cache", "runs"):
        (folder / name).mkdir(exist_ok=True)
    lines = [f"{address} {name}" for address, name in zip(ADDRESSES, NAMES, strict=True)]
    (folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *lines]) + "\n")
    try:
        for name in NAMES:
            ip("netns", "add", name)
        ip("link", "add", "eth0", "netns", NAMES[0], "type", "veth", "peer", "name", "eth0", "netns", NAMES[1])
        for name, address in zip(NAMES, ADDRESSES, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield
    finally:
        for name in NAMES:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def ip(*words: str) -> None:
    """Run iproute2. Raises CalledProcessError."""
    subprocess.run(["ip", *words], check=True)


def enter(folder: Path, number: int, *, private: bool = False) -> list[str]:
    """Return the words that start a program on a machine. `private` hides the runs of the first machine."""
    name = NAMES[number]
    mounts = [
        "mount --make-rprivate /",
        f"hostname {name}",
        f"mount --bind {folder / 'hosts'} /etc/hosts",
        f"mount --bind {folder / name / 'cache'} {folder / 'cache'}",
    ]
    if private:
        mounts.append(f"mount --bind {folder / name / 'empty'} {folder / 'runs'}")
    script = " && ".join(mounts) + ' && exec "$@"'
    spaces = ["--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
    return ["nsenter", f"--net=/run/netns/{name}", "unshare", *spaces, "sh", "-c", script, "sh"]


class Trial:
    """The trainings on the tiny model, with their files in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        cache = str(folder / "cache")
        python = str(Path(sys.executable).parent)
        self.environment = {
            **os.environ, "HF_HOME": cache, "MILORA_CACHE": cache, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu", "PATH": f"{folder}:{python}:{os.environ['PATH']}", "PORT": "29517",
            "SLURM_NNODES": "2", "SLURM_JOB_ID": "17", "FIRST_MACHINE": NAMES[0], "PROCESSES": "1",
        }  # fmt: skip
        records = [
            {"id": str(i), "conversations": [{"from": "human", "value": f"Count to {i}."},
                                             {"from": "gpt", "value": "word " * (1 + i % 7)}]}
            for i in range(48)
        ]  # fmt: skip
        (folder / "train.json").write_text(json.dumps(records))

    def run(self, kinds: Sequence[str]) -> dict[str, Any]:
        """Return a result for each kind, beside the losses of one process."""
        if not losses(self.folder / "runs" / "one"):
            self.alone()
        expected = losses(self.folder / "runs" / "one")
        result: dict[str, Any] = {"steps": len(expected)}
        for kind in kinds:
            start = time.monotonic()
            result[kind] = getattr(self, kind)(expected)
            result[kind]["seconds"] = round(time.monotonic() - start)
            print(kind, result[kind], file=sys.stderr, flush=True)
        result["caches"] = {name: files(self.folder / name / "cache") for name in NAMES}
        return result

    def words(self, run: str, *more: str) -> list[str]:
        """Return the command line of a training."""
        return [
            "--model", "tiny-text", "--data_path", str(self.folder / "train.json"), "--rank", "4", "--dropout", "0",
            "--output_dir", str(self.folder / "runs" / run), "--factor_cache", str(self.folder / "cache" / "factors"),
            "--max_steps", str(STEPS), "--save_steps", "2", "--logging_steps", "1", "--learning_rate", "1e-3",
            "--per_device_train_batch_size", "2", "--disable_tqdm", "--use_cpu", *more,
        ]  # fmt: skip

    def alone(self) -> None:
        """Train in one process, which the others are compared with."""
        words = self.words("one", "--per_device_train_batch_size", "4")
        with (self.folder / "one.log").open("w") as log:
            subprocess.run(
                [sys.executable, "-m", "milora_vl.train", *words],
                env=self.environment, stdout=log, stderr=log, check=True,
            )  # fmt: skip

    def start(self, log: str, words: Sequence[str], *, private: bool = False) -> subprocess.Popen[bytes]:
        """Start the job for SLURM, whose srun starts its words on both machines."""
        first, second = (
            " ".join(map(quoted, enter(self.folder, number, private=private and number > 0))) for number in (0, 1)
        )
        pids = self.folder / "pids"
        srun = self.folder / "srun"
        srun.write_text(
            '#!/bin/bash\n[ "$1" = --kill-on-bad-exit=1 ] || exit 99\nshift\n'
            f'{first} "$@" & a=$!\n{second} "$@" & b=$!\n'
            f"echo $a $b > {pids}.new; mv {pids}.new {pids}\n"
            "for _ in 1 2; do wait -n || { code=$?; kill -9 $a $b 2>/dev/null; exit $code; }; done\n"
        )
        srun.chmod(0o755)
        pids.unlink(missing_ok=True)
        job = resources.files("llava_recipes") / "cluster" / "slurm.sh"
        with (self.folder / f"{log}.log").open("wb") as file:
            return subprocess.Popen(["bash", str(job), *words], env=self.environment, stdout=file, stderr=file)

    def killed(self, expected: list[float]) -> dict[str, Any]:
        """Kill every process of the second machine after a checkpoint, then start both again."""
        words = self.words("killed")
        job = self.start("killed", words)
        self.wait_for(job, self.folder / "runs" / "killed" / "checkpoint-4" / "trainer_state.json")
        os.kill(self.machine(1), signal.SIGKILL)
        seconds, code = ended(job)
        again = self.start("killed-again", words)
        _, second = ended(again)
        return self.compared("killed", expected) | {"noticed_after_s": seconds, "codes": [code, second]}

    def unplugged(self, expected: list[float]) -> dict[str, Any]:
        """Pull the cable, so that the first machine hears nothing more, then start both again."""
        words = self.words("unplugged", "--ddp_timeout", "20")
        job = self.start("unplugged", words)
        self.wait_for(job, self.folder / "runs" / "unplugged" / "checkpoint-4" / "trainer_state.json")
        ip("-n", NAMES[1], "link", "set", "eth0", "down")
        seconds, code = ended(job)
        ip("-n", NAMES[1], "link", "set", "eth0", "up")
        message = SILENT in (self.folder / "unplugged.log").read_text()
        _, second = ended(self.start("unplugged-again", words))
        result = self.compared("unplugged", expected)
        return result | {"noticed_after_s": seconds, "codes": [code, second], "ok": result["ok"] and message}

    def private(self, expected: list[float]) -> dict[str, Any]:
        """The second machine does not see the output folder: a training works and warns, a resume is refused."""
        _, code = ended(self.start("private", self.words("private"), private=True))
        result = self.compared("private", expected)
        wrote = sorted({file.name for file in (self.folder / NAMES[1] / "empty").rglob("*") if file.is_file()})
        warned = INCOMPLETE in (self.folder / "private.log").read_text()
        run = self.folder / "runs" / "lost-mount"  # its first job ran with the folder mounted on both
        _, before = ended(self.start("lost-mount", self.words("lost-mount")))
        for file in (*run.glob("*.safetensors"), run / f"checkpoint-{STEPS}" / "trainer_state.json"):
            file.unlink()
        content = json.loads((run / "environment.json").read_text())
        kept = {key: value for key, value in content.items() if key != "finished"}
        (run / "environment.json").write_text(json.dumps(kept))
        seconds, after = ended(self.start("lost-mount-again", self.words("lost-mount"), private=True))
        refused = REFUSED in (self.folder / "lost-mount-again.log").read_text()
        return result | {
            "codes": [code, before, after], "second_wrote": wrote, "warned": warned, "resume_refused": refused,
            "refused_after_s": seconds, "ok": result["ok"] and warned and refused and after != 0,
        }  # fmt: skip

    def deepspeed(self, expected: list[float]) -> dict[str, Any]:
        """Start `deepspeed` on each machine with the same host file, which needs no ssh."""
        hosts = self.folder / "hostfile"
        hosts.write_text("".join(f"{name} slots=1\n" for name in NAMES))
        jobs = []
        with (self.folder / "deepspeed.log").open("wb") as log:
            for number in (0, 1):
                place = ["--no_ssh", "--node_rank", str(number), "--master_addr", NAMES[0], "--master_port", "29518"]
                launcher = ["deepspeed", "--hostfile", str(hosts), *place, "--module", "milora_vl.train"]
                words = [*enter(self.folder, number), *launcher, *self.words("deepspeed", "--deepspeed", "zero2")]
                jobs.append(subprocess.Popen(words, env=self.environment, stdout=log, stderr=log))
        codes = [ended(job)[1] for job in jobs]
        return self.compared("deepspeed", expected) | {"codes": codes}

    def machine(self, number: int) -> int:
        """Return the process whose end ends every process of a machine."""
        return int((self.folder / "pids").read_text().split()[number])

    def wait_for(self, job: subprocess.Popen[bytes], file: Path) -> None:
        """Wait until the training has written a file. Raises AssertionError if the job ends before."""
        while not file.is_file():
            assert job.poll() is None, f"the job ended before it wrote {file}"
            time.sleep(0.05)

    def compared(self, run: str, expected: list[float]) -> dict[str, Any]:
        """Return how far the losses of a run are from the expected ones."""
        found = losses(self.folder / "runs" / run)
        same = len(found) == len(expected)
        largest = max(abs(a - b) for a, b in zip(found, expected, strict=True)) if same else None
        return {"losses": len(found), "largest_difference": largest, "ok": largest is not None and largest <= 1e-5}


def ended(job: subprocess.Popen[bytes]) -> tuple[float, int]:
    """Wait for a job; return the seconds that it took and its exit code."""
    start = time.monotonic()
    code = job.wait(timeout=200)
    return round(time.monotonic() - start, 1), code


def losses(run: Path) -> list[float]:
    """Return the losses of a finished run; empty without trainer_state.json."""
    file = run / "trainer_state.json"
    log = json.loads(file.read_text())["log_history"] if file.is_file() else []
    return [entry["loss"] for entry in log if "loss" in entry]


def files(folder: Path) -> int:
    """Return the number of files under a folder."""
    return sum(file.is_file() for file in folder.rglob("*"))


def quoted(word: str) -> str:
    """Return a word for bash."""
    return "'" + word.replace("'", "'\\''") + "'"


if __name__ == "__main__":
    sys.exit(main())
