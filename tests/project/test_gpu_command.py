"""`make gpu` on a machine without a GPU: all parts run with tiny models, and a stopped or failed part loses nothing."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu


@pytest.mark.slow
def test_all_parts_run_without_a_card(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "gpu.json"
    words = ["--device", "cpu", "--tiny", "--output", str(file), "--only", "tests", "llava-1.5-7b", "questions"]
    assert gpu.main(words) == 0
    found = json.loads(file.read_text())
    assert found["tests"]["result"]["failure"] == found["tests"]["result"]["error"] == "none"
    assert found["llava-1.5-7b"]["result"]["milora"]["tokens_per_second"] > 0
    assert found["questions"]["result"]["per_second"] > 0
    assert "tokens_per_second" in capsys.readouterr().out


def test_a_failed_part_is_recorded_and_finished_ones_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        asked.append(name := command[command.index("--part") + 1])
        if name == "questions":
            return subprocess.CompletedProcess(command, 1, "", "Traceback\nValueError: too many questions\n")
        return subprocess.CompletedProcess(command, 0, '{"milora": {"tokens_per_second": 5}}\n', "")

    monkeypatch.setattr(gpu.subprocess, "run", run)
    file = tmp_path / "gpu.json"
    words = ["--device", "cpu", "--tiny", "--output", str(file), "--only", "questions", "llava-1.5-7b"]
    assert [gpu.main(words), gpu.main(words)] == [1, 1]
    assert asked == ["questions", "llava-1.5-7b", "questions"]
    assert json.loads(file.read_text())["questions"]["error"] == "ValueError: too many questions"
    assert "failed: ValueError" in capsys.readouterr().out
