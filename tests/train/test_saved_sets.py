"""Folders that `datasets.save_to_disk` writes are data like any other: of one split, with its pictures in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest

from milora_data.__main__ import main as data_main
from milora_data.stream import load_records
from milora_vl.common.errors import DataError
from milora_vl.train.__main__ import main
from support.drawn import encoded
from support.problems import raises_code
from support.train_runs import training

COLOURS = ("red", "green", "blue")


def rows(count: int = 12) -> list[dict[str, Any]]:
    return [
        {
            "id": f"r{number}",
            "image": {"bytes": encoded(COLOURS[number % 3], (48, 32 + number)), "path": f"{number}.png"},
            "conversations": [
                {"from": "human", "value": "<image>\nWhat colour?"},
                {"from": "gpt", "value": COLOURS[number % 3]},
            ],
        }
        for number in range(count)
    ]


def split(count: int = 12) -> datasets.Dataset:
    return datasets.Dataset.from_list(rows(count)).cast_column("image", datasets.Image())


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """One split in two files."""
    split().save_to_disk(tmp_path / "saved", num_shards=2)
    return tmp_path / "saved"


@pytest.fixture
def two_splits(tmp_path: Path) -> Path:
    datasets.DatasetDict({"train": split(6), "test": split(3)}).save_to_disk(tmp_path / "splits")
    return tmp_path / "splits"


def test_its_records_come_in_order_with_their_pictures(saved: Path, tmp_path: Path) -> None:
    assert [record.id for record in load_records(saved)] == [f"r{number}" for number in range(12)]
    chosen = split().shuffle(seed=1).select(range(5))
    chosen.save_to_disk(tmp_path / "chosen")
    assert [record.id for record in load_records(f"{tmp_path / 'chosen'}/")] == list(chosen["id"])


@pytest.mark.parametrize("how", [[], ["--streaming"], ["--packing", "--max_length", "256"]], ids=str)
def test_a_training_reads_it(how: list[str], saved: Path, tmp_path: Path) -> None:
    flags = ["--data_path", str(saved), "--image_folder", str(tmp_path), "--rank", "4", "--max_steps", "2", *how]
    assert main(training(tmp_path, tmp_path / "run", *flags)) == 0
    assert main(training(tmp_path, tmp_path / "planned", *flags, "--dry-run")) == 0


def test_of_several_splits_one_has_to_be_named(two_splits: Path, tmp_path: Path) -> None:
    for read in (lambda: list(load_records(two_splits)), lambda: data_main(["check", str(two_splits)])):
        with raises_code(
            "data-several-splits", says=f"2 splits(.|\n)*{two_splits}/test or {two_splits}/train", kind=DataError
        ):
            read()
    flags = ["--data_path", str(two_splits), "--image_folder", str(tmp_path), "--rank", "4"]
    for how in ([], ["--streaming"], ["--bad_images", "skip"]):
        with raises_code("data-several-splits", message="2 splits"):
            main(training(tmp_path, tmp_path / "run", *flags, *how))
    assert [len(list(load_records(two_splits / name))) for name in ("train", "test")] == [6, 3]
    datasets.DatasetDict({"validation": split(4)}).save_to_disk(tmp_path / "one")
    assert len(list(load_records(tmp_path / "one"))) == 4  # there is no choice
