"""A resumed run keeps what it was trained with: other settings are refused, harmless ones are allowed and recorded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from milora_vl.common.errors import UserError
from milora_vl.train.__main__ import main
from support.drawn import write_tiny_data
from support.problems import raises_code
from support.train_runs import file_contents, losses, read_json, training

WEIGHTS = "adapter_model.safetensors"
CONSTANT = ["--lr_scheduler_type", "constant"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, tiny_records: list[dict[str, Any]]) -> Path:
    return write_tiny_data(tmp_path_factory.mktemp("resumed") / "data", tiny_records)


@pytest.fixture(scope="module")
def whole(data: Path) -> Path:
    """A finished run, to be looked at and copied."""
    run = data.parent / "whole"
    assert main(training(data, run, "--rank", "8")) == 0
    return run


def cut(whole: Path, run: Path) -> Path:
    """A copy of a run that was killed after its fourth step."""
    shutil.copytree(whole, run)
    shutil.rmtree(run / "checkpoint-6")
    for name in (WEIGHTS, "trainer_state.json"):
        (run / name).unlink()
    return run


def same_weights(first: Path, second: Path) -> bool:
    one, other = load_file(first / WEIGHTS), load_file(second / WEIGHTS)
    return one.keys() == other.keys() and all(tensor.equal(other[name]) for name, tensor in one.items())


def refusal(*command: str) -> list[str]:
    with pytest.raises(UserError) as error:
        main(list(command))
    assert error.value.exit_code == 2
    return str(error.value).splitlines()


@pytest.mark.parametrize(
    ("flags", "rows"),
    [
        (
            ["--rank", "8", "--method", "lora"],
            ["policy[0].method: trained with milora, now lora", "policy[0].protect: trained with 0.95"],
        ),
        (["--rank", "4"], ["policy[0].rank: trained with 8, now 4", "policy[0].alpha: trained with 8, now 4"]),
        (["--rank", "8", "--learning_rate", "5e-4"], ["policy[0].learning_rate: trained with 0.001, now 0.0005"]),
        (
            ["--rank", "8", "--max_length", "512", "--seed", "7"],
            ["data.max_length: trained with 2048, now 512", "train.seed: trained with 42, now 7"],
        ),
        (
            ["--rank", "8", "--per_device_train_batch_size", "2"],
            ["batch in total: trained with 4 (4 x 1 x 1), now 2 (2 x 1 x 1)"],
        ),
    ],
)
def test_other_settings_are_refused_with_old_and_new_values_before_anything_is_read(
    flags: list[str], rows: list[str], whole: Path, data: Path, tmp_path: Path, capfd: Any
) -> None:
    run = cut(whole, tmp_path / "run")
    before = file_contents(run)
    for choice in ("auto", "true", str(run / "checkpoint-4")):
        lines = refusal(*training(data, run, *flags, "--resume_from_checkpoint", choice))
        assert [row for row in rows if not any(line.strip().startswith(row) for line in lines)] == []
        assert f"--recipe {run} --output_dir {run} --resume_from_checkpoint true" in lines[-2]
    assert file_contents(run) == before
    assert "loading" not in capfd.readouterr().err


def test_a_finished_run_is_not_taken_for_another_one(whole: Path, data: Path, tmp_path: Path) -> None:
    """A job that is queued again with other flags has not done what they say."""
    run = shutil.copytree(whole, tmp_path / "run")
    auto = ["--resume_from_checkpoint", "auto"]
    assert main(training(data, run, "--rank", "8", *auto)) == 0
    assert any(
        "policy[0].method" in line for line in refusal(*training(data, run, "--method", "lora", "--rank=8", *auto))
    )
    for checkpoint in run.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    assert any("policy[0].rank" in line for line in refusal(*training(data, run, "--rank", "4", *auto)))
    assert main(training(data, run, "--rank", "8", *auto)) == 0


def test_harmless_changes_leave_the_weights_as_they_would_have_been_and_are_recorded(
    whole: Path, data: Path, tmp_path: Path, capfd: Any
) -> None:
    run = cut(whole, tmp_path / "run")
    before = read_json(run, "environment.json")
    (run / "environment.json").write_text(json.dumps(before | {"seconds": 0.0, "finished": None}))  # it was killed
    moved = shutil.copytree(data / "images", tmp_path / "images")
    changed = {
        "train.save_steps": [2.0, 1.0],
        "train.dataloader_num_workers": [0, 1],
        "train.save_total_limit": [None, 1],
        "train.eval_strategy": ["no", "steps"],
        "train.eval_steps": [None, 1.0],
        "data.eval_path": [None, str(data / "val.json")],
        "data.image_folder": [str(data / "images"), str(moved)],
        "eval.forgetting_every": [None, 2],
    }
    flags = (
        "--save_steps 1 --dataloader_num_workers 1 --save_total_limit 1 --eval_strategy steps --eval_steps 1".split()
    )
    flags += ["--eval_data_path", str(data / "val.json"), "--forgetting_every", "2"]
    flags += ["--image_folder", str(moved), "--resume_from_checkpoint", "auto"]
    assert main(training(data, run, "--rank", "8", *flags)) == 0
    assert losses(run) == losses(whole)
    assert same_weights(run, whole)
    assert "changed since" in capfd.readouterr().err
    environment = read_json(run, "environment.json")
    (resumed,) = environment["resumed"]
    assert "auto" in resumed["command"]
    assert "auto" not in environment["command"]  # the page shows the command that started the run
    assert environment["seconds"] > environment["seconds_of_earlier"] > 0
    assert environment["seconds_of_earlier"] < before["seconds"] + 1
    assert environment["seconds_before_training"] > before["seconds_before_training"]
    assert resumed["from"] == "checkpoint-4"
    assert resumed["changed"] == changed
    assert yaml.safe_load((run / "recipe.yaml").read_text())["train"]["save_steps"] == 1
    assert "train.save_steps 2 -&gt; 1" in (run / "report.html").read_text()


def test_a_constant_schedule_makes_more_steps(data: Path, tmp_path: Path) -> None:
    """Also of a finished run, and by `auto`: a job that is queued again with more steps has something left to do."""
    short, long = tmp_path / "short", tmp_path / "long"
    flags = ["--rank", "4", *CONSTANT]
    assert main(training(data, short, *flags, "--max_steps", "4")) == 0
    assert main(training(data, short, *flags, "--max_steps", "6", "--resume_from_checkpoint", "auto")) == 0
    assert main(training(data, long, *flags)) == 0
    assert losses(short) == losses(long)
    assert same_weights(short, long)
    assert read_json(short, "environment.json")["resumed"][0]["changed"] == {"train.max_steps": [4, 6]}
    fewer = refusal(*training(data, short, *flags, "--max_steps", "3", "--resume_from_checkpoint", "auto"))
    assert "beyond the end of this run, step 3" in fewer[0]
    for checkpoint in short.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    more = refusal(*training(data, short, *flags, "--max_steps", "9", "--resume_from_checkpoint", "auto"))
    assert "it has no checkpoint to continue from" in more[0]


def test_records_are_told_by_their_contents(whole: Path, data: Path, tmp_path: Path) -> None:
    run = cut(whole, tmp_path / "run")
    records = json.loads((data / "train.json").read_text())
    other, moved = tmp_path / "other.json", tmp_path / "moved.json"
    moved.write_text(json.dumps(records, indent=2))
    other.write_text(json.dumps([*records[1:], records[0]]))
    resume = ["--rank", "8", "--resume_from_checkpoint", "auto", "--data_path"]
    with raises_code("resume-other-data", where=f"{other}:record 1"):
        main(training(data, run, *resume, str(other)))
    images = shutil.copytree(data / "images", tmp_path / "images")
    more = ["--image_folder", str(images)]
    seen = [images / record["image"] for record in records if "image" in record]
    kept, before = seen[-1].read_bytes(), (run / "environment.json").read_bytes()
    changed = bytearray(kept)
    changed[-20] ^= 1
    seen[-1].write_bytes(changed)
    with raises_code("resume-other-data", where=seen[-1].name):
        main(training(data, run, *resume, str(moved), *more))
    assert (run / "environment.json").read_bytes() == before
    seen[-1].write_bytes(kept)
    assert main(training(data, run, *resume, str(moved), *more)) == 0
    assert same_weights(run, whole)


@pytest.mark.parametrize("chooses", [False, True])
def test_other_held_out_records_are_named(chooses: bool, data: Path, tmp_path: Path, capfd: Any) -> None:
    held_out = Path(shutil.copytree(data, tmp_path / "data")) / "val.json"
    flags = ["--rank", "4", *CONSTANT, "--save_steps", "2", "--eval_steps", "2", "--eval_strategy", "steps"]
    flags += ["--eval_data_path", str(held_out), *(["--load_best_model_at_end", "--save_total_limit", "1"] * chooses)]
    assert main(training(data, tmp_path / "run", *flags, "--max_steps", "2")) == 0
    resume = training(data, tmp_path / "run", *flags, "--max_steps", "4", "--resume_from_checkpoint", "auto")
    records = json.loads(held_out.read_text())
    records[1]["conversations"][1]["value"] += " Or not."
    held_out.write_text(json.dumps(records))
    if chooses:
        with raises_code("resume-other-data", where=f"{held_out}:record 2"):
            main(resume)
        return
    assert main(resume) == 0
    assert f"{held_out}:record 2: this is the first of the held-out data that differ" in capfd.readouterr().err


def test_a_checkpoint_without_its_recipe_is_refused(whole: Path, data: Path, tmp_path: Path) -> None:
    alone = shutil.copytree(whole / "checkpoint-4", tmp_path / "alone" / "checkpoint-4")
    resume = ["--resume_from_checkpoint", str(alone)]
    with pytest.raises(UserError) as caught:
        main(training(data, tmp_path / "run", "--rank", "8", *resume))
    assert [problem.code for problem in caught.value.problems] == ["resume-no-recipe"]
    shutil.copy(whole / "recipe.yaml", alone.parent)
    shutil.copytree(whole / "_start", alone.parent / "_start")
    assert main(training(data, tmp_path / "run", "--rank", "8", *resume)) == 0
    assert same_weights(tmp_path / "run", whole)


@pytest.mark.parametrize(("save", "log", "saved", "logged"), [("1", "1", [5, 6], [5, 6]), ("2", "2", [6], [6])])
def test_a_resumed_run_logs_and_saves_as_often_as_its_flags_say(
    save: str, log: str, saved: list[int], logged: list[int], whole: Path, data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    resume = ["--resume_from_checkpoint", str(whole / "checkpoint-4"), "--rank", "8"]
    assert main(training(data, run, *resume, "--save_steps", save, "--logging_steps", log)) == 0
    assert sorted(int(path.name.removeprefix("checkpoint-")) for path in run.glob("checkpoint-*")) == saved
    assert [step for step, _ in losses(run) if step > 4] == logged
