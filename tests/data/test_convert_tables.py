"""Tables, instruction files and folders of captions, as people have them: separators, encodings, what is left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from milora_data.__main__ import main
from milora_data.stream.sources import load_records
from milora_vl.common.errors import DataError
from support.problems import raises_code


def convert_file(path: Path, kind: str, out: Path) -> list[Any]:
    assert main(["convert", "--from", kind, str(path), "--output_dir", str(out)]) == 0
    return list(load_records(out / "data.json"))


def test_the_id_0_of_a_row_is_kept(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,question,answer\n5,Why?,So.\n0,How?,Well.\n,When?,Now.\n")
    assert [record.id for record in convert_file(tmp_path / "a.csv", "table", tmp_path / "out")] == ["5", "0", "4"]


@pytest.mark.parametrize("kind", ["alpaca", "table"])
def test_a_row_without_question_or_answer_is_left_out(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = [("Say hi.", "Hi"), ("Say no.", " "), ("Say no.", None), ("", "No"), (None, "No")]
    rows = [{"instruction": instruction, "output": output} for instruction, output in pairs]
    (tmp_path / "a.json").write_text(json.dumps([*rows, {"instruction": "", "input": "Paris", "output": "France"}]))
    kept = convert_file(tmp_path / "a.json", kind, tmp_path / "out")
    assert [turn.text for record in kept for turn in record.turns] == ["Say hi.", "Hi", "Paris", "France"]
    assert capsys.readouterr().err.count("left out: ") == 4


@pytest.mark.parametrize("kind", ["alpaca", "table"])
def test_alpacas_input_follows_its_instruction(kind: str, tmp_path: Path) -> None:
    rows = [
        {"instruction": "Name the country.", "input": "Paris", "output": "France"},
        {"instruction": "Say hi.", "input": "", "output": "Hi", "system": "Be short.", "history": [["A?", "B"]]},
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    first, second = convert_file(tmp_path / "a.json", kind, tmp_path / "out")
    assert [turn.text for turn in first.turns] == ["Name the country.\nParis", "France"]
    assert [(turn.role, turn.text) for turn in second.turns] == [
        ("system", "Be short."), ("user", "A?"), ("assistant", "B"), ("user", "Say hi."), ("assistant", "Hi"),
    ]  # fmt: skip
    (tmp_path / "b.json").write_text(json.dumps([rows[1] | {"history": ["A?"]}]))
    with raises_code("", where="b.json:record 1", message="history must be a list of pairs", kind=DataError):
        main(["convert", "--from", kind, str(tmp_path / "b.json"), "--output_dir", str(tmp_path / "out2")])


def test_a_row_with_an_empty_cell_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.csv"
    path.write_text("question,answer\nWhy?,Because\nHow?,\n,Yes\nHow many?, \nHow many?,0\n")
    assert [record.turns[-1].text for record in convert_file(path, "table", tmp_path / "out")] == ["Because", "0"]
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("left out")]
    cells = ((3, "answer"), (4, "question"), (5, "answer"))
    assert lines == [f'left out: {path}:{number}: nothing under "{name}"' for number, name in cells]
    pictured = tmp_path / "p.csv"  # no question is asked that the row does not have
    pictured.write_text("image,question,answer\na.png,,red\nb.png,What is this?,A disc.\n")
    assert [record.images for record in convert_file(pictured, "table", tmp_path / "out4")] == [("b.png",)]
    (tmp_path / "b.json").write_text('[{"question": "How many?", "answer": 0}]')
    assert [record.turns[-1].text for record in convert_file(tmp_path / "b.json", "table", tmp_path / "out2")] == ["0"]
    path.write_text("question,comment\nWhy?,x\n")
    with raises_code("", where="a.csv:2", kind=DataError):
        main(["convert", "--from", "table", str(path), "--output_dir", str(tmp_path / "out3")])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "file;caption\nä b.jpg;Ein Kreis, rot\n"),
        ("a.csv", "\ufefffile,caption\r\nä b.jpg,\"Ein Kreis, rot\"\r\n"),
        ("a.tsv", "file\tcaption\nä b.jpg\tEin Kreis, rot\n"),
        ("a.jsonl", '{"image": "ä b.jpg", "caption": "Ein Kreis, rot"}\n'),
    ],
    ids=["semicolons", "commas", "tabs", "jsonl"],
)  # fmt: skip
def test_a_table_of_captions_comes_in_many_forms(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    (record,) = convert_file(tmp_path / name, "table", tmp_path / "out")
    assert record.images == ("ä b.jpg",)
    assert record.turns[1].text == "Ein Kreis, rot"


def test_a_folder_says_what_of_it_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "my pictures"
    folder.mkdir()
    for name in ("ä b.jpg", "none.png", "empty.png", "._ä b.jpg"):
        Image.new("RGB", (20, 10), "red").save(folder / name)
    for name in ("phone.HEIC", "._ä b.txt"):
        (folder / name).write_bytes(b"\xfe\xfc")
    for name, text in {"ä b": "Rot.", "empty": " ", "phone": "A garden.", "lonely": "No picture."}.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    (record,) = convert_file(folder, "folder", tmp_path / "out")
    assert (record.images, record.turns[1].text) == (("ä b.jpg",), "Rot.")
    said = capsys.readouterr().err
    assert "left out: 2 x picture without a caption: empty.png, none.png\n" in said
    assert "left out: 1 x picture in an unsupported format (save as JPEG or PNG): phone.HEIC\n" in said
    assert "left out: 2 x caption without a picture: lonely.txt, phone.txt\n" in said
    assert f"next: python -m milora_data check {tmp_path}/out/data.json --image_folder '{folder}'\n" in said
    (folder / "ä b.txt").write_bytes("Grün".encode("latin-1"))
    with raises_code("data-not-utf8", where="ä b.txt", message="not UTF-8 (byte 0xfc)", kind=DataError):
        convert_file(folder, "folder", tmp_path / "out2")
