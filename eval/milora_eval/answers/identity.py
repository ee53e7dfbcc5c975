"""When is a stored answer reused? Digests of all that it depends on: weights, tokenizer, prompt, picture, settings.

Weights are identified by their content, never by their path: after a second training into the same folder, the
questions are asked again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from milora_data.encode.tokens import fast_backend
from milora_data.keys import KeyOf, digest, file_key, question_key, shown_keys
from milora_eval.benchmark import Benchmark, Item


def tokenizer_digest(tokenizer: Any) -> str:
    return digest(fast_backend(tokenizer).to_str())


def content_of(item: Item, read: KeyOf = file_key) -> list[Any]:
    """Return what identifies the pictures and videos of an item; `read` returns the key of each file."""
    return shown_keys(item.images, item.videos, read)


def answer_key(settings: Mapping[str, Any], benchmark: Benchmark, item: Item, content: Sequence[Any]) -> str:
    """Return the key of one answer: a digest of the settings, the prompt, and the content of pictures and videos."""
    turns = [[turn.role, turn.text] for turn in benchmark.prompt(item)]
    decoding = [benchmark.max_new_tokens, benchmark.num_beams, benchmark.form]
    return digest([settings, decoding, turns, list(content)])


def key_of_question(benchmark: Benchmark, item: Item, content: Sequence[Any]) -> str:
    """Return the key of a question: its prompt, answers, type and metric, and the content of pictures and videos.

    Only where the file of a picture or video is missing, the id of the question is part of it.
    """
    has_all = all(each is not None and (isinstance(each, str) or each[0] is not None) for each in content)
    rest = [item.kind, item.meta.get("metric"), None if has_all else item.id]
    return question_key(benchmark.prompt(item), content, item.answers, rest)
