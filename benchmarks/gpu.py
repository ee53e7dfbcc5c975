"""What a machine with one GPU shows in ten minutes, without a hub: `make gpu`.

python -m benchmarks.gpu [--device cuda] [--tiny] [--only PART ...] [--again] [--output benchmarks/gpu.json]

The parts, most important first: the tests with the marker `gpu`; training of LLaVA-1.5-7B and Qwen2.5-VL-7B shapes with
random weights, against HF's Trainer + PEFT LoRA and TRL's SFTTrainer at the same batch, precision, attention and
checkpointing; 500 questions; the demo with its score. Each result is written when its part ends. A part that fails is
recorded with its error, and the others run; the same command runs what is missing. `--device cpu --tiny` tries all of
it in minutes, with tiny models.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

ROOT = Path(__file__).resolve().parents[1]
RANK, WARM, STEPS, SUPERVISED = 16, 3, 10, 60
# Dense bf16 operations a second, from the data sheets.
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}
RULES = [{"modules": "language", "method": "milora", "rank": RANK, "alpha": RANK}]
LAYERS = r"(.*language_model.*|model\.layers.*)\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def main(words: list[str] | None = None) -> int:
    """Run the parts that have no result yet, and print the table. Returns 1 if a part failed."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    options.add_argument("--tiny", action="store_true", help="tiny models, to try the command itself")
    options.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    options.add_argument("--again", action="store_true", help="measure finished parts again")
    options.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "gpu.json")
    options.add_argument("--part", choices=PARTS, help="run one part in this process (internal)")
    chosen = options.parse_args(words)
    if chosen.part:
        print(json.dumps(PARTS[chosen.part](chosen)))
        return 0
    if chosen.device == "cuda" and not torch.cuda.is_available():
        options.error("no CUDA device; to try the command without one:  --device cpu --tiny")
    results: dict[str, Any] = json.loads(chosen.output.read_text()) if chosen.output.is_file() else {}
    where = machine(chosen)
    for name in chosen.only:
        before = results.get(name, {})
        if "result" in before and before["machine"] == where and not chosen.again:
            continue
        print(f"{name} ...", file=sys.stderr, flush=True)
        start = time.perf_counter()
        entry = {"date": date.today().isoformat(), "machine": where, **measured(name, chosen)}
        results[name] = {**entry, "seconds": round(time.perf_counter() - start, 1)}
        chosen.output.write_text(json.dumps(results, indent=1) + "\n")
    for name, row in rows(results):
        print(f"{name:45} {row}")
    return int(any("error" in results[name] for name in chosen.only))


