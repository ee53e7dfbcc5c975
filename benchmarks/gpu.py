"""What a machine with GPUs shows, without a hub: `make gpu`. Its time on a GPU is not known yet.

python benchmarks/gpu.py [--device cuda] [--only PART ...] [--output benchmarks/gpu.json]

The parts, most important first: the tests with the marker `gpu`; LLaVA-1.5-7B and Qwen2.5-VL-7B shapes with random
weights, trained by us with and without protected inputs, by HF's Trainer + PEFT LoRA and by TRL's SFTTrainer, on the
same batch with the same precision, attention and checkpointing; 500 questions; the start and the steps of
`milora_vl.train` under each launcher, in one process and on all visible GPUs, for four layers of LLaVA-1.5-7B; the demo
with its score. Each part runs in its own process, and its result is written when it ends. A part that fails is recorded
with its error, and the others run; the same command runs what is missing. `--device cpu` (make gpu GPU_ARGS="--device
cpu") tries all of it in minutes, with tiny models.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

import llava_recipes
from benchmarks.timing import ROOT, apart, clocked, now
from milora_vl.common.atomic_write import write_json

MODELS = ("llava-1.5-7b", "qwen2.5-vl-7b")
RANK, RECORDS, TEXT, SUPERVISED, WARM, STEPS = 16, 4, 124, 60, 3, 10
RULE = {"modules": "language", "method": "milora", "rank": RANK, "alpha": RANK}
OURS = {"milora": [RULE | {"protect": 0}], "protected": [RULE | {"protect": 0.95}]}
PEERS = ("hf", "trl")
LAUNCHERS = {"ddp": [], "fsdp": ["--fsdp"]} | {
    f"zero{how}": ["--deepspeed", f"zero{how}"] for how in ("2", "3", "3_offload")
}
NO_CARD = "none, tried on a CPU"
# Dense bf16 operations a second, from the data sheets.
PEAKS = {
    "B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12,
    "RTX 4090": 165e12,
}  # fmt: skip


def main(words: list[str] | None = None) -> int:
    """Run the parts that have no result yet, and print the table. Returns 1 if a part failed."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: tiny models, to try it")
    options.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help="measure these, also again")
    options.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "gpu.json")
    options.add_argument("--part", choices=PARTS, help="run one part in this process (internal)")
    chosen = options.parse_args(words)
    chosen.tiny = chosen.device == "cpu"
    if chosen.part:
        return run_here(chosen)
    if chosen.device == "cuda" and not torch.cuda.is_available():
        options.error("no CUDA device; to try the command without one:  --device cpu")
    results: dict[str, Any] = json.loads(chosen.output.read_text()) if chosen.output.is_file() else {}
    where = machine(chosen)
    if any(entry["machine"] != where for entry in results.values()):
        options.error(
            f"{chosen.output} has results of another machine or of other versions: rename it, or use --output"
        )
    for name in chosen.only or [part for part in PARTS if "result" not in results.get(part, {})]:
        print(f"{name} ...", file=sys.stderr, flush=True)
        results[name] = {"date": date.today().isoformat(), "machine": where}
        with clocked(results[name], "seconds"):
            results[name] |= apart("gpu.py", "--part", name, "--device", chosen.device) or {"error": "the process died"}
        write_json(chosen.output, results)
    for name, row in rows(results):
        print(f"{name:28} {row}")
    return int(any("error" in entry for entry in results.values()))


def run_here(chosen: argparse.Namespace) -> int:
    """Run a part in this process; the last line of stdout is its `result` or its `error`."""
    try:
        outcome = {"result": PARTS[chosen.part](chosen)}
    except Exception as error:
        traceback.print_exc()
        outcome = {"error": f"{type(error).__name__}: {error}"[:300]}
    print(json.dumps(outcome))
    return 0


def machine(chosen: argparse.Namespace) -> dict[str, Any]:
    """Return what the figures depend on."""
    card = torch.cuda.get_device_name() if chosen.device == "cuda" else NO_CARD
    return {"card": card, "tiny": chosen.tiny} | {name: version(name) for name in ("torch", "transformers", "peft")}


