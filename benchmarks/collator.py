"""Records per second of `ProcessorCollator` and of TRL's collator, with one processor and the same files.

python benchmarks/collator.py [--records 16] [--repeats 3]    prints a JSON line; needs trl, which is not an extra

The processor is Qwen2.5-VL's with its published chat template, which TRL ships, and SmolLM2's tokenizer with Qwen's
special tokens. Both collators read the same JPEG files, in turns; labels are compared before. TRL supervises the line
break after an answer too, which ours does not.

Each runs in a process of its own with one thread, as in a loader process: there, our collator keeps freed memory.
`trl_kept` is TRL's collator in such a process. `floor` reads the pictures and calls the processor once, with texts that
are already written: the work that a collator has to do. Seconds are processor time, which another program on the
machine disturbs little.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import cache, partial
from importlib.resources import files
from pathlib import Path
from statistics import median
from typing import Any

import torch
from PIL import Image
from transformers import AutoTokenizer, Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

from milora_data.batches.memory import keep_freed_memory
from milora_data.batches.processor_collate import ProcessorCollator
from milora_data.records.record import parse_record
from milora_vl.models import loading

TOKENS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
          "<|video_pad|>")  # fmt: skip
ANSWER = "The picture shows a street with parked cars, two people with umbrellas, and a shop on the corner. "
SIZES = ((224, 224), (640, 480))
BATCH = 8
collate: Callable[[list[dict[str, Any]]], Any]  # of this process


WAYS = ("ours", "trl", "trl_kept", "floor")


def main() -> None:
    """Measure and print the figures."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--records", type=int, default=16)
    options.add_argument("--repeats", type=int, default=3)
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_pictures(Path(folder))
        print(json.dumps(measured(Path(folder), chosen.records, chosen.repeats)))


def write_pictures(folder: Path) -> None:
    """Write one JPEG file of each size."""
    for width, height in SIZES:
        noise = Image.effect_noise((width // 8, height // 8), 60).convert("RGB")
        noise.resize((width, height)).save(folder / f"{width}.jpg", quality=90)


def measured(folder: Path, count: int, repeats: int) -> dict[str, dict[str, float]]:
    """Return records per second of each way, and the ratio of both collators, by kind of record."""
    kinds = {
        "224 x 224 pixels, 1 answer": [record(1, "224.jpg")] * count,
        "640 x 480 pixels, 1 answer": [record(1, "640.jpg")] * count,
        "640 x 480 pixels, 10 long answers": [record(10, "640.jpg")] * count,
        "text, 1 answer": [record(1, None)] * count,
        "text, 10 long answers": [record(10, None)] * count,
    }
    new = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        processes = {
            way: stack.enter_context(ProcessPoolExecutor(1, new, initializer=prepare, initargs=(way, folder)))
            for way in WAYS
        }
        processes["ours"].submit(require_same, folder, [values[:BATCH] for values in kinds.values()]).result()
        results = {}
        for kind, values in kinds.items():
            runs = [[processes[way].submit(timed, values).result() for way in WAYS] for _ in range(repeats + 1)]
            seconds = dict(
                zip(WAYS, map(median, zip(*runs[1:], strict=True)), strict=True)
            )  # the first has the warm-up
            rates = {way: round(count / value, 1) for way, value in seconds.items()}
            results[kind] = rates | {"ratio": round(seconds["trl"] / seconds["ours"], 2)}
    return results


def prepare(way: str, folder: Path) -> None:
    """Make the function that collates a batch in this process."""
    global collate
    torch.set_num_threads(1)
    if way != "trl":
        keep_freed_memory()
    if way == "ours":
        collate = ProcessorCollator(trl_processor(), image_folder=folder)
    elif way == "floor":
        bare = ProcessorCollator(trl_processor())
        text = cache(lambda value: bare.inputs.format.render(parse_record(json.loads(value)).turns).text)
        collate = partial(processed, bare.inputs.processor, text, folder)
    else:
        collate = partial(collated_by, trl_collator(), folder)


def collated_by(theirs: Callable[[Any], Any], folder: Path, batch: list[dict[str, Any]]) -> object:
    """Read the pictures of a batch, as TRL takes them, and collate it."""
    return theirs([opened(folder, value) for value in batch])


def processed(processor: Any, text: Callable[[str], str], folder: Path, batch: list[dict[str, Any]]) -> object:
    """Read the pictures of a batch and call the processor on them and the texts."""
    images = [opened(folder, value)["images"] for value in batch]
    texts = [text(json.dumps(value)) for value in batch]
    return processor(text=texts, images=images if any(images) else None, padding=True, return_tensors="pt")


def timed(values: list[dict[str, Any]]) -> float:
    """Return the seconds of this process for all records, in batches."""
    start = time.process_time()
    for first in range(0, len(values), BATCH):
        collate(values[first : first + BATCH])
    return time.process_time() - start


def trl_collator() -> Any:
    """Return TRL's collator, which supervises the answers alone."""
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    template = (files("trl") / "chat_templates" / "qwen2_5_vl_training.jinja").read_text(encoding="utf-8")
    return DataCollatorForVisionLanguageModeling(trl_processor(), assistant_only_loss=True, chat_template=template)


def trl_processor() -> Any:
    """Return the processor with the published chat template."""
    return qwen_processor((files("trl") / "chat_templates" / "qwen2_5_vl.jinja").read_text(encoding="utf-8"))


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


def require_same(folder: Path, batches: list[list[dict[str, Any]]]) -> None:
    """Compare all tensors of both collators; in labels, TRL's line break after each answer does not count."""
    trl = trl_collator()
    for batch in batches:
        ours, theirs = collate(batch), trl([opened(folder, value) for value in batch])
        for name, tensor in theirs.items():
            if name != "labels":
                assert torch.equal(ours[name], tensor), name
        differing = theirs["labels"][ours["labels"] != theirs["labels"]]
        assert set(differing.tolist()) <= {trl.processor.tokenizer.convert_tokens_to_ids("Ċ")}


if __name__ == "__main__":
    main()
