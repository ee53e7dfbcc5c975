"""Settings that Hugging Face refuses only once a training starts are refused by the plan, and by a dry run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from milora_vl.train.__main__ import main
from support.problems import raises_code


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    turns = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "a b c"}]
    file = tmp_path_factory.mktemp("records") / "train.json"
    file.write_text(json.dumps([{"id": str(number), "conversations": turns} for number in range(8)]))
    return file


def words(records: Path, flags: str) -> list[str]:
    fixed = f"--model tiny-text --rank 2 --data_path {records} --max_steps 2 --use_cpu True --save_strategy no"
    return [*fixed.split(), *flags.replace("VAL", str(records)).split()]


@pytest.mark.parametrize(
    ("flags", "code", "says"),
    [
        (
            "--metric_for_best_model foo --lr_scheduler_type reduce_lr_on_plateau --eval_data_path VAL",
            "train-arguments",
            "--metric_for_best_model: foo is not measured",
        ),
        ("--lr_scheduler_type cosine_with_min_lr", "train-arguments", "lr_scheduler_kwargs"),
        ("--lr_scheduler_type warmup_stable_decay", "train-arguments", "wsd_schedule"),
        ('--lr_scheduler_kwargs {"bad":1}', "train-arguments", "'bad'"),
        ("--save_strategy best", "train-arguments", "--save_strategy: best needs held-out records"),
        ("--report_to zzz", "tracker-unavailable", "--report_to"),
        ("--logging_steps 0", "flag-value", "--logging_steps"),
        ("--save_steps 0", "flag-value", "--save_steps"),
        ("--load_best_model_at_end --eval_data_path VAL", "train-arguments", "load_best_model_at_end"),
        ("--optim_args foo", "train-arguments", "train"),
        ("--logging_strategy sometimes", "train-arguments", "sometimes.*steps"),
        ("--log_level loud", "train-arguments", "loud"),
        ("--optim adamw_trch", "train-arguments", "adamw_trch"),
        ('--accelerator_config {"x":1}', "train-arguments", "AcceleratorConfig"),
    ],
)
def test_the_plan_refuses_it_and_names_the_setting(flags: str, code: str, says: str, records: Path) -> None:
    with raises_code(code, says=says):
        main([*words(records, flags), "--dry-run"])


@pytest.mark.parametrize(
    "flags",
    [
        "--eval_strategy steps --eval_steps 0 --logging_steps 1 --eval_data_path VAL",
        "--metric_for_best_model accuracy",
        '--lr_scheduler_type polynomial --lr_scheduler_kwargs {"lr_end":0.15} --learning_rate 0.5',
        "--debug=underflow_overflow",
        "--optim sgd --optim_args momentum=0.9",
    ],
)
def test_what_hugging_face_takes_is_not_refused(flags: str, records: Path) -> None:
    assert main([*words(records, flags), "--dry-run"]) == 0


def test_no_answer_within_max_length_is_found_before_the_model_loads(
    records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("milora_vl.train.launch.load_weights", lambda *_, **__: pytest.fail("the model was loaded"))
    with raises_code("record-no-answer", where=str(records), hint="--max_length"):
        main([*words(records, "--max_length 20"), "--output_dir", str(tmp_path / "run")])
    held_out = tmp_path / "held_out.json"
    held_out.write_text(
        json.dumps([{"conversations": [{"from": who, "value": "a " * 900} for who in ("human", "gpt")]}])
    )
    flags = f"--max_length 300 --eval_strategy steps --eval_steps 1 --eval_data_path {held_out}"
    with raises_code("record-no-answer", where="held_out.json", hint="--max_length"):
        main([*words(records, flags), "--output_dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_the_best_checkpoint_by_the_held_out_loss_is_kept(records: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = "--save_strategy best --eval_strategy steps --eval_steps 1 --eval_data_path VAL --save_total_limit 1"
    command = [word for word in words(records, flags) if word != "no"]
    command.remove("--save_strategy")
    assert main([*command, "--output_dir", str(run)]) == 0
    assert len(list(run.glob("checkpoint-*"))) == 1
