"""Records of one question for the collator."""

from __future__ import annotations

from typing import Any

TOKENS = 16


def image_id(processor: Any) -> int:
    return int(processor.tokenizer.convert_tokens_to_ids("<image>"))


def question(text: str, answer: str = "Yes.", image: Any = None, **more: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]
    return {"id": text, "conversations": turns, **({} if image is None else {"image": image}), **more}
