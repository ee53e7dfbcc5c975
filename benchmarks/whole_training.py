"""A whole training, from the command to the saved adapter, against HF's Trainer with PEFT's LoRA, and TRL's SFTTrainer.

python benchmarks/whole_training.py [--data pictures text] [--steps 50] [--rounds 1] [--way milora hf trl ...]

The model, records, batch, rank, data type, optimizer and learning rate are the same. Ours is protected MiLoRA with its
own defaults and an empty cache, autocast, and for pictures eager attention, as in the demo; `hf` and `trl` keep their
defaults, `hf-tuned` gets autocast and that attention too. HF's Trainer
gets a collator that calls the processor, TRL its own DataCollatorForVisionLanguageModeling; both compute the loss of
the answers alone.
Pictures: smol-llava with records of the emoji data (`python -m milora_data emoji --output_dir data/emoji`). Text:
SmolLM2 with conversations of several hundred tokens. Each training runs in its own process, the methods in turns.
Seconds are processor time of one thread, which another program on the machine disturbs little.
TRL needs: pip install trl. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.timing import apart, memory

START = time.process_time()
WAYS = ("milora", "milora-ungrouped", "hf", "hf-tuned", "trl")  # ungrouped: batches are not grouped by length
BATCH, RANK, RATE, RECORDS = 8, 32, 1e-3, 256
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def main() -> None:
    """Train in every way, `rounds` times in turns, and print the medians and ratios."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", nargs="+", choices=("pictures", "text"), default=["pictures", "text"])
    options.add_argument("--emoji", type=Path, default=Path("data/emoji"))
    options.add_argument("--steps", type=int, default=50)
    options.add_argument("--rounds", type=int, default=1)
    options.add_argument("--way", nargs="+", choices=WAYS, default=WAYS)
    options.add_argument("--one", action="store_true", help="run the first way in this process (internal)")
    chosen = options.parse_args()
    if chosen.one:
        print(json.dumps(train(chosen.way[0], chosen.data[0], chosen.emoji, chosen.steps)))
        return
    if "trl" in chosen.way and importlib.util.find_spec("trl") is None:
        raise SystemExit("TRL is not installed: pip install trl, or leave it out:  --way milora hf")
    result = {data: compare(data, chosen.way, chosen) for data in chosen.data}
    print(json.dumps({"batch": BATCH, "rank": RANK, "steps": chosen.steps, **result}))


def compare(data: str, ways: list[str], chosen: argparse.Namespace) -> dict[str, Any]:
    """Return what each way measured, with its samples per second relative to the peers."""
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    for _ in range(chosen.rounds):
        for way in ways:
            words = ("--one", "--way", way, "--data", data, "--steps", chosen.steps, "--emoji", chosen.emoji)
            runs[way].append(apart(__file__, *words, OMP_NUM_THREADS="1"))
            print(data, way, runs[way][-1], file=sys.stderr)
    medians = {
        way: {key: statistics.median(run[key] for run in found) for key in found[0]} for way, found in runs.items()
    }
    speed = {way: row["samples_per_second"] for way, row in medians.items()}
    ratios = {
        f"{way}_over_{peer}": round(speed[way] / speed[peer], 2)
        for way in ways if way.startswith("milora")
        for peer in ("hf", "hf-tuned", "trl") if peer in ways
    }  # fmt: skip
    return {"ways": medians, **ratios}


def train(way: str, data: str, emoji: Path, steps: int) -> dict[str, float]:
    """Train in this process. Seconds of a step are the mean without the first, which has the warm-up."""
    from transformers import TrainerCallback, trainer

    class Clock(TrainerCallback):
        """Take the time after every step, and the logged losses."""

        ends: list[float] = []  # noqa: RUF012 - one training in a process
        losses: list[float] = []  # noqa: RUF012

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.ends.append(time.process_time())

        def on_log(self, *_: Any, **objects: Any) -> None:
            logs = objects["logs"]
            self.losses += [logs["loss"]] if "loss" in logs else []

    trainer.DEFAULT_CALLBACKS.append(Clock)  # type: ignore[arg-type]
    records = pictures(emoji) if data == "pictures" else conversations()
    with tempfile.TemporaryDirectory() as folder:
        if way.startswith("milora"):
            ours(records, data, emoji, Path(folder), steps, grouped=way == "milora")
        else:
            peer(way, records, data, emoji, Path(folder), steps)
    ended = time.process_time()
    # Batches differ in length, so the mean of all steps counts. The first step has the warm-up.
    seconds = (Clock.ends[-1] - Clock.ends[0]) / (len(Clock.ends) - 1)
    return {
        "samples_per_second": round(BATCH / seconds, 3),
        "seconds_per_step": round(seconds, 3),
        "peak_gb": round(memory("VmHWM") / 2**30, 2),
        "first_step_s": round(Clock.ends[0] - START, 1),
        "whole_s": round(ended - START, 1),
        "loss_first": round(Clock.losses[0], 4),
        "loss_last": round(statistics.mean(Clock.losses[-3:]), 4),
    }


def pictures(emoji: Path) -> list[dict[str, Any]]:
    """Return records of one question and answer about a picture."""
    records = json.loads((emoji / "train.json").read_text(encoding="utf-8"))
    return [record for record in records if "image" in record and len(record["conversations"]) == 2][:RECORDS]


