"""Start a command in two real processes on this machine, as torchrun does it on a server, on gloo."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import pytest

needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def launched(what: Sequence[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run `what` (a script or `-m module`, with its arguments) in two processes; their output comes back together."""
    done = subprocess.run(
        [*LAUNCH, *what],
        cwd=cwd,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=400,
    )
    print(done.stdout)
    return done
