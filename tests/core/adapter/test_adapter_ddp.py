"""Two processes hold the same adapter, whatever their machines make of nearly equal components, and train as one."""

from __future__ import annotations

from pathlib import Path

from support.launched import results_of_two

WORKER = """
import json, sys
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from milora_vl import apply_milora

dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 8))
if rank == 1:  # another machine rounds otherwise
    for parameter in model.parameters():
        parameter.data *= 1 + 1e-3 * torch.rand(parameter.shape)
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
print("RESULT" + json.dumps([protection.overlap, protection.energy, trained, anchors, ignored, unchanged]))
dist.barrier()
"""


def test_ranks_share_anchors_and_differences(tmp_path: Path) -> None:
    first, second = results_of_two(WORKER, tmp_path)
    assert first == second
    overlap, energy, _, fixed, ignored, unchanged = first
    assert overlap < 1e-5
    assert 0.5 < energy < 0.9999  # of 10 directions, the rank leaves 7
    assert len(fixed) == ignored == 3  # both factors of an anchor, and one A
    assert unchanged
