"""Private interfaces of transformers' Trainer, which takes a second to import, and of accelerate below it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import nn
from transformers import Trainer


def enable_fsdp_on_cpus(state: AcceleratorState, plugin_args: dict[str, Any] | None) -> None:
    """Make accelerate shard on CPUs too. Its default enables FSDP on GPUs alone, and trains with DDP on CPUs.

    Every new AcceleratorState takes its type from the shared state of PartialState, which accelerate writes like this
    on GPUs. Support of FSDP2 on CPUs in accelerate would replace it.
    """
    if plugin_args is not None and state.distributed_type == DistributedType.MULTI_CPU:
        state.fsdp_plugin = FullyShardedDataParallelPlugin(**plugin_args)
        state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP


class CheckpointTrainer(Trainer):
    """HF's Trainer with public methods for what a checkpoint holds besides the model.

    `save_model` is public. These four methods are not, and a hook for each in HF's Trainer would replace them.
    """

    def save_sharded_optimizer(self, folder: Path) -> None:
        raise NotImplementedError

    def load_sharded_optimizer(self, folder: Path) -> bool:
        raise NotImplementedError

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """HF would write the whole base beside every adapter, and an optimizer that only FSDP can read."""
        if self.is_fsdp_enabled:
            self.save_sharded_optimizer(Path(output_dir))
        else:
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not self.load_sharded_optimizer(Path(checkpoint)):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Do nothing: the model was restored when it was built, before anything wrapped or sharded it.

        HF reads the file of a full training without the names that transformers has changed, and finds no projector.
        """

    def _load_best_model(self) -> None:
        """Do nothing: the run copies the files of the best checkpoint. HF would load what it cannot read, as above."""
