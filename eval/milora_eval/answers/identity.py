"""When is a stored answer reused? Digests of all that it depends on: weights, tokenizer, prompt, picture, settings.

Weights are identified by their content, never by their path: after a second training into the same folder, the
questions are asked again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from milora_data.encode.tokens import fast_backend
from milora_eval.benchmark import Benchmark, Item
from milora_eval.data_files import file_digest
from milora_vl.core.adapter.folders import (
    ADAPTER_FILES,
    CONFIG,
    NON_LORA,
    PREFIX,
    PROJECTOR_FILES,
)

FILES = (*ADAPTER_FILES, CONFIG, *PROJECTOR_FILES, NON_LORA)
_SAMPLES = 256


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False, default=str).encode()).hexdigest()[:16]


def adapter_digest(folder: Path) -> str:
    """Return a hash of the bytes of a folder's adapter or projector files."""
    total = hashlib.sha256()
    for pattern in FILES:
        for path in sorted(folder.glob(pattern)):
            total.update(f"{path.relative_to(folder).as_posix()} {file_digest(str(path))}".encode())
    return total.hexdigest()[:16]


def weights_digest(model: Any) -> str:
    """Return a hash of a model's weights without adapters: name, shape, type and up to 256 values of each weight.

    A PEFT wrapper does not change it. It takes a fraction of a second, also for 7B parameters.
    """
    total = hashlib.sha256()
    weights = {}
    for name, weight in [*model.named_parameters(), *model.named_buffers()]:
        base_name = _base_name(name)
        if base_name is not None and weight.device.type != "meta":
            weights[base_name] = weight
    for name in sorted(weights):
        flat = weights[name].detach().reshape(-1)
        step = max(1, flat.numel() // _SAMPLES)
        total.update(f"{name} {tuple(weights[name].shape)} {flat.dtype}".encode())
        total.update(flat[::step][:_SAMPLES].float().cpu().numpy().tobytes())
    return total.hexdigest()[:16]


def tokenizer_digest(tokenizer: Any) -> str:
    return hashlib.sha256(fast_backend(tokenizer).to_str().encode()).hexdigest()[:16]


def content_of(item: Item, read: Callable[[str], str | None] = file_digest) -> list[Any]:
    """Return what identifies the pictures and videos of an item: the hash of each file, which `read` returns."""
    videos = [[*map(read, video.files), video.fps, video.num_frames] for video in item.videos]
    return [*map(read, item.images), *videos]


def answer_key(settings: Mapping[str, Any], benchmark: Benchmark, item: Item, content: Sequence[Any]) -> str:
    """Return the key of one answer: a digest of the settings, the prompt, and the content of pictures and videos."""
    turns = [[turn.role, turn.text] for turn in benchmark.prompt(item)]
    decoding = [benchmark.max_new_tokens, benchmark.num_beams, benchmark.form]
    return digest([settings, decoding, turns, list(content)])


def question_key(benchmark: Benchmark, item: Item, content: Sequence[Any]) -> str:
    """Return the key of a question: its prompt, answers, type and metric, and the content of pictures and videos.

    Only a picture whose file is missing is known by the id of the question.
    """
    turns = [[turn.role, turn.text] for turn in benchmark.prompt(item)]
    shown = [item.id if each is None else each for each in content]
    return digest([turns, shown, item.answers, item.kind, item.meta.get("metric")])


def _base_name(name: str) -> str | None:
    """Return a weight's name without PEFT's prefixes and suffixes; None for a weight of an adapter."""
    if "lora_" in name or ".modules_to_save." in name:
        return None
    return name.removeprefix(PREFIX).replace(".base_layer.", ".").replace(".original_module.", ".")
