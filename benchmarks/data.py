"""Data speed: encoding and pixels against LLaVA's code, packing, and memory for many records.

python benchmarks/data.py [--records 2000] [--lines 1000000]    prints a JSON line; the ratios are measured in one run
Needs the development packages (llava-torch and mistral-common): make setup
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import random
import sys
import tempfile
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.timing import ROOT, Work, alternately, clocked, memory, timed
from milora_data.batches.pack import fill, pack
from milora_data.encode.labels import encode
from milora_data.pictures.pixels import PixelMaker
from milora_data.stream import load_records

sys.path.insert(0, str(ROOT / "tests"))
from support.llava_oracle import llama_tokenizer, llava_train

# 30,000 random words with frequencies by Zipf's law; as in a natural language, frequent words are short.
_letters = random.Random(0)
WORDS = ["".join(_letters.choices("etaoinshrdlucmfwypvbgk", k=2 + rank.bit_length() // 2)) for rank in range(1, 30_001)]
WEIGHTS = list(accumulate(1 / rank for rank in range(1, 30_001)))
ROUNDS = 5
# number of exchanges, and words per question and answer, as in the parts of mix665k
KINDS = {"VQA": (8, 9, 1), "captions": (1, 12, 60), "conversations": (3, 14, 80)}


def main() -> None:
    """Measure everything and print the figures."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--records", type=int, default=1000)
    options.add_argument("--lines", type=int, default=1_000_000)
    chosen = options.parse_args()
    torch.set_num_threads(1)
    # Memory comes first, because nothing else has raised the peak yet.
    measured = {"threads": 1, **reading(chosen.lines), **encoding(chosen.records), **pixels(), **packing()}
    print(json.dumps(measured))


def fastest(theirs: Work, ours: Work) -> tuple[float, float]:
    """Return the shortest times of both."""
    seconds = alternately({"theirs": theirs, "ours": ours}, ROUNDS)
    return min(seconds["theirs"]), min(seconds["ours"])


def text(rng: random.Random, count: int) -> str:
    """Return `count` random words."""
    return " ".join(rng.choices(WORDS, cum_weights=WEIGHTS, k=count))


def records(kind: str, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return records of one kind, each with a picture."""
    rng = random.Random(seed)
    exchanges, question, answer = KINDS[kind]
    made = []
    for number in range(count):
        turns = []
        for place in range(exchanges):
            asked = ("<image>\n" if place == 0 else "") + text(rng, rng.randint(question // 2, question * 3 // 2))
            said = text(rng, rng.randint((answer + 1) // 2, answer * 3 // 2))
            turns += [{"from": "human", "value": asked}, {"from": "gpt", "value": said}]
        made.append({"id": str(number), "image": "a.jpg", "conversations": turns})
    return made


def encoding(count: int) -> dict[str, Any]:
    """Return milliseconds per record up to tensors of ids and labels; LLaVA's time includes its copy of the record."""
    train, tokenizer = llava_train(), llama_tokenizer("new")
    train.conversation_lib.default_conversation = train.conversation_lib.conv_templates["v1"]
    arguments = SimpleNamespace(is_multimodal=True, mm_use_im_start_end=False)

    def theirs(value: dict[str, Any]) -> None:
        sources = train.preprocess_multimodal(copy.deepcopy([value["conversations"]]), arguments)
        train.preprocess(sources, tokenizer, has_image=True)

    def ours(value: dict[str, Any]) -> None:
        made = encode(value, tokenizer, image_token_id=32000)
        for numbers in (made.input_ids, made.labels):  # the collator converts them to tensors in the same way
            torch.from_numpy(np.fromiter(numbers, np.int64, len(numbers)))

    found: dict[str, Any] = {}
    for kind in KINDS:
        fresh = [records(kind, count, seed) for seed in range(ROUNDS)]  # no text is repeated
        rounds = iter(fresh), iter(fresh)
        with contextlib.redirect_stdout(io.StringIO()):
            slow, fast = fastest(
                lambda r=rounds[0]: [theirs(x) for x in next(r)], lambda r=rounds[1]: [ours(x) for x in next(r)]
            )
        found[f"encode_{kind}"] = {"ms": fast / count * 1e3, "llava_ms": slow / count * 1e3, "ratio": slow / fast}
    return found


def photo(width: int, height: int, path: Path) -> None:
    """Write a JPEG with structure at all scales, like a photo."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 255, (height // 16, width // 16, 3), dtype=np.uint8))
    fine = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
    noisy = fine + rng.normal(0, 6, (height, width, 1)).astype(np.int16)
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=90)


def pixels() -> dict[str, Any]:
    """Return milliseconds per file, and the largest and the mean difference in levels of 255."""
    from llava.mm_utils import expand2square
    from transformers import CLIPImageProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    size: dict[str, Any] = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
    slow = CLIPImageProcessorPil(**size)
    color = tuple(int(x * 255) for x in slow.image_mean)
    levels = torch.tensor(slow.image_std)[:, None, None] * 255

    def theirs(path: Path) -> torch.Tensor:
        image = expand2square(Image.open(path).convert("RGB"), color)
        return slow.preprocess(image, return_tensors="pt")["pixel_values"]

    with tempfile.TemporaryDirectory() as folder:
        path, times = Path(folder) / "photo.jpg", 30
        photo(640, 480, path)
        make = PixelMaker(CLIPImageProcessor(**size))

        def ours() -> torch.Tensor:
            return make([make.read(path)])

        difference = ((ours() - theirs(path)) * levels).abs()
        them, us = fastest(lambda: [theirs(path) for _ in range(times)], lambda: [ours() for _ in range(times)])
    return {
        "jpeg_640x480": {
            "ms": us / times * 1e3, "llava_ms": them / times * 1e3, "ratio": them / us,
            "largest_difference": float(difference.max()), "mean_difference": float(difference.mean()),
        }
    }  # fmt: skip


def packing() -> dict[str, Any]:
    """Return the share of positions that hold a token: for random batches of 16 with padding, and for packed rows."""
    rng = np.random.default_rng(0)
    pictures, texts = 576 + 45 + rng.gamma(1.5, 80, 100_000), 45 + rng.lognormal(6, 0.9, 100_000)
    lengths = [int(n) for n in np.where(rng.random(100_000) < 0.94, pictures, texts).clip(60, 2048)]
    batches = np.array(lengths[: len(lengths) // 16 * 16]).reshape(-1, 16)
    seconds, rows = timed(lambda: pack(lengths, 4096))
    padded = float(batches.sum() / (batches.max(1) * 16).sum())
    return {"packing": {"packed": fill(rows, lengths, 4096), "padded": padded, "seconds_per_100k": seconds}}


def reading(lines: int) -> dict[str, Any]:
    """Return the added peak memory (MB) of reading JSON lines, after a tenth of them and after all."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "many.jsonl"
        some = "".join(json.dumps(value) + "\n" for value in records("VQA", 1000))
        with path.open("w") as file:
            for _ in range(lines // 1000):
                file.write(some)
        before, tenth = memory("VmHWM"), 0
        with clocked(took := {}, "seconds"):
            for number, _ in enumerate(load_records(path)):
                if number == lines // 10:
                    tenth = memory("VmHWM")
    after_tenth, after_all = (round((peak - before) / 2**20, 1) for peak in (tenth, memory("VmHWM")))
    return {"jsonl": {"lines": lines, "MB_after_a_tenth": after_tenth, "MB_after_all": after_all, **took}}


if __name__ == "__main__":
    main()
