"""`--after`: a run keeps the update of finished runs, protects the inputs of their records, and one LoRA comes out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file

from milora_vl import load_adapter, load_model
from milora_vl.core.adapter.sidecar import read_sidecar
from milora_vl.models.tiny import tiny_llava
from milora_vl.report.read_run import read_run
from milora_vl.report.tables import tasks_table
from milora_vl.train.__main__ import main
from support.adapter_cases import llava_batch
from support.drawn import write_tiny_data
from support.launched import KINDS, needs_deepspeed, train_in_two
from support.plans import plan
from support.problems import raises_code
from support.train_runs import losses, read_json, training

pytestmark = pytest.mark.filterwarnings("ignore:too little calibration", "ignore:.* protect less than their rule")
PROJECTOR_TOO = (
    "[{modules: language, method: milora, rank: 4, protect: 0.5, learning_rate: 0.002}, "
    "{modules: projector, method: full, learning_rate: 0.003}]"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, tiny_records: list[dict[str, Any]]) -> Path:
    """train.json is the first task, next.json the second one."""
    folder = write_tiny_data(tmp_path_factory.mktemp("after") / "data", tiny_records)
    (folder / "next.json").write_text(json.dumps(tiny_records[::-1][:8]))
    return folder


@pytest.fixture(scope="module")
def first(data: Path) -> Path:
    """A finished run, to be read alone."""
    run = data.parent / "first"
    assert main(training(data, run, "--policy", PROJECTOR_TOO, "--save_strategy", "no")) == 0
    return run


def second(data: Path, first: Path, run: Path, *more: str) -> list[str]:
    words = training(data, run, "--after", str(first), *more)
    return [word.replace("train.json", "next.json") for word in words]


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**llava_batch(load_model("tiny")[0])).logits


def test_three_tasks_in_a_row_are_one_lora_that_lists_them(
    data: Path, first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(second(data, first, tmp_path / "b", "--save_strategy", "no")) == 0
    assert main(second(data, tmp_path / "b", tmp_path / "c", "--save_strategy", "no", "--rank", "2")) == 0
    shown = capsys.readouterr().err
    assert "room  language: " in shown
    assert f"% in {first}, " in shown
    assert "the LoRA of all 3 tasks has rank " in shown
    rules = yaml.safe_load((tmp_path / "b" / "recipe.yaml").read_text())["policy"]
    assert [(rule["modules"], rule["method"], rule["rank"], rule["protect"]) for rule in rules] == [
        ("language", "milora", 4, 0.5),
        ("projector", "milora", 4, 0.5),
    ]
    saved = read_sidecar(tmp_path / "c")
    assert saved is not None
    assert [task["run"] for task in saved.tasks] == [str(first), str(tmp_path / "b"), str(tmp_path / "c")]
    assert [Path(task["data"]["path"]).name for task in saved.tasks] == ["train.json", "next.json", "next.json"]
    assert [task["records"] for task in saved.tasks] == [len(json.loads((data / "train.json").read_text())), 8, 8]
    rules = [rule for task in saved.tasks for rule in task["rules"] if rule["tower"] == "language"]
    assert [(rule["rank"], rule["protect"], rule["modules"]) for rule in rules] == [
        (4, 0.5, 14),
        (4, 0.5, 14),
        (2, 0.5, 14),
    ]
    assert {target.rank for target in saved.targets if target.tower == "language"} == {10}
    table = tasks_table(read_run(tmp_path / "c"))
    assert [row[0] for row in table.rows] == [str(first), str(tmp_path / "b"), str(tmp_path / "c")]
    assert f"also holds the updates of `{first}`, `{tmp_path / 'b'}`" in (tmp_path / "c" / "README.md").read_text()
    base, _ = load_model("tiny")
    assert torch.allclose(
        logits(PeftModel.from_pretrained(load_model("tiny")[0], tmp_path / "c")),
        logits(load_adapter(base, tmp_path / "c")),
        atol=1e-6,
    )


def test_it_starts_where_the_first_run_ended(data: Path, first: Path, tmp_path: Path) -> None:
    held_out = ["--eval_data_path", str(data / "val.json"), "--eval_strategy", "steps", "--eval_on_start", "True"]
    still = ["--max_steps", "1", "--save_strategy", "no", "--learning_rate", "1e-12", "--forgetting_every", "1"]
    assert main(training(data, tmp_path / "on", "--adapter", str(first), *still, *held_out)) == 0
    assert main(second(data, first, tmp_path / "b", *still, *held_out)) == 0
    logs = [read_json(tmp_path / name, "trainer_state.json")["log_history"] for name in ("on", "b")]
    for key in ("eval_loss", "forgetting"):  # forgetting is since the untouched base
        values = [next(entry[key] for entry in log if key in entry) for log in logs]
        assert values[1] == pytest.approx(values[0], rel=1e-4)


def test_a_killed_second_run_resumes_without_the_first_one(data: Path, first: Path, tmp_path: Path) -> None:
    gone, whole, cut = tmp_path / "gone", tmp_path / "whole", tmp_path / "cut"
    shutil.copytree(first, gone)
    assert main(second(data, gone, whole)) == 0
    shutil.rmtree(gone)
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoint-6")
    for name in ("adapter_model.safetensors", "trainer_state.json"):
        (cut / name).unlink()
    assert main([*second(data, gone, cut), "--resume_from_checkpoint", "auto"]) == 0
    assert losses(cut) == losses(whole)
    weights = [load_file(run / "adapter_model.safetensors") for run in (whole, cut)]
    assert all(tensor.equal(weights[1][name]) for name, tensor in weights[0].items())
    assert [read_json(run, "milora.json")["tasks"][0]["run"] for run in (whole, cut)] == [str(gone)] * 2


def test_records_that_have_moved_or_changed(
    data: Path, first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(first, moved)

    def recorded(name: str) -> None:
        for file in ("recipe.yaml", "milora.json"):
            (moved / file).write_text((first / file).read_text().replace("train.json", name))

    recorded("nowhere.json")
    words = second(data, moved, tmp_path / "b", "--max_steps", "1", "--save_strategy", "no")
    for more in ([], ["--dry_run"]):
        with raises_code("", where="--after", hint="put them back"):
            main([*words, *more])
    (data / "broken.json").write_text("{")
    words = second(data, moved, tmp_path / "c", "--dry_run")
    for name, said in (("next.json", "other records"), ("broken.json", "JSON")):
        recorded(name)
        with raises_code("", message=said, hint="put them back"):
            main(words)
    other = shutil.copytree(data, tmp_path / "data")  # other pictures under the names of the first task's
    for picture in (other / "images").iterdir():
        Image.new("RGB", (32, 32), "red").save(picture)
    for file in ("recipe.yaml", "milora.json"):
        (moved / file).write_text((first / file).read_text().replace(str(data), str(other)))
    with raises_code("", message="are others", hint="put them back"):
        main(words)


def test_a_run_without_protection_is_followed_by_one_with_it(data: Path, tmp_path: Path) -> None:
    assert main(training(data, tmp_path / "a", "--method", "lora", "--rank", "4", "--save_strategy", "no")) == 0
    found = plan(second(data, tmp_path / "a", tmp_path / "b"))
    assert "without protection" in found.notes[0]
    assert {(target.method, target.rank, target.protect) for target in found.targets} == {("milora", 4, 0.95)}
    chosen = plan(second(data, tmp_path / "a", tmp_path / "b", "--method", "lora"))
    assert {target.protect for target in chosen.targets} == {0}
    assert any("no rule has protect" in warning for warning in chosen.warnings)


@pytest.mark.parametrize(
    ("flags", "code", "where"),
    [
        (["--adapter", "FIRST"], "recipe-conflict", "--after"),
        (["--method", "full"], "", "--method"),
        (["--method", "dora"], "", "--after"),
        (["--policy", PROJECTOR_TOO], "", "--policy"),
    ],
)
def test_what_cannot_train_after_it_is_refused(
    flags: list[str], code: str, where: str, data: Path, first: Path, tmp_path: Path
) -> None:
    words = [word.replace("FIRST", str(first)) for word in flags]
    with raises_code(code, where=where):
        plan(second(data, first, tmp_path / "b", *words))


def test_what_is_no_adapter_of_ours_is_refused(data: Path, first: Path, tmp_path: Path) -> None:
    stock = tmp_path / "stock"
    shutil.copytree(first, stock, ignore=shutil.ignore_patterns("milora*", "checkpoint-*"))
    with raises_code("", where="--after", hint="--to merged"):
        plan(second(data, stock, tmp_path / "b"))
    load_model("tiny")[0].save_pretrained(tmp_path / "whole")
    with raises_code("adapter-missing", where="--after", hint="--model"):
        plan(second(data, tmp_path / "whole", tmp_path / "b"))
    with raises_code("adapter-no-folder", where="--after"):
        plan(second(data, tmp_path / "none", tmp_path / "b"))
    other, processor = tiny_llava(seed=1)
    for part in (other, processor):
        part.save_pretrained(tmp_path / "other")
    for words in (second(data, first, tmp_path / "b"), training(data, tmp_path / "b", "--adapter", str(first))):
        with raises_code("adapter-wrong-base", message="holds none of its weights"):  # before weights load
            plan([*words, "--model", str(tmp_path / "other")])
    for part in (tiny_llava()[0].bfloat16(), processor):
        part.save_pretrained(tmp_path / "rounded")
    plan(second(data, first, tmp_path / "b", "--model", str(tmp_path / "rounded")))
    other.config.text_config.intermediate_size *= 2
    other.config.save_pretrained(tmp_path / "other")
    with raises_code("adapter-wrong-base", where="mlp", message="there, here"):
        plan(second(data, first, tmp_path / "b", "--model", str(tmp_path / "other")))
    with raises_code("", where="--after", message="the model lacks", hint="the base model that the adapter"):
        plan(second(data, first, tmp_path / "b", "--model", "tiny-text"))
    assert main(second(data, first, tmp_path / "b", "--max_steps", "1", "--save_strategy", "no")) == 0
    with raises_code("adapter-several-tasks", hint="--after"):
        plan(training(data, tmp_path / "c", "--adapter", str(tmp_path / "b")))


@pytest.mark.slow
@needs_deepspeed
def test_two_processes_train_as_one(data: Path, tiny_folder: Path, tmp_path: Path) -> None:
    model = ["--model", str(tiny_folder), "--base_kl_weight", "0"]  # each process would read other texts
    words = training(data, tmp_path / "a", *model, "--policy", PROJECTOR_TOO, "--save_strategy", "no")
    assert main(words) == 0
    assert main(second(data, tmp_path / "a", tmp_path / "one", *model)) == 0
    halved = [*model, "--per_device_train_batch_size", "2"]
    train_in_two([second(data, tmp_path / "a", tmp_path / k, *halved, *more) for k, more in KINDS.items()], tmp_path)
    expected = load_file(tmp_path / "one" / "adapter_model.safetensors")
    for kind in KINDS:
        found = load_file(tmp_path / kind / "adapter_model.safetensors")
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)
