"""A folder with everything wrong in it: check finds and counts it, --fix drops it, training survives it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from milora_data.check import scan
from milora_vl.train.__main__ import main
from support import dirty_data
from support.train_runs import training


@pytest.fixture
def dirty(tmp_path: Path) -> Path:
    return dirty_data.make(tmp_path / "dirty")


def test_every_kind_is_found(dirty: Path) -> None:
    report = scan(dirty, dirty.parent / "images")
    found = [(finding.kind, finding.message) for finding in report.findings]
    kinds = {kind for kind, _ in found}
    expected = {kind for kind, _ in [*dirty_data.BROKEN, *dirty_data.ODD] if kind != "forgotten"}
    expected |= {"corrupt_picture", "broken_json"}
    assert expected <= kinds
    for name in dirty_data.UNREADABLE:
        kind = "missing_picture" if name in ("folder.png", "pipe.png") else "corrupt_picture"
        assert any(found_kind == kind and name in message for found_kind, message in found), name
    peculiar = {(kind, name) for kind, message in found for name in dirty_data.PECULIAR if name in message}
    assert peculiar == {("tiny_picture", "long.png"), ("tiny_picture", "tall.png")}
    assert report.records == len(dirty.read_bytes().splitlines()) - len(dirty_data.LINES) - 1  # an empty one


def test_training_survives_it_and_says_what_it_cost(dirty: Path, tmp_path: Path, capfd: Any) -> None:
    run = tmp_path / "run"
    folder = dirty.parent
    (folder / "train.json").write_text("")  # `words` names it; the flag below wins
    extra = ["--data_path", str(dirty), "--bad_images", "skip", "--rank", "4", "--max_steps", "30"]
    extra += ["--per_device_train_batch_size", "1", "--save_steps", "30", "--dataloader_num_workers", "2"]
    assert main(training(folder, run, *extra)) == 0
    said = capfd.readouterr().err
    assert "15 broken records skipped" in said
    assert "2 records without an answer skipped" in said
    state = json.loads((run / "trainer_state.json").read_text())
    assert state["global_step"] == 30
    assert "6 records skipped: images missing or empty" in said
    assert json.loads((run / "environment.json").read_text())["data"]["skipped"] == 6 + 15 + 2
    assert "times while training: " in said


def test_a_held_out_batch_without_a_usable_record_adds_nothing_to_the_loss(tiny_data: Path, tmp_path: Path) -> None:
    """A training record stood in its place."""
    good = json.loads((tiny_data / "val.json").read_text())
    (tiny_data / "images" / "broken.png").write_bytes(b"no picture")
    broken = [{**record, "id": f"broken {record['id']}", "image": "broken.png"} for record in good]
    found = []
    for name, records in (("good", good), ("mixed", [*broken[:1], *good, *broken[1:]])):
        file = tiny_data / f"{name}.json"
        file.write_text(json.dumps(records))
        flags = ["--eval_data_path", str(file), "--eval_strategy", "steps", "--eval_steps", "6", "--rank", "4"]
        flags += ["--per_device_eval_batch_size", "1", "--bad_images", "skip", "--lora_dropout", "0"]
        run = tmp_path / name
        assert main(training(tiny_data, run, *flags)) == 0
        found.append(json.loads((run / "trainer_state.json").read_text())["log_history"])
    good_loss, mixed_loss = (next(entry["eval_loss"] for entry in log if "eval_loss" in entry) for log in found)
    assert mixed_loss == pytest.approx(good_loss, rel=1e-5)
