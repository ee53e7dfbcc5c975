"""Pictures that are not there, empty, or larger than is read: found before a model loads, and said in our own words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from milora_data.check import MissingImages
from milora_vl.train.command import main
from support.problems import raises_code
from support.train_runs import training


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


def test_replace_shows_a_plain_picture(with_empty: Path, tmp_path: Path, capfd: Any) -> None:
    assert (
        main(
            training(
                with_empty,
                tmp_path / "run",
                "--method",
                "lora",
                "--rank",
                "4",
                "--max_steps",
                "3",
                "--bad_images",
                "replace",
            )
        )
        == 0
    )
    assert "3 times while training: a missing or broken picture was replaced" in capfd.readouterr().err
