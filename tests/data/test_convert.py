"""Files of well-known sets, tables, parquet, shards and mixtures as LLaVA records."""

from __future__ import annotations

import csv
import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from milora_data.__main__ import main
from milora_data.stream.sources import Source, load_records, mixed_records
from milora_vl.common.errors import DataError, UserError
from support.problems import raises_code

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
            "[0.10, 0.30, 0.60, 0.55]",
            "Please provide the bounding box coordinate of the region this sentence describes: dog",
            "[0.10, 0.30, 0.60, 0.55]",
        ], 1,
    ),
    "coco": (
        {"c.json": {"images": INSTANCES["images"], "annotations": [{"id": 1, "image_id": 9, "caption": " A dog. "}]}},
        "COCO_9.jpg", ["<image>\nDescribe this picture.", "A dog."], 1,
    ),
    "alpaca": (
        {"c.json": [{"instruction": " True? ", "input": "", "output": "the answer is true", "answer": "true"}]},
        None, [" True? ", "the answer is true"], 1,
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
    with pytest.raises(DataError) as error:
        main(["convert", "--from", kind, str(tmp_path / "other.json"), "--output_dir", str(tmp_path / "out")])
    codes = {"convert-wrong-format", "convert-missing-input", "table-missing-columns", "record-no-conversations"}
    assert error.value.first.code in codes
    with raises_code("data-missing-file", where="none.json", message="no such file", kind=DataError):
        main(["convert", "--from", kind, str(tmp_path / "none.json"), "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out" / "data.json").exists()


def hold_out(rows: list[dict[str, Any]], folder: Path, *flags: str, kind: str = "table") -> tuple[list[Any], list[Any]]:
    kept = convert(kind, {"i.json": rows}, folder, "--hold_out", *flags)
    return json.loads((folder / "out" / "eval.json").read_text()), kept


def test_all_records_of_a_picture_are_held_out_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"image": f"{n // 3}.png", "question": f"{n}?", "answer": "a"} for n in range(40)]
    rows += [{"image": ["0.png", "new.png"], "question": "Both?", "answer": "a"}]
    rows += [{"question": f"{n}?", "answer": "a"} for n in range(20)]
    held, kept = hold_out(rows, tmp_path, "10", "--format", "json")
    of_held, of_kept = (
        {name for r in side for name in ([r["image"]] if isinstance(r.get("image"), str) else r.get("image", []))}
        for side in (held, kept)
    )
    assert of_held
    assert of_kept
    assert not of_held & of_kept
    assert (len(held), len(kept)) == (10, 51)
    said = capsys.readouterr()
    assert json.loads(said.out)["held_out_records"] == 10
    assert "eval.json: 10 records, held out by picture\n" in said.err
    (tmp_path / "again").mkdir()
    assert hold_out(rows, tmp_path / "again", "10") == (held, kept)


def test_the_size_of_the_held_out_part_is_as_close_as_whole_pictures_allow(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"image": f"{n // 5}.png", "question": f"{n}?", "answer": "a"} for n in range(40)]
    held, kept = hold_out(rows, tmp_path, "8")
    assert (len(held), len(kept)) == (10, 30)
    assert "eval.json: 10 records, held out by picture, for the 8 of --hold_out\n" in capsys.readouterr().err
    (tmp_path / "one").mkdir()
    with raises_code("hold-out-one-group", where="--hold_out_by", kind=DataError):
        hold_out(rows[:5], tmp_path / "one", "2")


def test_records_are_held_out_one_by_one_on_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"image": f"{n // 2}.png", "question": f"{n}?", "answer": "a"} for n in range(40)]
    held, kept = hold_out(rows, tmp_path, "10", "--hold_out_by", "record")
    shared = sum(record["image"] in {record["image"] for record in kept} for record in held)
    assert shared
    assert f"note: {shared} of them show a picture" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["table", "alpaca", "llava"])
def test_records_of_one_patient_are_held_out_together(kind: str, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"instruction": f"{n}?", "output": "a", "patient": n % 7} for n in range(42)]
    if kind == "llava":
        turns = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]
        rows = [{"id": str(n), "conversations": turns, "patient": n % 7} for n in range(42)]
    held, kept = hold_out(rows, tmp_path, "12", "--hold_out_by", "patient", kind=kind)
    assert len(held) == 12
    assert not {record["patient"] for record in held} & {record["patient"] for record in kept}
    (tmp_path / "b").mkdir()
    with raises_code("hold-out-unknown-field", where="--hold_out_by", message=", patient", kind=DataError):
        hold_out(rows, tmp_path / "b", "12", "--hold_out_by", "patients", kind=kind)
    with raises_code("flag-needs-another", where="--hold_out_by"):
        convert(kind, {"i.json": rows}, tmp_path / "b", "--hold_out_by", "patient")


def test_held_out_are_the_records_that_llm_adapters_holds_out(tmp_path: Path) -> None:
    """finetune.py: `train_test_split(test_size=val_set_size, shuffle=True, seed=42)` of `datasets`."""
    import datasets

    rows = [{"query": str(number), "response": "a"} for number in range(200)]
    kept = convert("alpaca", {"i.json": rows}, tmp_path, "--hold_out", "12")
    held = json.loads((tmp_path / "out" / "eval.json").read_text())
    theirs = datasets.Dataset.from_list(rows).train_test_split(test_size=12, shuffle=True, seed=42)
    assert {record["conversations"][0]["value"] for record in held} == set(theirs["test"]["query"])
    assert {record["conversations"][0]["value"] for record in kept} == set(theirs["train"]["query"])
    with raises_code("hold-out-too-large", where="--hold_out", message="200 of 200 records leave none", kind=DataError):
        convert("alpaca", {"i.json": rows}, tmp_path / "out", "--hold_out", "200")


def test_pictures_can_be_named_by_a_pattern(tmp_path: Path) -> None:
    made = convert("vqav2", VQA, tmp_path, "--image_pattern", "coco/train2017/{:012d}.jpg")
    assert made[0]["image"] == "coco/train2017/000000000009.jpg"
    (tmp_path / "x").mkdir()
    with raises_code(
        "convert-image-pattern", message="--image_pattern {:d}.jpg does not fit the picture 'n5'", kind=DataError
    ):
        convert(
            "gqa",
            CASES["gqa"][0],
            tmp_path / "x",
            "--image_pattern",
            "{:d}.jpg",
        )


def test_a_flag_without_effect_is_refused(tmp_path: Path) -> None:
    with raises_code(
        "flag-no-effect", where="--split", message="only applies to --from ocrvqa, scienceqa, refcoco, not to gqa"
    ):
        convert("gqa", CASES["gqa"][0], tmp_path, "--split", "val")


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
    with raises_code(
        "table-missing-columns", says=r"b.csv:2: no question with an answer(.|\n)*columns: x, y", kind=DataError
    ):
        main(["convert", "--from", "csv", str(tmp_path / "b.csv"), "--output_dir", str(tmp_path / "out2")])


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
    for text, code in {
        "sources: []": "mixture-value",
        "sources: [{path: a, wieght: 2}]": "mixture-unknown-key",
        "sources: [{path: a, weight: -1}]": "mixture-value",
        "sources: [": "yaml-syntax",
    }.items():
        (tiny_data / "bad.yaml").write_text(text)
        with pytest.raises(UserError) as error:
            list(load_records(tiny_data / "bad.yaml"))
        assert error.value.first.code == code
        assert error.value.first.where.startswith(str(tiny_data / "bad.yaml"))
