"""What a training does with its data: packing, batches of one kind, broken pictures under each policy."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from milora_data.batches.image_text_collator import ImageTextCollator
from milora_data.check import MissingImages
from milora_data.records.record import Record
from milora_vl.common.errors import UserError
from milora_vl.train.__main__ import main
from support.problems import raises_code
from support.train_runs import lengthen_data, losses, training


def test_packed_records_train_and_resume(tiny_data: Path, tmp_path: Path, capfd: Any) -> None:
    lengthen_data(tiny_data, 60)
    extra = ["--rank", "4", "--packing", "--max_length", "256", "--per_device_train_batch_size", "2", "--dropout", "0"]
    assert main(training(tiny_data, tmp_path / "whole", *extra)) == 0
    said = capfd.readouterr().err
    assert "packed into" in said
    assert re.search(r"epochs? of \d+ packed rows", said)
    assert len(list(tiny_data.glob("train.json.lengths-*.npy"))) == 1
    shutil.copytree(tmp_path / "whole", tmp_path / "half")
    for step in (4, 6):
        shutil.rmtree(tmp_path / "half" / f"checkpoint-{step}")
    half = training(tiny_data, tmp_path / "half", *extra)
    assert main([*half, "--resume_from_checkpoint", str(tmp_path / "half" / "checkpoint-2")]) == 0
    assert losses(tmp_path / "half") == losses(tmp_path / "whole")


def test_llavas_flag_makes_batches_of_one_kind(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds: list[set[bool]] = []
    collate = ImageTextCollator.__call__

    def seen(self: ImageTextCollator, records: list[Record]) -> Any:
        kinds.append({bool(record.images) for record in records})
        return collate(self, records)

    monkeypatch.setattr(ImageTextCollator, "__call__", seen)
    records = json.loads((tiny_data / "train.json").read_text())[:8]
    for number in range(8):  # two are longer than any with a picture: by length alone they would share its batch
        turns = [{"from": "human", "value": "Say it."}, {"from": "gpt", "value": "word " * (60 if number < 2 else 1)}]
        records.append({"id": f"t{number}", "conversations": turns})
    (tiny_data / "train.json").write_text(json.dumps(records))
    flags = "--lora_enable True --lora_r 4 --method lora --group_by_modality_length True --max_steps 4".split()
    assert main(training(tiny_data, tmp_path / "run", *flags)) == 0
    assert sorted(kinds, key=str) == [{False}, {False}, {True}, {True}]  # an epoch


def test_a_recipe_mixes_sources_by_weight(tiny_data: Path, tmp_path: Path) -> None:
    images = str(tiny_data / "images")
    sources = [
        {"path": str(tiny_data / "train.json"), "weight": 2, "image_folder": images},
        {"path": str(tiny_data / "val.json"), "weight": 0, "image_folder": images},
    ]
    content = {"model": "tiny", "data": {"path": sources}, "policy": [{"modules": "projector", "method": "full"}]}
    (tmp_path / "mix.yaml").write_text(json.dumps(content))
    run = tmp_path / "run"
    assert (
        main(["--recipe", str(tmp_path / "mix.yaml"), "--output_dir", str(run), "--max_steps", "1", "--use_cpu"]) == 0
    )
    assert json.loads((run / "environment.json").read_text())["data"]["train"] == 24


def test_records_without_an_answer_are_counted_as_that_and_not_as_missing_pictures(
    tiny_data: Path, tmp_path: Path
) -> None:
    (tiny_data / "train.json").write_text(json.dumps([{"id": 1, "conversations": []}]))
    with pytest.raises(UserError) as error:
        main(training(tiny_data, tmp_path / "run", "--rank", "4"))
    (problem,) = error.value.problems
    assert (problem.code, problem.where) == ("data-all-records-left-out", str(tiny_data / "train.json"))
    assert "no answer" in problem.message
    assert "picture" not in problem.message
    assert "milora_data check" in problem.hint


@pytest.fixture
def with_empty(tiny_data: Path) -> Path:
    """Data whose pictures 0 and 5 have 0 bytes, and whose picture 3 is missing."""
    for name in ("0.png", "5.png"):
        (tiny_data / "images" / name).write_bytes(b"")
    (tiny_data / "images" / "3.png").unlink()
    return tiny_data


def test_empty_files_stop_a_training_before_its_model_loads(with_empty: Path, tmp_path: Path, capfd: Any) -> None:
    with raises_code(
        "data-missing-pictures",
        message="3 of 8 pictures are missing or empty",
        hint="2 empty files (0 bytes)",
        kind=MissingImages,
    ):
        main(training(with_empty, tmp_path / "run", "--rank", "4"))
    assert "loading" not in capfd.readouterr().err
    assert not (tmp_path / "run").exists()
    with raises_code("data-missing-pictures", hint="2 empty files (0 bytes)"):
        main(training(with_empty, tmp_path / "run", "--rank", "4", "--dry-run"))
    with raises_code("data-missing-pictures", hint="2 empty files (0 bytes)"):
        main(training(with_empty, tmp_path / "run", "--rank", "4", "--streaming"))
