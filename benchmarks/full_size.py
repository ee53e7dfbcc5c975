"""A LLaVA-1.5-7B with random weights in bf16 on a CPU: time and peak memory of load, factors, one step and save.

MiLoRA of rank 16 on all seven projections of the 32 blocks (224 matrices). The goal is 24 GB and two cores. With
--layers N the language model has N blocks. The peak of each stage is the kernel's counter (VmHWM), reset before it; the
peak of the step is compared with the plan of a dry run. The model is written once to --folder and read from there,
like a real one. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from milora_vl.core.adapter.apply import apply_milora
from milora_vl.core.policy import Policy
from milora_vl.models import loading
from milora_vl.models.loading import meta_model
from milora_vl.models.losses import add_chunked_loss, summed_loss
from milora_vl.train.memory import Shape, simulate

RULES = [{"modules": "language", "method": "milora", "protect": 0, "rank": 16}]
PICTURE, ANSWER = 576, 60
RESULTS: dict[str, Any] = {}


def status(name: str) -> int:
    """Return VmRSS or VmHWM in bytes."""
    with Path("/proc/self/status").open() as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Record the time and the peak of one stage."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    start = time.perf_counter()
    yield
    seconds, peak = time.perf_counter() - start, status("VmHWM")
    RESULTS[name] = {"seconds": round(seconds, 1), "peak_gb": round(peak / 1e9, 2)}
    print(f"{name}: {seconds:.0f} s, peak {peak / 1e9:.2f} GB", file=sys.stderr)


def write(config: Any, folder: Path) -> None:
    """Write random weights shard by shard, so the whole model is never in memory."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    config.save_pretrained(folder)
    names = {name: p.shape for name, p in meta_model(config).named_parameters()}
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in names.items():
        if size > 2e9:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += 2 * shape.numel()
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        made = {name: 0.02 * torch.randn(names[name], dtype=torch.bfloat16) for name in shard}
        for name in shard:
            if "norm" in name and name.endswith("weight"):
                made[name].fill_(1.0)
        save_file(made, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def one_step(base: Any, model: Any, config: Any) -> None:
    """Run forward, backward and one step of Adam on one record with a picture, with checkpointing."""
    from peft.helpers import disable_input_dtype_casting

    length = PICTURE + ANSWER + 64
    ids = torch.randint(5, 30000, (1, length))
    ids[:, 1 : 1 + PICTURE] = config.image_token_id
    labels = ids.clone()
    labels[:, :-ANSWER] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    batch["pixel_values"] = torch.randn(1, 3, 336, 336).bfloat16()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    with disable_input_dtype_casting(model), torch.autocast("cpu", torch.bfloat16):
        loss, count = summed_loss(model, batch, chunked=True)
    (loss / count).backward()
    optimizer.step()
    RESULTS["loss"] = round(float(loss.detach()) / count, 4)
    assert all(p.grad is not None for p in trained)


def planned(config: Any) -> int:
    """Return the planned bytes: resident, and added by the step (without Adam's states, which follow the peak)."""
    targets = Policy.parse(RULES).resolve(meta_model(config))
    shape = Shape(
        records=1, tokens=PICTURE + ANSWER + 64, supervised=ANSWER, pictures=1, image_tokens=PICTURE, half=True,
        checkpointing=True, base_dtype=torch.bfloat16,
    )  # fmt: skip
    found = simulate(config, targets, shape)
    resident = found.frozen + found.anchors + found.trained
    return resident + max(found.with_gradients, 3 * found.trained)


def main() -> None:
    """Run all stages and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=32, help="number of blocks of the language model [32]")
    parser.add_argument("--folder", help="folder for the weights (14 GB) [a temporary folder]")
    args = parser.parse_args()
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ:  # return freed memory to the system, so that peaks show used memory
        os.environ |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
        os.execv(sys.executable, [sys.executable, *sys.argv])
    config = loading.config_of("llava-1.5-7b")
    config.text_config.num_hidden_layers = args.layers
    RESULTS.update(benchmark="full_size", layers=args.layers, threads=torch.get_num_threads())
    folder = Path(args.folder or tempfile.mkdtemp(prefix="full-size-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with stage("write"):
            write(config, folder)
        start = status("VmRSS")
        with stage("load"):
            base: Any = loading.load_weights(folder)
        with stage("factors"):
            model = apply_milora(base, RULES, progress=True).train()
            RESULTS["matrices"] = len(model.milora_report)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        add_chunked_loss(base)
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
        with stage("step"):
            one_step(base, model, config)
        with stage("save"):
            model.save_pretrained(str(folder / "adapter"))
    finally:
        if args.folder is None:
            shutil.rmtree(folder, ignore_errors=True)
    taken = RESULTS["step"]["peak_gb"] - start / 1e9
    RESULTS["step_planned_gb"] = round(planned(config) / 1e9, 2)
    RESULTS["step_measured_gb"] = round(taken, 2)
    RESULTS["planned_over_measured"] = round(RESULTS["step_planned_gb"] / taken, 3)
    print(json.dumps(RESULTS))


if __name__ == "__main__":
    main()
