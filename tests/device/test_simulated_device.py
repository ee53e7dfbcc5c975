"""The simulated device refuses what CUDA refuses, and counts what makes a program wait for a GPU."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from support.simulated_device import counted_waits, simulated_device


@pytest.mark.parametrize(
    "act",
    [
        lambda x: x + torch.zeros(3),
        lambda x: x @ torch.zeros(3, 2),
        lambda x: torch.cat([x, torch.zeros(3)]),
        lambda x: torch.zeros(3)[x.long()],
        lambda x: x.index_put((torch.tensor([0]),), torch.zeros(1)),
        lambda x: nn.Linear(3, 2)(x),
        lambda x: torch.rand(3, generator=torch.Generator(), device=x.device),
        lambda x: x.normal_(generator=torch.Generator()),
        lambda x: torch.zeros(3).add_(x),
    ],
)
def test_two_devices_do_not_mix(act: Callable[[Tensor], Tensor], sim: torch.device) -> None:
    with pytest.raises(RuntimeError, match=r"Expected (all tensors|a 'sim' device)"):
        act(torch.ones(3, device=sim))


def test_what_cuda_takes_is_taken(sim: torch.device) -> None:
    x = torch.ones(3, device=sim)
    assert (x + torch.tensor(1.0)).device == sim
    assert x[torch.tensor([0, 2])].shape == (2,)
    assert (torch.arange(4, device=sim) * x.new_tensor(2.0)).tolist() == [0, 2, 4, 6]
    assert torch.zeros(3).copy_(x).device.type == "cpu"
    with pytest.raises(TypeError, match="to numpy"):
        x.numpy()


@pytest.mark.parametrize(
    "act",
    [
        lambda x: x.sum().item(),
        lambda x: x.cpu(),
        lambda x: bool(x.sum() > 0),
        lambda x: x.nonzero(),
        lambda x: x.tolist(),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: torch.equal(x, x),
        lambda x: torch.zeros(3).copy_(x),
    ],
)
def test_a_wait_is_counted_with_its_line(act: Callable[[Tensor], object], sim: torch.device) -> None:
    x = torch.ones(3, device=sim)
    with counted_waits() as waits:
        act(x)
    ((line, count),) = waits.lines.items()
    assert line.startswith("tests/device/test_simulated_device.py:") or "test_simulated_device" in line
    assert count == 1


def test_work_on_the_device_is_no_wait_and_a_copy_to_it_may_be(sim: torch.device) -> None:
    x = torch.ones(3, device=sim)
    with counted_waits() as waits:
        (x * 2 + x[1:].sum()).masked_fill_(x > 0, 1.0)
        x[x > 5] = 0
        torch.ones(3).to(sim, non_blocking=True)
        assert not waits.lines
        assert not waits.uploads
        torch.ones(3).to(sim)
        torch.tensor([1.0], device=sim)
    assert sum(waits.uploads.values()) == 2


def test_modules_gradients_copies_files_and_autocast(sim: torch.device) -> None:
    module = nn.Linear(3, 2).to(sim)
    assert isinstance(module.weight, nn.Parameter)
    with torch.autocast(sim.type, torch.bfloat16):
        out = module(torch.ones(1, 3, device=sim))
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert module.weight.grad is not None
    assert module.weight.grad.device == sim
    twin = copy.deepcopy(module)
    with torch.no_grad():
        twin.weight.zero_()
    assert module.weight.abs().sum() > 0
    module.weight.data = module.weight.data.double()
    assert module.weight.cpu().dtype == torch.float64
    torch.save(module.state_dict(), file := io.BytesIO())
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True)["weight"], module.weight.cpu())


def test_outside_its_block_there_is_none() -> None:
    assert not torch.accelerator.is_available()
    with simulated_device():
        assert torch.accelerator.is_available()
    assert not torch.accelerator.is_available()
