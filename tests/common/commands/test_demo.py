"""`milora demo`: all its steps, and none of them twice."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import llava_recipes
from milora_vl.demo import FULL, QUICK, fitted, main
from support.eval_questions import write_questions
from support.problems import raises_code


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with small questions in place of the drawn set, and a recipe of a small model."""
    questions = write_questions(tmp_path / "data" / "emoji")
    for name in ("train.json", "val.json"):
        shutil.copy(questions / "test.json", questions / name)
    recipe = llava_recipes.read("smol-llava-demo").replace("model: smol-llava", "model: tiny")
    recipe = recipe.replace("rank: 64, alpha: 64", "rank: 4, alpha: 4").replace("max_steps: 150", "max_steps: 2")
    (tmp_path / "tiny.yaml").write_text(recipe)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_the_demo_trains_evaluates_and_continues_where_it_stopped(folder: Path, capfd) -> None:
    assert main(["--recipe", "tiny.yaml", "--quick"]) == 0
    out, err = capfd.readouterr()
    assert "report: runs/demo/report.html" in out
    assert "done already\n$ python -m milora_data emoji" in err
    assert "[3/3] Ask the base" in err
    results = json.loads((folder / "runs" / "demo" / "eval" / "emoji" / "final" / "results.json").read_text())
    assert results["limit"] == 64
    before = (folder / "runs" / "demo" / "adapter_model.safetensors").stat().st_mtime
    assert main(["--recipe", "tiny.yaml", "--quick", "--format", "json"]) == 0
    assert "done already\n$ python -m milora_vl.train" in (printed := capfd.readouterr()).err
    assert json.loads(printed.out)["benchmarks"] == results["benchmarks"]
    assert (folder / "runs" / "demo" / "adapter_model.safetensors").stat().st_mtime == before


def test_a_step_that_fails_stops_the_demo(folder: Path, capfd, forked_programs: None) -> None:
    with raises_code("", message="milora_vl.train failed", hint="it continues with this step"):
        main(["--recipe", "no-such-recipe"])
    err = capfd.readouterr().err
    assert "no-such-recipe" in err
    assert err.startswith("3 parts: ")  # the size, before anything is downloaded
    assert "[2/3] Fine-tune." in err


@pytest.mark.parametrize("seconds", [60, 290, 700, 1500, 9000, 1e7])
def test_a_slower_machine_does_less_and_never_less_than_quick(seconds: float) -> None:
    chosen = fitted(seconds)
    for name in ("steps", "texts", "pictures", "forgetting_tokens"):
        assert getattr(QUICK, name) <= getattr(chosen, name) <= getattr(FULL, name)
    assert chosen.steps == max(20, min(150, round(150 * 300 / seconds)))
    assert (chosen.questions is None) == (seconds <= 300)
