"""Time and memory of a training step of MiLoRA and of the default against stock PEFT LoRA, alternately in one process.

python benchmarks/step.py [--width 4096] [--rank 128] [--tokens 512] [--layers 2] [--dtype bfloat16] [--checkpointing]
Prints one JSON line: for MiLoRA (the difference form, rank r) and the default (a fixed A, rank r) the ratios of the
medians to LoRA of rank r, for the default also to LoRA with as many trained numbers (rank r / 2 in a square layer). And
the memory that autograd saves in a layer of Llama, the default's over LoRA's. On a CPU, seconds are processor time of
one thread, which another program on the machine disturbs little. A CPU without bfloat16 emulates it for minutes.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
import warnings
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaModel

from milora_vl import apply_milora
from milora_vl.core.adapter.fixed_a import fix_A

RATIOS = (("milora", "lora"), ("default", "lora"), ("default", "lora_of_equal_size"))


class Block(nn.Module):
    """A linear layer with a residual connection, as in a language model."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, inner, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(tokens, width) -> (tokens, width)."""
        out = self.up(x)
        return x + out if out.shape == x.shape else x + out[..., : x.shape[-1]]


class Model(nn.Module):
    """A stack of blocks without attention and norms, whose cost would hide the difference."""

    def __init__(self, width: int, inner: int, num_layers: int, checkpointing: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(width, inner) for _ in range(num_layers))
        self.checkpointing = checkpointing

    def forward(self, x: Tensor) -> Tensor:
        """(tokens, width) -> (tokens, width)."""
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpointing else layer(x)
        return x


def main() -> None:
    """Measure and print the ratios."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--width", type=int, default=4096)
    options.add_argument("--inner", type=int, help="outputs per layer (default: the width)")
    options.add_argument("--rank", type=int, default=128)
    options.add_argument("--tokens", type=int, default=512)
    options.add_argument("--layers", type=int, default=2)
    options.add_argument("--steps", type=int, default=10)
    options.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options.add_argument("--autocast", action="store_true", help="bfloat16 autocast over float32 weights")
    options.add_argument("--checkpointing", action="store_true")
    options.add_argument("--compile", action="store_true")
    options.add_argument("--device", default="cpu")
    chosen = options.parse_args()
    print(json.dumps(measure(chosen)))


def measure(chosen: argparse.Namespace) -> dict[str, Any]:
    """Time both models alternately, step by step; return ratios of medians."""
    torch.set_num_threads(1)  # with more threads, processor time contains waiting
    inner = chosen.inner or chosen.width
    models = {name: build(name, chosen, inner) for name in ("lora", "lora_of_equal_size", "milora", "default")}
    x = torch.randn(chosen.tokens, chosen.width, device=chosen.device, dtype=getattr(torch, chosen.dtype))
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for number in range(chosen.steps + 2):
        for name, model in models.items():
            took = step(model, x, chosen)
            if number >= 2:  # the first two steps are warm-up
                seconds[name].append(took)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    memory = {name: activations(llama_layer(name, chosen), x, chosen) for name in ("lora", "default")}
    return {
        **{key: value for key, value in vars(chosen).items() if key != "inner"},
        "inner": inner,
        "threads": torch.get_num_threads(),
        "seconds": median,
        "saved_for_backward_bytes": memory,
        "trained": {name: sum(p.numel() for p in m.parameters() if p.requires_grad) for name, m in models.items()},
        "time": {f"{ours}_over_{theirs}": round(median[ours] / median[theirs], 4) for ours, theirs in RATIOS},
        "memory": round(memory["default"] / memory["lora"], 4),
        "flops_predict": round(flops(chosen.width, inner, chosen.rank, chosen.checkpointing), 4),
        "anchor_bytes": sum(b.numel() * b.element_size() for b in models["milora"].buffers()),
    }


def build(name: str, chosen: argparse.Namespace, inner: int) -> nn.Module:
    """Return the same model with an adapter. The cost does not depend on the initial factors."""
    torch.manual_seed(0)
    base = Model(chosen.width, inner, chosen.layers, chosen.checkpointing)
    base = base.to(chosen.device, getattr(torch, chosen.dtype))
    rank = chosen.rank * inner // (chosen.width + inner) if name == "lora_of_equal_size" else chosen.rank
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if name == "milora":
            model: Any = apply_milora(base, [{"modules": "language", "method": "milora", "protect": 0, "rank": rank}])
        else:
            model = with_lora(base, rank, fixed=name == "default")
    return torch.compile(model) if chosen.compile else model  # type: ignore[return-value]


def with_lora(base: nn.Module, rank: int, fixed: bool) -> nn.Module:
    """Return the base with a stock LoRA on every linear layer, or with its A fixed, as the default has it."""
    model = get_peft_model(base, LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear"))  # type: ignore[arg-type]
    for layer in model.modules():
        if fixed and isinstance(layer, LoraLayer):
            fix_A(layer, "default")
    return model


def llama_layer(name: str, chosen: argparse.Namespace) -> nn.Module:
    """Return one layer of Llama with the width of the benchmark and an adapter on its seven linear layers."""
    config = LlamaConfig(
        hidden_size=chosen.width,
        intermediate_size=chosen.width * 43 // 16,
        num_attention_heads=max(1, chosen.width // 128),
        num_hidden_layers=1,
        vocab_size=8,
    )
    base = LlamaModel(config).to(chosen.device, getattr(torch, chosen.dtype))
    if chosen.checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    return with_lora(base.train(), chosen.rank, fixed=name == "default")


def step(model: nn.Module, x: Tensor, chosen: argparse.Namespace) -> float:
    """Run forward and backward, including the gradient of the input, which every layer except the first needs."""
    x = x.detach().requires_grad_()
    model.zero_grad(set_to_none=True)
    start = now(chosen.device)
    forward(model, x, chosen).float().square().mean().backward()
    return now(chosen.device) - start


def forward(model: nn.Module, x: Tensor, chosen: argparse.Namespace) -> Tensor:
    """Run the model, optionally under autocast."""
    with torch.autocast(torch.device(chosen.device).type, torch.bfloat16, enabled=chosen.autocast):
        out: Tensor = model(x)
        return out


def forward_layer(model: nn.Module, x: Tensor, chosen: argparse.Namespace) -> Tensor:
    """Run a layer of Llama on the embeddings (tokens, width)."""
    with torch.autocast(torch.device(chosen.device).type, torch.bfloat16, enabled=chosen.autocast):
        out: Tensor = model(inputs_embeds=x[None]).last_hidden_state
        return out


def activations(model: nn.Module, x: Tensor, chosen: argparse.Namespace) -> int:
    """Return the bytes that autograd saves for backward; each storage counts once, without weights."""
    owned = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = forward_layer(model, x.detach().requires_grad_(), chosen)
    del out
    gc.collect()
    return sum(kept.values())


def flops(width: int, inner: int, rank: int, checkpointing: bool) -> float:
    """Return MiLoRA's ratio by the number of multiplications: the anchor adds a forward and an input gradient."""
    forward, weight = 1 + checkpointing, width * inner
    adapter = rank * (width + inner)
    lora = forward * (weight + adapter) + (weight + adapter) + adapter
    return (lora + (forward + 1) * adapter) / lora


def now(device: str) -> float:
    """Return the time in seconds after the device has finished its work."""
    if device != "cpu":
        torch.cuda.synchronize()
    return time.process_time() if device == "cpu" else time.perf_counter()


if __name__ == "__main__":
    main()
