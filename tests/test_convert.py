"""Files of well-known sets, tables, parquet, shards and mixtures as LLaVA records."""

from __future__ import annotations

import csv
import io
import json
import pickle
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from milora_data.__main__ import main
from milora_data.errors import DataError, UserError
from milora_data.images import StoredPicture, load_image
from milora_data.mix import Source, mixed_records
from milora_data.records import load_records

SHORT = "\nAnswer the question using a single word or phrase."
INSUFFICIENT = "When the provided information is insufficient, respond with 'Unanswerable'."
VQA = {
    "q.json": {
        "data_subtype": "val2014",
        "questions": [
            {"question_id": 1, "image_id": 9, "question": "Red?"},
            {"question_id": 2, "image_id": 7, "question": "Big?"},
            {"question_id": 3, "image_id": 9, "question": "Blue?"},
        ],
    },
    "a.json": {
        "annotations": [
            {"question_id": 1, "image_id": 9, "multiple_choice_answer": "yes"},
            {"question_id": 2, "image_id": 7, "answers": [{"answer": "no"}, {"answer": "so"}, {"answer": "so"}]},
            {"question_id": 3, "image_id": 9, "multiple_choice_answer": "no"},
        ]
    },
}
REFS = [
    {"ref_id": 4, "ann_id": 5, "image_id": 9, "split": "train", "sentences": [{"sent": "left dog"}, {"sent": "dog"}]},
    {"ref_id": 5, "ann_id": 5, "image_id": 9, "split": "testA", "sentences": [{"sent": "secret"}]},
]
INSTANCES = {
    "images": [{"id": 9, "file_name": "COCO_9.jpg", "width": 200, "height": 100}],
    "annotations": [{"id": 5, "image_id": 9, "bbox": [20, 10, 100, 50]}],
}
# format -> files, the pictures of the first record, its turns, number of records
CASES: dict[str, tuple[dict[str, Any], Any, list[str], int]] = {
    "vqav2": (VQA, "COCO_val2014_000000000009.jpg", [f"<image>\nRed?{SHORT}", "yes", "Blue?", "no"], 2),
    "okvqa": (VQA, "COCO_val2014_000000000009.jpg", [f"<image>\nRed?{SHORT}", "yes", "Blue?", "no"], 2),
    "gqa": (
        {"g.json": {"1": {"imageId": "n5", "question": "On?", "answer": "off"}}},
        "n5.jpg", [f"<image>\nOn?{SHORT}", "off"], 1,
    ),
    "textvqa": (
        {"t.json": {"data": [{"image_id": "ab", "question": "Brand?", "answers": ["x", "y", "y"]}]}},
        "ab.jpg", [f"<image>\nBrand?{SHORT}", "y"], 1,
    ),
    "vizwiz": (
        {"v.json": [{"image": "v1.jpg", "question": "?", "answers": [{"answer": "unanswerable"}]}]},
        "v1.jpg",
        [f"<image>\n?\n{INSUFFICIENT}{SHORT}", "Unanswerable"],
        1,
    ),
    "ocrvqa": (
        {"o.json": {
            "10": {"questions": ["Title?", "Year?"], "answers": ["It", "1999"], "split": 1},
            "11": {"questions": ["Test?"], "answers": ["secret"], "split": 3},
        }},
        "10.jpg", [f"<image>\nTitle?{SHORT}", "It", "Year?", "1999"], 1,
    ),
    "aokvqa": (
        {"a.json": [
            {"question_id": "q", "image_id": 3, "question": "Why?", "choices": ["a", "b"], "correct_choice_idx": 1}
        ]},
        "000000000003.jpg",
        ["<image>\nWhy?\nA. a\nB. b\nAnswer with the option's letter from the given choices directly.", "B"], 1,
    ),
    "scienceqa": (
        {"problems.json": {
            "1": {"question": "Q", "choices": ["x", "y"], "answer": 0, "hint": "H", "image": "image.png"},
            "2": {"question": "Q", "choices": ["x"], "answer": 0, "hint": "", "image": None, "split": "train"},
            "3": {"question": "Q", "choices": ["x"], "answer": 0, "hint": "", "image": None, "split": "test"},
        }},
        "train/1/image.png",
        ["<image>\nH\nQ\nA. x\nB. y\nAnswer with the option's letter from the given choices directly.", "A"], 2,
    ),
    "refcoco": (
        {"refs(unc).p": REFS, "instances.json": INSTANCES}, "COCO_9.jpg",
        [
            "<image>\nPlease provide the bounding box coordinate of the region this sentence describes: left dog",
            "[0.10, 0.10, 0.60, 0.60]",
            "Please provide the bounding box coordinate of the region this sentence describes: dog",
            "[0.10, 0.10, 0.60, 0.60]",
        ], 1,
    ),
    "coco": (
        {"c.json": {"images": INSTANCES["images"], "annotations": [{"id": 1, "image_id": 9, "caption": " A dog. "}]}},
        "COCO_9.jpg", ["<image>\nDescribe this picture.", "A dog."], 1,
    ),
    "alpaca": (
        {"a.json": [{"instruction": "Add one.", "input": "1", "output": "2"}]}, None, ["Add one.\n1", "2"], 1,
    ),
    "sharegpt": (
        {"s.json": [
            {"id": "s", "conversations": [
                {"from": "gpt", "value": "Hi"}, {"from": "human", "value": "A"}, {"from": "chatgpt", "value": "B"},
                {"from": "human", "value": "C"}, {"from": "human", "value": "D"},
            ]},
            {"id": "none", "conversations": []},
        ]},
        None, ["A", "B"], 1,
    ),
}  # fmt: skip