def rows(results: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the lines of the table: a part and its figures; after the trainings of a model, the ratios of speed."""
    for name, entry in results.items():
        figures = entry.get("result", {"failed": entry.get("error")})
        yield name, ", ".join(f"{key} {figure}" for key, figure in figures.items())
    for model in MODELS:
        names = {way: f"{model}/{way}" for way in (*OURS, *PEERS) if "result" in results.get(f"{model}/{way}", {})}
        speed = {way: results[name]["result"]["tokens_per_second"] for way, name in names.items()}
        ratios = [
            f"{way} over {peer} {speed[way] / speed[peer]:.2f}"
            for way in OURS
            for peer in PEERS
            if {way, peer} <= speed.keys()
        ]
        if ratios:
            yield f"{model}, speed", ", ".join(ratios)


def tests(chosen: argparse.Namespace) -> dict[str, Any]:
    """Run the tests with the marker `gpu`; return the number, the skipped ones, and what tests have recorded.

    Raises RuntimeError that names the failed ones.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tests.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/gpu", f"--junitxml={file}"]
        environment = {**os.environ, "MILORA_GPU_TESTS_ON": chosen.device}
        subprocess.run(command, cwd=ROOT, env=environment, stdout=sys.stderr, check=False)
        cases = list(ElementTree.parse(file).iter("testcase"))  # written by the line before
    failed, skipped = (
        [str(case.get("name")) for case in cases if any(case.find(kind) is not None for kind in kinds)]
        for kinds in (("failure", "error"), ("skipped",))
    )
    if failed or not cases:
        raise RuntimeError(f"failed: {', '.join(failed) or 'no test ran'}")
    recorded = {str(p.get("name")): p.get("value") for case in cases for p in case.iter("property")}
    return {"passed": len(cases) - len(skipped), "skipped": ", ".join(skipped) or "none", **recorded}


def shaped(model: str, chosen: argparse.Namespace, layers: int | None = None) -> tuple[Any, dict[str, Any]]:
    """Return a model with random weights on the device, and a batch on the CPU with one picture per record."""
    from transformers import AutoModelForImageTextToText

    from milora_vl.models.base import config_of

    config = config_of(model)
    if layers is not None:
        config.get_text_config().num_hidden_layers = layers
    if chosen.tiny:
        shrink(config)
    dtype = torch.float32 if chosen.tiny else torch.bfloat16
    torch.manual_seed(0)
    with torch.device(chosen.device):
        base = AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation="sdpa")
    picture, extra = pictures(config, dtype, 112 if chosen.tiny else 448)
    ids = torch.randint(5, 200, (RECORDS, picture + TEXT))
    ids[:, 1 : 1 + picture] = config.image_token_id
    labels = ids.clone()
    labels[:, :-SUPERVISED] = -100
    return base, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, **extra}


