"""Processes share the decompositions of a model, with whole weights and with weights partitioned by ZeRO-3."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.launched import needs_deepspeed, results_of_two

WORKER = """
import hashlib, json, os, sys
import torch
import torch.distributed as dist
from contextlib import nullcontext
from torch import nn

zero3 = sys.argv[1] == "zero3"
broken, method = sys.argv[2] == "broken", sys.argv[3]
if zero3:
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiling it can leave a stale lock
    deepspeed.init_distributed("gloo")
    config = {"train_batch_size": 2, "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    kept = HfDeepSpeedConfig(config)
    place = deepspeed.zero.Init(config_dict_or_path=config)
else:
    dist.init_process_group("gloo")
    place = nullcontext()
torch.manual_seed(0)
with place:
    model = nn.Sequential(nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 70), nn.Tanh(), nn.Linear(70, 20))
if broken:
    if zero3:
        with deepspeed.zero.GatheredParameters([model[2].weight], modifier_rank=0):
            if dist.get_rank() == 0:
                model[2].weight.data[0, 0] = float("nan")
    else:
        model[2].weight.data[0, 0] = float("nan")

import milora_vl.core.adapter.initialize as module
from milora_vl.core.policy import Policy

calls = []
decompose = module.decompose
module.decompose = lambda W, *a, **k: calls.append(list(W.shape)) or decompose(W, *a, **k)
targets = Policy.parse([{"modules": "language", "method": method, "rank": 3}]).resolve(model)
try:
    made = module.initialize(model, targets)
    bits = [hashlib.sha256(m.A0.numpy().tobytes() + m.B0.numpy().tobytes()).hexdigest() for m in made.values()]
    told = {"paths": list(made), "bits": bits, "calls": calls, "shapes": [list(m.report.shape) for m in made.values()]}
except module.WeightError as error:
    told = {"error": str(error)}
print("RESULT" + json.dumps(told), flush=True)
dist.barrier()
"""


weights = pytest.mark.parametrize("weights", ["whole", pytest.param("zero3", marks=needs_deepspeed)])


@pytest.mark.parametrize("method", ["milora", "pissa"])
@weights
def test_each_layer_is_decomposed_once_and_all_processes_hold_the_same_bits(
    tmp_path: Path, weights: str, method: str
) -> None:
    first, second = results_of_two(WORKER, tmp_path, weights, "sound", method)
    assert first["bits"] == second["bits"]
    assert len(set(first["bits"])) == 3
    assert first["paths"] == second["paths"] == ["0", "2", "4"]
    assert first["shapes"] == second["shapes"] == [[30, 40], [70, 30], [20, 70]]
    assert sorted(first["calls"] + second["calls"]) == [[20, 70], [30, 40], [70, 30]]
    assert first["calls"]
    assert second["calls"]


@weights
def test_a_broken_weight_is_an_error_in_every_process(tmp_path: Path, weights: str) -> None:
    first, second = results_of_two(WORKER, tmp_path, weights, "broken", "milora")
    assert first == second
    assert first["error"].startswith("2: the weight contains 1 NaN or infinite values")
