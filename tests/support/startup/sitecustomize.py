"""The CPU as the tests see it. Python imports this file when it starts, as `support/machine.py` names its folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

FASTEST = "float32"  # the fastest data type, for every CPU; the suite passes with bfloat16, too
VARIABLE = "MILORA_TESTS_FASTEST"  # another answer, for one test
_read_text = Path.read_text


def _with_settled_cpu(self: Path, *arguments: Any, **keywords: Any) -> str:
    if str(self) != "/proc/cpuinfo":
        return _read_text(self, *arguments, **keywords)
    return "flags : avx512_bf16" if os.environ.get(VARIABLE, FASTEST) == "bfloat16" else "flags :"


Path.read_text = _with_settled_cpu  # type: ignore[method-assign]
