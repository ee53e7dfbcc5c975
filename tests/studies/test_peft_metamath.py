"""PEFT's comparison with our arms: the hook into its script, resuming, and the table.

`support/peft_checkout` has the names and keywords of PEFT's script (commit 5d602fd), with a tiny model and two steps.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from studies.peft_metamath import __main__ as command
from studies.peft_metamath.arms import ARMS, LORA, OSF
from support import programs
from support.problems import raises_code

CHECKOUT = Path(__file__).resolve().parents[1] / "support" / "peft_checkout"


@pytest.fixture(autouse=True)
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "subprocess", programs.ForkedSubprocess)


def run(folder: Path, *words: str, checkout: Path = CHECKOUT) -> int:
    return command.main(["--peft_checkout", str(checkout), "--output_dir", str(folder), *words])


def result(folder: Path, arm: str, seed: int = 0) -> dict[str, Any]:
    return json.loads((folder / arm.replace("/", "--") / f"seed-{seed}" / "result.json").read_text())


@pytest.mark.slow
def test_all_arms_train_as_many_numbers_start_at_the_base_and_resume(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path) == 0
    table = capsys.readouterr().out
    results = {arm: result(tmp_path, arm) for arm in ARMS}
    trained = {arm: found["train_info"]["num_trainable_params"] for arm, found in results.items()}
    assert trained == dict.fromkeys(ARMS[:-1], trained[LORA]) | {OSF: trained[OSF]}
    assert {round(found["run_info"]["losses"][0], 4) for found in results.values()} == {
        round(results[LORA]["run_info"]["losses"][0], 4)
    }
    assert len({found["run_info"]["losses"][1] for found in results.values()}) == len(ARMS), "no two arms are the same"
    rule = results["gradient"]["milora_vl"]["policy"][0]
    assert rule == {"modules": "*.q_proj", "method": "gradient", "protect": 0.95, "rank": 7, "alpha": 14.0}
    assert (
        results["milora"]["milora_vl"]["policy"][1]["alpha"] == results["milora"]["milora_vl"]["policy"][1]["rank"] == 3
    )
    assert "| PEFT's: lora/llama-3.2-3B-rank32 | 1 | 47.8 % | 0.050 | 0.607 | 9,175,040 | 20.8 |" in table
    assert table.count("50.0 %") == len(ARMS)
    assert (tmp_path / "table.md").read_text() == table

    (tmp_path / "milora" / "seed-0" / "result.json").unlink()
    written = {arm: (tmp_path / arm.replace("/", "--") / "seed-0" / "log.txt").stat().st_mtime_ns for arm in ARMS}
    assert run(tmp_path) == 0
    again = {arm: (tmp_path / arm.replace("/", "--") / "seed-0" / "log.txt").stat().st_mtime_ns for arm in ARMS}
    assert [arm for arm in ARMS if again[arm] != written[arm]] == ["milora"]
    assert result(tmp_path, "milora")["run_info"]["losses"] == results["milora"]["run_info"]["losses"]


def test_other_seeds_read_the_records_in_another_order_and_options_reach_the_script(tmp_path: Path) -> None:
    assert run(tmp_path, "--arms", "milora", "--seeds", "0", "1", "--learning_rate", "1e-3", "--max_steps", "1") == 0
    first, second = (result(tmp_path, "milora-lr_0.001", seed)["run_info"] for seed in (0, 1))
    assert first["losses"] != second["losses"]
    assert first["max_steps"] == 1
    with raises_code("study-other-settings", "--output_dir"):
        run(tmp_path, "--arms", "milora", "--learning_rate", "1e-3")
    settings = json.loads((tmp_path / "milora-lr_0.001" / "seed-1" / "training_params.json").read_text())
    assert settings["optimizer_kwargs"] == {"lr": 1e-3, "weight_decay": 0.1}
    row = next(line for line in (tmp_path / "table.md").read_text().splitlines() if line.startswith("| milora-lr"))
    assert row.startswith("| milora-lr_0.001 | 2 | 50.0 ± 0.0 % | ")


def test_a_failed_arm_is_reported_and_runs_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkout = tmp_path / "peft"
    shutil.copytree(CHECKOUT, checkout)
    default = checkout / "method_comparison" / "MetaMathQA" / "default_training_params.json"
    default.write_text(default.read_text().replace("Question:", "fail"))
    assert run(tmp_path / "runs", "--arms", LORA, checkout=checkout) == 1
    shown = capsys.readouterr()
    assert "made to fail" in shown.err
    assert "50.0 %" not in shown.out
    assert run(tmp_path / "runs", "--arms", LORA) == 0


def test_a_script_without_the_hooks_stops_the_run(tmp_path: Path) -> None:
    checkout = tmp_path / "peft"
    shutil.copytree(CHECKOUT, checkout)
    script = checkout / "method_comparison" / "MetaMathQA" / "run.py"
    script.write_text(script.read_text().replace("get_model", "build_model"))
    utils = script.with_name("utils.py")
    utils.write_text(utils.read_text().replace("def get_model", "def build_model"))
    assert run(tmp_path / "runs", "--arms", "milora", checkout=checkout) == 1
    assert "has no get_model" in (tmp_path / "runs" / "milora" / "seed-0" / "log.txt").read_text()


def test_unknown_arms_and_checkouts_are_errors(tmp_path: Path) -> None:
    with raises_code("flag-value", "--arms", hint="milora-protected"):
        run(tmp_path, "--arms", "milora-protcted")
    with raises_code("path-missing"):
        run(tmp_path, checkout=tmp_path / "peft")
