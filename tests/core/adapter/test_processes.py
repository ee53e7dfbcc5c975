"""Two processes hold the same factors and the same A, even if their machines round differently, and train as one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from milora_vl.core.weights.tensor_files import weights_digest
from support.launched import needs_deepspeed, results_of_two

DDP = """
import json, sys
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from milora_vl import apply_milora
from milora_vl.core.weights.tensor_files import shared_digest

dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 8))
if rank == 1:  # another machine rounds otherwise
    for parameter in model.parameters():
        parameter.data *= 1 + 1e-3 * torch.rand(parameter.shape)
digest = shared_digest(model)
rules = [{"modules": "language", "method": "milora", "protect": 0, "rank": 3}, {"modules": "2", "protect": 0.9999}]
calibration = [{"input": torch.randn(9, 12, generator=torch.Generator().manual_seed(i))} for i in range(2)]
tuned = apply_milora(model, rules, calibration=calibration)
wrapped = DistributedDataParallel(tuned)
x = torch.randn(4, 12, generator=torch.Generator().manual_seed(rank))
optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.1)
start = [b.sum().item() for b in tuned.buffers()]
for _ in range(3):
    wrapped(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
trained = [p.detach().double().sum().item() for p in tuned.parameters() if p.requires_grad]
anchors = [b.double().sum().item() for b in tuned.buffers()]
ignored = len(wrapped.parameters_to_ignore)
(protection,) = tuned.milora_protection.values()
unchanged = start == [b.sum().item() for b in tuned.buffers()]
print("RESULT" + json.dumps([protection.overlap, protection.energy, trained, anchors, ignored, unchanged, digest]))
dist.barrier()
"""


def test_ranks_share_anchors_and_differences(tmp_path: Path) -> None:
    first, second = results_of_two(DDP, tmp_path)
    assert first == second
    overlap, energy, _, fixed, ignored, unchanged, _ = first
    assert overlap < 1e-5
    assert 0.5 < energy < 0.9999  # of 10 directions, the rank leaves 7
    assert len(fixed) == ignored == 3  # both factors of an anchor, and one A
    assert unchanged


OTHER_A = """
import json, sys
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from milora_vl import apply_milora, save_adapter
from milora_vl.core.adapter import fixed_a

dist.init_process_group("gloo")
rank, folder, cache = dist.get_rank(), *sys.argv[1:]
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 12))
make, chosen = fixed_a.make_A, {}

def differs(target, *arguments):  # as the SVD of another GPU, whose signs are others
    A, protection = make(target, *arguments)
    A *= 1 - 2 * rank
    chosen[target.path] = A.tolist()
    return A, protection

fixed_a.make_A = differs
rules = [{"modules": "language", "method": "milora", "rank": 3, "protect": 0.5}]
calibration = [{"input": torch.randn(9, 12, generator=torch.Generator().manual_seed(i))} for i in range(2)]
tuned = apply_milora(model, rules, calibration=calibration, cache_dir=cache or None)
wrapped = DistributedDataParallel(tuned)
optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.1)
wrapped(torch.randn(4, 12)).square().mean().backward()
optimizer.step()
if rank == 0:
    save_adapter(tuned, folder)
layers = {path: tuned.base_model.model[int(path)] for path in "02"}
A = {path: layer.lora_A["default"].weight.tolist() for path, layer in layers.items()}
B = {path: layer.lora_B["default"].weight.tolist() for path, layer in layers.items()}
print("RESULT" + json.dumps([chosen, A, B]))
dist.barrier()
"""


@pytest.mark.parametrize("is_cached", [False, True])
def test_each_a_is_chosen_once_and_all_train_with_it_and_save_it(tmp_path: Path, is_cached: bool) -> None:
    cache = str(tmp_path / "cache") if is_cached else ""
    first, second = results_of_two(OTHER_A, tmp_path, str(tmp_path / "saved"), cache)
    (mine, A, B), (other, *trained) = first, second
    assert trained == [A, B]
    assert [len(mine), len(other)] == [1, 1]
    assert mine | other == A
    saved = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    assert {path: saved[f"base_model.model.{path}.lora_A.weight"].tolist() for path in A} == A
    if is_cached:
        again = results_of_two(OTHER_A, tmp_path, str(tmp_path / "again"), cache)
        assert [(chosen, found) for chosen, found, _ in again] == [({}, A)] * 2


SHARED = """
import hashlib, json, os, sys
import torch
import torch.distributed as dist
from torch import nn

