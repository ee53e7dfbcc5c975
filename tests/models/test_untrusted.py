"""What comes from strangers runs no code and is explained: pickles in the place of weights, models that bring code."""

from __future__ import annotations

import json
import os
import pickle
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

from milora_vl import apply_milora, load_model, save_adapter
from milora_vl.core.adapter.folders import NON_LORA
from milora_vl.core.adapter.sidecar import stored_tensors
from milora_vl.interop.llava_layout import read_llava
from milora_vl.models.base import _weight_files, config_of
from milora_vl.models.projector import read_projector
from milora_vl.train.output import run_failures
from support.adapter_cases import one_rule
from support.problems import raises_code

SAID = r"holds more than tensors \((posix|nt)\.system\), so reading it could run code: it was not read"


class Hostile:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("echo harm > harmed",)


def zipped(file: Path) -> None:
    torch.save({"weight": Hostile()}, file)


def bare(file: Path) -> None:
    file.write_bytes(pickle.dumps(Hostile(), protocol=2))


@pytest.fixture(autouse=True)
def unharmed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    yield
    assert not Path("harmed").exists()


@pytest.fixture
def adapter(tiny_llama: Callable[..., Any], tmp_path: Path) -> Path:
    save_adapter(apply_milora(tiny_llama()[0], one_rule()), tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("write", [zipped, bare])
def test_code_in_the_place_of_weights_is_named_and_never_run(write: Callable[[Path], None], adapter: Path) -> None:
    write(Path("projector.bin"))
    with raises_code("weights-unreadable", says=SAID):
        read_projector(Path("projector.bin"))
    write(adapter / NON_LORA)
    with raises_code("weights-unreadable", says=SAID):
        read_llava(adapter)
    write(Path("pytorch_model.bin"))
    with raises_code("weights-unreadable", says=SAID):
        next(iter(_weight_files(Path())))
    (adapter / "adapter_model.safetensors").unlink()
    write(adapter / "adapter_model.bin")
    with raises_code("weights-unreadable", says=SAID):
        stored_tensors(adapter)


def test_code_in_the_states_of_a_checkpoint_ends_a_run_in_a_line(tmp_path: Path) -> None:
    zipped(Path("optimizer.pt"))
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    with raises_code("checkpoint-unreadable", says="a file of the checkpoint " + SAID), run_failures(arguments):
        torch.load("optimizer.pt", weights_only=True)


def test_a_model_that_brings_code_is_refused_without_a_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    classes = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM", "AutoProcessor"), "own.Own")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": classes}))
    (tmp_path / "model" / "own.py").write_text("open('harmed', 'w').close()\nclass Own: pass\n")
    for load in (load_model, config_of):
        monkeypatch.setattr(sys, "stdin", StringIO("y\ny\ny\n"))
        with raises_code("model-unreadable", says=r".*model: cannot read the model: .*custom code"):
            load(str(tmp_path / "model"))
    assert capsys.readouterr().out == ""
