"""The loader of a run with streamed records, and the position in the stream that checkpoints save and resume."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from milora_data.stream.record_stream import RecordStream, record_stream
from milora_vl.base.errors import UserError
from milora_vl.plan.run_data import sources_of
from milora_vl.recipe.schema import Recipe
from milora_vl.train import loader_processes
from milora_vl.weights.torch_files import read_pickled


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


def loader(stream: RecordStream, collator: Any, args: TrainingArguments, checkpoint: Path | None) -> Any:
    """Return the loader of a stream; it continues at the position stored in `checkpoint`.

    Raises UserError if the checkpoint has no position for this process or was written by other processes.
    """
    from torchdata.stateful_dataloader import StatefulDataLoader

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*set_vital.*")  # torchdata calls a deprecated function of torch
        result = StatefulDataLoader(
            stream,
            batch_size=args.train_batch_size,
            collate_fn=collator,
            num_workers=args.dataloader_num_workers,
            timeout=loader_processes.TIMEOUT if args.dataloader_num_workers else 0,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=args.to_dict().get("dataloader_multiprocessing_context"),  # not in transformers 4
            # A loader draws a seed when it starts. A resumed run has drawn it before its random states were saved.
            generator=None if checkpoint is None else torch.Generator(),
        )
    if checkpoint is not None:
        result.load_state_dict(_stored_position(checkpoint, _shape(args), args.process_index))
    return result


def keep(loader: Any, folder: Path, args: TrainingArguments) -> None:
    """Write the stream position of this process into the checkpoint `folder`."""
    content = {"shape": _shape(args), "loader": loader.state_dict()}
    torch.save(content, folder / _name(args.process_index))


def _stored_position(checkpoint: Path, shape: dict[str, int], rank: int) -> Any:
    path = checkpoint / _name(rank)
    if not path.is_file():
        raise UserError(
            f"{path.name} is missing; it holds the position of this process in the stream",
            code="checkpoint-incomplete",
            where=str(checkpoint),
            hint="resume from another checkpoint, with as many processes as before",
        )
    content = read_pickled(path)
    for name, before in content["shape"].items():
        if before != shape[name]:
            raise UserError(
                f"the checkpoint was written with {name} {before}, this run has {shape[name]}",
                code="resume-other-stream",
                where=str(checkpoint),
                hint="a stream is divided among processes: use as many as before",
            )
    return content["loader"]


def _shape(args: TrainingArguments) -> dict[str, int]:
    return {"number of devices": args.world_size, "dataloader_num_workers": args.dataloader_num_workers}


def _name(rank: int) -> str:
    return f"stream_state_{rank}.pth"
