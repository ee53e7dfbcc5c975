"""The scripts in examples/ run as they are, and the notebook is what its script makes."""

from __future__ import annotations

import importlib.util
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from support.documented import ROOT, words
from support.documented_run import flags_of

EXAMPLES = ROOT / "examples"
SCRIPTS = ("llava_own_data", "text_model", "vision_transformer", "dpo_with_pictures", "first_adapter")


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_runs_and_saves_an_adapter(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{name}.py"])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert list(tmp_path.glob("*-adapter/adapter_model.safetensors"))


def test_easy_vqa_stands_beside_two_baselines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--questions", "8", "--model", "tiny", "--rank", "4", "--max_steps", "2"]
    monkeypatch.setattr(sys, "argv", ["easy_vqa.py", *words])
    runpy.run_path(str(EXAMPLES / "easy_vqa.py"), run_name="__main__")
    (results,) = tmp_path.glob("runs/easy-vqa/eval/test/final/results.json")
    metrics = json.loads(results.read_text())["benchmarks"][0]["metrics"]
    assert metrics[0]["name"] == "accuracy"
    assert all(0 <= metric["baseline"] <= 1 for metric in metrics if metric["name"] != "answer in first line")
    assert "network: 93.8" in capsys.readouterr().out


@pytest.fixture(scope="module")
def maker() -> Any:
    spec = importlib.util.spec_from_file_location("make_notebook", EXAMPLES / "make_notebook.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_notebook_is_made_from_its_script(maker: Any) -> None:
    script = (EXAMPLES / "first_adapter.py").read_text(encoding="utf-8")
    stored = json.loads((EXAMPLES / "first_adapter.ipynb").read_text(encoding="utf-8"))
    assert stored == maker.notebook(script), "run: python examples/make_notebook.py"
    assert [cell["cell_type"] for cell in stored["cells"]][:2] == ["markdown", "code"]


@pytest.mark.slow
def test_the_notebook_runs_in_jupyter(tmp_path: Path) -> None:
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(EXAMPLES / "first_adapter.ipynb", as_version=4)
    nbformat.validate(notebook)
    nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert (tmp_path / "first-adapter" / "adapter_config.json").is_file()


def test_the_jobs_for_many_gpus_have_flags_that_exist() -> None:
    slurm = (EXAMPLES / "many_gpus.slurm.sh").read_text(encoding="utf-8")
    assert subprocess.run(["bash", "-n", str(EXAMPLES / "many_gpus.slurm.sh")]).returncode == 0
    sky = yaml.safe_load((EXAMPLES / "many_gpus.sky.yaml").read_text(encoding="utf-8"))
    assert {"name", "resources", "setup", "run"} <= sky.keys()
    for text in (slurm, sky["run"]):
        (command,) = re.findall(r"-m (milora_vl\.train .*)", re.sub(r"\\\n\s*", "", text))
        used = {word for word in words(command) if word.startswith("--")}
        assert used <= flags_of(f"python -m {command}")
