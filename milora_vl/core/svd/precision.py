"""Force true float32 products: TF32 or bfloat16 products would make a Gram matrix inaccurate without any error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Disable autocast, TF32 products, bfloat16 products and gradients, and restore the settings at the end."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        try:
            switches: list[Any] = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]  # type: ignore[attr-defined]
            before = [switch.fp32_precision for switch in switches]
        except AttributeError:  # torch < 2.9 has a single setting for all backends
            precision = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("highest")
            try:
                yield
            finally:
                torch.set_float32_matmul_precision(precision)
            return
        for switch in switches:
            switch.fp32_precision = "ieee"
        try:
            yield
        finally:
            for switch, value in zip(switches, before, strict=True):
                switch.fp32_precision = value
