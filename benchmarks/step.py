"""Time and memory of a training step: of adapters against stock PEFT LoRA, and of the chunked loss against the model's.

python benchmarks/step.py [--width 4096] [--rank 128] [--tokens 512] [--dtype bfloat16] [--autocast] [--checkpointing]
python benchmarks/step.py --loss

Adapters: for MiLoRA (the difference form, rank r) and the default (a fixed A, rank r) the ratios of the medians to LoRA
of rank r, for the default also to LoRA with as many trained numbers (rank r / 2). And the memory that autograd saves in
a layer of Llama, the default's over LoRA's. A CPU without bfloat16 emulates it for minutes.
The loss: 2,048 positions x 32,000 words of a small Llama whose logits dominate a step. Memory is the resident memory at
the peak of the third step minus the memory after the second, each method in its own process.
On a CPU, seconds are processor time of one thread. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import warnings
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.timing import FREED, alternately, apart, memory, reset_peak, saved_for_backward
from milora_vl import apply_milora
from milora_vl.core.adapter.fixed_a import fix_A
from milora_vl.models.losses import add_chunked_loss, summed_loss

RATIOS = (("milora", "lora"), ("default", "lora"), ("default", "lora_of_equal_size"))
LAYERS, STEPS = 2, 10
WORDS, LENGTH, LOSS_WIDTH, ROUNDS = 32000, 2048, 256, 5
SUPERVISED = (60, LENGTH - 1)  # of a LLaVA record, and of a text record
LOSSES = ("own", "chunked")


def main() -> None:
    """Measure and print the ratios."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--width", type=int, default=4096)
    options.add_argument("--rank", type=int, default=128)
    options.add_argument("--tokens", type=int, default=512)
    options.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options.add_argument("--autocast", action="store_true", help="bfloat16 autocast over float32 weights")
    options.add_argument("--checkpointing", action="store_true")
    options.add_argument("--device", default="cpu")
    options.add_argument("--loss", action="store_true", help="measure the loss")
    options.add_argument("--peak", nargs=2, metavar=("LOSS", "SUPERVISED"), help="its memory, here (internal)")
    chosen = options.parse_args()
    torch.set_num_threads(1)  # with more threads, processor time contains waiting
    if chosen.peak:
        print(peak_of_loss(chosen.peak[0], int(chosen.peak[1])))
        return
    print(json.dumps(losses() if chosen.loss else adapters(chosen)))


class Model(nn.Module):
    """Linear layers with residual connections, without attention and norms, whose cost would hide the difference."""

    def __init__(self, width: int, checkpointing: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(LAYERS))
        self.checkpointing = checkpointing

    def forward(self, x: Tensor) -> Tensor:
        """(tokens, width) -> (tokens, width)."""
        for layer in self.layers:
            x = x + (checkpoint(layer, x, use_reentrant=False) if self.checkpointing else layer(x))
        return x


def adapters(chosen: argparse.Namespace) -> dict[str, Any]:
    """Time the models alternately, step by step; return ratios of medians."""
    models = {name: build(name, chosen) for name in ("lora", "lora_of_equal_size", "milora", "default")}
    x = torch.randn(chosen.tokens, chosen.width, device=chosen.device, dtype=getattr(torch, chosen.dtype))
    steps = {name: partial(step, model, x, chosen) for name, model in models.items()}
    is_cpu = chosen.device == "cpu"
    seconds = alternately(steps, STEPS, warm_up=2, device=chosen.device, of_process=is_cpu)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    saved = {name: activations(llama_layer(name, chosen), x, chosen) for name in ("lora", "default")}
    return {
        **{name: value for name, value in vars(chosen).items() if name not in ("loss", "peak")},
        "threads": torch.get_num_threads(),
        "seconds": median,
        "saved_for_backward_bytes": saved,
        "trained": {name: sum(p.numel() for p in m.parameters() if p.requires_grad) for name, m in models.items()},
        "time": {f"{ours}_over_{theirs}": round(median[ours] / median[theirs], 4) for ours, theirs in RATIOS},
        "memory": round(saved["default"] / saved["lora"], 4),
    }


def build(name: str, chosen: argparse.Namespace) -> nn.Module:
    """Return the same model with an adapter. The cost does not depend on the initial factors."""
    torch.manual_seed(0)
    base = Model(chosen.width, chosen.checkpointing).to(chosen.device, getattr(torch, chosen.dtype))
    rank = chosen.rank // 2 if name == "lora_of_equal_size" else chosen.rank
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if name == "milora":
            return apply_milora(base, [{"modules": "language", "method": "milora", "rank": rank, "protect": 0}])
        return with_lora(base, rank, fixed=name == "default")


