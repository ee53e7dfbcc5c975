"""What happens to long runs: SIGTERM of a scheduler, a full disk, a loader process that dies, a launch that differs."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from milora_vl.adapter.checkpoints import num_processes, why_incomplete, zero_stage
from milora_vl.plan import launch, resuming
from milora_vl.train import failures
from milora_vl.train.command import main
from support.checkpoint_files import write_checkpoint
from support.problems import raises_code
from support.train_runs import losses, training


def test_sigterm_saves_and_the_resumed_run_goes_on_from_there(tiny_data: Path, tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    extra = ["--rank", "4", "--save_steps", "100", "--max_steps", "20"]
    before, ended = signal.getsignal(signal.SIGTERM), threading.Event()

    def terminate() -> None:
        while signal.getsignal(signal.SIGTERM) == before:
            if ended.wait(0.001):
                return
        if not ended.wait(0.1):
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=terminate).start()
    try:
        with raises_code("run-stopped-by-signal", message="which is saved") as error:
            main(training(tiny_data, stopped, *extra))
    finally:
        ended.set()  # after a training that fails earlier it must not wait for the handler of the next one
    assert error.value.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) == before
    assert [why_incomplete(folder) for folder in stopped.glob("checkpoint-*")] == [None]
    assert not (stopped / "adapter_model.safetensors").exists()
    assert main(training(tiny_data, stopped, *extra, "--resume_from_checkpoint", "auto")) == 0
    assert main(training(tiny_data, whole, *extra)) == 0
    assert losses(stopped) == losses(whole)
    first, second = (load_file(run / "adapter_model.safetensors") for run in (whole, stopped))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def arguments(tmp_path: Path) -> TrainingArguments:
    return TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is Linux's")
def test_a_full_disk_is_named(arguments: TrainingArguments) -> None:
    state = {"a": torch.zeros(1_000_000)}  # torch 2.6 misses that a small one has not been written
    writers = [lambda: torch.save(state, "/dev/full"), lambda: Path("/dev/full").write_text("x" * 10_000)]
    for write in writers:
        with raises_code("disk-full", hint="--resume_from_checkpoint auto") as error, failures.explained(arguments):
            write()
        problem = error.value.problems[0]
        assert (problem.code, problem.where) == ("disk-full", arguments.output_dir)
        assert error.value.exit_code == 1


@pytest.mark.slow
def test_a_run_on_a_full_disk_keeps_its_last_checkpoint(tiny_data: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk."""
    import resource
    import subprocess
    import sys

    run = tmp_path / "run"
    flags = ["--rank", "4", "--lr_scheduler_type", "constant"]
    assert main(training(tiny_data, run, *flags, "--max_steps", "2")) == 0
    (run / "adapter_model.safetensors").unlink()
    again = training(tiny_data, run, *flags, "--resume_from_checkpoint", "auto")
    done = subprocess.run(
        [sys.executable, "-m", "milora_vl.train", *again],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)),
    )  # fmt: skip
    assert done.returncode == 1
    assert "cannot write: " in done.stderr
    assert "Traceback" not in done.stderr
    assert main(again) == 0
    assert [step for step, _ in losses(run)] == [1, 2, 3, 4, 5, 6]


class Dies(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_loader_process_that_dies_is_named(arguments: TrainingArguments) -> None:
    with raises_code("run-loader-died", hint="--dataloader_num_workers") as error, failures.explained(arguments):
        next(iter(DataLoader(Dies(), num_workers=1)))
    assert error.value.problems[0].code == "run-loader-died"


def test_other_errors_keep_their_traceback(arguments: TrainingArguments) -> None:
    for error in (RuntimeError("shapes differ"), FileNotFoundError("x"), KeyError("y")):
        with pytest.raises(type(error)), failures.explained(arguments):
            raise error


def sharded(run: Path, processes: int, stage: int) -> Path:
    """A checkpoint as DeepSpeed writes it."""
    folder = write_checkpoint(run, 4)
    for name in ("optimizer.pt", "rng_state.pth"):
        (folder / name).unlink()
    (folder / "global_step4").mkdir()
    for rank in range(processes):
        torch.save({}, folder / f"rng_state_{rank}.pth")
        torch.save({}, folder / "global_step4" / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
        if stage == 3:
            torch.save({}, folder / "global_step4" / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
    return folder


@pytest.mark.parametrize("stage", [2, 3])
def test_a_sharded_checkpoint_needs_all_its_shards(stage: int, tmp_path: Path) -> None:
    folder = sharded(tmp_path, 2, stage)
    assert (why_incomplete(folder), zero_stage(folder), num_processes(folder)) == (None, stage, 2)
    shard = next(folder.glob("global_step4/*optim_states.pt"))
    content = shard.read_bytes()
    shard.write_bytes(content[:100])
    assert "truncated" in str(why_incomplete(folder))
    shard.unlink()
    assert why_incomplete(folder) == "has the optimizer of 1 of 2 processes"


def test_other_processes_or_another_stage_are_refused_or_told(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "a", 2, 3)
    assert resuming.warnings(folder, processes=2, stage=3) == []
    with raises_code("resume-other-processes", says=r"2 parts.*this run has 4 processes\n.*start 2 processes"):
        resuming.warnings(folder, processes=4, stage=3)
    for stage in (0, 1, 2):
        with raises_code("resume-other-zero-stage", hint="--deepspeed zero3"):
            resuming.warnings(folder, processes=2, stage=stage)
    plain = write_checkpoint(tmp_path / "b", 4)
    assert resuming.warnings(plain, processes=1, stage=0) == []
    assert "written by 1 process, now there are 2" in resuming.warnings(plain, processes=2, stage=0)[0]
    with raises_code("resume-other-zero-stage", hint="remove --deepspeed"):
        resuming.warnings(plain, processes=1, stage=2)


def test_ways_to_start_that_would_not_keep_their_promise_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    launch.require_supported({"deepspeed": "zero3"})
    launch.require_supported({"fsdp": "full_shard"})
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with raises_code("launch-accelerate-deepspeed", hint="distributed_type: MULTI_GPU"):
        launch.require_supported({})
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with raises_code("launch-accelerate-fsdp", message="accelerate has FSDP settings"):
        launch.require_supported({"deepspeed": "zero3"})


def test_an_optimizer_in_deepspeeds_file_gives_way_to_the_rules_and_that_is_said(tmp_path: Path) -> None:
    """LLaVA's zero3_offload.json has one, and a schedule."""
    file = tmp_path / "zero3.json"
    zero = {"stage": 3, "offload_optimizer": {"device": "cpu"}}
    file.write_text(json.dumps({"optimizer": {"type": "AdamW"}, "scheduler": {}, "zero_optimization": zero}))
    settings, warnings = launch.deepspeed_settings(str(file))
    assert settings.keys() == {"zero_optimization", "zero_force_ds_cpu_optimizer"}
    assert settings["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"]
    assert [warning.split(",")[0] for warning in warnings] == [
        "deepspeed: its optimizer has no effect; use --optim and the policy",
        "deepspeed: its scheduler has no effect; use --lr_scheduler_type",
    ]
    file.write_text("{")
    with raises_code("deepspeed-settings", says=r"zero3.json is not a JSON file: .*line 1"):
        launch.deepspeed_settings(str(file))
