"""A checkpoint that was cut off by a kill is recognized."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from milora_vl.core.adapter.folders import num_processes, why_incomplete, zero_stage
from milora_vl.train.resume import resume_warnings
from support.checkpoint_files import write_checkpoint
from support.problems import raises_code


def test_a_file_that_is_missing_or_cut_off_makes_it_incomplete(tmp_path: Path) -> None:
    for step, name in enumerate(("adapter_model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json")):
        folder = write_checkpoint(tmp_path, step)
        assert why_incomplete(folder) is None
        (folder / name).unlink()
        assert why_incomplete(folder)
    folder = write_checkpoint(tmp_path, 9)
    (folder / "trainer_state.json").write_text('{"global_step"')
    assert "truncated" in str(why_incomplete(folder))


def sharded(run: Path, stage: int) -> Path:
    """Return a checkpoint of two processes as DeepSpeed writes it."""
    folder = write_checkpoint(run, 4)
    for name in ("optimizer.pt", "rng_state.pth"):
        (folder / name).unlink()
    (folder / "global_step4").mkdir()
    for rank in range(2):
        torch.save({}, folder / f"rng_state_{rank}.pth")
        torch.save({}, folder / "global_step4" / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
        if stage == 3:
            torch.save({}, folder / "global_step4" / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
    return folder


@pytest.mark.parametrize("stage", [2, 3])
def test_a_sharded_checkpoint_needs_all_its_shards(stage: int, tmp_path: Path) -> None:
    folder = sharded(tmp_path, stage)
    assert (why_incomplete(folder), zero_stage(folder), num_processes(folder)) == (None, stage, 2)
    next(folder.glob("global_step4/*optim_states.pt")).unlink()
    assert why_incomplete(folder) == "has the optimizer of 1 of 2 processes"


def test_other_processes_or_another_stage_are_refused_or_warned_about(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "a", 3)
    assert resume_warnings(folder, processes=2, stage=3) == []
    with raises_code("", says=r"2 processes, and this run has 4\n.*--nproc_per_node 2"):
        resume_warnings(folder, processes=4, stage=3)
    for stage in (0, 1, 2):
        with raises_code("", hint="--deepspeed zero3"):
            resume_warnings(folder, processes=2, stage=stage)
    plain = write_checkpoint(tmp_path / "b", 4)
    assert resume_warnings(plain, processes=1, stage=0) == []
    assert "processes, now there are 2" in resume_warnings(plain, processes=2, stage=0)[0]
    with raises_code("", hint="remove --deepspeed"):
        resume_warnings(plain, processes=1, stage=2)
    with raises_code("", hint="remove --fsdp"):
        resume_warnings(plain, processes=1, stage=0, fsdp=True)
