"""A run whose records come as a stream: its loader, and the place in the stream that checkpoints keep."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from milora_data.errors import UserError
from milora_data.stream import RecordStream, record_stream
from milora_vl.plan.run_data import sources_of
from milora_vl.recipe.schema import Recipe
from milora_vl.weights.torch_files import read_pickled


def stream_of(recipe: Recipe, args: TrainingArguments) -> RecordStream:
    """The stream of this process: its share of the records, in an order that the data's seed decides."""
    assert recipe.data.path is not None
    return record_stream(
        sources_of(recipe.data.path),
        seed=args.seed if args.data_seed is None else args.data_seed,
        shuffle_buffer=recipe.data.shuffle_buffer,
        rank=args.process_index,
        world_size=args.world_size,
        num_workers=args.dataloader_num_workers,
    )


def loader(stream: RecordStream, collator: Any, args: TrainingArguments, checkpoint: Path | None) -> Any:
    """The loader of a stream, which goes on where it was at `checkpoint`. UserError where that does not say so."""
    from torchdata.stateful_dataloader import StatefulDataLoader

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*set_vital.*")  # torchdata calls what torch has deprecated
        made = StatefulDataLoader(
            stream,
            batch_size=args.train_batch_size,
            collate_fn=collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=args.to_dict().get("dataloader_multiprocessing_context"),  # not in transformers 4
        )
    if checkpoint is not None:
        made.load_state_dict(_kept(checkpoint, _shape(args), args.process_index))
    return made


def keep(loader: Any, folder: Path, args: TrainingArguments) -> None:
    """Write the place of this process in its stream into the checkpoint `folder`."""
    content = {"shape": _shape(args), "loader": loader.state_dict()}
    torch.save(content, folder / _name(args.process_index))


def _kept(checkpoint: Path, shape: dict[str, int], rank: int) -> Any:
    path = checkpoint / _name(rank)
    if not path.is_file():
        raise UserError(f"{checkpoint} does not say where in the stream it was: no {path.name}")
    content = read_pickled(path)
    for what, before in content["shape"].items():
        if before != shape[what]:
            raise UserError(
                f"{checkpoint} was written with {what} {before}, this run has {shape[what]}\n"
                "a stream is shared out among processes: it goes on with as many as before"
            )
    return content["loader"]


def _shape(args: TrainingArguments) -> dict[str, int]:
    return {"number of devices": args.world_size, "dataloader_num_workers": args.dataloader_num_workers}


def _name(rank: int) -> str:
    return f"stream_state_{rank}.pth"
