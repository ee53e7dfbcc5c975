"""The device of the tests for a real card: `MILORA_GPU_TESTS_ON=cpu` runs them without one, for typing errors."""

from __future__ import annotations

import os

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    name = os.environ.get("MILORA_GPU_TESTS_ON", "cuda")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(name)


@pytest.fixture(scope="session")
def on_device(device: torch.device) -> list[str]:
    """The flags that start a training there."""
    return ["--use_cpu"] if device.type == "cpu" else []