def convert(kind: str, files: dict[str, Any], folder: Path, *flags: str) -> list[dict[str, Any]]:
    for name, content in files.items():
        path = folder / name
        path.write_bytes(pickle.dumps(content) if path.suffix == ".p" else json.dumps(content).encode())
    sources = [str(folder / name) for name in files]
    assert main(["convert", "--from", kind, *sources, "--output_dir", str(folder / "out"), *flags]) == 0
    return json.loads((folder / "out" / "data.json").read_text())  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", CASES)
def test_a_known_format_becomes_llavas(kind: str, tmp_path: Path) -> None:
    files, image, texts, count = CASES[kind]
    made = convert(kind, files, tmp_path)
    assert len(made) == count
    assert made[0].get("image") == image
    assert [turn["value"] for turn in made[0]["conversations"]] == texts
    records = list(load_records(tmp_path / "out" / "data.json"))
    assert [turn.role for turn in records[0].turns] == ["user", "assistant"] * (len(texts) // 2)


@pytest.mark.parametrize("kind", CASES)
def test_a_file_of_another_kind_is_said_to_be_one(kind: str, tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text('[{"something": "else"}]')
    with pytest.raises(DataError, match=r"other.json|expected"):
        main(["convert", "--from", kind, str(tmp_path / "other.json"), "--output_dir", str(tmp_path / "out")])
    with pytest.raises(DataError, match="none.json: no such file"):
        main(["convert", "--from", kind, str(tmp_path / "none.json"), "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out" / "data.json").exists()


def test_pictures_can_be_named_by_a_pattern(tmp_path: Path) -> None:
    made = convert("vqav2", VQA, tmp_path, "--image_pattern", "coco/train2017/{:012d}.jpg")
    assert made[0]["image"] == "coco/train2017/000000000009.jpg"
    (tmp_path / "x").mkdir()
    with pytest.raises(DataError, match="--image_pattern {:d}.jpg does not fit the picture 'n5'"):
        convert(
            "gqa",
            CASES["gqa"][0],
            tmp_path / "x",
            "--image_pattern",
            "{:d}.jpg",
        )


def test_a_flag_without_effect_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--split is for --from ocrvqa, scienceqa, refcoco; --from gqa has no use"):
        convert("gqa", CASES["gqa"][0], tmp_path, "--split", "val")


def test_a_pickle_with_code_in_it_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "refs.p").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    (tmp_path / "i.json").write_text(json.dumps(INSTANCES))
    files = [str(tmp_path / "refs.p"), str(tmp_path / "i.json")]
    with pytest.raises(DataError, match="data alone"):
        main(["convert", "--from", "refcoco", *files, "--output_dir", str(tmp_path / "out")])


def test_tables_have_columns_of_many_names(tmp_path: Path) -> None:
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [["file_name", "query", "response"], ["a.png", "What,\nhere?", "That"], ["", "1+1?", "2"]]
        )
    assert main(["convert", "--from", "csv", str(tmp_path / "a.csv"), "--output_dir", str(tmp_path / "out")]) == 0
    first, second = load_records(tmp_path / "out" / "data.json")
    assert (first.images, first.turns[0].text, first.turns[1].text) == (("a.png",), "<image>\nWhat,\nhere?", "That")
    assert not second.images
    (tmp_path / "b.csv").write_text("x,y\n1,2\n")
    with pytest.raises(DataError, match=r"b.csv:2: no question with an answer(.|\n)*columns: x, y"):
        main(["convert", "--from", "csv", str(tmp_path / "b.csv"), "--output_dir", str(tmp_path / "out2")])


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


def test_messages_are_read_where_records_are(tmp_path: Path) -> None:
    value = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}
    (tmp_path / "m.jsonl").write_text(json.dumps(value) + "\n")
    (record,) = load_records(tmp_path / "m.jsonl")
    assert [turn.text for turn in record.turns] == ["Hi", "Ho"]
    (tmp_path / "m.jsonl").write_text(json.dumps({"messages": [{"role": "cat", "content": "Miau"}]}))
    with pytest.raises(DataError, match=r"m.jsonl:1: message 1: unknown role 'cat'"):
        list(load_records(tmp_path / "m.jsonl"))


