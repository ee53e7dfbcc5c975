"""Files of well-known sets, tables, parquet, shards and mixtures as LLaVA records."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from milora_data.__main__ import main
from milora_data.pictures.load import load_image
from milora_data.stream import Source, load_records, mixed_records, record_items
from milora_vl.common.errors import DataError, UserError
from support.drawn import made
from support.problems import raises_code


def convert(files: dict[str, Any], folder: Path, *flags: str) -> list[dict[str, Any]]:
    for name, content in files.items():
        path = folder / name
        path.write_text(json.dumps(content))
    sources = [str(folder / name) for name in files]
    assert main(["convert", *sources, "--output_dir", str(folder / "out"), *flags]) == 0
    return json.loads((folder / "out" / "data.json").read_text())  # type: ignore[no-any-return]


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_columns_and_a_split_are_named(form: str, tmp_path: Path) -> None:
    import datasets

    rows = [{"Bild": f"{n}.png", "Frage": f"{n}?", "Antwort": "ja", "answer": "no", "Teil": part}
            for n, part in enumerate(("train", "test", "train"))]  # fmt: skip
    table, out = datasets.Dataset.from_list(rows), tmp_path / "out"
    getattr(table, f"to_{form}")(tmp_path / f"t.{form}")
    words = ["convert", str(tmp_path / f"t.{form}"), "--output_dir", str(out)]
    columns = "image=Bild,question=Frage,answer=Antwort"
    with raises_code("", says="name others:  --columns image=PHOTO", kind=DataError):
        main(words)
    with raises_code("", where="--split", hint="--columns split=", kind=DataError):
        main([*words, "--columns", columns, "--split", "test"])
    with raises_code("convert-no-records", where="--split", message="found: test, train"):
        main([*words, "--columns", f"{columns},split=Teil", "--split", "val"])
    with raises_code("flag-no-effect", where="--columns", message="without effect: Farbe"):
        main([*words, "--columns", f"{columns},input=Farbe"])
    with raises_code("flag-no-effect", where="--prompt"):
        main([*words, "--columns", columns, "--prompt", "What?"])
    with raises_code("data-missing-file", where="none.json", kind=DataError):
        main(["convert", "none.json", "--output_dir", str(out)])
    with raises_code("command-line", message="'picture'"):
        main([*words, "--columns", "picture=Bild"])
    with raises_code("command-line", message="'image'"):
        main([*words, "--columns", f"{columns},image=Frage"])
    assert not out.exists() or not list(out.iterdir())
    assert main([*words, "--columns", f"{columns},split=Teil", "--split", "test"]) == 0
    (record,) = load_records(out / "data.json")
    assert (record.images[0].name, *(turn.text for turn in record.turns)) == ("1.png", "<image>\n1?", "ja")


def hold_out(rows: list[dict[str, Any]], folder: Path, *flags: str) -> tuple[list[Any], list[Any]]:
    kept = convert({"i.json": rows}, folder, "--hold_out", *flags)
    return json.loads((folder / "out" / "out-eval.json").read_text()), kept


def test_all_records_of_a_picture_are_held_out_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"image": f"{n // 3}.png", "question": f"{n}?", "answer": "a"} for n in range(40)]
    rows += [{"image": ["0.png", "new.png"], "question": "Both?", "answer": "a"}]
    rows += [{"question": f"{n}?", "answer": "a"} for n in range(20)]
    (tmp_path / "new.png").write_bytes(b"new")
    with raises_code("hold-out-unknown", where="--image_folder", message="14 files not found"):
        hold_out(rows, tmp_path, "10")
    for n in range(14):
        (tmp_path / f"{n}.png").write_bytes(b"%d" % n)
    words = ["10", "--image_folder", str(tmp_path)]
    held, kept = hold_out(rows, tmp_path, *words, "--format", "json")
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
    assert "out-eval.json: 10 records, held out by picture\n" in said.err
    (tmp_path / "again").mkdir()
    assert hold_out(rows, tmp_path / "again", *words) == (held, kept)


@pytest.mark.parametrize("kind", ["table", "llava"])
def test_records_of_one_patient_are_held_out_together(kind: str, tmp_path: Path, capsys: Any) -> None:
    rows: list[dict[str, Any]] = [{"instruction": f"{n}?", "output": "a", "patient": n % 7} for n in range(42)]
    if kind == "llava":
        turns = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]
        rows = [{"id": str(n), "conversations": turns, "patient": n % 7} for n in range(42)]
    held, kept = hold_out(rows, tmp_path, "12", "--hold_out_by", "patient")
    assert len(held) == 12
    assert ("note: 12 of them have a picture or a whole question" in capsys.readouterr().err) == (kind == "llava")
    assert not {record["patient"] for record in held} & {record["patient"] for record in kept}
    (tmp_path / "b").mkdir()
    with raises_code("", where="--hold_out_by", message=", patient", kind=DataError):
        hold_out(rows, tmp_path / "b", "12", "--hold_out_by", "patients")
    with raises_code("flag-needs-another", where="--hold_out_by"):
        convert({"i.json": rows}, tmp_path / "b", "--hold_out_by", "patient")


def test_pictures_are_held_out_by_their_content_whatever_they_are_called(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No picture or video is on both sides under another spelling or as a copy, and `check --against` finds none."""
    images = tmp_path / "images"
    (images / "sub").mkdir(parents=True)
    for n in range(20):
        for name in (f"{n}.png", f"copy-{n}.png"):
            (images / name).write_bytes(b"%d" % n)
    spelt = ("{}.png", "./{}.png", "sub/../{}.png", "copy-{}.png", f"file://{images}/{{}}.png", f"{images}/{{}}.png")
    rows: list[dict[str, Any]] = []
    for number in range(120):
        name = spelt[number % len(spelt)].format(number // 6)
        asked = [{"from": "human", "value": f"{number}?"}, {"from": "gpt", "value": "That."}]
        rows.append({"video" if number % 2 else "image": [name], "conversations": asked})
    held, kept = hold_out(rows, tmp_path, "24", "--image_folder", str(images))
    assert (len(held), len(kept)) == (24, 96)
    shown = [{int(row["conversations"][0]["value"][:-1]) // 6 for row in side} for side in (held, kept)]
    assert shown[0].isdisjoint(shown[1])
    for name, first in {"a.json": 1, "b.json": 3}.items():
        (tmp_path / name).write_text(json.dumps(rows[first::6]))
    for train, test, leaked in (("out/data.json", "out/out-eval.json", 0), ("b.json", "a.json", 20)):  # 20 videos
        capsys.readouterr()
        words = ["--against", str(tmp_path / test), "--image_folder", str(images), "--format", "json"]
        main(["check", str(tmp_path / train), *words])
        assert json.loads(capsys.readouterr().out)["kinds"].get("leaked", 0) == leaked


def test_questions_that_both_sides_ask_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.png").write_bytes(b"a")
    (tmp_path / "other.png").write_bytes(b"a")
    (tmp_path / "b.png").write_bytes(b"b")
    ask = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That."}]
    (tmp_path / "train.json").write_text(json.dumps([{"image": "a.png", "conversations": ask}]))
    tests = [{"image": name, "conversations": ask} for name in ("other.png", "b.png", "none.png")]
    (tmp_path / "test.json").write_text(json.dumps(tests))
    words = [str(tmp_path / "train.json"), "--against", str(tmp_path / "test.json"), "--format", "json"]
    main(["check", *words])
    report = json.loads(capsys.readouterr().out)
    assert (report["warnings"], report["kinds"]["leaked"]) == (2, 2)
    assert [finding["message"] for finding in report["findings"] if finding["kind"] == "leaked"] == [
        f"also in {tmp_path / 'train.json'}:record 1", "none.png: no such file, so its content is unknown"
    ]  # fmt: skip
    far = made(tmp_path / "far")  # a folder with another picture of an equal name
    (far / "a.png").write_bytes(b"far")
    (far / "test.json").write_text(json.dumps([{"image": "a.png", "conversations": ask}]))
    main(["check", words[0], "--against", str(far / "test.json"), "--format", "json"])
    assert "leaked" not in json.loads(capsys.readouterr().out)["kinds"]


def test_a_picture_of_a_table_is_on_one_side(tmp_path: Path) -> None:
    import datasets

    names = [None, "same.png", "{}.png"]
    rows = [
        {"image": {"bytes": png("red") + b"%d" % (n // 4), "path": names[n % 3] and names[n % 3].format(n)},
         "question": f"{n}?", "answer": "a"}
        for n in range(120)
    ]  # fmt: skip
    features = {"image": datasets.Image(), "question": datasets.Value("string"), "answer": datasets.Value("string")}
    datasets.Dataset.from_list(rows, features=datasets.Features(features)).to_parquet(tmp_path / "rows.parquet")
    words = [str(tmp_path / "rows.parquet"), "--output_dir", str(tmp_path / "out"), "--hold_out", "20"]
    assert main(["convert", *words]) == 0
    images = tmp_path / "out" / "images"
    held, kept = (
        {(images / record.images[0].name).read_bytes() for record in load_records(tmp_path / "out" / name)}
        for name in ("out-eval.json", "data.json")
    )
    assert not held & kept
    assert len(list(images.iterdir())) == len(held | kept) == 30


def test_questions_without_pictures_are_on_one_side(tmp_path: Path) -> None:
    rows = [{"question": f"{n % 5}?", "answer": f"{n}"} for n in range(40)]
    with raises_code("", where="--hold_out", message="40 of 40 records leave none", kind=DataError):
        hold_out(rows, made(tmp_path / "none"), "40")
    held, kept = hold_out(rows, tmp_path, "8")
    asked = [{record["conversations"][0]["value"] for record in side} for side in (held, kept)]
    assert (len(held), len(kept)) == (8, 32)
    assert not asked[0] & asked[1]


def test_what_an_evaluation_reads_is_kept(tmp_path: Path) -> None:
    row = {"question": "Colour?", "answers": ["dark red", "red", "red"], "type": "colour"}
    first, second = convert({"t.json": [row, {"question": "2?", "answer": "2"}]}, tmp_path)
    assert (first["type"], first["answers"]) == (row["type"], row["answers"])
    assert first["conversations"][1]["value"] == "red"
    assert not second.keys() & {"type", "answers"}
    votes = [{"answer": text, "answer_id": n} for n, text in enumerate(row["answers"])]
    (third,) = convert({"t.json": [row | {"answers": votes}]}, made(tmp_path / "votes"))
    assert third["conversations"][1]["value"] == "red"
    assert third["answers"] == row["answers"]


def test_sources_are_mixed_by_weight(tiny_data: Path) -> None:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That."}]
    rows = [{"id": f"r{n}", "image": f"{n % 8}.png", "conversations": turns} for n in range(400)]
    (tiny_data / "many.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sources = [
        Source(path=str(tiny_data / name), weight=weight, image_folder=str(tiny_data / "images"))
        for name, weight in (("train.json", 2), ("many.jsonl", 0.25), ("many.jsonl", 0))
    ]
    records = list(mixed_records(sources))
    assert [record.id for record in records[:4]] == ["p0", "p0", "p1", "p1"]
    assert 24 + 70 < len(records) < 24 + 130
    assert records == list(mixed_records(sources))
    assert all(Path(str(picture)).is_file() for record in records for picture in record.images)


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
    assert load_image(pickle.loads(pickle.dumps(picture))).getpixel((1, 1)) == (255, 0, 0)
    assert main(["check", str(parquet)]) == 0
    assert main(["convert", str(parquet), "--output_dir", str(tmp_path / "out")]) == 0
    assert sorted(path.name for path in (tmp_path / "out" / "images").iterdir()) == ["same-2.png", "same.png"]
    assert main(["check", str(tmp_path / "out" / "data.json")]) == 0


def test_a_configuration_of_a_set_is_named_and_its_classes_have_names(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=["dog", "cat"]),
            "prompt": datasets.Value("string"),
        }
    )
    for name, labels in {"pets": [1, 0, -1], "more": [1]}.items():
        rows = [{"image": {"bytes": png("red"), "path": "a.png"}, "label": n, "prompt": "What is it?"} for n in labels]
        datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "set" / f"{name}.parquet")
    configs = "".join(f"- config_name: {name}\n  data_files: {name}.parquet\n" for name in ("pets", "more"))
    (tmp_path / "set" / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    found = [next(load_records(f"hub:{tmp_path}/set/{name}")) for name in ("pets", "more")]
    assert [[turn.text for turn in record.turns] for record in found] == [["<image>\nWhat is it?", "cat"]] * 2
    items = list(record_items(f"hub:{tmp_path}/set/pets"))
    assert [isinstance(item, DataError) for item in items] == [False, False, True]  # a row without a class
    with raises_code("hub-unreadable", message="['pets', 'more']", hint=f"hub:{tmp_path}/set/CONFIG"):
        next(load_records(f"hub:{tmp_path}/set"))


def test_a_revision_of_a_set_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[Any] = []

    def load(*names: Any, **settings: Any) -> Any:
        asked.append((*names, settings["revision"], settings["split"]))
        raise ValueError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    for name in ("a/b", "a/b/en@main:test", "a/b@1f2:val"):
        with raises_code("hub-unreadable", kind=UserError):
            next(load_records(f"hub:{name}"))
    assert asked == [("a/b", None, None, "train"), ("a/b", "en", "main", "test"), ("a/b", None, "1f2", "val")]


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
@pytest.mark.parametrize(("key", "value"), [("weight", 0), ("loss", False)])
def test_an_answer_that_is_left_out_stays_so(form: str, key: str, value: object, tmp_path: Path) -> None:
    import datasets

    said = [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "2", key: value}]
    rows, path = [{"messages": [*said, said[0], {"role": "assistant", "content": "1"}]}], tmp_path / f"t.{form}"
    if form == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    path.write_bytes(path.read_bytes() if form == "parquet" else json.dumps(rows[0]).encode())
    (record,) = convert_file(path, tmp_path / "out")
    assert [turn.weight for turn in record.turns if turn.role == "assistant"] == [0, 1]


def test_ids_of_joined_files_stay_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, ids in {"a": ("x", "y", "y-2"), "b": ("y", "y", "z")}.items():
        rows = [{"id": each, "question": f"{name} {n}?", "answer": "a"} for n, each in enumerate(ids)]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    words = ["convert", str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    assert main([*words, "--output_dir", str(tmp_path / "out")]) == 0
    ids = [record.id for record in load_records(tmp_path / "out" / "data.json")]
    assert ids == ["x", "y", "y-2", "y-3", "y-3", "z"]
    assert "note: 2 ids of earlier files got a number" in capsys.readouterr().err


def test_a_picture_is_looked_for_beside_its_own_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["convert", str(tmp_path / "a" / "t.json"), str(tmp_path / "b" / "t.json")]

    def write(names: dict[str, str], colours: dict[str, tuple[int, int, int]]) -> None:
        for folder, name in names.items():
            rows = [{"image": name.format(n), "question": f"{folder} {n}?", "answer": "a"} for n in range(20)]
            (made(tmp_path / folder) / "t.json").write_text(json.dumps(rows))
            for n in range(20):
                Image.new("RGB", (9, 9), (n, *colours[folder][1:])).save(tmp_path / folder / name.format(n))

    write({"a": "{}.png", "b": "./{}.png"}, {"a": (0, 0, 0), "b": (0, 0, 9)})
    for flags in ([], ["--hold_out", "10"]):
        with raises_code("convert-picture-names", where="b/t.json", message="a/t.json", hint="rename the pictures"):
            main([*words, "--output_dir", str(tmp_path / "out"), *flags])
        assert not list(tmp_path.glob("out/*"))
    assert main([*words, "--output_dir", str(tmp_path / "one"), "--image_folder", str(tmp_path / "a")]) == 0
    write({"b": "b{}.png"}, {"b": (0, 0, 0)})  # the pictures of a, with other names
    assert main([*words, "--output_dir", str(tmp_path / "out"), "--hold_out", "10"]) == 0
    held = json.loads((tmp_path / "out" / "out-eval.json").read_text())
    of_a, of_b = ({row["image"].strip("b") for row in held if row["image"].startswith("b") == is_b} for is_b in (0, 1))
    assert of_a == of_b
    assert len(of_a) == 5
    said = capsys.readouterr().err
    assert "not found" not in said
    assert f"note: 15 of 30 pictures are not in {tmp_path / 'a'}: copy them there" in said
    assert f"--image_folder {tmp_path / 'a'} --against {tmp_path / 'out' / 'out-eval.json'}" in said


def test_a_stored_picture_takes_no_name_of_another_source(parquet: Path, tmp_path: Path) -> None:
    (made(tmp_path / "a") / "t.json").write_text(json.dumps([{"image": "same.png", "question": "1?", "answer": "2"}]))
    Image.new("RGB", (9, 9)).save(tmp_path / "a" / "same.png")
    sources, out = [str(tmp_path / "a" / "t.json"), str(parquet)], tmp_path / "out"
    with raises_code("convert-picture-names", where="a/t.json"):
        main(["convert", *sources[::-1], "--output_dir", str(out)])
    assert main(["convert", *sources, "--output_dir", str(out)]) == 0
    assert [record.images[0].name for record in load_records(out / "data.json")] == [
        "same.png", "same-1.png", "same-2.png"
    ]  # fmt: skip


def test_records_of_the_hub_keep_their_other_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import datasets

    turns = [{"from": "human", "value": "Why?", "mood": "curious"}, {"from": "gpt", "value": "So."}]
    row = {"id": "a", "conversations": turns, "type": "why", "answers": ["So.", "so"], "raw": b"\x00"}
    datasets.Dataset.from_list([row]).to_parquet(tmp_path / "rows.parquet")
    (record,) = convert_file(tmp_path / "rows.parquet", tmp_path / "out")
    assert record.extra == {"type": "why", "answers": ["So.", "so"]}
    assert (
        "left out: columns that JSON cannot hold, keys of turns that are not read: mood, raw" in capsys.readouterr().err
    )


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_what_is_broken_off_leaves_nothing_in_the_way_of_the_next_try(
    error: type[BaseException], parquet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, records: object) -> int:
        next(iter(records))
        raise error

    words = ["convert", str(parquet), "--output_dir", str(tmp_path / "out")]
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


def convert_file(path: Path, out: Path, *flags: str) -> list[Any]:
    assert main(["convert", str(path), "--output_dir", str(out), *flags]) == 0
    return list(load_records(out / "data.json"))


def test_alpacas_input_follows_its_instruction(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Name the country. ", "input": "Paris", "output": " France", "answer": "no"},
        {"instruction": "Say hi.", "input": "", "output": "Hi", "system": "Be short.", "history": [["A?", "B"]]},
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    first, second = convert_file(tmp_path / "a.json", tmp_path / "out", "--columns", "answer=output")
    assert [turn.text for turn in first.turns] == ["Name the country. \nParis", " France"]
    assert [(turn.role, turn.text) for turn in second.turns] == [
        ("system", "Be short."), ("user", "A?"), ("assistant", "B"), ("user", "Say hi."), ("assistant", "Hi"),
    ]  # fmt: skip
    (tmp_path / "b.json").write_text(json.dumps([rows[1] | {"history": ["A?"]}]))
    with raises_code("", where="b.json:record 1", message="history must be a list of pairs", kind=DataError):
        convert_file(tmp_path / "b.json", tmp_path / "out2")


def test_a_row_with_an_empty_cell_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.csv"
    path.write_text("question,answer\nWhy?,Because\nHow?,\n,Yes\nHow many?, \nHow many?,0\n")
    assert [record.turns[-1].text for record in convert_file(path, tmp_path / "out")] == ["Because", "0"]
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("left out")]
    cells = ((3, "answer"), (4, "question"), (5, "answer"))
    assert lines == [f'left out: {path}:{number}: nothing under "{name}"' for number, name in cells]
    pictured = tmp_path / "p.csv"  # no question is asked that the row does not have
    pictured.write_text("image,question,answer\na.png,,red\nb.png,What is this?,A disc.\n")
    assert [str(record.images[0]) for record in convert_file(pictured, tmp_path / "out4")] == ["b.png"]
    (tmp_path / "b.json").write_text('[{"question": "How many?", "answer": 0}]')
    assert [record.turns[-1].text for record in convert_file(tmp_path / "b.json", tmp_path / "out2")] == ["0"]
    path.write_text("question,comment\nWhy?,x\n")
    with raises_code("", where="a.csv:2", kind=DataError):
        main(["convert", str(path), "--output_dir", str(tmp_path / "out3")])


def test_a_row_with_an_unquoted_comma_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.csv"
    path.write_text("question,answer\nWhy?,Yes, because\nHow?,So,\n")
    assert [record.turns[-1].text for record in convert_file(path, tmp_path / "out")] == ["So"]
    assert f"left out: {path}:2: more cells than the header\n" in capsys.readouterr().err


def test_rows_without_a_picture_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.csv"
    path.write_text("image,question,answer\na.png,Why?,So\n,How?,So\n")
    first, second = convert_file(path, tmp_path / "out", "--image_folder", str(tmp_path / "photos"))
    assert first.images
    assert not second.images
    said = capsys.readouterr()
    assert f"note: {path}: 1 row without a picture, kept as text alone\n" in said.err
    assert f"--image_folder {tmp_path / 'photos'}" in said.out + said.err


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
    (record,) = convert_file(tmp_path / name, tmp_path / "out")
    assert record.images[0].name == "ä b.jpg"
    assert record.turns[1].text == "Ein Kreis, rot"
