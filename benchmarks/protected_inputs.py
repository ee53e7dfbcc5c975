"""Memory and time of protected inputs and of the task's gradient for one block, by default of a 7B Llama.

python benchmarks/protected_inputs.py [--hidden 4096] [--mlp 11008] [--tokens 10752] [--share 0.95]

A block has four distinct inputs: of q, k, v; of o; of gate, up; and of down. Their activations are Gaussian with the
spectrum 1/i, whose first 40 % of the directions hold 90 % of the energy (SmolLM2: 36 %). Prints one JSON line:

    sums        seconds for C = E[x x'] of all four inputs over `tokens` positions
    vectors     seconds for the eigenvectors of all four C
    directions  protected directions by input size
    bytes_C     memory of the four C, which one pass of the calibration holds at most 2 GiB of, and of the largest one
    gradient    seconds of the sketches of one record of 700 tokens at rank 64, and of forward and backward alone; bytes
                that the backward keeps for a token
    product     seconds of one product (hidden, hidden) x (hidden, hidden), the unit to compare machines with

Times are CPU times of this process: other processes on the machine do not count.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from milora_vl import Policy
from milora_vl.core.calibration.bases import first_directions
from milora_vl.core.calibration.gradients import gradient_sketches

RECORD = 700  # tokens: the picture of LLaVA-1.5 and its text


def activations(tokens: int, size: int, generator: torch.Generator) -> Tensor:
    """Return inputs (tokens, size) with a decaying spectrum; the axes are its directions, which costs no rotation."""
    energies = torch.arange(1, size + 1).float().reciprocal()
    return torch.randn(tokens, size, generator=generator) * energies.sqrt()


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Return the CPU seconds of a call, and its result."""
    start = time.process_time()
    result = run()
    return time.process_time() - start, result


def measure(hidden: int, mlp: int, tokens: int, share: float, seed: int) -> dict[str, Any]:
    """Return the measurements of one block."""
    generator = torch.Generator().manual_seed(seed)
    product, _ = timed(lambda: torch.randn(hidden, hidden) @ torch.randn(hidden, hidden))
    found: dict[int, dict[str, Any]] = {}
    for size in (hidden, mlp):  # the inputs of q, o and gate have one size
        x = activations(tokens, size, generator)
        sums, C = timed(lambda x=x: x.T @ x / len(x))  # type: ignore[misc]
        vectors, (V, held) = timed(lambda C=C: first_directions(C, share))  # type: ignore[misc]
        found[size] = {
            "sums": sums,
            "vectors": vectors,
            "C": C.nbytes,
            "directions": V.shape[1],
            "held": float(held[-1]),
        }
    small, large = found[hidden], found[mlp]
    return {
        "hidden": hidden, "mlp": mlp, "tokens": tokens, "share": share,
        "threads": torch.get_num_threads(),
        "product": round(product, 2),
        "sums": round(3 * small["sums"] + large["sums"], 2),
        "vectors": round(3 * small["vectors"] + large["vectors"], 2),
        "vectors_by_size": {size: round(found[size]["vectors"], 2) for size in found},
        "directions": {size: found[size]["directions"] for size in found},
        "gradient": gradient(hidden, mlp, seed),
        "bytes_C": {"all": 3 * small["C"] + large["C"], "largest": large["C"]},
    }  # fmt: skip


def gradient(hidden: int, mlp: int, seed: int) -> dict[str, Any]:
    """Measure the task's gradient of one block in float32."""
    torch.manual_seed(seed)
    heads = max(1, hidden // 128)
    base = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=1, num_attention_heads=heads,
            num_key_value_heads=heads, vocab_size=100,
        )
    ).requires_grad_(False)  # fmt: skip
    ids = torch.randint(100, (1, RECORD))
    targets = Policy.parse([{"modules": "language", "method": "gradient", "rank": min(64, hidden)}]).resolve(base)
    kept: dict[int, int] = {}  # bytes of each storage
    weights = {parameter.untyped_storage().data_ptr() for parameter in base.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def plain() -> None:
        embedded = base.get_input_embeddings()(ids).requires_grad_()
        base(inputs_embeds=embedded, labels=ids).loss.backward()

    alone, _ = timed(plain)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        sketches, _ = timed(lambda: gradient_sketches(base, targets, [{"input_ids": ids, "labels": ids}]))
    return {
        "sketches": round(sketches, 2), "alone": round(alone, 2),
        "bytes_per_token": sum(kept.values()) // RECORD,
    }  # fmt: skip


def main() -> None:
    """Print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--mlp", type=int, default=11008)
    parser.add_argument("--tokens", type=int, default=56 * 192)
    parser.add_argument("--share", type=float, default=0.95)
    parser.add_argument("--seed", type=int, default=0)
    print(json.dumps(measure(**vars(parser.parse_args()))))


if __name__ == "__main__":
    main()