def test_sources_are_mixed_by_weight_from_a_yaml(tiny_data: Path, tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That."}]
    rows = [{"id": f"r{n}", "image": f"{n % 8}.png", "conversations": turns} for n in range(400)]
    (tiny_data / "many.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tiny_data / "mix.yaml").write_text(
        "seed: 3\nsources:\n  - {path: train.json, weight: 2, image_folder: images}\n"
        "  - {path: many.jsonl, weight: 0.25, image_folder: images}\n"
    )
    records = list(load_records(tiny_data / "mix.yaml"))
    assert [record.id for record in records[:4]] == ["p0", "p0", "p1", "p1"]
    assert 24 + 70 < len(records) < 24 + 130
    assert records == list(load_records(tiny_data / "mix.yaml"))
    assert all((tmp_path / name).is_file() for record in records for name in record.images)
    assert len(list(mixed_records([Source(str(tiny_data / "many.jsonl"), 0)]))) == 0
    for text, message in {
        "sources: []": "expected `sources:`",
        "sources: [{path: a, wieght: 2}]": "unknown key 'wieght'",
        "sources: [{path: a, weight: -1}]": "weight must be a number from 0 up",
        "sources: [": "broken YAML",
    }.items():
        (tiny_data / "bad.yaml").write_text(text)
        with pytest.raises(UserError, match=message):
            list(load_records(tiny_data / "bad.yaml"))


def convert_file(path: Path, kind: str, out: Path) -> list[Any]:
    assert main(["convert", "--from", kind, str(path), "--output_dir", str(out)]) == 0
    return list(load_records(out / "data.json"))


def test_alpacas_input_follows_its_instruction(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Name the country.", "input": "Paris", "output": "France"},
        {"instruction": "Say hi.", "input": "", "output": "Hi", "system": "Be short.", "history": [["A?", "B"]]},
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    first, second = convert_file(tmp_path / "a.json", "alpaca", tmp_path / "out")
    assert [turn.text for turn in first.turns] == ["Name the country.\nParis", "France"]
    assert [(turn.role, turn.text) for turn in second.turns] == [
        ("system", "Be short."), ("user", "A?"), ("assistant", "B"), ("user", "Say hi."), ("assistant", "Hi"),
    ]  # fmt: skip
    (tmp_path / "b.json").write_text(json.dumps([rows[1] | {"history": ["A?"]}]))
    with pytest.raises(DataError, match=r"b.json:1: history must be a list of pairs"):
        main(["convert", "--from", "alpaca", str(tmp_path / "b.json"), "--output_dir", str(tmp_path / "out2")])


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


def test_a_table_in_another_encoding_is_said_to_be_one(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("file,caption\nä.jpg,Grün\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"a.csv: not UTF-8(.|\n)*iconv -f WINDOWS-1252"):
        convert_file(tmp_path / "a.csv", "table", tmp_path / "out")
    assert not any((tmp_path / "out").iterdir())


def test_a_folder_says_what_of_it_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "my pictures"
    folder.mkdir()
    for name in ("ä b.jpg", "none.png", "empty.png", "._ä b.jpg"):
        (folder / name).write_bytes(png("red"))
    for name in ("phone.HEIC", "._ä b.txt"):
        (folder / name).write_bytes(b"\xfe\xfc")
    for name, text in {"ä b": "Rot.", "empty": " ", "phone": "A garden.", "lonely": "No picture."}.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    (record,) = convert_file(folder, "folder", tmp_path / "out")
    assert (record.images, record.turns[1].text) == (("ä b.jpg",), "Rot.")
    said = capsys.readouterr().err
    assert "left out: 2 pictures without a caption: empty.png, none.png\n" in said
    assert "(save them as JPEG or PNG): phone.HEIC\n" in said
    assert "left out: 2 captions without a picture: lonely.txt, phone.txt\n" in said
    assert f"next: python -m milora_data check {tmp_path}/out/data.json --image_folder '{folder}'\n" in said
    (folder / "ä b.txt").write_bytes("Grün".encode("latin-1"))
    with pytest.raises(DataError, match=r"ä b.txt: not UTF-8 \(byte 0xfc\)"):
        convert_file(folder, "folder", tmp_path / "out2")
