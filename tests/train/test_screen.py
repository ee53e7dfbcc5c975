"""The policy table and the line people grep."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers.trainer_pt_utils import get_model_param_count

from milora_vl.common.cli.screen import Screen
from milora_vl.core.adapter.apply import apply_milora
from milora_vl.core.policy import Policy
from milora_vl.core.policy.resolve import policy_rows
from milora_vl.core.policy.rules import METHODS
from milora_vl.train.__main__ import main
from milora_vl.train.counts import trained_sizes
from milora_vl.train.plan import show_policy, trainable_line
from milora_vl.train.settings import with_rates
from support.problems import raises_code
from support.programs import run as run_program

RULES = [
    {"modules": "language", "method": "milora", "protect": 0, "rank": 4, "learning_rate": 2e-4},
    {"modules": "language.layers[0].attention", "rank": 8},
    {"modules": "projector", "method": "full"},
]


def test_one_row_per_rule_with_its_selector_as_written(tiny_llava: Callable[..., Any]) -> None:
    base = tiny_llava()[0]
    targets = with_rates(Policy.parse(RULES).resolve(base), {"learning_rate": 3e-4})
    sizes, meta = trained_sizes(targets, base), tiny_llava()[0]
    model = apply_milora(base, Policy.parse(RULES))
    rows = policy_rows(RULES, targets, sizes, meta, {layer.path: layer.energy for layer in model.milora_report})
    assert [row[:5] for row in rows] == [
        ("language", "10", "MiLoRA", "4", "4"),
        ("language.layers[0].attention", "4", "MiLoRA", "8", "8"),
        ("projector", "2", "full", "-", "-"),
    ]
    assert [row[6] for row in rows] == ["0.0002", "0.0002", "0.0003"]
    assert rows[2][5:] == ("6,272", "0.0003", "-", "the weight itself")
    assert rows[0][7].endswith(" %")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(sizes.values()) == trained


@pytest.mark.parametrize("columns", ["40", "200"])
def test_a_narrow_screen_cuts_no_number(columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    shown = io.StringIO()
    row = ("language.layers[0-11].self_attn.q_proj", "12", "milora", "64", "64", "123,456,789", "0.0002", "0.12 %", "x")
    show_policy(Screen(shown), [row], ["vision"])
    assert all(cell in shown.getvalue() for cell in row[1:])


@pytest.mark.parametrize("method", sorted({name for name, method in METHODS.items() if "rank" in method.fields}))
def test_the_table_counts_what_trains(tiny_llava: Callable[..., Any], method: str) -> None:
    base = tiny_llava()[0]
    share = {} if method == "dora" else {"protect": 0}
    rules = [{"modules": "language", "method": method, "rank": 4, **share}]
    sizes = trained_sizes(Policy.parse(rules).resolve(base), base)
    assert sum(sizes.values()) == get_model_param_count(apply_milora(base, rules), trainable_only=True)


def test_the_line_is_pefts_own(tiny_llava: Callable[..., Any], capsys: Any) -> None:
    model = apply_milora(tiny_llava()[0], Policy.parse(RULES))
    model.print_trainable_parameters()
    line = trainable_line(get_model_param_count(model, trainable_only=True), get_model_param_count(model))
    assert capsys.readouterr().out.strip() == line


def test_a_training_without_data_says_only_that(capsys: pytest.CaptureFixture[str]) -> None:
    with raises_code("data-no-path"):
        main(["--model", "tiny", "--rank", "4", "--output_dir", "none"])
    assert capsys.readouterr().err == ""


def test_a_training_into_a_pipe_writes_plain_lines_to_stderr(tiny_data: Path, tmp_path: Path) -> None:
    done = run_program(
        [
            "milora_vl.train", "--model", "tiny", "--rank", "4", "--max_steps", "2",
            "--logging_steps", "1",
            "--data_path", str(tiny_data / "train.json"), "--image_folder", str(tiny_data / "images"),
            "--eval_data_path", str(tiny_data / "train.json"), "--use_cpu", "--output_dir", str(tmp_path / "run"),
        ]
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "")
    assert "\x1b" not in done.stderr
    assert "\r" not in done.stderr
    assert "Warning" not in done.stderr
    shown = done.stderr.splitlines()
    assert any(line.startswith("step 1/2  loss ") and line.endswith(" s left") for line in shown)
    assert any(line.startswith("step 2/2  loss ") for line in shown)
    assert any(line.startswith("step 2/2  loss on held-out records ") for line in shown)
    assert not any(line.startswith("{'") for line in shown)  # as Hugging Face prints a log entry
    assert done.stderr.rstrip().splitlines()[-1].startswith("next ")
