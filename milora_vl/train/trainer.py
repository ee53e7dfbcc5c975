"""HF's Trainer with our loss, optimizer groups, checkpoints, data loader and callbacks (SIGTERM, logs).

HF's Trainer does distributed training, precision and logging. The loss calls the model's own forward, also in wrappers.
"""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from peft.utils.integrations import gather_params_ctx
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import PreTrainedModel, PrinterCallback, TrainingArguments
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK

from milora_data.batches.lengths import LengthGroupedSampler
from milora_data.batches.record_collator import RecordCollator
from milora_data.encode.tokens import IGNORE
from milora_vl.common.compat.trainer import CheckpointTrainer, enable_fsdp_on_cpus
from milora_vl.common.errors import UserError
from milora_vl.core.adapter.earlier import APART_FILE
from milora_vl.core.adapter.folders import ANCHORS_FILE, PROJECTOR_FILES, SHARDED_OPTIMIZER, STATE, is_of_fsdp, step_of
from milora_vl.core.adapter.lora import base_model_of
from milora_vl.core.adapter.rates import RatesOfRules
from milora_vl.core.adapter.sidecar import FILE_NAME
from milora_vl.core.policy import Target
from milora_vl.core.policy.towers import image_token_of
from milora_vl.core.weights.distributed import gathered_state
from milora_vl.interop.base_kl import BaseKL, add_base_kl, with_positions
from milora_vl.models.losses import add_chunked_loss, row_losses, summed_loss, supervised_positions
from milora_vl.models.projector import save_projector
from milora_vl.train import data
from milora_vl.train.callbacks import (
    Bars,
    FrozenTowers,
    IntervalsOfThisRun,
    KeepDigits,
    Lines,
    LogBeforeSave,
    Meter,
    StopOnSignal,
    SuiteCallback,
)
from milora_vl.train.launch import RequireShards, prepare_fsdp

if TYPE_CHECKING:
    from peft import PeftModel


OUR_FILES = (FILE_NAME, ANCHORS_FILE, APART_FILE, *PROJECTOR_FILES)
CheckpointKind = Literal["adapter", "projector", "full"]


