"""Two machines as namespaces of this one: one is killed, both start again. Needs root and iproute2."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from support.launched import ENVIRONMENT

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_killed_machine_and_a_lost_folder(tmp_path: Path) -> None:
    words = ["benchmarks/two_machines.py", "--output_dir", str(tmp_path / "two"), "--only", "killed", "private"]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    if done.returncode == 2 and "two machines need" in done.stderr:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    assert result["killed"]["ok"]
    assert result["killed"]["codes"][0] != 0
    assert result["private"]["resume_refused"]
    assert min(result["caches"].values()) > 0
