"""The feature cache of a run (`data.feature_cache`): a frozen vision tower's features, computed before training.

The batches then hold features in place of pixels, and the tower returns its input unchanged.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments
from transformers.modeling_outputs import BaseModelOutput

from milora_data.batches.collate import ImageTextCollator
from milora_data.pictures.features import PLAIN, FeatureReader, Features
from milora_data.pictures.files import ImageError, place_of
from milora_data.pictures.pixels import PixelMaker
from milora_data.records.record import Record
from milora_vl.core.policy.towers import find_towers
from milora_vl.models.image_tokens import layers_of
from milora_vl.train.failures import explained
from milora_vl.train.loaders import TIMEOUT
from milora_vl.train.plan.screen import Screen

VERSION = 1  # increase it when the same tower and picture may give other features
BATCH = 16  # pictures


def prepare(
    folder: Path,
    base: nn.Module,
    collator: ImageTextCollator,
    records: Iterable[Record],
    args: TrainingArguments,
    screen: Screen,
) -> FeatureReader:
    """Compute the missing features of the records' pictures, a share per process, and return their reader.

    Afterwards the tower returns its input (see `replay`). Raises UserError if the disk is full.
    """
    assert isinstance(base, PreTrainedModel)
    tower = base.get_submodule(str(find_towers(base).vision))
    layers = layers_of(base.config)
    names = dict.fromkeys(name for record in records for name in record.images)
    pictures = [place_of(collator.image_folder, name) for name in names]
    maker = collator.maker()
    reader = FeatureReader(folder / _key(tower, layers, maker, args), maker, collator.tiling)
    with explained(args, folder), _Tower(tower, layers, args) as compute:
        _fill(reader, compute, pictures, args, screen)
    replay(tower, layers)
    return reader


def replay(tower: Any, layers: Sequence[int]) -> None:
    """Make `tower` return its input: features (num_images, 1, tokens, channels) in place of pixels."""

    def forward(pixel_values: Tensor, **_: object) -> BaseModelOutput:
        features = pixel_values.squeeze(1)
        parts = features.chunk(len(layers), dim=-1)
        chosen: Any = dict(zip(layers, parts, strict=True))  # the model indexes it with the number of a layer
        return BaseModelOutput(last_hidden_state=features, hidden_states=chosen)

    tower.forward = forward


class _Tower:
    """The tower on the device of the training, in the precision of the training."""

    def __init__(self, tower: Any, layers: Sequence[int], args: TrainingArguments) -> None:
        self.tower, self.layers, self.device = tower, layers, args.device
        self.half = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
        self.home = next(tower.parameters()).device

    def __enter__(self) -> _Tower:
        self.tower.to(self.device)
        return self

    def __exit__(self, *_: object) -> None:
        self.tower.to(self.home)

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        """Return the chosen layers of (num_images, 3, H, W) side by side: (num_images, tokens, channels)."""
        dtype = next(self.tower.parameters()).dtype
        with torch.autocast(self.device.type, self.half or torch.bfloat16, enabled=self.half is not None):
            hidden = self.tower(pixels.to(self.device, dtype), output_hidden_states=True).hidden_states
        return torch.cat([hidden[layer] for layer in self.layers], dim=-1)


def _fill(
    reader: FeatureReader, compute: _Tower, pictures: Sequence[str | Path], args: TrainingArguments, screen: Screen
) -> None:
    from accelerate import PartialState
    from tqdm import tqdm

    if not reader.holds(reader.file(PLAIN)):
        _write(reader, compute, [(reader.file(PLAIN), reader.maker.plain_image())])
    seen = {reader.file(PLAIN)}
    missing: list[tuple[Path, str | Path]] = []
    for picture in tqdm(pictures, "looking for features", disable=None, file=sys.stderr, leave=False):
        entry = reader.entry(picture)
        if entry is None:
            continue  # training meets it again and applies --bad_images
        if entry not in seen and not reader.holds(entry):
            missing.append((entry, picture))
        seen.add(entry)
    screen.say(f"features of {len(seen) - 1 - len(missing):,} of {len(seen) - 1:,} pictures are in {reader.folder}")
    PartialState().wait_for_everyone()  # all processes list the same files before one of them writes
    mine = _Pictures(missing[args.process_index :: args.world_size], reader.maker)
    workers = args.dataloader_num_workers
    timeout = TIMEOUT if workers else 0
    loader = torch.utils.data.DataLoader(mine, batch_size=BATCH, num_workers=workers, collate_fn=list, timeout=timeout)
    for batch in tqdm(loader, "features of pictures", disable=None, file=sys.stderr, leave=False):
        _write(reader, compute, [pair for pair in batch if pair is not None])
    PartialState().wait_for_everyone()


class _Pictures(torch.utils.data.Dataset[Any]):
    """Decoded pictures; None for an unreadable one, which training handles by `--bad_images`."""

    def __init__(self, entries: Sequence[tuple[Path, str | Path]], maker: PixelMaker) -> None:
        self.entries, self.maker = entries, maker

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, number: int) -> tuple[Path, Any] | None:
        entry, picture = self.entries[number]
        try:
            return entry, self.maker.read(picture)
        except ImageError:
            return None


def _write(reader: FeatureReader, compute: _Tower, pairs: Sequence[tuple[Path, Any]]) -> None:
    if not pairs:
        return
    inputs = reader.maker.inputs([image for _, image in pairs])
    pixels = inputs["pixel_values"]
    entries = [entry for entry, _ in pairs]
    if reader.tiling is None:
        for entry, values in zip(entries, compute(pixels), strict=True):
            reader.write(entry, Features(values[None], 0, 0))
        return
    for entry, tiles, size in zip(entries, pixels, inputs["image_sizes"].tolist(), strict=True):
        reader.write(entry, Features(compute(tiles[: reader.tiling.num_tiles(*size)]), *size))


def _key(tower: nn.Module, layers: Sequence[int], maker: PixelMaker, args: TrainingArguments) -> str:
    settings = f"{VERSION} {layers} {args.bf16} {args.fp16} {maker.aspect_ratio} {maker.jpeg_decoding}"
    digest = xxhash.xxh3_128(f"{settings} {sorted(maker.image_processor.to_dict().items())}".encode())
    for name, weight in tower.state_dict().items():
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return str(digest.hexdigest())