def measured(name: str, chosen: argparse.Namespace) -> dict[str, Any]:
    """Run one part in a separate process, which frees the card; return its `result`, or the end of its `error`."""
    words = ["--part", name, "--device", chosen.device, *["--tiny"] * chosen.tiny]
    command = [sys.executable, "-m", "benchmarks.gpu", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return {"result": json.loads(done.stdout.splitlines()[-1])}
    print(done.stderr, file=sys.stderr)
    return {"error": (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1]}


def machine(chosen: argparse.Namespace) -> dict[str, Any]:
    """Return what the figures depend on."""
    card = torch.cuda.get_device_name() if chosen.device == "cuda" else "none, tried on a CPU"
    return {"card": card, "tiny": chosen.tiny} | {name: version(name) for name in ("torch", "transformers", "peft")}


def rows(results: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the lines of the table: what was measured, and the figures."""
    for name, entry in results.items():
        if "error" in entry:
            yield name, f"failed: {entry['error']}"
        for what, value in entry.get("result", {}).items():
            figures = value if isinstance(value, dict) else {what: value}
            label = f"{name} {what}" if isinstance(value, dict) else name
            yield label, "  ".join(f"{key} {figure}" for key, figure in figures.items())


def tests(chosen: argparse.Namespace) -> dict[str, Any]:
    """Run the tests with the marker `gpu`; return the failed and skipped ones, and what tests have recorded."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tests.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/gpu", f"--junitxml={file}"]
        command += ["-k", "step_0 or merged or batches"] * chosen.tiny
        environment = {**os.environ, "MILORA_GPU_TESTS_ON": chosen.device}
        subprocess.run(command, cwd=ROOT, env=environment, stdout=sys.stderr, check=False)
        cases = list(ElementTree.parse(file).iter("testcase"))  # written by the line before
    by_outcome = {kind: [case.get("name") for case in cases if case.find(kind) is not None] for kind in OUTCOMES}
    seconds = {f"{case.get('name')}": p.get("value") for case in cases for p in case.iter("property")}
    named = {kind: ", ".join(map(str, names)) or "none" for kind, names in by_outcome.items()}
    return {"tests": len(cases), **named, **seconds}


OUTCOMES = ("failure", "error", "skipped")


class Memory:
    """The peak of the card's memory, or of this process without a card."""

    def __init__(self, device: str) -> None:
        self.device = device

    def reset(self) -> None:
        """Forget the card's peak so far; a process keeps its peak."""
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def peak_gb(self) -> float:
        """Return the peak in GB."""
        peak = (
            torch.cuda.max_memory_allocated()
            if self.device == "cuda"
            else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        )
        return round(peak / 1e9, 2)


def training(model: str) -> Callable[[argparse.Namespace], dict[str, Any]]:
    """Return the part that trains a model in three ways, in turns, on the same batch."""

    def part(chosen: argparse.Namespace) -> dict[str, Any]:
        results: dict[str, Any] = {}
        for way in ("milora", "hf", "trl"):
            try:
                results[way] = train(way, model, chosen)
            except ImportError as error:
                results[way] = {"not measured": str(error)}
        speeds = {way: row["tokens_per_second"] for way, row in results.items() if "tokens_per_second" in row}
        ratios = {f"over {way}": round(speeds["milora"] / speed, 2) for way, speed in speeds.items() if way != "milora"}
        return {**results, "ratio": ratios}

    return part


def shaped(model: str, chosen: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """Return a model with random weights on the device, and a batch on the CPU with one picture per record."""
    from transformers import AutoModelForImageTextToText

    from milora_vl.models.loading import config_of
    from milora_vl.tiny import tiny_llava

    records, text = (2, 20) if chosen.tiny else (4, 64 + SUPERVISED)
    config = tiny_llava()[0].config if chosen.tiny else config_of(model)
    if chosen.tiny and model.startswith("qwen"):
        raise ImportError("a tiny Qwen is part of the tests only")
    dtype = torch.float32 if chosen.tiny else torch.bfloat16
    with torch.device(chosen.device):
        base = AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation="sdpa")
    picture, extra = pictures(config, records, dtype)
    ids = torch.randint(5, 200, (records, picture + text))
    ids[:, 1 : 1 + picture] = config.image_token_id
    labels = ids.clone()
    labels[:, : -min(SUPERVISED, text // 2)] = -100
    kinds = {"mm_token_type_ids": (ids == config.image_token_id).long()} if "image_grid_thw" in extra else {}
    return base, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, **extra, **kinds}


def pictures(config: Any, records: int, dtype: torch.dtype) -> tuple[int, dict[str, Any]]:
    """Return the tokens of a picture, and pixels for one per record: LLaVA's square, or Qwen's patches of 448 x 448."""
    vision = config.vision_config
    if hasattr(vision, "image_size"):
        size = vision.image_size
        return (size // vision.patch_size) ** 2, {"pixel_values": torch.randn(records, 3, size, size, dtype=dtype)}
    side = 448 // vision.patch_size
    width = 3 * vision.temporal_patch_size * vision.patch_size**2
    grid = torch.tensor([[1, side, side]] * records)
    return side**2 // vision.spatial_merge_size**2, {
        "pixel_values": torch.randn(records * side**2, width, dtype=dtype),
        "image_grid_thw": grid,
    }


def train(way: str, model: str, chosen: argparse.Namespace) -> dict[str, Any]:
    """Train WARM + STEPS steps on one batch; return the speed after the first WARM, the peak, and the start."""
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from milora_vl import apply_milora
    from milora_vl.policy import Policy
    from milora_vl.train.trainer import MiloraTrainer

    torch.manual_seed(0)
    base, batch = shaped(model, chosen)
    memory, records = Memory(chosen.device), len(batch["input_ids"])
    start: dict[str, float] = {}
    if way == "milora":
        with clocked(start, "factors_s"):
            tuned = apply_milora(base, RULES)
    else:
        tuned = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=LAYERS))
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()

    class Clock(TrainerCallback):
        """The time after each step, when the card has finished it."""

        ends: list[float] = []  # noqa: RUF012 - one training for each definition

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if chosen.device == "cuda":
                torch.cuda.synchronize()
            self.ends.append(time.perf_counter())
            if len(self.ends) == WARM:
                memory.reset()

    common: dict[str, Any] = {
        "max_steps": WARM + STEPS, "per_device_train_batch_size": records, "bf16": not chosen.tiny,
        "learning_rate": 1e-4,
        "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}, "report_to": "none",
        "logging_steps": 100, "save_strategy": "no", "use_cpu": chosen.device == "cpu", "disable_tqdm": True,
        "remove_unused_columns": False, "dataloader_pin_memory": chosen.device == "cuda",
    }  # fmt: skip
    rows = [{"row": number} for number in range(records * (WARM + STEPS))]
    tuned.enable_input_require_grads()
    with tempfile.TemporaryDirectory() as folder:
        common["output_dir"] = folder
        collate: Any = lambda _: dict(batch)  # noqa: E731
        if way == "milora":
            trainer: Any = MiloraTrainer(
                tuned, TrainingArguments(**common, label_names=["labels"]), targets=Policy.parse(RULES).resolve(base),
                checkpoint_kind="adapter", data_collator=collate, train_dataset=rows,
            )  # fmt: skip
        elif way == "hf":
            trainer = Trainer(tuned, TrainingArguments(**common), data_collator=collate, train_dataset=rows)
        else:
            import trl
            from datasets import Dataset

            from milora_vl.tiny import tiny_tokenizer  # TRL asks for a tokenizer and does not use it here

            config = trl.SFTConfig(**common, dataset_kwargs={"skip_prepare_dataset": True}, max_length=None)
            data, tokenizer = Dataset.from_list(rows), tiny_tokenizer()
            trainer = trl.SFTTrainer(
                tuned, config, data_collator=collate, train_dataset=data, processing_class=tokenizer
            )
        trainer.add_callback(Clock)
        trainer.train()
    seconds = (Clock.ends[-1] - Clock.ends[WARM - 1]) / STEPS
    speed = batch["input_ids"].numel() / seconds
    return {"tokens_per_second": round(speed), "peak_gb": memory.peak_gb(), **share(base, speed), **start}


