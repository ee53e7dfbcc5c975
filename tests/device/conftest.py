"""The simulated device, the only accelerator of the process during a test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from support.simulated_device import register, simulated_device

register()  # pytest imports this before it runs any test


@pytest.fixture
def sim() -> Iterator[torch.device]:
    with simulated_device() as device:
        yield device
