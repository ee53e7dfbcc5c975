"""`milora_data check`: finds everything at once, names file and line, repairs into a new file."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from milora_data.__main__ import main
from milora_data.check import MissingImages, TrainingCheck, read_training_records, scan
from milora_data.stream import load_records
from milora_vl.common.errors import DataError
from support.problems import raises_code

H, G = "human", "gpt"


def turns(*texts: tuple[str, str]) -> dict[str, Any]:
    return {"conversations": [{"from": role, "value": text} for role, text in texts]}


BROKEN: dict[str, tuple[str, dict[str, Any]]] = {
    "turn_order": ("turn 2 is from user, expected assistant", turns((H, "a"), (H, "b"))),
    "no_answer": ("1 turn", turns((H, "a"))),
    "placeholders": ("0 <image> in the conversation, but 1", turns((H, "a"), (G, "b")) | {"image": "0.png"}),
    "missing_picture": ("none.png", turns((H, "<image>\na"), (G, "b")) | {"image": "none.png"}),
    "corrupt_picture": ("bad.png: not a picture", turns((H, "<image>\na"), (G, "b")) | {"image": "bad.png"}),
    "not_a_record": ('"conversations" must be a list', {"id": "x", "text": "y"}),
    "empty_answer": ("turn 2", turns((H, "a"), (G, " "))),
    "empty_question": ("turn 1", turns((H, ""), (G, "a"))),
    "answer_first": ("hello", turns((G, "hello"), (H, "a"), (G, "b"))),
    "unanswered": ("and?", turns((H, "a"), (G, "b"), (H, "and?"))),
    "tiny_picture": ("1.png: 1 x 1 pixels", turns((H, "<image>\na"), (G, "b")) | {"image": "1.png"}),
    "repeated_id": ("an earlier record has this id", {"id": "same"} | turns((H, "other"), (G, "c"))),
    "duplicate": ("data.json:record 1", {"id": "copy"} | turns((H, "Who?"), (G, "b"))),
    "contradiction": ('"c", but "b" in ', turns((H, "Who? "), (G, "c"))),
    "unread_key": ("note", {"conversations": [{"from": H, "value": "a", "note": "x"}, {"from": G, "value": "b"}]}),
    "special_token": ("turn 2: </s>", turns((H, "a"), (G, "the </s> token"))),
}


@pytest.fixture
def write(tiny_data: Path) -> Callable[..., Path]:
    """Writes records as a JSON list."""
    (tiny_data / "images" / "bad.png").write_text("no picture")
    Image.new("RGB", (1, 1)).save(tiny_data / "images" / "1.png")

    def writer(*records: Any, name: str = "data.json") -> Path:
        path = tiny_data / name
        path.write_text("[\n" + ",\n".join(json.dumps(record) for record in records) + "\n]\n")
        return path

    return writer


def check_for_training(path: Path, folder: Any, bad_images: Any = "raise") -> tuple[TrainingCheck, set[str]]:
    check = TrainingCheck()
    for record in load_records(path):
        check.add(record)
    return check, check.finish(folder, bad_images)


GOOD = {"id": "same"} | turns((H, "Who?"), (G, "b"))


@pytest.mark.parametrize("kind", BROKEN)
def test_each_kind_is_found_with_file_and_line(kind: str, write: Callable[..., Path], tiny_data: Path) -> None:
    message, record = BROKEN[kind]
    path = write(GOOD, record)
    report = scan(path, tiny_data / "images")
    assert [finding.kind for finding in report.findings] == [kind]
    assert report.findings[0].where == f"{path}:record 2"
    assert message in report.findings[0].message


def test_pictures_beside_the_data_are_found_without_a_flag(tiny_data: Path, write: Callable[..., Path]) -> None:
    ask = turns((H, "<image>\na"), (G, "b"))
    assert main(["check", str(tiny_data / "train.json")]) == 0  # in images/
    assert main(["check", str(write(GOOD, ask | {"image": "images/0.png"}))]) == 0  # named from the data's folder
    assert main(["check", str(write(ask | {"image": "no/0.png"}, name="no.json"))]) == 1


def test_every_missing_picture_is_counted(
    write: Callable[..., Path], tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ask = turns((H, "<image>\na"), (G, "b"))
    path = write(*[ask | {"image": f"gone{i}.png"} for i in range(7)], ask | {"image": "0.png"})
    assert main(["check", str(path), "--image_folder", str(tiny_data / "images"), "--limit", "2"]) == 1
    captured = capsys.readouterr()
    assert "error          7  missing picture" in captured.out
    assert captured.out.count("gone") == 2
    assert "... and 5 more" in captured.out
    assert "next: python -m milora_data check" in captured.err


def test_fix_writes_the_usable_records(
    write: Callable[..., Path], tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blank = turns((H, "a"), (G, "\u00a0\u200b"))
    path, out = write(GOOD | {"more": 1}, *[record for _, record in BROKEN.values()], blank), tiny_data / "clean.json"
    arguments = ["check", str(path), "--image_folder", str(tiny_data / "images"), "--fix", str(out)]
    assert main(arguments) == 1
    out_text, said = capsys.readouterr()
    assert "<image> is not that of pictures (a rule of every model)" in out_text
    assert "1 left out: missing picture" in said
    assert "1 missing <image> inserted at the start" in said
    assert "2 left out: every answer is empty" in said
    assert "1 left out: record that repeats an earlier one" in said
    assert "to decide by hand: another answer" in said
    assert scan(out, tiny_data / "images").count("error") == 0
    kept = json.loads(out.read_text())
    assert GOOD | {"more": 1} in kept
    assert [turn["value"] for turn in kept[1]["conversations"]] == ["<image>\na", "b"]
    with raises_code("output-exists"):
        main(arguments)


def test_repeats_and_contradictions_go_by_content(write: Callable[..., Path], tiny_data: Path) -> None:
    """Names, ids and the place of `<image>` do not count; the pictures, and the earlier turns do."""
    images = tiny_data / "images"
    (images / "copy.png").write_bytes((images / "0.png").read_bytes())
    ask, why = (H, "<image>\nColour?"), (H, "Why?")
    rows = [
        {"id": "0", "image": "0.png"} | turns(ask, (G, "blue"), why, (G, "So.")),
        {"id": "1", "image": "1.png"} | turns(ask, (G, "purple"), why, (G, "Because.")),
        {"id": "2", "image": "copy.png"} | turns((H, "Colour? <image>"), (G, "purple"), why, (G, "Because.")),
        {"id": "3", "image": "copy.png"} | turns(ask, (G, "blue"), why, (G, "So.")),
    ]
    path = write(*rows)
    found = scan(path, images).findings
    assert [(f.kind, f.id) for f in found if f.kind != "tiny_picture"] == [("contradiction", "2"), ("duplicate", "3")]
    assert found[0].message == f'"purple", but "blue" in {path}:record 1'


def test_a_name_in_another_case_and_a_broken_link_are_called_so(
    write: Callable[..., Path], tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tiny_data / "images" / "link.png").symlink_to("gone/far.png")
    ask = turns((H, "<image>\na"), (G, "b"))
    (tiny_data / "images" / "Cat.png").write_bytes((tiny_data / "images" / "0.png").read_bytes())
    path = write(*[ask | {"image": name} for name in ("cat.PNG", "link.png", "none.png")])
    main(["check", str(path), "--image_folder", str(tiny_data / "images"), "--format", "json"])
    messages = [finding["message"] for finding in json.loads(capsys.readouterr().out)["findings"]]
    assert messages == [
        "cat.PNG: the folder has Cat.png, in another case",
        "link.png: a broken link to gone/far.png",
        "none.png",
    ]


def test_training_is_told_of_all_missing_pictures_at_once(write: Callable[..., Path], tiny_data: Path) -> None:
    ask = turns((H, "<image>\na"), (G, "b"))
    path = write(*[ask | {"image": f"gone{i}.png"} for i in range(7)], ask | {"image": "0.png"})
    with pytest.raises(MissingImages) as caught:
        check_for_training(path, tiny_data / "images")
    message = str(caught.value)
    assert (caught.value.first.code, caught.value.first.where) == ("data-missing-pictures", f"{path}:record 1")
    assert caught.value.first.message.startswith("7 of 8 pictures are missing")
    assert "gone0.png, gone1.png, gone2.png, gone3.png, gone4.png, ..." in message
    assert "--bad_images skip" in message
    check, missing = check_for_training(path, tiny_data / "images", bad_images="skip")
    assert (len(missing), sum(check.with_images), check.unlearnable) == (7, 8, [])


def test_a_run_knows_its_pictures_by_all_of_their_bytes(write: Callable[..., Path], tiny_data: Path) -> None:
    images, keys, content = tiny_data / "images", [], bytearray(2**24)
    for name, place in {"a": 0, "b": 0, "c": 2**23, "d": 2**24 - 1}.items():
        content[place] += 1
        (images / name).write_bytes(content)
        content[place] -= 1
        path = write(turns((H, "<image>\na"), (G, "b")) | {"image": name})
        keys.append(read_training_records(str(path), image_folder=str(images)).pictures)
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3


def test_the_first_records_of_a_stream_are_told_by_their_content(write: Callable[..., Path], tiny_data: Path) -> None:
    (record,) = load_records(write(turns((H, "<image>\na"), (G, "b")) | {"image": "0.png"}))
    for other, count in ((replace(record, source="elsewhere:7"), 1), (record.within(tiny_data / "images"), 2)):
        data = read_training_records("x", image_folder=str(tiny_data / "images"), stream=[record, other])
        assert len(data.train) == count


def test_a_file_url_is_a_path_like_any_other(write: Callable[..., Path], tiny_data: Path, capsys: Any) -> None:
    ask, images = turns((H, "<image>\na"), (G, "b")), tiny_data / "images"
    path = write(*[ask | {"image": (folder / "0.png").as_uri()} for folder in (images, tiny_data)])
    assert main(["check", str(path), "--image_folder", str(images), "--format", "json"]) == 1
    messages = [finding["message"] for finding in json.loads(capsys.readouterr().out)["findings"]]
    assert messages == [f"{tiny_data / '0.png'} (outside the image folder)"]


def test_a_list_that_breaks_off_is_repaired_without_a_next_step(write: Callable[..., Path], capsys: Any) -> None:
    path = write(*[{"id": f"{n}"} | turns((H, "a"), (G, "b")) for n in range(9)])
    path.write_text("\n".join(path.read_text().split("\n")[:3])[:-9])
    assert main(["check", str(path), "--fix", str(path.with_name("fixed.json"))]) == 1
    said = capsys.readouterr().err
    assert "1 broken JSON list: the records after the error could not be read" in said
    assert "next:" not in said


@pytest.mark.parametrize("absolute", [False, True])
def test_a_picture_outside_the_folder_is_never_read(
    absolute: bool, write: Callable[..., Path], tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, secret = tiny_data / "images", tiny_data / "secret.png"
    (images / "0.png").rename(secret)
    name = str(secret) if absolute else "../secret.png"
    path = write(turns((H, "<image>\na"), (G, "b")) | {"image": name})
    words = [str(path), "--image_folder", str(images)]
    assert main(["check", *words, "--format", "json"]) == 1
    assert f"{name} (outside the image folder)" in capsys.readouterr().out
    with raises_code("data-missing-pictures", hint="1 lead out of that folder and are never read", kind=MissingImages):
        check_for_training(path, images)
    assert main(["show", *words, "--html", str(tiny_data / "page.html")]) == 0
    assert "data:image" not in (tiny_data / "page.html").read_text()
    assert len(check_for_training(path, images, "skip")[1]) == 1
    assert absolute == (not check_for_training(path, "/", "skip")[1])


def test_training_refuses_broken_records_by_line(write: Callable[..., Path], tiny_data: Path) -> None:
    path = write(*[BROKEN["turn_order"][1]] * 7, BROKEN["placeholders"][1], BROKEN["no_answer"][1])
    with pytest.raises(DataError) as caught:
        check_for_training(path, tiny_data / "images")
    message = str(caught.value)
    assert message.startswith(f"8 broken records\n{path}:record 1: turn 2 is from user")
    assert "... and 3 more" in message
    assert f"python -m milora_data check {path}" in message


def test_training_counts_what_teaches_nothing(write: Callable[..., Path], tiny_data: Path) -> None:
    found = read_training_records(str(write(GOOD, BROKEN["no_answer"][1], BROKEN["unread_key"][1])))
    assert found.warnings() == ["1 record without an answer skipped", '"note" of 1 turn is not read']
    with raises_code("data-no-records", where="the data", hint="at least one record"):
        check_for_training(write(name="empty.json"), tiny_data)


def test_a_record_that_is_left_out_is_the_one_that_was_found(tiny_data: Path, capsys: Any) -> None:
    good = [{"id": f"g{n}"} | turns((H, "a"), (G, f"b{n}")) for n in range(5)]
    path, out = tiny_data / "one-line.json", tiny_data / "clean.json"
    path.write_text(json.dumps([*good[:3], BROKEN["missing_picture"][1], *good[3:]]))
    assert main(["check", str(path), "--image_folder", str(tiny_data / "images"), "--fix", str(out)]) == 1
    assert f"{path}:record 4: none.png" in capsys.readouterr().out
    assert json.loads(out.read_text()) == good


Out = pytest.CaptureFixture[str]


def test_show_marks_what_is_learnt(tiny_data: Path, capsys: Out) -> None:
    assert main(["show", str(tiny_data / "train.json"), "--image_folder", str(tiny_data / "images")]) == 0
    out = capsys.readouterr().out
    width, height = Image.open(tiny_data / "images" / "0.png").size
    assert f"picture: 0.png ({width} x {height})" in out
    assert (
        "USER: <image>\nWhat colour is it? ASSISTANT:[[ red</s>]]USER: Are you sure? ASSISTANT:[[ Yes, it is.</s>]]"
        in out
    )


def test_show_finds_records_and_says_when_there_is_none(tiny_data: Path, capsys: Out) -> None:
    data = str(tiny_data / "train.json")
    assert main(["show", data, "--id", "t2"]) == 0
    assert "What is 2 + 1?" in capsys.readouterr().out
    assert main(["show", data, "--index", "10", "--limit", "5"]) == 0
    assert capsys.readouterr().out.count("ASSISTANT:[[") == 2
    with raises_code("", message="no record with id"):
        main(["show", data, "--id", "none"])


def test_the_page_holds_pictures_and_marks_what_is_learnt(tiny_data: Path, tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<image>\nIs 1 < 2 & 3?"}, {"from": "gpt", "value": "<b>Yes</b>"}]
    records = [
        {"id": "a", "image": "0.png", "conversations": turns},
        {"id": "b", "image": "no.png", "conversations": turns},
    ]
    (tiny_data / "two.json").write_text(json.dumps(records))
    (tiny_data / "README.md").write_text("# Data\n\n- Pictures by <me>, licence CC BY 4.0.\nMore.\n")
    out = tmp_path / "new" / "page.html"
    arguments = ["show", str(tiny_data / "two.json"), "--image_folder", str(tiny_data / "images"), "--limit", "9"]
    assert main([*arguments, "--html", str(out)]) == 0
    page = out.read_text()
    assert page.count("<li data-kinds=") == 2
    assert page.count("data:image/jpeg;base64,") == 1
    assert "no.png (no such file)" in page
    assert "Is 1 &lt; 2 &amp; 3?" in page
    assert '<span class="learnt"> &lt;b&gt;Yes&lt;/b&gt;&lt;/s&gt;</span>' in page
    assert "<p>Pictures by &lt;me&gt;, licence CC BY 4.0.</p>" in page
    assert "http" not in page.replace("http-equiv", "")
    with raises_code("output-exists"):
        main([*arguments, "--html", str(out)])


def said(*texts: str) -> list[dict[str, Any]]:
    return [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(texts)]


@pytest.mark.parametrize(
    ("value", "code"),
    [
        ({"messages": [{"role": "bot", "content": "x"}]}, ""),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "record-image-count"),
    ],
)
def test_messages_that_cannot_be_used_are_named_and_left_out(
    tmp_path: Path, value: dict[str, Any], code: str, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad, path = json.dumps({"messages": said("a", "b")}), json.dumps(value), tmp_path / "m.jsonl"
    words = ["convert", str(path), "--output_dir", str(tmp_path / "out"), "--format", "json"]
    path.write_text(f"{bad}\n{bad}")
    with raises_code(code, where=f"{path}:1", kind=DataError):
        main(words)
    assert not (tmp_path / "out" / "data.json").exists()
    path.write_text(f"{good}\n{bad}\n{{\n{good}")
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"file": str(tmp_path / "out" / "data.json"), "records": 2, "left_out": 2}
    assert [line.split(": ")[1] for line in err.splitlines() if "left out" in line] == [f"{path}:2", f"{path}:3"]
