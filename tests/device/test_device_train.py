"""Whole trainings on a device that is not the CPU, through accelerate and HF's Trainer, and what makes it wait."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from milora_vl.train.__main__ import main
from support.simulated_device import NAME, counted_waits, simulated_device
from support.train_runs import METHODS, lengthen_data, losses, read_json, training
from support.versions import needs_spans
from support.vlm_runs import write_model, write_pictures, write_records

OURS = ("milora_vl", "milora_data")
PLAIN = ("--dropout", "0", "--rank", "2")  # a tiny layer has two input directions that ordinary text leaves free


def on_device(words: list[str]) -> list[str]:
    return [word for word in words if word != "--use_cpu"]


pytestmark = pytest.mark.filterwarnings(  # tiny layers have few directions, and few texts
    "ignore:.* layers protect", "ignore:too little calibration"
)

SLOW = [
    pytest.param("tiny-text", marks=pytest.mark.slow),
    pytest.param("gemma3", marks=[pytest.mark.slow, needs_spans]),
]


@pytest.fixture(params=["tiny", pytest.param("qwen2_5_vl", marks=needs_spans), *SLOW])
def words(request: pytest.FixtureRequest, tmp_path: Path, tiny_data: Path) -> Callable[..., list[str]]:
    """The command line of a run of a family; the last `--model` wins."""
    name = request.param
    if name == "tiny-text":
        records = [record for record in json.loads((tiny_data / "train.json").read_text()) if "image" not in record]
        (tiny_data / "train.json").write_text(json.dumps(records))
    more = ["--model", name]
    if not name.startswith("tiny"):
        (tmp_path / "vlm").mkdir()
        shutil.rmtree(tiny_data / "images")
        write_pictures(tiny_data / "images")
        write_records(tiny_data / "train.json")
        more = ["--model", str(write_model(name, tmp_path / "vlm"))]

    def make(run: str, *others: str) -> list[str]:
        return training(tiny_data, tmp_path / run, *PLAIN, *more, *others)

    return make


def test_the_losses_are_those_of_the_cpu(words: Callable[..., list[str]], tmp_path: Path) -> None:
    assert main(words("cpu")) == 0
    with simulated_device():
        assert main(on_device(words("sim"))) == 0
    (_, there), (_, here) = (zip(*losses(tmp_path / run), strict=True) for run in ("cpu", "sim"))
    assert here == pytest.approx(there, rel=1e-4)
    assert NAME in read_json(tmp_path / "sim", "environment.json")["device"]


def test_mixed_precision_checkpointing_accumulation_evaluation_and_resume(
    words: Callable[..., list[str]], sim: torch.device, tmp_path: Path
) -> None:
    data = words("x")[words("x").index("--data_path") + 1]
    more = [
        "--bf16", "--gradient_checkpointing", "--gradient_accumulation_steps", "2",
        "--per_device_train_batch_size", "2",
        "--eval_data_path", data, "--eval_strategy", "steps", "--eval_steps", "2", "--dropout", "0.1",
    ]  # fmt: skip
    assert main(on_device(words("whole", *more))) == 0
    environment = read_json(tmp_path / "whole", "environment.json")
    assert environment["dtype"] == "bfloat16"
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoint-6")
    assert main(on_device(words("again", *more, "--resume_from_checkpoint", "auto"))) == 0
    assert losses(tmp_path / "again") == losses(tmp_path / "whole")


OTHERS = [["--method", name, *flags, "--bf16"] for name, flags in METHODS.items() if name != "milora"]
LOADERS = [["--packing"], ["--train_sampling_strategy", "group_by_length"], ["--streaming"]]


@pytest.mark.parametrize("more", [*OTHERS, *([*PLAIN, "--dataloader_num_workers", "2", *more] for more in LOADERS)])
def test_other_methods_and_loaders(more: list[str], sim: torch.device, tiny_data: Path, tmp_path: Path) -> None:
    lengthen_data(tiny_data, 8)
    assert main(on_device(training(tiny_data, tmp_path / "run", "--max_steps", "2", *more))) == 0


def waits_of(words: list[str]) -> tuple[Counter[str], Counter[str]]:
    with counted_waits() as waits:
        assert main(words) == 0
    return waits.lines, waits.uploads


def test_a_step_waits_for_nothing_of_ours(words: Callable[..., list[str]], sim: torch.device) -> None:
    """The difference between eight steps and four, with `base_kl`; transformers itself reads what its models check."""
    more = ["--logging_steps", "100", "--save_strategy", "no", "--bf16", "--gradient_accumulation_steps", "2"]
    more += ["--calibration_pictures", "0"]
    assert main(on_device(words("first", *more, "--max_steps", "2"))) == 0  # the calibration, which both runs find
    few, fewer = waits_of(on_device(words("few", *more, "--max_steps", "4")))
    many, uploads = waits_of(on_device(words("many", *more, "--max_steps", "8")))
    assert not [line for line in uploads - fewer if line.startswith((*OURS, "transformers/trainer"))]
    assert all(line.startswith("transformers/") for line in many - few)


def test_a_logged_step_waits_once(sim: torch.device, tiny_data: Path, tmp_path: Path) -> None:
    """HF's Trainer reads the loss and the norm of the gradient, one after the other."""
    words = [*on_device(training(tiny_data, tmp_path / "a", *PLAIN)), "--save_strategy", "no"]
    words += ["--logging_first_step", "False"]
    assert main([*words, "--output_dir", str(tmp_path / "first")]) == 0  # the calibration, which both runs find
    each, _ = waits_of(words)
    once, _ = waits_of([*words, "--output_dir", str(tmp_path / "b"), "--logging_steps", "100"])
    assert [line.rpartition(":")[0] for line in each - once] == ["transformers/trainer.py"] * 2
    assert set((each - once).values()) == {5}
