"""The scripts in examples/ run as they are; those of TRL are tested in tests/interop/test_trl.py."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from support.documented import ROOT, flags_of

EXAMPLES = ROOT / "examples"
SCRIPTS = ("llava_own_data", "vision_transformer", "first_adapter")


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_runs_and_saves_an_adapter(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{name}.py"])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert list(tmp_path.glob("*-adapter/adapter_model.safetensors"))


def test_the_jobs_for_many_gpus_have_flags_that_exist() -> None:
    slurm = (EXAMPLES / "many_gpus.slurm.sh").read_text(encoding="utf-8")
    assert subprocess.run(["bash", "-n", str(EXAMPLES / "many_gpus.slurm.sh")]).returncode == 0
    sky = yaml.safe_load((EXAMPLES / "many_gpus.sky.yaml").read_text(encoding="utf-8"))
    assert {"name", "resources", "setup", "run"} <= sky.keys()
    for text in (slurm, sky["run"]):
        (command,) = re.findall(r"-m (milora_vl\.train .*)", re.sub(r"\\\n\s*", "", text))
        used = {word for word in command.split() if word.startswith("--")}
        assert used <= flags_of(f"python -m {command}")