def shrink(config: Any) -> None:
    """Make a config small: two layers, and heads as wide as before."""
    text, vision = config.get_text_config(), config.vision_config
    text.update({"num_hidden_layers": 2, "hidden_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1})
    text.update({"intermediate_size": 320, "vocab_size": 300})
    config.update({"image_token_id": 260})
    if hasattr(vision, "depth"):  # Qwen
        vision.update({"depth": 2, "hidden_size": 160, "num_heads": 2, "intermediate_size": 192})
        vision.update({"out_hidden_size": 256, "fullatt_block_indexes": [1]})
    else:
        vision.update({"num_hidden_layers": 2, "hidden_size": 128, "num_attention_heads": 2, "image_size": 56})


def pictures(config: Any, dtype: torch.dtype, size: int) -> tuple[int, dict[str, Any]]:
    """Return the tokens of a picture, and one per record: LLaVA's square, or Qwen's patches of `size` x `size`."""
    vision = config.vision_config
    if not hasattr(vision, "depth"):
        size = vision.image_size
        return (size // vision.patch_size) ** 2, {"pixel_values": torch.randn(RECORDS, 3, size, size, dtype=dtype)}
    side, tokens = size // vision.patch_size, (size // vision.patch_size // vision.spatial_merge_size) ** 2
    kinds = torch.zeros(RECORDS, tokens + TEXT, dtype=torch.long)
    kinds[:, 1 : 1 + tokens] = 1
    width = 3 * vision.temporal_patch_size * vision.patch_size**2
    return tokens, {
        "pixel_values": torch.randn(RECORDS * side**2, width, dtype=dtype),
        "image_grid_thw": torch.tensor([[1, side, side]] * RECORDS),
        "mm_token_type_ids": kinds,
    }


def train(model: str, way: str, chosen: argparse.Namespace) -> dict[str, Any]:
    """Train WARM + STEPS steps on one batch; return the speed and the peak after the first WARM, and the start."""
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from milora_data import ImageTextCollator
    from milora_vl.core.policy import Policy
    from milora_vl.models.tiny import tiny_tokenizer
    from milora_vl.train.trainer import MiloraTrainer

    base, batch = shaped(model, chosen)
    targets = Policy.parse(OURS.get(way, [RULE])).resolve(base)
    figures: dict[str, Any] = {}
    if way in OURS:
        tuned = started(way, base, batch, figures)
    else:
        tuned = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=[t.path for t in targets]))
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    tuned.enable_input_require_grads()
    ends: list[float] = []
    is_card = chosen.device == "cuda"

    class Clock(TrainerCallback):
        """The time after each step, when the card has finished it."""

        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(now(chosen.device))
            if is_card and len(ends) == WARM:
                torch.cuda.reset_peak_memory_stats()

    class OneBatch(ImageTextCollator):
        """Returns the same batch for all records."""

        is_causal = False

        def __call__(self, records: Any) -> dict[str, Any]:
            return dict(batch)

    collate = OneBatch(tiny_tokenizer())
    data = [{"row": number} for number in range(RECORDS * (WARM + STEPS))]
    with tempfile.TemporaryDirectory() as folder:
        common: dict[str, Any] = {
            "output_dir": folder, "max_steps": WARM + STEPS, "per_device_train_batch_size": RECORDS,
            "bf16": not chosen.tiny, "learning_rate": 1e-4, "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": False}, "label_names": ["labels"], "report_to": "none",
            "logging_steps": 100, "save_strategy": "no", "use_cpu": not is_card, "disable_tqdm": True,
            "remove_unused_columns": False, "dataloader_pin_memory": is_card,
        }  # fmt: skip
        if way in OURS:
            trainer: Any = MiloraTrainer(
                tuned, TrainingArguments(**common), targets=targets, checkpoint_kind="adapter",
                data_collator=collate, train_dataset=data,
            )  # fmt: skip
        elif way == "hf":
            trainer = Trainer(tuned, TrainingArguments(**common), data_collator=collate, train_dataset=data)
        else:
            import trl
            from datasets import Dataset

            trainer = trl.SFTTrainer(
                tuned, trl.SFTConfig(**common, dataset_kwargs={"skip_prepare_dataset": True}, max_length=None),
                data_collator=collate, train_dataset=Dataset.from_list(data),
                processing_class=tiny_tokenizer(),  # TRL asks for a tokenizer and does not use it here
            )  # fmt: skip
        trainer.add_callback(Clock)
        trainer.train()
    speed = batch["input_ids"].numel() * STEPS / (ends[-1] - ends[WARM - 1])
    figures["tokens_per_second"] = round(speed)
    if is_card:
        figures["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        name = torch.cuda.get_device_name()
        peak = next((peak for card, peak in PEAKS.items() if card in name), None)
        # Forward, forward again (checkpointing) and backward to the inputs: each two operations for a weight and token.
        operations = 6 * speed * sum(math.prod(target.shape) for target in targets)
        figures |= {} if peak is None else {"mfu": round(operations / peak, 3)}
    if way in OURS:
        figures["planned_gb"] = planned_gb(base, way, batch["input_ids"].shape[1], chosen)
    return figures


def started(way: str, base: Any, batch: dict[str, Any], figures: dict[str, Any]) -> Any:
    """Return the base with our adapter; add the seconds of its start to the figures.

    With protected inputs it starts as the default of `milora_vl.train` does: with texts of the model itself and 64
    records with pictures.
    """
    from milora_vl import apply_milora
    from milora_vl.core.calibration.texts import COUNT, LENGTH, ROWS, SEED, padded, sampled_rows

    if way == "milora":
        with clocked(figures, "factors_s", base.device):
            return apply_milora(base, OURS[way])
    with clocked(figures, "texts_s", base.device):
        texts = sampled_rows(base, 1, 2, count=COUNT, length=LENGTH, batch_size=32, seed=SEED)
    texts = [[id_ % 200 for id_ in row] for row in texts]  # random weights write image tokens, too
    seen = {name: value for name, value in batch.items() if name != "labels"}
    calibration = [padded(texts[first : first + ROWS], 2) for first in range(0, COUNT, ROWS)]
    with clocked(figures, "calibration_s", base.device):
        return apply_milora(base, OURS[way], calibration=[*[seen] * (64 // RECORDS), *calibration])


def planned_gb(base: Any, way: str, tokens: int, chosen: argparse.Namespace) -> float:
    """Return what a dry run plans for such a step, without the memory of CUDA itself and of Qwen's vision tower."""
    from benchmarks.plan import planned
    from milora_vl.models.memory_plan import memory

    work = planned(base.config, OURS[way], RECORDS, tokens, checkpointing=True, half=not chosen.tiny)
    return round(sum(memory(work).values()) / 1e9, 2)


def llava(chosen: argparse.Namespace, layers: int | None = None) -> tuple[Any, Any]:
    """Return LLaVA-1.5-7B with random weights, all or some layers, and a processor with the tokenizer of `tiny`."""
    from milora_vl.models.tiny import tiny_llava

    model, vision = (base := shaped(MODELS[0], chosen, layers)[0].eval()), base.config.vision_config
    tiny, processor = tiny_llava()
    model.config.image_token_id = tiny.config.image_token_id
    processor.patch_size = vision.patch_size
    processor.image_processor.size = {"shortest_edge": vision.image_size}
    processor.image_processor.crop_size = {"height": vision.image_size, "width": vision.image_size}
    return model, processor


def launched(flags: list[str], chosen: argparse.Namespace) -> dict[str, Any]:
    """Run the training command under a launcher; return its seconds before the first step and its last speed."""
    from PIL import Image

    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder, count = Path(name), 2 if chosen.tiny else torch.cuda.device_count()
        model, processor = llava(chosen, 4)
        model.save_pretrained(folder / "model")
        processor.save_pretrained(folder / "model")
        del model
        records = []
        for number in range(64):
            Image.new("RGB", (336, 336), (3 * number, 90, 120)).save(folder / f"{number}.png")
            turns = [("human", f"<image>\nWhich number is it, {number}?"), ("gpt", f"It is number {number}. " * 8)]
            said = [{"from": role, "value": value} for role, value in turns]
            records.append({"image": f"{number}.png", "conversations": said})
        (folder / "train.json").write_text(json.dumps(records))
        for processes in sorted({1, count} - ({1} if "--fsdp" in flags else set())):  # FSDP2 refuses one process
            words = [
                "--model", folder / "model", "--data_path", folder / "train.json", "--image_folder", folder,
                "--output_dir", folder / f"run{processes}", "--max_steps", WARM + STEPS, "--logging_steps", STEPS,
                "--save_strategy", "no", "--gradient_checkpointing", "--factor_cache", folder / f"cache{processes}",
                "--per_device_train_batch_size", RECORDS, *(["--use_cpu"] if chosen.tiny else ["--bf16"]), *flags,
            ]  # fmt: skip
            launch = ["torch.distributed.run", "--standalone", "--nproc_per_node", processes, "-m", "milora_vl.train"]
            command = [sys.executable, "-m", *map(str, (*launch, *words))]
            subprocess.run(command, cwd=ROOT, stdout=sys.stderr, check=True)
            ran, state = (
                json.loads((folder / f"run{processes}" / f"{file}.json").read_text())
                for file in ("environment", "trainer_state")
            )
            speeds = [line["tokens_per_second"] for line in state["log_history"] if "tokens_per_second" in line]
            figures[f"start_s on {processes}"] = ran["seconds_before_training"]
            figures[f"tokens_per_second on {processes}"] = round(speeds[-1])
    return figures or {"not run": "one GPU"}


def questions(chosen: argparse.Namespace) -> dict[str, Any]:
    """Ask LLaVA 500 questions about pictures, six about each, in batches; twelve if it is tiny."""
    from PIL import Image

    from milora_data.records.record import Turn
    from milora_vl.models.generate import Prompt, generate

    model, processor = llava(chosen)
    count = 12 if chosen.tiny else 500
    images = [Image.new("RGB", (640, 480), (n % 256, 90, 120)) for n in range(count // 6 + 1)]
    prompts = [Prompt((Turn("user", f"<image>\nIs there a thing {n}?"),), (images[n // 6],)) for n in range(count)]
    figures: dict[str, Any] = {"questions": count}
    with clocked(figures, "seconds", chosen.device):
        generate(model, processor, prompts, batch_size=32, max_new_tokens=8)
    return figures


def demo(chosen: argparse.Namespace) -> dict[str, Any]:
    """Run the whole `milora demo` on the device; return its time and the scores of the base and of the tuned model."""
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        words = ["--output_dir", f"{folder}/run", "--quick" if chosen.tiny else "--full"]
        if chosen.tiny:
            recipe = llava_recipes.read("smol-llava-demo").replace("smol-llava\n", "tiny\n")
            (Path(folder) / "tiny.yaml").write_text(recipe.replace("rank: 64, alpha: 64", "rank: 4, alpha: 4"))
            words += ["--recipe", f"{folder}/tiny.yaml"]
        with clocked(figures, "seconds"):
            command = [sys.executable, "-m", "milora_vl.demo", *words]
            subprocess.run(command, cwd=ROOT, stdout=sys.stderr, check=True)
        for name in ("base", "final"):  # the mean over the types of questions
            file = Path(folder) / "run" / "eval" / "emoji" / name / "results.json"
            figures[f"score of the {name}"] = json.loads(file.read_text())["benchmarks"][0]["metrics"][0]["value"]
    return figures


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "tests": tests,
    **{f"{model}/{way}": partial(train, model, way) for model in MODELS for way in (*OURS, *PEERS)},
    "questions": questions,
    **{name: partial(launched, flags) for name, flags in LAUNCHERS.items()},
    "demo": demo,
}

if __name__ == "__main__":
    sys.exit(main())
