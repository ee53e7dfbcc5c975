"""The cache of a frozen tower's features: the losses are those without it, and it holds what it should and no more."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from milora_vl.train.command import main
from support.launched import FSDP, train_in_two
from support.tiny_next import saved
from support.train_runs import losses, training

CACHED = ["--rank", "4", "--dropout", "0"]


def entries(cache: Path) -> list[Path]:
    return sorted(cache.glob("*/*/*.safetensors"))


@pytest.mark.parametrize("model", ["tiny", pytest.param("next", marks=pytest.mark.slow)])
def test_the_losses_are_those_without_it(model: str, tiny_data: Path, tmp_path: Path, capfd: Any) -> None:
    extra = [*CACHED, "--eval_data_path", str(tiny_data / "val.json"), "--eval_strategy", "steps", "--eval_steps", "6"]
    if model == "next":
        extra += ["--model", str(saved(tmp_path / "next")), "--max_length", "512"]
    assert main(training(tiny_data, tmp_path / "without", *extra)) == 0
    extra += ["--feature_cache", str(tmp_path / "cache")]
    assert main(training(tiny_data, tmp_path / "first", *extra, "--dataloader_num_workers", "1")) == 0
    said = capfd.readouterr().err
    assert "features of 0 of 8 pictures are in" in said
    made = entries(tmp_path / "cache")
    assert len(made) == 1 + len({path.read_bytes() for path in (tiny_data / "images").iterdir()})
    times = [path.stat().st_mtime_ns for path in made]
    assert main(training(tiny_data, tmp_path / "again", *extra)) == 0
    assert "features of 8 of 8 pictures are in" in capfd.readouterr().err
    assert [path.stat().st_mtime_ns for path in entries(tmp_path / "cache")] == times
    whole = losses(tmp_path / "without")
    for run in ("first", "again"):
        # Some versions of transformers log losses with four decimals.
        found, expected = ([loss for _, loss in pairs] for pairs in (losses(tmp_path / run), whole))
        assert found == pytest.approx(expected, rel=1e-5, abs=3e-4)


@pytest.mark.slow
def test_two_processes_under_fsdp_use_it(tiny_data: Path, tmp_path: Path) -> None:
    """The features are computed before the tower is cut up; afterwards its shards are never used."""
    cached = [*CACHED, "--feature_cache", str(tmp_path / "cache")]
    two = [*cached, "--per_device_train_batch_size", "2", *FSDP]
    train_in_two([training(tiny_data, tmp_path / run, *two) for run in ("first", "again")], tmp_path)
    assert len(entries(tmp_path / "cache")) == 1 + 8
    assert main(training(tiny_data, tmp_path / "without", *CACHED)) == 0
    whole = [loss for _, loss in losses(tmp_path / "without")]
    for run in ("first", "again"):
        assert [loss for _, loss in losses(tmp_path / run)] == pytest.approx(whole, rel=1e-5, abs=1e-5)


def test_it_goes_on_where_it_was_stopped_and_bad_pictures_are_left_to_their_policy(
    tiny_data: Path, tmp_path: Path, capfd: Any
) -> None:
    (tiny_data / "images" / "1.png").write_bytes(b"no picture")
    records = json.loads((tiny_data / "train.json").read_text())
    records[0]["image"], records[2]["image"], records[3]["image"] = "a" * 300 + ".png", "nul\0.png", "pipe.png"
    os.mkfifo(tiny_data / "images" / "pipe.png")
    (tiny_data / "train.json").write_text(json.dumps(records))
    extra = [*CACHED, "--feature_cache", str(tmp_path / "cache"), "--bad_images", "replace", "--max_steps", "3"]
    assert main(training(tiny_data, tmp_path / "run", *extra)) == 0
    assert "4 times while training: a missing or broken picture was replaced" in capfd.readouterr().err
    made = entries(tmp_path / "cache")
    made[-1].unlink()  # the plain one
    made[0].with_name("left.part").write_bytes(b"by a process that was killed")
    Image.new("RGB", (30, 30), "orange").save(tiny_data / "images" / "5.png")  # another picture, another entry
    assert main(training(tiny_data, tmp_path / "again", *extra)) == 0
    assert len(entries(tmp_path / "cache")) == len(made) + 1


def test_stored_pictures_of_one_name_have_entries_of_their_own(tiny_data: Path, tmp_path: Path) -> None:
    import datasets

    pictures = [{"bytes": path.read_bytes(), "path": "image.png"} for path in sorted((tiny_data / "images").iterdir())]
    rows = {"image": pictures, "question": ["q"] * 8, "answer": ["Yes."] * 8}
    data = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    data.to_parquet(tmp_path / "rows.parquet")
    extra = [*CACHED, "--data_path", str(tmp_path / "rows.parquet"), "--max_steps", "2"]
    assert main(training(tiny_data, tmp_path / "run", *extra, "--feature_cache", str(tmp_path / "cache"))) == 0
    assert len(entries(tmp_path / "cache")) == 9


@pytest.mark.slow
def test_another_transform_or_precision_has_entries_of_its_own(tiny_data: Path, tmp_path: Path) -> None:
    extra = [*CACHED, "--feature_cache", str(tmp_path / "cache"), "--max_steps", "1"]
    for number, more in enumerate([[], ["--image_aspect_ratio", "plain"], ["--bf16", "True"]], start=1):
        assert main(training(tiny_data, tmp_path / f"run{number}", *extra, *more)) == 0
        assert len(list((tmp_path / "cache").iterdir())) == number
