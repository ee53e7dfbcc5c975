"""When is a stored answer reused? Digests of all that it depends on: weights, tokenizer, prompt, picture, settings.

Weights are identified by their content, never by their path: after a second training into the same folder, the
questions are asked again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from milora_data.encode.tokens import fast_backend
from milora_data.keys import digest
from milora_eval.benchmark import Benchmark, Item


def tokenizer_digest(tokenizer: Any) -> str:
    return digest(fast_backend(tokenizer).to_str())


def answer_key(settings: Mapping[str, Any], benchmark: Benchmark, item: Item, content: Sequence[Any]) -> str:
    """Return the key of one answer: a digest of the settings, the prompt, and the content of pictures and videos."""
    turns = [[turn.role, turn.text] for turn in benchmark.prompt(item)]
    decoding = [benchmark.max_new_tokens, benchmark.num_beams, benchmark.form]
    return digest([settings, decoding, turns, list(content)])
