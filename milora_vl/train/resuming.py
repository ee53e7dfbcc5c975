"""Whether a run may go on from a checkpoint with the processes and the ZeRO stage it has now."""

from __future__ import annotations

from pathlib import Path

from milora_data.errors import UserError
from milora_vl.checkpoints import num_processes, zero_stage


def check(checkpoint: Path, *, processes: int, stage: int) -> list[str]:
    """Warnings about what will not be as in an uninterrupted run.

    UserError where the optimizer cannot be put back: HF's Trainer would go on with a fresh one and say nothing, and
    DeepSpeed needs as many processes as wrote its shards. `stage` is ZeRO's, 0 without DeepSpeed; 1 counts as 2.
    """
    stage = 2 if stage == 1 else stage
    wrote, before = num_processes(checkpoint), zero_stage(checkpoint)
    if before != stage:
        raise UserError(
            f"{checkpoint} was written {_with(before)}; this run is {_with(stage)}\n"
            "the optimizer could not be put back\n"
            f"to resume:  {f'--deepspeed zero{before}' if before else 'leave --deepspeed out'}"
        )
    if wrote == processes:
        return []
    if stage:
        raise UserError(
            f"{checkpoint} holds the optimizer in {_count(wrote)}, a part for each process; now there are {processes}\n"
            f"to resume:  start {wrote} processes (torchrun --nproc_per_node {wrote} ...)"
        )
    return [
        f"{checkpoint.name} was written by {_count(wrote, 'process')}, now there are {processes}: random states start "
        "anew (dropout differs); records come in the same order only if the batch in total is the same"
    ]


def _with(stage: int) -> str:
    return f"with ZeRO-{stage}" if stage else "without DeepSpeed"


def _count(number: int, what: str = "part") -> str:
    plural = what + ("es" if what.endswith("s") else "s")
    return f"{number} {what if number == 1 else plural}"
