"""`make gpu` on a machine without a GPU: all parts run with tiny models, and a stopped or failed part loses nothing."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu

TRY = ["--device", "cpu", "--output"]


@pytest.mark.slow
def test_all_parts_run_without_a_card(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "gpu.json"
    parts = [name for name in gpu.PARTS if find_spec("trl") or not name.endswith("/trl")]
    assert gpu.main([*TRY, str(file), "--only", *parts]) == 0
    found = {name: entry["result"] for name, entry in json.loads(file.read_text()).items()}
    assert list(found) == parts
    for model in gpu.MODELS:
        for way in (*gpu.OURS, "hf"):
            assert found[f"{model}/{way}"]["tokens_per_second"] > 0
        assert found[f"{model}/milora"]["planned_gb"] > 0
        assert found[f"{model}/protected"].keys() >= {"texts_s", "calibration_s"}
    assert found["demo"].keys() >= {"seconds", "score of the base", "score of the final"}
    table = capsys.readouterr().out
    assert f"{gpu.MODELS[0]}, speed" in table
    assert "milora over hf" in table


def test_a_failed_part_is_recorded_and_finished_ones_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[object] = []

    def apart(script: str, *words: object) -> Any:
        asked.append(words[1])
        return {
            "questions": {"error": "ValueError: too many questions"}, "demo": None
        }.get(str(words[1]), {"result": {"tokens_per_second": 5}})  # fmt: skip

    monkeypatch.setattr(gpu, "apart", apart)
    file = tmp_path / "gpu.json"
    assert [gpu.main([*TRY, str(file)]), gpu.main([*TRY, str(file)])] == [1, 1]
    assert asked == [*gpu.PARTS, "questions", "demo"], "only what has no result runs again"
    assert json.loads(file.read_text())["demo"]["error"] == "the process died"
    assert "failed ValueError: too many questions" in capsys.readouterr().out
