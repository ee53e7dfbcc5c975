"""Python's garbage collector passes over the imported libraries: a collection takes 0.4 s with them, 0.02 s without.

A training collects twice, and Python itself does so during tests. What a test leaves behind is collected before.
"""

from __future__ import annotations

import atexit
import gc
import sys

import pytest

MANY_MODULES = 300
atexit.register(gc.unfreeze)  # else extension modules report the frozen objects as leaks when Python ends
_num_frozen = 0


def freeze_new_modules() -> None:
    """Take all objects out of later collections, if many modules were imported since the last time."""
    global _num_frozen
    if len(sys.modules) >= _num_frozen + MANY_MODULES:
        gc.collect()
        gc.freeze()
        _num_frozen = len(sys.modules)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    freeze_new_modules()


def pytest_collection_finish() -> None:
    freeze_new_modules()
