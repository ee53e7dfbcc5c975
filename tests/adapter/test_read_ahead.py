"""The next weight is read from its file while the present one is decomposed."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from milora_vl.factors.read_ahead import one_ahead, read_weights

MINCORE = ctypes.CDLL(None, use_errno=True)


def mapped(path: Path) -> nn.Linear:
    """Return a layer whose weight is a file that the page cache does not hold."""
    path.write_bytes(os.urandom(1 << 22))
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    layer = nn.Linear(1024, 1024, bias=False, device="meta")
    storage = torch.UntypedStorage.from_file(str(path), shared=True, nbytes=1 << 22)
    layer.weight = nn.Parameter(torch.empty(0).set_(storage, 0, (1024, 1024)))  # type: ignore[arg-type]
    return layer


def resident(layer: nn.Linear) -> float:
    """Return the share of a weight's pages that are in memory."""
    count = (1 << 22) // mmap.PAGESIZE
    pages = (ctypes.c_ubyte * count)()
    failed = MINCORE.mincore(ctypes.c_void_p(layer.weight.data_ptr()), ctypes.c_size_t(1 << 22), pages)
    assert not failed, os.strerror(ctypes.get_errno())
    return sum(page & 1 for page in pages) / count


@pytest.mark.skipif(sys.platform != "linux", reason="needs mincore")
def test_the_next_weight_is_in_memory_before_its_turn_and_the_one_after_it_is_not(tmp_path: Path) -> None:
    layers = [mapped(tmp_path / f"{number}.bin") for number in range(3)]
    if resident(layers[2]) > 0:
        pytest.skip("this file system keeps the pages")
    work = one_ahead(list(enumerate(layers)))
    assert next(work) == 0
    deadline = time.monotonic() + 30
    while resident(layers[1]) < 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert resident(layers[1]) == 1
    assert resident(layers[2]) == 0
    assert list(work) == [1, 2]


def test_pieces_without_a_module_and_weights_elsewhere_are_passed_on() -> None:
    elsewhere, transposed, here = nn.Linear(8, 8, device="meta"), nn.Linear(8, 8, bias=False), nn.Linear(2048, 2)
    transposed.weight = nn.Parameter(torch.ones(8, 8).T[:4])
    assert list(one_ahead([("a", None), ("b", elsewhere), ("c", None), ("d", here)])) == ["a", "b", "c", "d"]
    assert list(one_ahead([])) == []
    assert read_weights(elsewhere) == read_weights(transposed) == 0
    assert read_weights(here) == 2 * 2048 * 4 // mmap.PAGESIZE + 1
