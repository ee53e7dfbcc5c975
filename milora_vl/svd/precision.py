"""True float32 products, whatever the program around asks for: TF32 or bfloat16 would spoil a Gram matrix unseen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Switch off autocast, TF32 and bfloat16 products; no gradients either. Everything is put back."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        try:
            switches: list[Any] = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]  # type: ignore[attr-defined]
            before = [switch.fp32_precision for switch in switches]
        except AttributeError:  # torch < 2.9 knows one switch for all
            whole = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("highest")
            try:
                yield
            finally:
                torch.set_float32_matmul_precision(whole)
            return
        for switch in switches:
            switch.fp32_precision = "ieee"
        try:
            yield
        finally:
            for switch, value in zip(switches, before, strict=True):
                switch.fp32_precision = value
