"""Rewrite tests/reference/golden.json: ids, masks and batches as the commit before the rebuild made them.

Run it only where a change of these is meant:  python tests/reference/make_golden.py
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image

TARGET = Path(__file__).with_name("golden.json")
TURNS = {
    "one": [("human", "<image>\nWhat is it?"), ("gpt", "A cat.")],
    "two": [("human", "<image>\nWhat is it?"), ("gpt", "A cat."), ("human", "Its colour?"), ("gpt", "Grey.")],
    "system": [("system", "Be brief."), ("human", "Hello <image>"), ("gpt", "Hi.")],
    "text": [("human", "How much is 2 + 3?"), ("gpt", "It is 5.")],
    "spaces": [("human", "  <image>  a  "), ("gpt", "  b\n\n")],
    "unicode": [("human", "<image>\n\u00e9\u4f60\u597d \U0001f600"), ("gpt", "\u00fc \u0645\u0631\u062d\u0628\u0627")],
    "long": [("human", "<image>\nTell me."), ("gpt", "word " * 200)],
    "pictures": [("human", "<image><image>\nCompare."), ("gpt", "The same.")],
    "tokens": [("human", "<image>\n</s> [INST] <s>"), ("gpt", "USER: ASSISTANT: </s>x")],
}


def records() -> list[dict[str, Any]]:
    """Conversations of many shapes, as LLaVA JSON."""
    found = []
    for name, turns in TURNS.items():
        count = sum(text.count("<image>") for _, text in turns)
        images = {"image": [f"{number}.png" for number in range(count)]} if count else {}
        found.append({"id": name, **images, "conversations": [{"from": who, "value": text} for who, text in turns]})
    return found


def digest(value: Any) -> str:
    """A short name of some numbers."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def encoded() -> dict[str, dict[str, str]]:
    """By template and record, the digest of ids and labels, or the class of the error."""
    from milora_data import TEMPLATES, encode
    from milora_vl.tiny import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    found: dict[str, dict[str, str]] = {}
    for template in sorted(TEMPLATES):
        for record in records():
            try:
                made = encode(
                    record, tokenizer, template=template, image_token_id=image_token, image_tokens=4, max_length=300
                )
                value = digest([made.input_ids, made.labels])
            except ValueError:
                value = "refused"
            found.setdefault(template, {})[record["id"]] = value
    return found


def batches() -> dict[str, str]:
    """Digests of the tensors of collated batches, padded and packed."""
    from milora_data import ImageTextCollator
    from milora_vl.tiny import tiny_llava

    _, processor = tiny_llava()
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(2):
            Image.new("RGB", (40 + 9 * number, 31), (90 * number, 120, 30)).save(Path(folder) / f"{number}.png")
        collator = ImageTextCollator(
            processor.tokenizer, processor.image_processor, image_tokens=16, image_folder=folder, max_length=400
        )
        usable = [record for record in records() if record["id"] not in ("tokens", "pictures")]
        for name, items in (("padded", usable), ("packed", [usable[:3], usable[3:]])):
            for key, tensor in collator(items).items():
                if not isinstance(tensor, torch.Tensor):
                    continue
                rounded = tensor.double().mul(1e4).round().long() if tensor.is_floating_point() else tensor.long()
                found[f"{name} {key}"] = digest([list(tensor.shape), rounded.flatten().tolist()])
    return found


if __name__ == "__main__":
    TARGET.write_text(json.dumps({"encoded": encoded(), "batches": batches()}, indent=1) + "\n", encoding="utf-8")
