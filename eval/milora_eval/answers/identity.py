"""When is a stored answer reused? Digests of all that it depends on: weights, tokenizer, prompt, picture, settings.

Weights are identified by their content, never by their path: after a second training into the same folder, the
questions are asked again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from milora_data.encode.tokens import fast_backend
from milora_eval.benchmark import Benchmark, Item
from milora_eval.data_files import file_digest


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False, default=str).encode()).hexdigest()[:16]


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
