"""The planned memory of a run against the memory of real runs.

python benchmarks/plan.py                            small LLaVAs of several shapes
python benchmarks/plan.py --full_size [--layers 32]  a LLaVA-1.5-7B with random weights in bf16: load, factors, a step

Small LLaVAs: the resident memory at the peak of the second step, each in its own process. Full size: MiLoRA of rank 16
on the seven projections of all blocks; the goal is 24 GB and two cores. The model is written to --folder and read from
there, like a real one; the time and the peak of each stage are measured. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.timing import FREED, apart, clocked, memory, reset_peak
from milora_vl.core.adapter.apply import apply_milora
from milora_vl.core.policy import Policy
from milora_vl.models.base import Base, config_of, meta_model
from milora_vl.models.loading import load_weights
from milora_vl.models.losses import add_chunked_loss, summed_loss
from milora_vl.models.memory_plan import Workload
from milora_vl.models.memory_plan import memory as planned_memory
from milora_vl.train.counts import Batching, Counts, workload_of
from milora_vl.train.launch import Launch

RULES: list[dict[str, Any]] = [
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
SUPERVISED = 60
Step = Callable[[], float]  # returns the loss


def main() -> None:
    """Measure and print one JSON line."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--full_size", action="store_true")
    options.add_argument("--layers", type=int, default=32, help="blocks of the language model at full size [32]")
    options.add_argument("--folder", type=Path, help="folder for its weights (14 GB) [a temporary folder]")
    options.add_argument("--one", type=int, help="measure one run by its number (internal)")
    chosen = options.parse_args()
    if chosen.one is not None:
        print(json.dumps(measure(*RUNS[chosen.one])))
    elif not chosen.full_size:
        runs = [apart(__file__, "--one", number, **FREED) for number in range(len(RUNS))]
        print(json.dumps({"runs": runs}))
    elif not FREED.keys() <= os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | FREED)
    else:
        with nullcontext(chosen.folder) if chosen.folder else tempfile.TemporaryDirectory() as folder:
            print(json.dumps(full_size(chosen.layers, Path(folder))))


def measure(
    layers: int, width: int, records: int, tokens: int, checkpointing: bool, half: bool, *, device: str = "cpu"
) -> dict[str, Any]:
    """Return the predicted and the measured peak of one shape, in MB: of this process, or of the card."""
    from transformers import LlavaForConditionalGeneration

    config, dtype = small_config(layers, width), torch.bfloat16 if half else torch.float32
    work = planned(config, RULES, records, tokens, checkpointing=checkpointing, half=half)
    predicted = sum(planned_memory(work).values())
    is_card = device == "cuda"
    with torch.device(device):
        for kind in (torch.float32, dtype):  # the first use of the kernels has memory of its own
            nn.Linear(64, 64, dtype=kind)(torch.randn(4, 64, dtype=kind)).sum().backward()
        start = torch.cuda.memory_allocated() if is_card else memory()
        torch.set_default_dtype(dtype)
        base = LlavaForConditionalGeneration(config)
        torch.set_default_dtype(torch.float32)
    model = apply_milora(base, RULES)
    step = prepared(base, model, work, batch(records, tokens, 64, torch.randn(records, 3, 112, 112)), device)
    step()
    torch.cuda.reset_peak_memory_stats() if is_card else reset_peak()
    step()
    taken = (torch.cuda.max_memory_allocated() if is_card else memory("VmHWM")) - start
    return {
        "layers": layers, "width": width, "records": records, "tokens": tokens, "checkpointing": checkpointing,
        "bf16": half, "predicted_mb": round(predicted / 1e6), "measured_mb": round(taken / 1e6),
        "ratio": round(predicted / taken, 3),
    }  # fmt: skip


