"""One process, DDP, ZeRO-2 and ZeRO-3 are the same training; each continues after a kill as if there had been none."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from milora_vl.models.tiny import tiny_llava
from milora_vl.train.__main__ import main
from support.launched import ENVIRONMENT, KINDS, needs_deepspeed, needs_zero3, train_in_two
from support.train_runs import METHODS, WEIGHTS, lengthen_data, losses, training


def same(first: Path, second: Path, weights: str = "adapter_model.safetensors") -> None:
    """Losses within 1e-5, final weights within what a step of Adam makes of rounding."""
    pairs = list(zip(losses(first), losses(second), strict=True))
    assert max(abs(one - other) for (_, one), (_, other) in pairs) <= 1e-5
    before, after = load_file(first / weights), load_file(second / weights)
    assert before.keys() == after.keys()
    assert max((tensor - after[name]).abs().max() for name, tensor in before.items()) <= 2e-4


def forgetting(run: Path) -> list[float]:
    log = json.loads((run / "trainer_state.json").read_text())["log_history"]
    return [entry["forgetting"] for entry in log if "forgetting" in entry]


def run_all(kinds: list[str], method: str, model: Path, data: Path, tmp_path: Path) -> str:
    """One process here, the others in two; each of these is cut and resumed, too. Returns what was printed."""
    weights = WEIGHTS.get(method, "adapter_model.safetensors")
    extra = ["--model", str(model), *METHODS[method], "--dropout", "0"]
    extra = [word for word in extra if method in ("milora", "lora") or word not in ("--dropout", "0")]
    batch = ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2"]
    extra += ["--forgetting_every", "3"]
    lines: list[list[str]] = []
    for kind in kinds:
        line = training(data, tmp_path / kind, *extra, *KINDS[kind], *batch)
        lines += [line, ["cut", str(tmp_path / kind)], [*line, "--resume_from_checkpoint", "true"]]
    assert main(training(data, tmp_path / "one", *extra, "--per_device_train_batch_size", "8")) == 0
    printed = train_in_two(lines, tmp_path)
    for kind in kinds:
        same(tmp_path / "one", tmp_path / kind, weights)
        assert forgetting(tmp_path / kind) == pytest.approx(forgetting(tmp_path / "one"), abs=1e-4)
        assert (tmp_path / kind / "incomplete-checkpoint-6").is_dir()
        counts = [json.loads((tmp_path / run / "policy.json").read_text()) for run in ("one", kind)]
        assert all(counts[0][key] == counts[1][key] for key in ("trainable", "total", "targets"))
    return printed


@needs_zero3
def test_zero3_is_the_training_of_one_process_from_parts(tmp_path: Path, tiny_data: Path, tiny_folder: Path) -> None:
    """With batches of text alone on one rank: the records with pictures are in the minority."""
    lengthen_data(tiny_data, 20)
    printed = run_all(["zero3"], "milora", tiny_folder, tiny_data, tmp_path)
    held = [int(number) for number in re.findall(r"WHOLE \d+ (\d+)", printed)]  # two processes write at once
    assert len(held) == 4
    assert set(held) == {0}, "a process held a copy of the weights after loading"
    assert printed.count("trainable params: ") == 2, "each of two trainings speaks once"
    from peft import PeftModel

    tuned = PeftModel.from_pretrained(tiny_llava()[0], tmp_path / "zero3")
    assert torch.isfinite(next(tuned.parameters())).all()


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("method", METHODS)
def test_all_are_the_same(method: str, tmp_path: Path, tiny_data: Path, tiny_folder: Path) -> None:
    lengthen_data(tiny_data, 20)
    run_all(list(KINDS), method, tiny_folder, tiny_data, tmp_path)


CONFIGS = resources.files("llava_recipes") / "accelerate"
LAUNCHERS = {
    "zero2": "deepspeed --num_gpus 2 --module",
    "zero3": f"accelerate launch --config_file {CONFIGS / 'zero3.yaml'} --num_processes 2 -m",
    "fsdp": f"accelerate launch --config_file {CONFIGS / 'fsdp2.yaml'} --num_processes 2 -m",
}


@needs_zero3
@pytest.mark.slow
@pytest.mark.parametrize("kind", LAUNCHERS)
def test_launchers_take_the_same_command_line(kind: str, tmp_path: Path, tiny_data: Path) -> None:
    program, *options = LAUNCHERS[kind].split()
    run = tmp_path / "run"
    line = training(tiny_data, run, "--rank", "4", *KINDS[kind], "--per_device_train_batch_size", "2")
    done = subprocess.run(
        [str(Path(sys.executable).parent / program), *options, "milora_vl.train", *line],
        env={**ENVIRONMENT, "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 devices = 4" in done.stderr + done.stdout
    assert (run / "adapter_model.safetensors").is_file()


SRUN = """#!/bin/bash
shift  # --kill-on-bad-exit=1
"$@" & first=$!
"$@" & second=$!
wait $first && wait $second
"""


@needs_zero3
@pytest.mark.slow
def test_the_slurm_job_runs_as_two_agents(tmp_path: Path, tiny_data: Path) -> None:
    """On the loopback address, with a srun that starts both here."""
    srun = tmp_path / "srun"
    srun.write_text(SRUN)
    srun.chmod(0o755)
    job = resources.files("llava_recipes") / "cluster" / "slurm.sh"
    run, extra = tmp_path / "run", ["--rank", "4", "--deepspeed", "zero3", "--per_device_train_batch_size", "2"]
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    slurm = {"SLURM_NNODES": "2", "SLURM_JOB_ID": str(os.getpid()), "FIRST_MACHINE": "127.0.0.1"}
    done = subprocess.run(
        ["bash", str(job), *training(tiny_data, run, *extra)],
        env={**ENVIRONMENT, **slurm, "PATH": path, "PROCESSES": "1", "PORT": str(20000 + os.getpid() % 20000)},
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("trainable params: ") == 1
    assert [step for step, _ in losses(run)] == [1, 2, 3, 4, 5, 6]


@needs_deepspeed
def test_a_projector_loads_into_shards(tiny_data: Path, tmp_path: Path) -> None:
    """ZeRO-3 shards the weights also in one process."""
    first = tmp_path / "first"
    flags = "--train projector --method full --max_steps 1 --save_strategy no".split()
    assert main(training(tiny_data, first, *flags)) == 0
    words = training(tiny_data, tmp_path / "run", "--rank", "4", "--projector_weights", str(first))
    command = [sys.executable, "-m", "milora_vl.train", *words, "--deepspeed", "zero3", "--max_steps", "1"]
    done = subprocess.run(command, env={**ENVIRONMENT, "DS_ACCELERATOR": "cpu"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