def share(base: Any, tokens_per_second: float) -> dict[str, float]:
    """Return the share of the card's peak (MFU): forward, backward to the inputs, and forward again (checkpointing).

    Each costs two operations for each weight of the language model and each token.
    """
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    peak = next((peak for name, peak in PEAKS.items() if name in card), None)
    weights = sum(p.numel() for name, p in base.named_parameters() if "vision" not in name and "lora" not in name)
    return {} if peak is None else {"mfu": round(6 * weights * tokens_per_second / peak, 3)}


@contextmanager
def clocked(into: dict[str, float], name: str) -> Iterator[None]:
    """Write the seconds of the block into a mapping."""
    start = time.perf_counter()
    yield
    into[name] = round(time.perf_counter() - start, 1)


def questions(chosen: argparse.Namespace) -> dict[str, Any]:
    """Ask questions about pictures, six about each, in batches: 500 to the 7B shape, or a few to `tiny`."""
    from PIL import Image

    from milora_data.records.record import Turn
    from milora_vl.models.generate import Prompt, generate
    from milora_vl.tiny import tiny_llava

    tiny, processor = tiny_llava()
    if chosen.tiny:
        model, count = tiny.to(chosen.device), 12
    else:
        model, count = shaped("llava-1.5-7b", chosen)[0].eval(), 500
        model.config.image_token_id = tiny.config.image_token_id  # the tokenizer is `tiny`'s
        size = model.config.vision_config.image_size
        processor.image_processor.size = {"shortest_edge": size}
        processor.image_processor.crop_size = {"height": size, "width": size}
    images = [Image.new("RGB", (640, 480), (n % 256, 90, 120)) for n in range(count // 6 + 1)]
    prompts = [Prompt((Turn("user", f"<image>\nIs there a thing {n}?"),), (images[n // 6],)) for n in range(count)]
    start: dict[str, float] = {}
    with clocked(start, "seconds"):
        generate(model, processor, prompts, batch_size=32, max_new_tokens=8)
    return {"questions": count, "per_second": round(count / max(start["seconds"], 0.1), 1)}


def demo(chosen: argparse.Namespace) -> dict[str, Any]:
    """Run `milora demo` on the device; return its time and its score."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["--output_dir", f"{folder}/run", *(["--quick", "--recipe", "tiny-test"] if chosen.tiny else [])]
        start: dict[str, float] = {}
        with clocked(start, "seconds"):
            command = [sys.executable, "-m", "milora_vl.demo", *words]
            subprocess.run(command, cwd=ROOT, stdout=sys.stderr, check=True)
        scores = [json.loads(file.read_text()) for file in sorted(Path(folder).glob("run/eval/emoji/*/results.json"))]
    values = [{m["name"]: m["value"] for b in score["benchmarks"] for m in b["metrics"]} for score in scores]
    return {**start, "base": values[0], "final": values[-1]}


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "tests": tests,
    "llava-1.5-7b": training("llava-1.5-7b"),
    "qwen2.5-vl-7b": training("qwen2.5-vl-7b"),
    "questions": questions,
    "demo": demo,
}

if __name__ == "__main__":
    sys.exit(main())
