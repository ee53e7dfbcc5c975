"""The features of a frozen vision tower, computed once before the training (`data.feature_cache`).

The tower then returns what it is given: the batches hold its features in place of pixels.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import xxhash
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments
from transformers.modeling_outputs import BaseModelOutput

from milora_data.collate import ImageTextCollator
from milora_data.errors import UserError
from milora_data.features import PLAIN, FeatureReader, Features
from milora_data.images import ImageError, place_of
from milora_data.pixels import PixelMaker
from milora_data.records import Record
from milora_vl.policy import Target
from milora_vl.towers import find_towers

VERSION = 1  # raise it when the same tower and picture may give other features
BATCH = 16  # pictures


class Says(Protocol):
    """What tells the user something."""

    def say(self, text: str) -> None:
        """Show a line."""


def check(base: nn.Module, targets: Sequence[Target]) -> None:
    """UserError unless the tower is frozen as a whole and its features are taken as LLaVA takes them."""
    trained = next((target for target in targets if target.tower == "vision"), None)
    if trained is not None:
        raise UserError(
            f"data.feature_cache: the vision tower trains ({trained.path}), so its features change with each step\n"
            "leave the rule for vision out, or the cache"
        )
    assert isinstance(base, PreTrainedModel)
    if find_towers(base).vision is None or base.config.model_type not in ("llava", "llava_next"):
        raise UserError(
            "data.feature_cache: for models of LLaVA 1.5 and 1.6 alone, which use the tower's tokens as such"
        )
    if any(parameter.numel() == 0 for parameter in base.parameters()):
        raise UserError(
            "data.feature_cache: ZeRO-3 has cut the tower up, and the cache needs it whole\n"
            "say --deepspeed zero2, or leave the cache out"
        )


def prepare(
    folder: Path,
    base: nn.Module,
    collator: ImageTextCollator,
    records: Iterable[Record],
    args: TrainingArguments,
    tell: Says,
) -> FeatureReader:
    """Compute what the cache lacks of the records' pictures, each process a share; the tower returns what it is given.

    What it will write is said before. UserError where the disk has no room for that, or does not take it.
    """
    from safetensors import SafetensorError

    assert isinstance(base, PreTrainedModel)
    tower = base.get_submodule(str(find_towers(base).vision))
    layers: Any = base.config.vision_feature_layer
    layers = [layers] if isinstance(layers, int) else list(layers)
    names = dict.fromkeys(name for record in records for name in record.images)
    pictures = [place_of(collator.image_folder, name) for name in names]
    maker = collator.maker()
    reader = FeatureReader(folder / _key(tower, layers, maker, args), maker, collator.tiling)
    with _Tower(tower, layers, args) as compute:
        try:
            _fill(reader, compute, pictures, args, tell)
        except (OSError, SafetensorError) as error:
            raise UserError(f"data.feature_cache: {folder} cannot be written to: {error}") from None
    replay(tower, layers)
    return reader


def replay(tower: Any, layers: Sequence[int]) -> None:
    """Let `tower` return the features (num_images, 1, tokens, channels) that it is given in place of pixels."""

    def forward(pixel_values: Tensor, **_: object) -> BaseModelOutput:
        features = pixel_values.squeeze(1)
        parts = features.chunk(len(layers), dim=-1)
        chosen: Any = dict(zip(layers, parts, strict=True))  # looked up by the number of a layer
        return BaseModelOutput(last_hidden_state=features, hidden_states=chosen)

    tower.forward = forward


class _Tower:
    """The tower on the device of the training, in its precision."""

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
    reader: FeatureReader, compute: _Tower, pictures: Sequence[str | Path], args: TrainingArguments, tell: Says
) -> None:
    from accelerate import PartialState
    from tqdm import tqdm

    if not reader.holds(reader.file(PLAIN)):
        _write(reader, compute, [(reader.file(PLAIN), reader.maker.plain_image())])
    seen = {reader.file(PLAIN)}
    lacking: list[tuple[Path, str | Path]] = []
    for picture in tqdm(pictures, "looking for features", disable=None, file=sys.stderr, leave=False):
        entry = reader.entry(picture)
        if entry is None:
            continue  # training comes upon it, and does as --bad_images says
        if entry not in seen and not reader.holds(entry):
            lacking.append((entry, picture))
        seen.add(entry)
    _announce(reader, len(lacking), len(seen) - 1, tell)
    PartialState().wait_for_everyone()  # every process has seen the same before one writes
    mine = _Pictures(lacking[args.process_index :: args.world_size], reader.maker)
    loader: Any = torch.utils.data.DataLoader(
        mine, batch_size=BATCH, num_workers=args.dataloader_num_workers, collate_fn=list
    )
    for batch in tqdm(loader, "features of pictures", disable=None, file=sys.stderr, leave=False):
        _write(reader, compute, [pair for pair in batch if pair is not None])
    PartialState().wait_for_everyone()


class _Pictures(torch.utils.data.Dataset[Any]):
    """Pictures as the maker reads them; None for one that cannot be read, which training will come upon itself."""

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
    made = reader.maker.inputs([image for _, image in pairs])
    pixels = made["pixel_values"]
    entries = [entry for entry, _ in pairs]
    if reader.tiling is None:
        for entry, values in zip(entries, compute(pixels), strict=True):
            reader.write(entry, Features(values[None], 0, 0))
        return
    for entry, tiles, size in zip(entries, pixels, made["image_sizes"].tolist(), strict=True):
        reader.write(entry, Features(compute(tiles[: reader.tiling.num_tiles(*size)]), *size))


def _announce(reader: FeatureReader, lacking: int, total: int, tell: Says) -> None:
    size = reader.file(PLAIN).stat().st_size * lacking
    free = shutil.disk_usage(reader.folder).free
    have = f"features of {total - lacking:,} of {total:,} pictures are in {reader.folder}"
    if not lacking:
        tell.say(have)
        return
    more = "" if reader.tiling is None else " at least"
    tell.say(f"{have}; the others take{more} {size / 1e6:,.1f} MB ({free / 1e6:,.0f} MB are free)")
    if size > free:
        raise UserError(
            f"data.feature_cache: {size / 1e9:,.1f} GB are needed in {reader.folder}, {free / 1e9:,.1f} are free"
        )


def _key(tower: nn.Module, layers: Sequence[int], maker: PixelMaker, args: TrainingArguments) -> str:
    made = f"{VERSION} {layers} {args.bf16} {args.fp16} {maker.aspect_ratio} {maker.jpeg_decoding}"
    digest = xxhash.xxh3_128(f"{made} {sorted(maker.image_processor.to_dict().items())}".encode())
    for name, weight in tower.state_dict().items():
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return str(digest.hexdigest())
