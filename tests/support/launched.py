"""Two real processes on this machine: a command that torchrun starts as on a server, or forks with a script of ours."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from torch.torch_version import TorchVersion
from transformers.utils import is_accelerate_available

from support.programs import Program

needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")
HAS_ZERO3 = find_spec("deepspeed") is not None and TorchVersion(version("deepspeed")) >= "0.19.8"
needs_zero3 = pytest.mark.skipif(not HAS_ZERO3, reason="older DeepSpeed is refused with ZeRO-3 on CPUs, or missing")
needs_bf16_shards = pytest.mark.skipif(
    not is_accelerate_available("1.13.0"), reason="older versions of accelerate are refused with --fsdp and --bf16"
)
# Several trainings in one launch: starting processes takes longer than training. Each line of the file is a command;
# "cut" makes of a finished run a killed run, stopped while it wrote its last checkpoint.
WORKER = """
import json, os, sys
from pathlib import Path
import torch.distributed as dist
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from milora_vl.train.__main__ import main
from milora_vl.models import losses
from milora_vl.train import run

closed = []
close_processes, run.close_processes = run.close_processes, lambda: closed.append(1)  # the next line trains here too
copy = run.folders.copy_results
run.folders.copy_results = lambda *folders: copy(*folders) if closed else sys.exit("all wait for a copy of the first")
load_base = run.load_base
def load(*arguments):
    base, processor = load_base(*arguments)
    whole = sum(p.numel() for p in base.parameters())
    print(f"WHOLE {os.environ['RANK']} {whole}", flush=True)
    return base, processor
run.load_base = load
losses.CHUNK = int(sys.argv[2])

for line in json.loads(Path(sys.argv[1]).read_text()):
    if line[0] == "cut" and dist.get_rank() == 0:
        run = Path(line[1])
        (run / "checkpoint-6" / "trainer_state.json").unlink()
        for file in (*run.glob("*.safetensors"), run / "trainer_state.json"):
            file.unlink()
    if line[0] == "cut":
        dist.barrier()
    else:
        closed.clear()
        assert main(line) == 0
        unset_hf_deepspeed_config()  # it lives as long as the arguments, which something keeps
dist.barrier()
close_processes()
"""
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
ZERO = ("zero2", "zero3", "zero3_offload") if HAS_ZERO3 else ("zero2",)
FSDP = ["--fsdp", "full_shard"]
KINDS: dict[str, list[str]] = {"ddp": [], "fsdp": FSDP} | {kind: ["--deepspeed", kind] for kind in ZERO}


def launched(what: Sequence[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run `what` (a script or `-m module`, with its arguments) in two processes; their output comes back together."""
    done = subprocess.run(
        [*LAUNCH, *what],
        cwd=cwd,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=400,
    )
    print(done.stdout)
    return done


def results_of_two(script: str, folder: Path, *arguments: str) -> list[Any]:
    """Run the text of a script as ranks 0 and 1 on gloo; returns what each printed behind `RESULT`, read as JSON."""
    (folder / "script.py").write_text(script)
    _, printed = in_two_processes([str(folder / "script.py"), *arguments], folder)
    # gloo sometimes aborts at interpreter exit, after everything is done
    assert all("RESULT" in text for text in printed), "\n".join(text[-1500:] for text in printed)
    return [json.loads(text.split("RESULT")[1].splitlines()[0]) for text in printed]


def in_two_processes(words: Sequence[str], folder: Path) -> tuple[list[int], list[str]]:
    """Run a script as ranks 0 and 1, as a launcher would start it. Returns the exit codes and what each printed."""
    settings = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    settings["TORCHDYNAMO_DISABLE"] = "1"  # DeepSpeed marks an optimizer to compile, which imports the compiler: 3 s
    logs = [folder / f"rank{rank}.log" for rank in range(2)]
    started = []
    for rank, log in enumerate(logs):
        env = ENVIRONMENT | settings | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        with log.open("w") as file:
            started.append(Program(words, cwd=folder, env=env, stdout=file, stderr=file))
    try:
        codes = [program.wait(timeout=400) for program in started]
    finally:
        for program in started:
            program.kill_if_running()
    return codes, [log.read_text() for log in logs]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def train_in_two(lines: Sequence[Sequence[str]], folder: Path, chunk: int = 2**24) -> str:
    """Train by each command line, one after the other, in one launch; returns what was printed.

    `chunk` is the size of the pieces that the loss is made in.
    """
    (folder / "lines.json").write_text(json.dumps(lines))
    (folder / "worker.py").write_text(WORKER)
    codes, printed = in_two_processes([str(folder / "worker.py"), str(folder / "lines.json"), str(chunk)], folder)
    assert codes == [0, 0], printed[0][-3000:] + printed[1][-3000:]
    return "".join(printed)
