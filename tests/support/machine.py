"""One machine for all tests: what its environment says is settled here, before any other module of ours is imported."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support.startup import sitecustomize

for name in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR"):  # rich and argparse follow them
    os.environ.pop(name, None)
for name in ("no_proxy", "NO_PROXY"):  # the servers of the tests run here
    os.environ[name] = f"{os.environ.get(name, '')},localhost,127.0.0.1".strip(",")
paths = (str(Path(__file__).parent / "startup"), os.environ.get("PYTHONPATH"))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
os.environ.setdefault("OMP_NUM_THREADS", "1")
if cache := os.environ.get("MILORA_CACHE"):  # perhaps because the home, where others cache, cannot be written
    for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
        os.environ.setdefault(name, cache)


@contextmanager
def fastest(dtype: str) -> Iterator[None]:
    """Inside this context `dtype` (float32 or bfloat16) is the fastest, here and in programs that a test starts."""
    from milora_vl.models import devices

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(sitecustomize.VARIABLE, dtype)
        devices._cpu_flags.cache_clear()
        yield
    devices._cpu_flags.cache_clear()
