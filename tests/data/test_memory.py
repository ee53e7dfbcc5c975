"""A loader process keeps the memory that batches free; the main process is left alone."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from typing import Any

import pytest
from torch.utils.data import DataLoader

from milora_data.batches import memory
from milora_data.batches.record_collator import Item, RecordCollator
from milora_data.records.record import Record

ON_GLIBC = platform.libc_ver()[0] == "glibc"


class Kept(RecordCollator[int]):
    """A collator whose batch says whether its process keeps freed memory."""

    def _collated(self, records: Any) -> dict[str, Any]:
        return {"was_asked": memory.keep_freed_memory.cache_info().currsize}

    def _read(self, record: Record) -> int:
        raise NotImplementedError


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    memory.keep_freed_memory.cache_clear()
    yield
    memory.keep_freed_memory.cache_clear()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_only_a_loader_process_keeps_freed_memory(num_workers: int) -> None:
    records: list[Item] = [Record("a", (), ())]
    (batch,) = DataLoader(records, collate_fn=Kept(), num_workers=num_workers)  # type: ignore[arg-type]
    assert batch["was_asked"] == num_workers


@pytest.mark.parametrize("name", ["MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", ""])
def test_the_settings_of_the_environment_have_precedence(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Libc:
        def mallopt(self, parameter: int, value: int) -> int:
            asked.append((parameter, value))
            return 1

    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: Libc())
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_", raising=False)
    if name:
        monkeypatch.setenv(name, "131072")
    assert memory.keep_freed_memory() == (ON_GLIBC and not name)
    assert asked == ([(-3, 1 << 30), (-1, 1 << 30)] if ON_GLIBC and not name else [])
