"""The chunked loss against the model's loss: peak memory and time of a step at 2,048 positions x 32,000 words.

A small Llama with a large vocabulary, so that the logits dominate a step. Memory is the resident memory at the peak of
the third step minus the memory after it, each method in its own process. Time is processor time, alternately in one
process. Prints one JSON line with ratios (ours / the model's).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

import torch

from milora_vl.models.losses import add_chunked_loss, summed_loss
from plan import status

WORDS, LENGTH, WIDTH = 32000, 2048, 256
SUPERVISED = (60, LENGTH - 1)  # of a LLaVA record, and of a text record
WAYS = ("own", "chunked")


def model() -> Any:
    """Return a model with one layer and a trainable head of WIDTH x WORDS."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=1, num_attention_heads=4
    )
    torch.manual_seed(0)
    made = LlamaForCausalLM(config)
    assert add_chunked_loss(made)
    return made


def batch(supervised: int) -> dict[str, torch.Tensor]:
    """Return one row with labels at its last `supervised` positions."""
    ids = torch.randint(0, WORDS, (1, LENGTH))
    labels = ids.clone()
    labels[:, :-supervised] = -100
    return {"input_ids": ids, "labels": labels}


def step(made: Any, inputs: dict[str, torch.Tensor], way: str) -> float:
    """Run forward and backward; return the loss."""
    if way == "own":
        loss = made(**inputs).loss
    else:
        summed, count = summed_loss(made, inputs, chunked=True)
        loss = summed / count
    loss.backward()
    made.zero_grad(set_to_none=False)
    return float(loss.detach())


def memory(way: str, supervised: int) -> int:
    """Return the bytes that the third step needs at its peak."""
    made, inputs = model(), batch(supervised)
    for _ in range(2):
        step(made, inputs, way)
    start = status("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:  # noqa: PTH123 - the kernel's peak counter
        file.write("5")
    step(made, inputs, way)
    return status("VmHWM") - start


def seconds(supervised: int, rounds: int) -> dict[str, float]:
    """Return the median processor time of a step per method, with one thread: more threads wait for each other."""
    torch.set_num_threads(1)
    made, inputs = model(), batch(supervised)
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    losses = {way: step(made, inputs, way) for way in WAYS}
    assert abs(losses["own"] - losses["chunked"]) < 1e-5 * losses["own"], losses
    for _ in range(rounds):
        for way in WAYS:
            start = time.process_time()
            step(made, inputs, way)
            found[way].append(time.process_time() - start)
    return {way: statistics.median(times) for way, times in found.items()}


def main() -> None:
    """Measure both methods at both numbers of supervised positions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", nargs=2, metavar=("WAY", "NUMBER"), help="measure the memory of one method (internal)")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    if args.one:
        print(memory(args.one[0], int(args.one[1])))
        return
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    rows = []
    for supervised in SUPERVISED:
        peaks = {}
        for way in WAYS:
            command = [sys.executable, __file__, "--one", way, str(supervised)]
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            peaks[way] = int(done.stdout.split()[-1])
        times = seconds(supervised, args.rounds)
        rows.append({
            "supervised": supervised, "own_mb": round(peaks["own"] / 1e6), "chunked_mb": round(peaks["chunked"] / 1e6),
            "memory": round(peaks["chunked"] / peaks["own"], 3), "own_s": round(times["own"], 3),
            "chunked_s": round(times["chunked"], 3), "time": round(times["chunked"] / times["own"], 3),
        })  # fmt: skip
        print(json.dumps(rows[-1]), file=sys.stderr)
    print(json.dumps({"benchmark": "loss", "positions": LENGTH, "words": WORDS, "runs": rows}))


if __name__ == "__main__":
    main()
