"""What occurs twice, and what of a test set is in the training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageFilter

from milora_data.__main__ import main
from support.problems import raises_code


def ask(image: str, question: str = "What?") -> dict[str, Any]:
    turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": "That."}]
    return {"image": image, "conversations": turns}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures, an equal file of the first, a near copy of the second; a test set with pictures of its own."""
    for number in range(3):
        noise = Image.effect_noise((16, 16), 90 + number).resize((128, 128), Image.Resampling.BICUBIC)
        noise.filter(ImageFilter.GaussianBlur(2)).save(tmp_path / f"{number}.png")
    (tmp_path / "same.png").write_bytes((tmp_path / "0.png").read_bytes())
    Image.open(tmp_path / "1.png").resize((90, 90)).save(tmp_path / "near.jpg", quality=70)
    train = [ask("0.png"), ask("1.png"), ask("2.png"), ask("same.png"), ask("near.jpg"), ask("2.png")]
    (tmp_path / "train.json").write_text(json.dumps(train))
    (tmp_path / "test").mkdir()
    Image.open(tmp_path / "2.png").resize((100, 100)).save(tmp_path / "test" / "t.jpg")
    (tmp_path / "test" / "u.png").write_bytes((tmp_path / "0.png").read_bytes())
    test = [ask("t.jpg"), ask("u.png"), ask("0.png"), ask("0.png", "New?")]
    (tmp_path / "test" / "test.json").write_text(json.dumps(test))
    return tmp_path


def stats(folder: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Any]:
    assert main(["stats", str(folder / "train.json"), "--format", "json", *flags]) == 0
    return json.loads(capsys.readouterr().out)  # type: ignore[no-any-return]


def test_repeated_records_and_pictures_are_counted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert stats(folder, capsys)["duplicates"] == {"repeated_records": 1}
    exact = stats(folder, capsys, "--copies", "exact")["duplicates"]
    assert exact["exact_copies_of_pictures"] == 1
    assert exact["first_copies"] == [["0.png = same.png", 1]]


def test_near_pictures_are_found_by_their_hash(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("imagehash")
    near = stats(folder, capsys, "--copies", "near")["duplicates"]
    assert near["near_copies_of_pictures"] == 2
    assert ["1.png = near.jpg", 1] in near["first_copies"]


def test_leakage_into_the_training_is_counted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    against = ["--against", str(folder / "test" / "test.json")]
    found = stats(folder, capsys, *against)["leakage"]
    assert found == {
        "test_records": 4, "with_a_question_of_the_training": 1, "with_a_picture_name_of_the_training": 2
    }  # fmt: skip
    exact = stats(folder, capsys, *against, "--copies", "exact")["leakage"]
    assert exact["with_an_equal_picture_in_the_training"] == 1
    assert main(["stats", str(folder / "train.json"), *against, "--copies", "exact"]) == 0
    assert "0.png = u.png" in capsys.readouterr().out
    with raises_code("flag-needs-another", message="needs --against"):
        stats(folder, capsys, "--against_image_folder", str(folder))