def with_lora(base: nn.Module, rank: int, fixed: bool) -> nn.Module:
    """Return the base with a stock LoRA on every linear layer, or with its A fixed, as the default has it."""
    model = get_peft_model(base, LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear"))  # type: ignore[arg-type]
    for layer in model.modules():
        if fixed and isinstance(layer, LoraLayer):
            fix_A(layer, "default")
    return model


def llama_layer(name: str, chosen: argparse.Namespace) -> nn.Module:
    """Return one layer of Llama with the width of the benchmark and an adapter on its seven linear layers."""
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        hidden_size=chosen.width, intermediate_size=chosen.width * 43 // 16, num_hidden_layers=1, vocab_size=8,
        num_attention_heads=max(1, chosen.width // 128),
    )  # fmt: skip
    base = LlamaModel(config).to(chosen.device, getattr(torch, chosen.dtype))
    if chosen.checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    return with_lora(base.train(), chosen.rank, fixed=name == "default")


def step(model: nn.Module, x: Tensor, chosen: argparse.Namespace) -> None:
    """Run forward and backward, including the gradient of the input, which every layer except the first needs."""
    model.zero_grad(set_to_none=True)
    with autocast(chosen):
        out = model(x.detach().requires_grad_())
    out.float().square().mean().backward()


def activations(layer: nn.Module, x: Tensor, chosen: argparse.Namespace) -> int:
    """Return the bytes that autograd saves for backward in a layer of Llama on the embeddings (tokens, width)."""
    with autocast(chosen):
        return saved_for_backward(layer, lambda: layer(inputs_embeds=x.detach().requires_grad_()[None]))


def autocast(chosen: argparse.Namespace) -> torch.autocast:
    return torch.autocast(torch.device(chosen.device).type, torch.bfloat16, enabled=chosen.autocast)


def losses() -> dict[str, Any]:
    """Measure both losses at both numbers of supervised positions."""
    rows = []
    for supervised in SUPERVISED:
        peaks = {name: apart(__file__, "--peak", name, supervised, **FREED) for name in LOSSES}
        model, inputs = small_llama(), batch(supervised)
        found = {name: loss_step(model, inputs, name) for name in LOSSES}
        assert abs(found["own"] - found["chunked"]) < 1e-5 * found["own"], found
        steps = {name: partial(loss_step, model, inputs, name) for name in LOSSES}
        times = {name: statistics.median(took) for name, took in alternately(steps, ROUNDS, of_process=True).items()}
        rows.append({
            "supervised": supervised, "own_mb": round(peaks["own"] / 1e6), "chunked_mb": round(peaks["chunked"] / 1e6),
            "memory": round(peaks["chunked"] / peaks["own"], 3), "own_s": round(times["own"], 3),
            "chunked_s": round(times["chunked"], 3), "time": round(times["chunked"] / times["own"], 3),
        })  # fmt: skip
        print(json.dumps(rows[-1]), file=sys.stderr)
    return {"positions": LENGTH, "words": WORDS, "runs": rows}


def small_llama() -> Any:
    """Return a model with one layer and a trainable head of LOSS_WIDTH x WORDS."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": LOSS_WIDTH, "intermediate_size": LOSS_WIDTH}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=WORDS, num_hidden_layers=1, num_attention_heads=4, **sizes))
    assert add_chunked_loss(model)
    return model


def batch(supervised: int) -> dict[str, Tensor]:
    """Return one row with labels at its last `supervised` positions."""
    ids = torch.randint(0, WORDS, (1, LENGTH))
    labels = ids.clone()
    labels[:, :-supervised] = -100
    return {"input_ids": ids, "labels": labels}


def loss_step(model: Any, inputs: dict[str, Tensor], name: str) -> float:
    """Run forward and backward; return the loss."""
    if name == "own":
        loss = model(**inputs).loss
    else:
        summed, count = summed_loss(model, inputs, chunked=True)
        loss = summed / count
    loss.backward()
    model.zero_grad(set_to_none=False)
    return float(loss.detach())


def peak_of_loss(name: str, supervised: int) -> int:
    """Return the bytes that the third step needs at its peak."""
    model, inputs = small_llama(), batch(supervised)
    for _ in range(2):
        loss_step(model, inputs, name)
    start = memory()
    reset_peak()
    loss_step(model, inputs, name)
    return memory("VmHWM") - start


if __name__ == "__main__":
    main()
