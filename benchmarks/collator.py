"""Records per second of `ProcessorCollator` and of TRL's collator, with one processor and the same files.

python benchmarks/collator.py [--records 32] [--repeats 3]    prints a JSON line; needs trl, which is not an extra

The processor is Qwen2.5-VL's with its published chat template, which TRL ships, and SmolLM2's tokenizer with Qwen's
special tokens. Both collators read the same JPEG files, in turns; labels are compared before. TRL supervises the line
break after an answer too, which ours does not.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from statistics import median
from typing import Any

import torch
from PIL import Image
from transformers import AutoTokenizer, Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

from milora_data.processor_collate import ProcessorCollator
from milora_vl.models import loading

TOKENS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
          "<|video_pad|>")  # fmt: skip
ANSWER = "The picture shows a street with parked cars, two people with umbrellas, and a shop on the corner. "
SIZES = ((224, 224), (640, 480))
BATCH = 8


def main() -> None:
    """Measure and print the figures."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--records", type=int, default=32)
    options.add_argument("--repeats", type=int, default=3)
    chosen = options.parse_args()
    torch.set_num_threads(1)  # as in a loader process
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measured(Path(folder), chosen.records, chosen.repeats)))


def measured(folder: Path, count: int, repeats: int) -> dict[str, dict[str, float]]:
    """Return records per second of both collators, and their ratio, by kind of record."""
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    templates = files("trl") / "chat_templates"
    processor = qwen_processor((templates / "qwen2_5_vl.jinja").read_text(encoding="utf-8"))
    theirs = DataCollatorForVisionLanguageModeling(
        processor,
        assistant_only_loss=True,
        chat_template=(templates / "qwen2_5_vl_training.jinja").read_text(encoding="utf-8"),
    )
    ours = ProcessorCollator(processor, image_folder=folder)
    for width, height in SIZES:
        noise = Image.effect_noise((width // 8, height // 8), 60).convert("RGB")
        noise.resize((width, height)).save(folder / f"{width}.jpg", quality=90)
    kinds = {
        "224 x 224 pixels, 1 answer": [record(1, "224.jpg")] * count,
        "640 x 480 pixels, 1 answer": [record(1, "640.jpg")] * count,
        "640 x 480 pixels, 10 long answers": [record(10, "640.jpg")] * count,
        "text, 10 long answers": [record(10, None)] * count,
    }
    results = {}
    for kind, values in kinds.items():
        require_same(ours(values[:BATCH]), theirs([opened(folder, value) for value in values[:BATCH]]), processor)
        batches = [values[start : start + BATCH] for start in range(0, count, BATCH)]
        read = [
            lambda batch: ours(batch),
            lambda batch: theirs([opened(folder, value) for value in batch]),
        ]
        pairs = [[timed(collate, batches) for collate in read] for _ in range(repeats)]
        fast, slow = (median(seconds) for seconds in zip(*pairs, strict=True))
        results[kind] = {"ours": count / fast, "trl": count / slow, "ratio": slow / fast}
    return results


def qwen_processor(template: str) -> Any:
    """Return Qwen2.5-VL's processor, with SmolLM2's tokenizer."""
    tokenizer, _ = loading.split_processor(loading.load_processor("smollm2"))
    tokenizer = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    tokenizer.add_special_tokens({"additional_special_tokens": list(TOKENS)})
    limits = {"shortest_edge": 56 * 56, "longest_edge": 640 * 480}
    return Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(size=dict(limits)), tokenizer, Qwen2VLVideoProcessor(size=dict(limits)), template
    )


def record(num_answers: int, image: str | None) -> dict[str, Any]:
    """Return a record of OpenAI's messages: a picture or none, and several answers."""
    turns: list[dict[str, Any]] = []
    for number in range(num_answers):
        turns.append({"role": "user", "content": f"What else is there? ({number})"})
        turns.append({"role": "assistant", "content": (ANSWER * (3 if num_answers > 1 else 1)).strip()})
    return {"messages": turns, "images": [] if image is None else [image]}


def opened(folder: Path, value: dict[str, Any]) -> dict[str, Any]:
    """Return a record as TRL takes it, with its pictures read."""
    pictures = [Image.open(folder / name).convert("RGB") for name in value["images"]]
    return {"messages": [dict(turn) for turn in value["messages"]], "images": pictures}


def require_same(ours: dict[str, Any], theirs: dict[str, Any], processor: Any) -> None:
    """Compare all tensors; in labels, TRL's line break after each answer does not count."""
    for name, tensor in theirs.items():
        if name != "labels":
            assert torch.equal(ours[name], tensor), name
    differing = theirs["labels"][ours["labels"] != theirs["labels"]]
    assert set(differing.tolist()) <= {processor.tokenizer.convert_tokens_to_ids("Ċ")}


def timed(collate: Callable[[Any], object], batches: list[Any]) -> float:
    """Return the seconds that a collator takes for all batches."""
    start = time.perf_counter()
    for batch in batches:
        collate(batch)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
