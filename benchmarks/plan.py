"""The planned memory of a run against the memory of real runs.

Measured: small LLaVAs of several shapes on this CPU, resident memory at the peak of the second step, each in its own
process (glibc returns freed memory). Planned: the memory of 7B and 13B on 1, 2, 4 and 8 devices with 24, 40
and 80 GB. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from milora_vl.core.policy import Policy
from milora_vl.models.base import find_base
from milora_vl.models.loading import meta_model
from milora_vl.models.losses import add_chunked_loss, summed_loss
from milora_vl.train.arguments import Launch, TrainSection
from milora_vl.train.dry_run import cost
from milora_vl.train.memory import GIB, MIX665K, Shape, activations, shape_of, simulate, workload_of
from milora_vl.train.setup import Batching

RULES = [
    {"modules": "language", "method": "milora", "protect": 0, "rank": 16, "dropout": 0.05},
    {"modules": "projector", "method": "full"},
]
# layers, width, records, tokens, checkpointing, bf16
RUNS = [
    (4, 1024, 4, 300, False, False),
    (4, 1024, 8, 300, True, False),
    (4, 1024, 4, 300, False, True),
    (4, 1024, 2, 600, True, True),
]


def config(layers: int, width: int) -> Any:
    """Return a LLaVA on a Llama with this shape, with a small tower of 64 image tokens."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    heads = width // 128
    text = LlamaConfig(
        hidden_size=width, intermediate_size=width * 11 // 4, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads, vocab_size=32064,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=112,
        patch_size=14,
    )
    return LlavaConfig(text_config=text, vision_config=vision, image_token_index=32000)


def memory(device: str, name: str) -> int:
    """Return VmRSS (now) or VmHWM (the peak) of this process in bytes, or the same of the tensors on a card."""
    if device == "cuda":
        return torch.cuda.memory_allocated() if name == "VmRSS" else torch.cuda.max_memory_allocated()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def measure(
    layers: int, width: int, records: int, tokens: int, checkpointing: bool, half: bool, *, device: str = "cpu"
) -> dict[str, Any]:
    """Return the predicted and the measured peak of one shape, in MB: of this process, or of the card."""
    from peft.helpers import disable_input_dtype_casting
    from transformers import LlavaForConditionalGeneration

    from milora_vl.core.adapter.apply import apply_milora

    made = config(layers, width)
    dtype = torch.bfloat16 if half else torch.float32
    targets = Policy.parse(RULES).resolve(meta_model(made))
    shape = Shape(
        records=records, tokens=tokens, supervised=records * 60, pictures=records, image_tokens=64, half=half,
        checkpointing=checkpointing, base_dtype=dtype,
    )  # fmt: skip
    found = simulate(made, targets, shape)
    predicted = found.frozen + found.anchors + 3 * found.trained + found.with_gradients
    with torch.device(device):
        # Exclude the memory of the first use of the kernels.
        for kind in (torch.float32, dtype):
            nn.Linear(64, 64, dtype=kind)(torch.randn(4, 64, dtype=kind)).sum().backward()
        start = memory(device, "VmRSS")
        torch.set_default_dtype(dtype)
        base = LlavaForConditionalGeneration(made)
        torch.set_default_dtype(torch.float32)
    model = apply_milora(base, RULES).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    add_chunked_loss(base)
    if checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    optimizer = torch.optim.AdamW(trained, fused=True)
    ids = torch.randint(5, 30000, (records, tokens), device=device)
    ids[:, 1:65] = 32000
    labels = ids.clone()
    labels[:, :-60] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    batch["pixel_values"] = torch.randn(records, 3, 112, 112, device=device)
    for step in range(2):
        if step == 1 and device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        elif step == 1:
            Path("/proc/self/clear_refs").write_text("5")  # the kernel's peak counter
        with disable_input_dtype_casting(model, active=half):  # recompute checkpoints under the same autocast
            with torch.autocast(device, torch.bfloat16, enabled=half):
                loss, count = summed_loss(model, dict(batch), chunked=True)
            (loss / count).backward()
        if step == 0:
            optimizer.step()
            optimizer.zero_grad()
    taken = memory(device, "VmHWM") - start
    return {
        "layers": layers, "width": width, "records": records, "tokens": tokens, "checkpointing": checkpointing,
        "bf16": half, "predicted_mb": round(predicted / 1e6), "measured_mb": round(taken / 1e6),
        "ratio": round(predicted / taken, 3),
    }  # fmt: skip


def needs() -> list[dict[str, Any]]:
    """Return GiB per device (rank 128, batch 1 and 16, checkpointing), and whether it fits 24, 40 and 80 GB."""
    rows = []
    for name in ("llava-1.5-7b", "llava-1.5-13b"):
        base = find_base(name)
        rules = [RULES[0] | {"rank": 128}, RULES[1]]
        targets = Policy.parse(rules).resolve(base.meta)
        train = {"bf16": True, "activation_checkpointing": True, "per_device_train_batch_size": 16}
        batching = Batching(num_records=1, per_device=16)
        plan = workload_of(TrainSection(train, Launch(), (), None), base, targets, MIX665K, batching, None)
        small = replace(plan, records=1)
        small = replace(small, activations=activations(base, targets, shape_of(base, small, MIX665K)))
        for devices in (1, 2, 4, 8):
            for stage in (0,) if devices == 1 else (2, 3):
                for chosen in (small, plan):
                    size = cost.needed(replace(chosen, devices=devices, stage=stage))
                    fits = [size <= card * 1e9 / GIB for card in (24, 40, 80)]
                    rows.append({"model": name, "devices": devices, "stage": stage, "batch": chosen.records,
                                 "gib": round(size, 1), "fits": fits})  # fmt: skip
    return rows


def main() -> None:
    """Measure every shape and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", help="measure one run by its number (internal)")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(*RUNS[int(args.one)])))
        return
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    runs = []
    for number in range(len(RUNS)):
        command = [sys.executable, __file__, "--one", str(number)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        runs.append(json.loads(done.stdout.strip().splitlines()[-1]))
        print(json.dumps(runs[-1]), file=sys.stderr)
    print(json.dumps({"benchmark": "plan", "runs": runs, "needs": needs()}))


if __name__ == "__main__":
    main()
