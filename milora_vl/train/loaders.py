"""Data loaders of a run: settings of their processes, and the stream of records whose position checkpoints save.

Loader processes (`--dataloader_num_workers`) that give no batch for TIMEOUT seconds end the run with an error.
"""

from __future__ import annotations

import os
import signal
import threading
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import DataLoaderAdapter
from transformers import TrainingArguments

from milora_data.stream.dataset import RecordStream, record_stream
from milora_vl.common.errors import UserError
from milora_vl.core.weights.tensor_files import read_weights
from milora_vl.train.meter import CountingCollator
from milora_vl.train.plan.run_data import sources_of
from milora_vl.train.recipe.schema import Recipe

TIMEOUT = 1800.0
"""Seconds after which loader processes without a batch count as hung. A slow file system needs seconds, not this."""


def process_settings(args: TrainingArguments) -> dict[str, Any]:
    """Return the arguments of a DataLoader that concern its processes."""
    return {
        "num_workers": args.dataloader_num_workers,
        "pin_memory": args.dataloader_pin_memory,
        "persistent_workers": args.dataloader_persistent_workers,
        "prefetch_factor": args.dataloader_prefetch_factor,
        "multiprocessing_context": args.to_dict().get("dataloader_multiprocessing_context"),  # not in transformers 5.6
        "timeout": TIMEOUT if args.dataloader_num_workers else 0,
        "worker_init_fn": start_process,
    }


def guarded(loader: Any) -> Any:
    """Return HF's loader with our timeout, our start of its processes, and counts of its batches."""
    inner = loader.base_dataloader if isinstance(loader, DataLoaderAdapter) else loader
    inner.collate_fn = CountingCollator(inner.collate_fn)
    if inner.num_workers:
        inner.timeout = TIMEOUT
        inner.worker_init_fn = partial(start_process, then=inner.worker_init_fn)
    return loader


def start_process(number: int, then: Callable[[int], None] | None = None) -> None:
    """Let a loader process ignore SIGTERM, except from the main process; then call `then` with its number.

    Schedulers and torchrun send SIGTERM to all processes of a job. The main process then needs batches to end its step
    and save it. At its own end it sends SIGTERM to loader processes that hang.
    """
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_the_main_process, daemon=True).start()
    if then is not None:
        then(number)


def _end_with_the_main_process() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def stream_of(recipe: Recipe, args: TrainingArguments) -> RecordStream:
    """Return the stream of this process: its share of the records, in an order given by the data seed."""
    assert recipe.data.path is not None
    return record_stream(
        sources_of(recipe.data.path),
        seed=args.seed if args.data_seed is None else args.data_seed,
        shuffle_buffer=recipe.data.shuffle_buffer,
        rank=args.process_index,
        world_size=args.world_size,
        num_workers=args.dataloader_num_workers,
        web_pictures=recipe.data.web_pictures,
    )


def stream_loader(stream: RecordStream, collator: Any, args: TrainingArguments, checkpoint: Path | None) -> Any:
    """Return the loader of a stream; it continues at the position stored in `checkpoint`.

    Raises UserError if the checkpoint has no position for this process.
    """
    from torchdata.stateful_dataloader import StatefulDataLoader

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*set_vital.*")  # torchdata calls a deprecated function of torch
        result = StatefulDataLoader(
            stream,
            batch_size=args.train_batch_size,
            collate_fn=CountingCollator(collator),
            # A loader draws a seed when it starts. A resumed run has drawn it before its random states were saved.
            generator=None if checkpoint is None else torch.Generator(),
            **process_settings(args),
        )
    if checkpoint is not None:
        result.load_state_dict(_stored_position(checkpoint, args.process_index))
    return result


def save_position(loader: Any, folder: Path, args: TrainingArguments) -> None:
    """Write the stream position of this process into the checkpoint `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(loader.state_dict(), folder / _name(args.process_index))


def _stored_position(checkpoint: Path, rank: int) -> Any:
    path = checkpoint / _name(rank)
    if not path.is_file():
        raise UserError(
            f"{path.name} is missing; it holds the position of this process in the stream",
            code="checkpoint-incomplete",
            where=str(checkpoint),
            hint="resume from another checkpoint, with as many processes as before",
        )
    return read_weights(path)


def _name(rank: int) -> str:
    return f"stream_state_{rank}.pth"