broken, method = sys.argv[1] == "broken", sys.argv[2]
os.environ["DS_ACCELERATOR"] = "cpu"
import deepspeed
from transformers.integrations import HfDeepSpeedConfig
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiling it can leave a stale lock
deepspeed.init_distributed("gloo")
config = {"train_batch_size": 2, "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
kept = HfDeepSpeedConfig(config)
torch.manual_seed(0)
with deepspeed.zero.Init(config_dict_or_path=config):
    model = nn.Sequential(nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 70), nn.Tanh(), nn.Linear(70, 20))
if broken:
    with deepspeed.zero.GatheredParameters([model[2].weight], modifier_rank=0):
        if dist.get_rank() == 0:
            model[2].weight.data[0, 0] = float("nan")

import milora_vl.core.adapter.initialize as module
import milora_vl.core.weights.tensor_files as cache
from milora_vl.core.policy import Policy

calls = []
decompose = cache.decompose
cache.decompose = lambda W, *a, **k: calls.append(list(W.shape)) or decompose(W, *a, **k)
digest = cache.shared_digest(model)  # gathers one weight at a time
targets = Policy.parse([{"modules": "language", "method": method, "rank": 3, "protect": 0}]).resolve(model)
try:
    made = module.initialize(model, targets)
    bits = [hashlib.sha256(m.A0.numpy().tobytes() + m.B0.numpy().tobytes()).hexdigest() for m in made.values()]
    told = {"paths": list(made), "bits": bits, "calls": calls, "shapes": [list(m.report.shape) for m in made.values()]}
    told["digest"] = digest
except module.WeightError as error:
    told = {"error": str(error)}
print("RESULT" + json.dumps(told), flush=True)
dist.barrier()
"""


@needs_deepspeed
@pytest.mark.parametrize("method", ["milora", "pissa"])
def test_each_layer_is_decomposed_once_and_all_processes_hold_the_same_bits(tmp_path: Path, method: str) -> None:
    first, second = results_of_two(SHARED, tmp_path, "sound", method)
    assert first["bits"] == second["bits"]
    assert len(set(first["bits"])) == 3
    assert first["paths"] == second["paths"] == ["0", "2", "4"]
    assert first["shapes"] == second["shapes"] == [[30, 40], [70, 30], [20, 70]]
    assert sorted(first["calls"] + second["calls"]) == [[20, 70], [30, 40], [70, 30]]
    assert first["calls"]
    assert second["calls"]
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 70), nn.Tanh(), nn.Linear(70, 20))
    assert first["digest"] == second["digest"] == weights_digest(whole)


@needs_deepspeed
def test_a_broken_weight_is_an_error_in_every_process(tmp_path: Path) -> None:
    first, second = results_of_two(SHARED, tmp_path, "broken", "milora")
    assert first == second
    assert first["error"].startswith("2: the weight contains 1 NaN or infinite values")


GATHERED = """
import json
import deepspeed, torch
from torch import nn
from transformers.integrations import HfDeepSpeedConfig
from milora_vl.core.weights.distributed import gathered_in_forward

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.below = nn.ModuleDict({"words": nn.Embedding(6, 4)})
        self.attention = nn.MultiheadAttention(4, 2)
    def forward(self, ids):
        x = self.below["words"](ids)
        return self.attention(x, x, x)[0] @ self.below["words"].weight.T

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiling it can leave a stale lock
deepspeed.init_distributed("gloo")
config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
settings = HfDeepSpeedConfig(config)
torch.manual_seed(0)
whole = Tied()
with deepspeed.zero.Init(config_dict_or_path=config):
    parts = Tied()
for here, there in zip(parts.parameters(), whole.parameters()):
    with deepspeed.zero.GatheredParameters([here], modifier_rank=0):
        here.data.copy_(there.data)
ids = torch.arange(6)
with torch.no_grad(), gathered_in_forward(parts):
    found = parts(ids)
left = sum(parameter.numel() for parameter in parts.parameters())
print("RESULT" + json.dumps([torch.allclose(found, whole(ids), atol=1e-6), left]))
torch.distributed.barrier()
"""


@needs_deepspeed
def test_weights_that_a_module_uses_without_those_below_are_gathered(tmp_path: Path) -> None:
    assert results_of_two(GATHERED, tmp_path) == [[True, 0], [True, 0]]
