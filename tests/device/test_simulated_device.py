"""The simulated device refuses what CUDA refuses, and counts what makes a program wait for a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from support.simulated_device import counted_waits


@pytest.mark.parametrize(
    "act",
    [
        lambda x: x + torch.zeros(3),
        lambda x: torch.zeros(3)[x.long()],
        lambda x: x.index_put((torch.tensor([0]),), torch.zeros(1)),
        lambda x: nn.Linear(3, 2)(x),
        lambda x: torch.rand(3, generator=torch.Generator(), device=x.device),
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
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
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
