"""Private interfaces of transformers' Trainer, which takes a second to import."""

from __future__ import annotations

from pathlib import Path

from torch import nn
from transformers import Trainer


class CheckpointTrainer(Trainer):
    """HF's Trainer with public methods for what a checkpoint holds besides the model.

    `save_model` is public. These four methods are not, and a hook for each in HF's Trainer would replace them.
    """

    def save_sharded_optimizer(self, folder: Path) -> None:
        """Write optimizer and scheduler under FSDP2."""
        raise NotImplementedError

    def load_sharded_optimizer(self, folder: Path) -> None:
        """Read what `save_sharded_optimizer` wrote."""
        raise NotImplementedError

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """HF would write the whole base beside every adapter, and an optimizer that only FSDP can read."""
        if self.is_fsdp_enabled:
            self.save_sharded_optimizer(Path(output_dir))
        else:
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self.is_fsdp_enabled:
            self.load_sharded_optimizer(Path(checkpoint))
        else:
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Do nothing: the model was restored when it was built, before anything wrapped or sharded it.

        HF reads the file of a full training without the names that transformers has changed, and finds no projector.
        """

    def _load_best_model(self) -> None:
        """Do nothing: the run copies the files of the best checkpoint. HF would load what it cannot read, as above."""