class MiloraTrainer(RatesOfRules, CheckpointTrainer):
    """Train the modules of `targets`. `saves` is the content of checkpoints: adapter, projector or full model.

    With `lengths` (one per training record), a batch has records of similar length and of one of `kinds`.
    A stream as data set continues at its position in the checkpoint `resume_from`. `base_kl` adds a term to the
    loss.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        targets: Sequence[Target],
        checkpoint_kind: CheckpointKind,
        data_collator: RecordCollator[Any],
        train_dataset: Any,
        eval_dataset: Any = None,
        processing_class: Any = None,
        lengths: Sequence[int] | None = None,
        kinds: Sequence[object] | None = None,
        resume_from: Path | None = None,
        base_kl: BaseKL | None = None,
    ) -> None:
        self.chunked = add_chunked_loss(base_model_of(model))  # before anything wraps its forward
        self.base_kl = base_kl
        if base_kl is not None:
            add_base_kl(cast("PeftModel", model))
            self.image_token = image_token_of(base_model_of(model))
        super().__init__(
            model,
            args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=[stop := StopOnSignal(), LogBeforeSave(), IntervalsOfThisRun()],
        )
        self.stop_on_signal = stop
        self.remove_callback(PrinterCallback if self.args.disable_tqdm else DEFAULT_PROGRESS_CALLBACK)
        self.add_callback(Lines)
        if sys.stderr.isatty() and not self.args.disable_tqdm:
            self.add_callback(Bars)
        self.checkpoint_kind = checkpoint_kind
        self.lengths, self.kinds = lengths, kinds
        self.resume_from = resume_from
        self.model_accepts_loss_kwargs = True  # compute_loss below divides by num_items_in_batch for every model
        self.meter = Meter(data_collator)
        self.suites: SuiteCallback | None = None  # scores during training
        if self.args.fsdp:
            self.add_callback(RequireShards())
        if self.args.deepspeed:
            self.add_callback(KeepDigits(model))
        if self.args.gradient_checkpointing:
            self.add_callback(FrozenTowers())
        if self.is_fsdp_enabled:
            prepare_fsdp(self.accelerator, model)
        self._rows: list[tuple[str, float, int]] = []  # of an evaluation: key, summed loss and tokens of a record
        self.record_losses: dict[str, float] = {}  # of the last evaluation in this process, by key; means over tokens
        self.evaluated_step = -1

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.args.fsdp:
            enable_fsdp_on_cpus(self.accelerator.state, self.args.fsdp_plugin_args)
            self.is_fsdp_enabled = self.accelerator.state.fsdp_plugin is not None

    def trained(self) -> nn.Module:
        assert isinstance(self.model, nn.Module)
        return self.model

    def get_train_dataloader(self) -> Any:
        args, dataset, collator = self.args, self.train_dataset, self.data_collator
        if isinstance(dataset, IterableDataset):
            self._stream = data.stream_loader(dataset, collator, args, self.resume_from)
            return self._stream
        if self.lengths is None:
            return data.guarded(super().get_train_dataloader())
        seed = args.seed if args.data_seed is None else args.data_seed
        per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        loader = DataLoader(
            cast("Dataset[Any]", dataset),
            batch_size=args.train_batch_size,
            sampler=LengthGroupedSampler(self.lengths, per_step, seed, kinds=self.kinds),
            collate_fn=collator,
            drop_last=args.dataloader_drop_last,
            **data.process_settings(args),
        )
        return self.accelerator.prepare(data.guarded(loader))

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Return HF's loader, which fails if its processes hang. No training record replaces a held-out one."""
        collator = self.data_collator
        self.data_collator = cast("RecordCollator[Any]", collator).for_evaluation()
        try:
            return data.guarded(super().get_eval_dataloader(eval_dataset))
        finally:
            self.data_collator = collator

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        texts = None if self.base_kl is None else self.base_kl.next_batch(self.state.global_step, self.args)
        if texts is not None:
            batch, device = with_positions(texts, self.image_token), self.args.device
            if device.type not in ("cpu", "mps"):  # HF would wait for the copies
                batch = {name: part.pin_memory().to(device, non_blocking=True) for name, part in batch.items()}
            inputs = {**inputs, "base_kl": batch}
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the mean cross-entropy over the supervised tokens of the accumulated batch on all devices.

        Batch 1 x accumulation 8 therefore equals 8 x 1. Raises UserError if a training batch has no supervised tokens.
        """
        inputs = dict(inputs)
        counts = inputs.pop("counts")
        if not model.training:
            return self._evaluated(model, inputs)
        self.meter.add(counts)
        outputs: list[Mapping[str, Any]] = []

        def forward(**arguments: Any) -> Mapping[str, Any]:
            outputs.append(model(**arguments))
            return outputs[0]

        summed, num_tokens = summed_loss(forward, inputs, chunked=self.chunked)
        if num_tokens == 0:
            message = "nothing in the batch is supervised"
            hint = "the answers are empty or cut off; see --max_length and python -m milora_data check"
            raise UserError(message, where=f"step {self.state.global_step + 1}", hint=hint, exit_code=1)
        loss = summed / (num_tokens if num_items_in_batch is None else num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # DDP averages gradients; the count is already global
        if self.base_kl is not None and "base_kl" in inputs:
            term = outputs[0]["base_kl"]
            self.base_kl.terms.append(term.detach())
            loss = loss + self.base_kl.factor * (term - term.detach())  # the gradient alone: `loss` is the task's
        return (loss, {}) if return_outputs else loss

    def _evaluated(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Keep the loss of each record of a batch, and return what HF's loop takes."""
        keys, inputs = inputs.pop("keys"), self._counted_once(inputs)
        losses, tokens = row_losses(model, inputs, chunked=self.chunked), (inputs["labels"][:, 1:] != IGNORE).sum(1)
        self._rows += zip(keys, losses.tolist(), tokens.tolist(), strict=True)
        return losses.sum() / tokens.sum().clamp(min=1), {}

    def _counted_once(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Mask the labels (batch, length) of records that this evaluation has counted before.

        accelerate fills the last batches of several processes with records from the start, so that all are full.
        """
        state, args = self.accelerator.gradient_state, self.args
        if args.world_size == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return inputs
        labels, num_new = inputs["labels"], max(state.remainder - args.process_index * args.eval_batch_size, 0)
        labels = torch.cat([labels[:num_new], torch.full_like(labels[num_new:], IGNORE)])
        return {**inputs, "labels": labels, "supervised": supervised_positions(labels)}

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """Run HF's loop, but report the mean loss over tokens, not over batches.

        It keeps the random state: later dropout is the same whether or not a resumed run evaluates again.
        """
        self._rows.clear()
        self.evaluated_step = self.state.global_step
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        # A row without tokens repeats a record, or is a substitute.
        self.record_losses = {key: loss / count for key, loss, count in self._rows if count}
        sums = (sum(loss for _, loss, _ in self._rows), sum(count for *_, count in self._rows))
        total, count = self._over_processes(sums)
        assert output.metrics is not None
        output.metrics[f"{metric_key_prefix}_loss"] = total / max(count, 1)
        return output

    def _over_processes(self, numbers: Sequence[float]) -> list[float]:
        if self.args.world_size == 1:
            return list(numbers)
        sums: Tensor = self.accelerator.reduce(torch.tensor(numbers, dtype=torch.float32, device=self.args.device))
        return sums.tolist()

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        metrics: dict[str, float] = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if self.suites is not None and "suite_" in (self.args.metric_for_best_model or ""):
            metrics |= self.suites.scores()
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as HF does, with our entries. Raises UserError if the loss is not finite."""
        if "loss" in logs:
            logs |= self.meter.take(self._over_processes(self.meter.counts))
            if self.base_kl is not None and (mean := self.base_kl.taken()) is not None:
                (total,) = self._over_processes([mean])
                logs["base_kl"] = total / self.args.world_size
        super().log(logs, start_time)
        if not math.isfinite(logs.get("loss", 0.0)):
            message = f"the loss is {logs['loss']}"
            hint = "start a new run with a lower --learning_rate, or with --bf16 instead of --fp16"
            raise UserError(message, where=f"step {self.state.global_step}", hint=hint, exit_code=1)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as HF does, but of shards gather only what trains, and ask no hub whether the vocabulary has grown.

        A checkpoint of a run with streamed records also gets the position of each process in its stream.
        """
        folder = Path(output_dir or str(self.args.output_dir))
        is_checkpoint = step_of(folder) >= 0
        if is_checkpoint and self.args.should_save:
            (folder / STATE).unlink(missing_ok=True)  # of an earlier attempt; the new one marks a complete checkpoint
        if self.checkpoint_kind == "full" and not self.is_fsdp_enabled:
            super().save_model(str(folder), _internal_call)
        else:
            self._save_trained(folder)
        if not is_checkpoint:
            return
        if isinstance(self.train_dataset, IterableDataset):
            data.save_position(self._stream, folder, self.args)
        if self.args.push_to_hub and self.args.should_save:  # HF pushes its own files of the checkpoint from here
            for name in (name for name in OUR_FILES if (folder / name).is_file()):
                shutil.copy2(folder / name, str(self.args.output_dir))

    def _save_trained(self, folder: Path) -> None:
        """Gather what trains in all processes; one of them writes it, the processor and the arguments."""
        state, model = None, self.trained()
        if self.is_fsdp_enabled:
            only_trained, is_writer = self.checkpoint_kind != "full", bool(self.args.should_save)
            state = gathered_state(model, only_trained=only_trained, keep=is_writer)
        elif self.is_deepspeed_enabled:
            named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
            with gather_params_ctx(list(named.values()), modifier_rank=None):  # does nothing but under ZeRO-3
                state = {name: parameter.detach().cpu().clone() for name, parameter in named.items()}
        if not self.args.should_save:
            return
        folder.mkdir(parents=True, exist_ok=True)
        if self.checkpoint_kind == "projector":
            save_projector(model, folder, state)
        elif self.checkpoint_kind == "adapter":
            # The vocabulary never grows here; PEFT would ask the hub at every checkpoint.
            cast("Any", model).save_pretrained(str(folder), state_dict=state, save_embedding_layers=False)
        else:
            cast("PreTrainedModel", model).save_pretrained(str(folder), state_dict=state)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        torch.save(self.args, folder / "training_args.bin")

    def save_sharded_optimizer(self, folder: Path) -> None:
        """Write the share of the optimizer that this process holds, and the scheduler."""
        import torch.distributed.checkpoint as checkpoint

        checkpoint.save(self._optimizer_state(), checkpoint_id=folder / SHARDED_OPTIMIZER)
        if self.args.should_save:
            torch.save(cast("Any", self.lr_scheduler).state_dict(), folder / "scheduler.pt")

    def load_sharded_optimizer(self, folder: Path) -> bool:
        """Load what a run with FSDP2 wrote, in any number of processes, also without FSDP2; False if none did."""
        if not is_of_fsdp(folder):
            return False
        import torch.distributed.checkpoint as checkpoint
        from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

        content, reader = self._optimizer_state(), checkpoint.FileSystemReader(folder / SHARDED_OPTIMIZER)
        stored = {key.rpartition(".")[0] for key in reader.read_metadata().state_dict_metadata}
        checkpoint.load(content, storage_reader=reader, planner=checkpoint.DefaultLoadPlanner(allow_partial_load=True))
        set_optimizer_state_dict(self.trained(), cast("Any", self.optimizer), content["optimizer"])
        for name, parameter in self.trained().named_parameters():
            if f"optimizer.state.{name}" not in stored:  # no step has used it: torch has made a state to load
                cast("Any", self.optimizer).state.pop(parameter, None)
        cast("Any", self.lr_scheduler).load_state_dict(torch.load(folder / "scheduler.pt", weights_only=True))
        return True

    def _optimizer_state(self) -> dict[str, Any]:
        from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

        return {"optimizer": get_optimizer_state_dict(self.trained(), cast("Any", self.optimizer))}
