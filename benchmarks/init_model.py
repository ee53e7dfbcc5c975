"""Initialization of a model: ours, from the cache, PEFT's `pissa`, and a full SVD per layer; time, memory, errors.

python benchmarks/init_model.py [--model smollm2|7b-block|FOLDER] [--rank 32] [--dtype float32|bfloat16] [--alone]

smollm2 is the language model of smol-llava (SmolLM2-135M, 210 linear layers); 7b-block holds the seven linear layers of
one block of LLaMA-7B, Gaussian; a FOLDER holds a transformers model.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import nn

from milora_vl.core.adapter.initialize import initialize
from milora_vl.core.policy import Policy, Target
from milora_vl.core.weights.matrices import read_matrix
from milora_vl.interop.load_model import load_model


def main() -> None:
    """Measure all methods one after the other and print the table."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", default="smollm2")
    options.add_argument("--rank", type=int, default=32)
    options.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options.add_argument("--alone", action="store_true", help="leave out PEFT and the full decomposition")
    chosen = options.parse_args()
    model = language_model(chosen.model, getattr(torch, chosen.dtype))
    policy = [{"modules": "language", "method": "milora", "protect": 0, "rank": chosen.rank}]
    targets = Policy.parse(policy).resolve(model)
    rows = ours(model, targets)
    if not chosen.alone:
        rows += [full(model, targets), pissa(model, targets, chosen.rank)]
    table = Table(
        "way", "seconds", "peak memory grew by", "layers", title=f"{chosen.model}, {torch.get_num_threads()} threads"
    )
    for row in rows:
        table.add_row(row["way"], f"{row['seconds']:.2f}", f"{row['grew_mib']:.0f} MiB", row["layers"])
    Console(stderr=True, width=140).print(table)
    print(json.dumps(rows))


def language_model(name: str, dtype: torch.dtype) -> nn.Module:
    """Return the causal language model with this name."""
    if name == "smollm2":
        return load_model("smol-llava", dtype=dtype)[0].model.language_model
    if name == "7b-block":
        return block(hidden=4096, mlp=11008).to(dtype)
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(name, dtype=dtype)


def block(hidden: int, mlp: int) -> nn.Module:
    """Return the linear layers of one block of LLaMA with Gaussian weights."""
    shapes = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (hidden, hidden))
    shapes |= {"gate_proj": (hidden, mlp), "up_proj": (hidden, mlp), "down_proj": (mlp, hidden)}
    layers = nn.ModuleDict({name: nn.Linear(*sizes, bias=False) for name, sizes in shapes.items()})
    generator = torch.Generator().manual_seed(1)
    for parameter in layers.parameters():
        nn.init.normal_(parameter, generator=generator)
    return layers


def ours(model: nn.Module, targets: list[Target]) -> list[dict[str, Any]]:
    """Measure without a cache, filling a cache, and loading from it."""
    with tempfile.TemporaryDirectory() as folder:
        plain, made = measured("milora_vl", lambda: initialize(model, targets))
        filled, _ = measured("milora_vl, filling its cache", lambda: initialize(model, targets, cache_dir=folder))
        cached, _ = measured("milora_vl, from its cache", lambda: initialize(model, targets, cache_dir=folder))
    ways = Counter(initial.report.svd for initial in made.values())
    worst = max(initial.report.excess for initial in made.values())
    layers = ", ".join(f"{count} {way}" for way, count in ways.items()) + f"; excess at most {worst:.1e}"
    return [row | {"layers": layers} for row in (plain, filled, cached)]


def full(model: nn.Module, targets: list[Target]) -> dict[str, Any]:
    """Measure torch.linalg.svd of every weight."""

    def every() -> None:
        for target in targets:
            torch.linalg.svd(read_matrix(model.get_submodule(target.path)).float(), full_matrices=False)

    row, _ = measured("torch.linalg.svd, each", every)
    return row | {"layers": f"{len(targets)}"}


def pissa(model: nn.Module, targets: list[Target], rank: int) -> dict[str, Any]:
    """Measure PEFT's initialization with principal components; it runs last because it changes the model."""
    names = sorted({target.path.rpartition(".")[2] for target in targets})
    config = LoraConfig(r=rank, target_modules=names, init_lora_weights="pissa")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        row, _ = measured("PEFT pissa", lambda: get_peft_model(model, config))
    return row | {"layers": f"{len(targets)}"}


def measured(way: str, function: Callable[[], Any]) -> tuple[dict[str, Any], Any]:
    """Return the seconds, and the increase of the memory above the initial use (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak counter
    before = memory("VmRSS")
    start = time.perf_counter()
    result = function()
    seconds = time.perf_counter() - start
    return {"way": way, "seconds": seconds, "grew_mib": (memory("VmHWM") - before) / 1024}, result


def memory(name: str) -> int:
    """Return a value of /proc/self/status in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(f"{name}:")))


if __name__ == "__main__":
    main()
