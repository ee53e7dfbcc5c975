"""Sets that store their pictures (parquet, webdataset), read as they are and written out."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from milora_data.__main__ import main
from milora_data.pictures.files import StoredPicture, load_image
from milora_data.stream.sources import load_records
from support.problems import raises_code


def png(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 10), colour).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    import datasets

    rows = {
        "image": [{"bytes": png("red"), "path": "same.png"}, {"bytes": png("lime"), "path": "same.png"}],
        "question": ["Colour?", "And this?"],
        "answers": [["red", "dark red"], ["green"]],
    }
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "question": datasets.Value("string"),
            "answers": datasets.Sequence(datasets.Value("string")),
        }
    )
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "rows.parquet")
    return tmp_path / "rows.parquet"


def test_what_exists_is_said_before_any_picture_is_written(parquet: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "out-eval.json").write_text("mine")
    with raises_code("output-exists", message="out-eval.json exists already", hint="nothing was written"):
        main(["convert", "--from", "hub", str(parquet), "--hold_out", "1", "--output_dir", str(out)])
    assert [(path.name, path.read_text()) for path in out.iterdir()] == [("out-eval.json", "mine")]


def test_parquet_is_read_with_its_pictures_and_can_be_written_out(parquet: Path, tmp_path: Path) -> None:
    records = list(load_records(parquet))
    assert [record.turns[1].text for record in records] == ["red", "green"]
    picture = records[0].images[0]
    assert isinstance(picture, StoredPicture)
    assert load_image(pickle.loads(pickle.dumps(picture))).getpixel((1, 1)) == (255, 0, 0)
    assert main(["check", str(parquet)]) == 0
    assert main(["convert", "--from", "hub", str(parquet), "--output_dir", str(tmp_path / "out")]) == 0
    assert sorted(path.name for path in (tmp_path / "out" / "images").iterdir()) == ["same-2.png", "same.png"]
    assert main(["check", str(tmp_path / "out" / "data.json")]) == 0


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_what_is_broken_off_leaves_nothing_in_the_way_of_the_next_try(
    error: type[BaseException], parquet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, records: object) -> int:
        next(iter(records))
        raise error

    words = ["convert", "--from", "hub", str(parquet), "--output_dir", str(tmp_path / "out")]
    with monkeypatch.context() as patch:
        patch.setattr("milora_data.convert.write_objects", full)
        with pytest.raises(error):
            main(words)
    assert not list((tmp_path / "out").iterdir())
    assert main(words) == 0


def test_webdataset_shards_are_read(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That."}]
    with tarfile.open(tmp_path / "shard-0.tar", "w") as tar:
        for name, content in {
            "a.png": png("red"), "a.json": json.dumps({"conversations": turns}).encode(),
            "b.png": png("blue"), "b.json": json.dumps({"conversations": turns}).encode(),
        }.items():  # fmt: skip
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    records = list(load_records(tmp_path / "shard-*.tar"))
    assert [record.id for record in records] == ["a", "b"]
    assert load_image(records[1].images[0]).getpixel((1, 1)) == (0, 0, 255)
    assert records[0].turns[1].text == "That."