def small_config(layers: int, width: int) -> Any:
    """Return a LLaVA on a Llama with this shape, with a small tower of 64 image tokens."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    heads = width // 128
    text = LlamaConfig(
        hidden_size=width, intermediate_size=width * 11 // 4, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads, vocab_size=32064,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4, image_size=112,
        patch_size=14,
    )  # fmt: skip
    return LlavaConfig(text_config=text, vision_config=vision, image_token_index=32000)


def planned(
    config: Any, rules: list[dict[str, Any]], records: int, tokens: int, *, checkpointing: bool, half: bool
) -> Workload:
    """Return what a dry run plans for a step."""
    base = Base.of("planned", config)
    targets = Policy.parse(rules).resolve(base.meta)
    train, batching = (
        {"bf16": half, "activation_checkpointing": checkpointing},
        Batching(num_records=1, per_device=records),
    )
    return workload_of(Launch(train), base, targets, Counts(tokens, SUPERVISED), batching)


def batch(records: int, tokens: int, image_tokens: int, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return records with one picture each and labels at their ends."""
    ids = torch.randint(5, 30000, (records, tokens))
    ids[:, 1 : 1 + image_tokens] = 32000
    labels = ids.clone()
    labels[:, :-SUPERVISED] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "pixel_values": pixels}


def prepared(
    base: Any, model: Any, work: Workload, inputs: dict[str, torch.Tensor], device: str = "cpu"
) -> Callable[[], float]:
    """Prepare a training as the command does; return one step of it, which returns the loss."""
    from peft.helpers import disable_input_dtype_casting

    trained = [parameter for parameter in model.train().parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    add_chunked_loss(base)
    if work.checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    inputs = {name: value.to(device) for name, value in inputs.items()}

    def step() -> float:
        optimizer.zero_grad()
        with disable_input_dtype_casting(model, active=work.half):  # recompute checkpoints under the same autocast
            with torch.autocast(device, torch.bfloat16, enabled=work.half):
                loss, count = summed_loss(model, dict(inputs), chunked=True)
            (loss / count).backward()
        optimizer.step()
        return float(loss.detach()) / count

    return step


def full_size(layers: int, folder: Path) -> dict[str, Any]:
    """Return time and peak of each stage of a LLaVA-1.5-7B, and its planned and measured GB of a step."""
    config = config_of("llava-1.5-7b")
    config.text_config.num_hidden_layers = layers
    picture = 576
    work = planned(config, RULES[:1], 1, picture + SUPERVISED + 64, checkpointing=True, half=True)
    results: dict[str, Any] = {"layers": layers, "threads": torch.get_num_threads()}

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        gc.collect()
        reset_peak()
        with clocked(took := {}, "seconds"):
            yield
        results[name] = {**took, "peak_gb": round(memory("VmHWM") / 1e9, 2)}
        print(name, results[name], file=sys.stderr)

    with stage("write"):
        write(config, folder)
    start = memory()
    with stage("load"):
        base: Any = load_weights(folder)
    with stage("factors"):
        model = apply_milora(base, RULES[:1], progress=True)
    step = prepared(base, model, work, batch(1, work.tokens, picture, torch.randn(1, 3, 336, 336).bfloat16()))
    with stage("step"):
        results |= {"matrices": len(model.milora_report), "loss": round(step(), 4)}
    with stage("save"):
        model.save_pretrained(str(folder / "adapter"))
    sizes = planned_memory(work)
    plan = sum(sizes.values()) - min(sizes["optimizer"], sizes["activations"])  # Adam's states follow the first peak
    taken = results["step"]["peak_gb"] - start / 1e9
    results |= {"step_planned_gb": round(plan / 1e9, 2), "step_measured_gb": round(taken, 2)}
    return results | {"planned_over_measured": round(plan / 1e9 / taken, 3)}


def write(config: Any, folder: Path) -> None:
    """Write random weights shard by shard, so the whole model is never in memory."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    config.save_pretrained(folder)
    shapes = {name: p.shape for name, p in meta_model(config).named_parameters()}
    shard: dict[str, torch.Tensor] = {}
    index: dict[str, str] = {}
    for place, (name, shape) in enumerate(shapes.items(), start=1):
        is_norm = "norm" in name and name.endswith("weight")
        shard[name] = torch.ones(shape).bfloat16() if is_norm else 0.02 * torch.randn(shape, dtype=torch.bfloat16)
        if sum(weight.nbytes for weight in shard.values()) > 2e9 or place == len(shapes):
            file = f"model-{place:05}.safetensors"
            save_file(shard, folder / file, metadata={"format": "pt"})
            index |= dict.fromkeys(shard, file)
            shard.clear()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


if __name__ == "__main__":
    main()