def conversations() -> list[dict[str, Any]]:
    """Return records of one question and an answer of 20 to 200 words, without pictures."""
    draw = random.Random(0)
    words = Path(json.__file__).read_text(encoding="utf-8").split()
    sides = ((10, 30), (20, 200))
    texts = [[" ".join(draw.choices(words, k=draw.randint(*size))) for size in sides] for _ in range(RECORDS)]
    return [
        {"id": str(n), "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}
        for n, (question, answer) in enumerate(texts)
    ]


def ours(records: list[dict[str, Any]], data: str, emoji: Path, folder: Path, steps: int, *, grouped: bool) -> None:
    """Run `python -m milora_vl.train` in this process, with the recipe of the demo but for the peers' settings."""
    from milora_vl.train.__main__ import main as train_command

    (folder / "train.json").write_text(json.dumps(records))
    rule = f"{{modules: language, method: milora, rank: {RANK}, alpha: {RANK}}}"
    (folder / "recipe.yaml").write_text(
        f"model: {'smol-llava' if data == 'pictures' else 'smollm2'}\ndtype: bfloat16\ntemplate: vicuna_v1\n"
        f"data: {{path: {folder / 'train.json'}, image_folder: {emoji / 'images'}, max_length: 512}}\n"
        f"factor_cache: {folder / 'cache'}\n"
        f"attn_implementation: {'eager' if data == 'pictures' else 'sdpa'}\npolicy: [{rule}]\n"
    )
    words = {
        "output_dir": folder / "run", "max_steps": steps, "per_device_train_batch_size": BATCH, "logging_steps": 1,
        "learning_rate": RATE, "lr_scheduler_type": "constant", "save_strategy": "no",
    }  # fmt: skip
    words |= {"train_sampling_strategy": "group_by_length"} if grouped else {}
    flags = [word for name, value in words.items() for word in (f"--{name}", str(value))]
    assert train_command(["--recipe", str(folder / "recipe.yaml"), *flags]) == 0


def peer(way: str, records: list[dict[str, Any]], data: str, emoji: Path, folder: Path, steps: int) -> None:
    """Train PEFT's LoRA of the same rank on the same layers with HF's Trainer or TRL's SFTTrainer.

    `hf` and `trl` keep their defaults: sdpa, and float32 adapters on the bfloat16 base without autocast.
    """
    import torch
    from datasets import Dataset, Image
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainingArguments

    from milora_vl import load_model

    base: Any
    base, processor = load_model("smol-llava" if data == "pictures" else "smollm2", dtype=torch.bfloat16)
    tokenizer = processor.tokenizer if data == "pictures" else processor
    if way == "hf-tuned" and data == "pictures":
        base.set_attn_implementation("eager")
    layers = r"(.*language_model.*|model\.layers.*)\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    model = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=layers))
    rows = [
        {"prompt": f"{SYSTEM} USER: {question} ASSISTANT:", "completion": f" {answer}{tokenizer.eos_token}"}
        for record in records
        for question, answer in [[turn["value"] for turn in record["conversations"]]]
    ]
    dataset = Dataset.from_list(rows)
    if data == "pictures":
        paths = [[str(emoji / "images" / record["image"])] for record in records]
        dataset = dataset.add_column("images", paths).cast_column("images", [Image()])
    words: dict[str, Any] = {
        "output_dir": str(folder), "max_steps": steps, "per_device_train_batch_size": BATCH, "logging_steps": 1,
        "learning_rate": RATE, "lr_scheduler_type": "constant", "save_strategy": "no", "use_cpu": True,
        "bf16": way == "hf-tuned", "report_to": "none", "remove_unused_columns": False, "disable_tqdm": True,
    }  # fmt: skip
    if way == "trl":
        import trl

        words |= {"max_length": 512, "completion_only_loss": True, "gradient_checkpointing": False}
        trainer = trl.SFTTrainer(model, trl.SFTConfig(**words), train_dataset=dataset, processing_class=processor)
    else:
        collate = processor_collator(processor, tokenizer)
        trainer = Trainer(model, TrainingArguments(**words), train_dataset=dataset, data_collator=collate)
    trainer.train()
    trainer.save_model()


def processor_collator(processor: Any, tokenizer: Any) -> Any:
    """Return the collator that tutorials write: the processor makes the batch, and the prompt's labels are -100."""

    tokenizer.padding_side = "right"

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        texts = [row["prompt"] + row["completion"] for row in rows]
        if "images" in rows[0]:
            images = [row["images"] for row in rows]
            batch = processor(text=texts, images=images, padding=True, return_tensors="pt")
        else:
            batch = processor(texts, padding=True, return_tensors="pt")
        labels = batch["input_ids"].clone()
        for row, label, length in zip(rows, labels, batch["attention_mask"].sum(1).tolist(), strict=True):
            supervised = len(tokenizer(row["completion"], add_special_tokens=False)["input_ids"])
            label[: length - supervised] = -100
            label[length:] = -100
        return {**batch, "labels": labels}

    return collate


if __name__ == "__main__":
    main()
