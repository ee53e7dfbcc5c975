"""Reading records: both file forms, every mistake with file and line, memory independent of the file."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import re
import sys
import tracemalloc
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from milora_data.formats import jsonfile
from milora_data.formats.jsonfile import read_objects, write_objects
from milora_data.keys import FileKeys, data_key, question_key, record_key, shown_keys
from milora_data.pictures.load import Picture
from milora_data.records import parse_record
from milora_data.records.record import CompactRecords, Record, Turn, Video
from milora_data.stream import load_records
from milora_vl.common.errors import DataError
from support.problems import raises_code

RECORD = {
    "id": 17,
    "image": "a/b.jpg",
    "conversations": [{"from": "human", "value": "<image>\nHi é😀"}, {"from": "gpt", "value": "Hello"}],
    "type": "naming",
    "answers": ["x"],
}


def test_a_record_keeps_what_the_format_does_not_know() -> None:
    record = parse_record(RECORD, source="x.json:3")
    assert record == Record(
        id="17",
        images=(Picture("a/b.jpg"),),
        turns=(Turn("user", "<image>\nHi é😀"), Turn("assistant", "Hello")),
        source="x.json:3",
        extra={"type": "naming", "answers": ["x"]},
    )


def test_messages_under_conversations_and_ms_swifts_form_are_read() -> None:
    turns = (Turn("user", "<image>\nHi?"), Turn("assistant", "Yes."))
    said = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes."}]
    marked = [said[0] | {"content": "<image>\nHi?"}, said[1]]
    swift = {"query": "Hi?", "response": "Yes.", "images": ["a.jpg"]}
    forms: list[dict[str, Any]] = [
        {"image": "a.jpg", "conversations": said},
        {"images": ["a.jpg"], "conversations": marked},
    ]
    parts = [{"type": "image_url", "image_url": {"url": "a.jpg"}}, {"type": "text", "text": "Hi?"}]
    forms += [{"messages": [{"role": "user", "content": parts}, said[1]]}]
    forms += [{"prompt": "Hi?", "completion": "Yes.", "images": ["a.jpg"]}]
    forms += [{"prompt": [{"role": "user", "content": parts}], "completion": said[1:]}]
    for value in (*forms, swift, swift | {"query": "<image>\nHi?", "history": []}):
        record = parse_record(value)
        assert (record.turns, record.images) == (turns, (Picture("a.jpg"),))
    longer = parse_record(swift | {"images": [], "system": "Be short.", "history": [["A?", "B"]]})
    assert [turn.role for turn in longer.turns] == ["system", *["user", "assistant"] * 2]
    assert [turn.text for turn in longer.turns] == ["Be short.", "A?", "B", "Hi?", "Yes."]
    with raises_code("", where="m.json:2", message="history must be a list of pairs", kind=DataError):
        parse_record(swift | {"history": ["A?"]}, source="m.json:2")


@pytest.mark.parametrize(
    ("keys", "code"),
    [
        ({"weight": 0.5}, "record-weight"),
        ({"weight": True}, "record-weight"),
        ({"loss": 0}, "record-weight"),
        ({"reasoning_content": "Hm."}, "record-reasoning"),
        ({"reasoning": "Hm."}, "record-reasoning"),
    ],
)
def test_what_a_message_says_about_its_training_is_never_dropped(keys: dict[str, Any], code: str) -> None:
    said = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes."}]
    with raises_code(code, kind=DataError):
        parse_record({"messages": [said[0], said[1] | keys]})
    with raises_code(code, kind=DataError):
        parse_record({"conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Yes."} | keys]})
    for key, value in (("loss", False), ("weight", 0)):  # of a whole record, as of ms-swift
        with raises_code("record-weight", kind=DataError):
            parse_record({"messages": said, key: value})
    others: dict[str, Any] = {"name": "Ann", "weight": None, "loss": None, "reasoning_content": "", "tool_calls": []}
    assert parse_record({"messages": [said[0] | others, said[1]]}).unread == ("name",)
    part = {"type": "text", "text": "Yes.", "citation": "a book", "note": None}
    assert parse_record({"messages": [said[0], said[1] | {"content": [part]}]}).unread == ("content.citation",)
    with raises_code("record-weight", kind=DataError):
        parse_record({"messages": [said[0], said[1] | {"content": [part | {"weight": 0}]}]})


@pytest.mark.parametrize("indent", [None, 2])
def test_a_list_gives_each_record_with_its_number(tmp_path: Path, indent: int | None) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([RECORD] * 3, indent=indent), encoding="utf-8")
    records = list(load_records(path))
    assert [record.turns for record in records] == [parse_record(RECORD).turns] * 3
    assert [record.source for record in records] == [f"{path}:record {number}" for number in (1, 2, 3)]


@pytest.mark.parametrize(
    "text", ["{0}\n{0}\n", "{0}\r\n\r\n{0}", "\ufeff{0}\n\n  {0}  \n\n", "[{0},{0}]", "\ufeff [ {0} , {0} ] \n"]
)
def test_lines_and_lists_with_blanks_and_byte_order_mark(tmp_path: Path, text: str) -> None:
    (tmp_path / "a").write_text(text.replace("{0}", json.dumps(RECORD)), encoding="utf-8", newline="")
    assert [record.id for record in load_records(tmp_path / "a")] == ["17", "17"]


BROKEN = {
    "missing comma": ('[\n{"a": 1}\n{"b": 2}\n]', 3, "expecting ',' delimiter", "{"),
    "trailing comma": ('[\n{"a": 1},]', 2, "", None),  # Python 3.13 names the comma, others what is behind it
    "text behind": ('[{"a": 1}]\n\n{"b": 2}', 3, "extra data", "{"),
    "bad line": ('{"a": 1}\n{"b": }\n', 2, "expecting value", "}"),
    "control character": ('[\n\n{"a": "x\ty\n"}]', 3, "invalid control character", None),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_json_is_shown_with_line_and_caret(tmp_path: Path, name: str) -> None:
    text, line, message, under = BROKEN[name]
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(DataError) as caught:
        list(read_objects(path))
    (problem,) = caught.value.problems
    assert (problem.code, problem.where) == ("json-syntax", f"{path}:{line}")
    first, excerpt, caret = problem.message.split("\n")
    assert message in first
    assert caret.strip() == "^"
    if under is not None:
        assert excerpt[caret.index("^")] == under


def test_a_list_is_read_as_json_reads_it_wherever_the_buffer_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = [{"a": 1}, {"b": float("inf")}, {"c": 10**30}, -1.5e3, "], é", [], [{"d": [1, 2]}]]
    (tmp_path / "a.json").write_text(json.dumps(values, indent=1, ensure_ascii=False), encoding="utf-8")
    for size in (1, 2, 3, 5, 8, 1000):
        monkeypatch.setattr(jsonfile, "_CHUNK", size)
        assert [value for _, value in read_objects(tmp_path / "a.json")] == values


@pytest.mark.parametrize("depth", [150, 100_000])
@pytest.mark.parametrize(("text", "where"), [("[{}, {}]", "record 2"), ('{"a": {}}\n{"a": {}}', "2")])
def test_a_value_that_is_nested_too_deeply_is_named(tmp_path: Path, text: str, where: str, depth: int) -> None:
    path = tmp_path / "a.json"
    path.write_text(text.replace("{}", "[" * 90 + "]" * 90, 1).replace("{}", "[" * depth + "]" * depth))
    with raises_code("json-depth", where=f"a.json:{where}", kind=DataError):
        list(read_objects(path))
    path.write_text("[" * depth)
    with raises_code("json-depth" if depth > 1000 else "json-syntax", where="a.json", kind=DataError):
        list(read_objects(path))


def test_a_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text("[]")
    with raises_code("data-missing-file", where="tarin.json", hint="train.json", kind=DataError):
        list(load_records(tmp_path / "tarin.json"))
    with raises_code("data-folder", hint="*.parquet", kind=DataError):
        list(load_records(tmp_path))


NOT_RECORDS: list[tuple[Any, str]] = [
    ([1], "expected a record"),
    ({"id": 1, "text": ""}, '"conversations" must be a list'),
    ({"conversations": [{"from": "human"}]}, "turn 1 must be"),
    ({"conversations": [{"from": "human", "value": None}]}, "turn 1 must be"),
    ({"conversations": [{"from": "bot", "value": ""}]}, "unknown \"from\": 'bot'"),
    ({"conversations": [], "image": 3}, '"image" must be'),
    ({"conversations": [], "image": [""]}, '"image" must be'),
    ({"conversations": [{"from": "system", "value": "a"}], "system": "b"}, "only system text"),
]


@pytest.mark.parametrize(("value", "message"), NOT_RECORDS)
def test_what_is_no_record_is_named_with_file_and_line(tmp_path: Path, value: Any, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(RECORD) + "\n" + json.dumps(value) + "\n")
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        list(load_records(path))
    assert caught.value.first.where == f"{path}:2"


def test_a_system_text_of_sharegpt_is_the_first_turn() -> None:
    record = parse_record(RECORD | {"system": "Be brief."})
    assert record.turns == (Turn("system", "Be brief."), *parse_record(RECORD).turns)
    assert "system" not in record.extra
    assert parse_record(RECORD | {"system": None}).turns == parse_record(RECORD).turns
    own = [{"from": "system", "value": "Be brief."}, *RECORD["conversations"]]
    assert parse_record({"conversations": own, "system": "Be brief."}).turns == record.turns


def test_messages_without_an_id_have_none() -> None:
    said = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes."}]
    assert [parse_record({"id": name, "messages": said}).id for name in (None, 0, "a")] == ["", "0", "a"]


def test_a_file_url_is_the_path_of_a_picture() -> None:
    part = {"type": "image_url", "image_url": {"url": "file:///photos/a%20cat.jpg"}}
    said = [{"role": "user", "content": [part]}, {"role": "assistant", "content": "A cat."}]
    for value in ({"messages": said}, RECORD | {"image": "file:///photos/a%20cat.jpg"}):
        assert parse_record(value).images == (Picture("/photos/a cat.jpg"),)


def test_a_large_list_is_read_in_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("[\n" + ",\n".join([json.dumps(RECORD | {"pad": "é" * 2000})] * 8000) + "\n]")
    assert path.stat().st_size > 30e6
    tracemalloc.start()
    assert sum(1 for _ in load_records(path)) == 8000
    assert tracemalloc.get_traced_memory()[1] < 15e6
    tracemalloc.stop()


@pytest.mark.parametrize("name", ["a.json", "deep/er/a.jsonl"])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_what_is_written_is_read_back_and_never_replaced(tmp_path: Path, name: str, count: int) -> None:
    values = [RECORD | {"n": i} for i in range(count)]
    assert write_objects(tmp_path / name, values) == count
    assert [value for _, value in read_objects(tmp_path / name)] == values
    with raises_code("output-exists", kind=DataError):
        write_objects(tmp_path / name, values)


MEGABYTE = 1 << 20


def many(count: int) -> list[Record]:
    turns = ((Turn("user", f"{i} " * 50), Turn("assistant", "b")) for i in range(count))
    return [Record(str(i), (Picture(f"{i}.png"),), exchange) for i, exchange in enumerate(turns)]


def test_it_is_a_sequence_of_the_same_records() -> None:
    records = many(7)
    compact = CompactRecords(records)
    assert list(compact) == records == list(pickle.loads(pickle.dumps(compact)))
    assert compact[-1] == records[-1]
    assert compact[2:5] == records[2:5]
    with pytest.raises(IndexError):
        compact[7]
    assert not CompactRecords([])


def private() -> int:
    text = Path("/proc/self/smaps_rollup").read_text()
    return 1024 * sum(map(int, re.findall(r"Private_Dirty: +(\d+)", text)))


def growth(records: Sequence[Record], said: Any) -> None:
    before = private()
    assert sum(len(record.turns[0].text) for record in records)
    said.put(private() - before)


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").is_file(), reason="how much memory is one's own, Linux says")
def test_a_loader_process_shares_them() -> None:
    context = multiprocessing.get_context("fork")

    def grown(records: Sequence[Record]) -> int:
        said = context.SimpleQueue()
        process = context.Process(target=growth, args=(records, said))
        process.start()
        process.join()
        return int(said.get())

    records = many(40_000)
    assert grown(CompactRecords(records)) < 2 * MEGABYTE
    assert sys.getsizeof(records) < grown(records)  # what a list costs


def test_a_record_is_known_by_its_texts_and_the_bytes_it_shows(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name, content in {"a.png": b"one", "b.png": b"two", "sub/a.png": b"one"}.items():
        (tmp_path / name).write_bytes(content)
    turns = (Turn("user", "<image>\nHi \ud83d?"), Turn("assistant", "Yes."))
    record = Record("1", (Picture("a.png"),), turns, "train.json:1", {"type": "x"})

    def key(record: Record) -> str:
        return record_key(record, FileKeys(tmp_path))

    same = [replace(record, id="2", source="moved.json:7", extra={}), record.within(tmp_path)]
    same += [replace(record, images=(p,)) for p in (Picture("sub/../sub/a.png"), Picture("c.png", content=b"one"))]
    assert {key(record)} == set(map(key, same))
    others = [
        replace(record, images=tuple(map(Picture, names)))
        for names in (("b.png",), ("none.png",), ("../a.png",), ("a.png", "b.png"))
    ]
    others += [replace(record, turns=turns[:1]), replace(record, turns=(Turn("system", turns[0].text), turns[1]))]
    others += [replace(record, videos=(Video((Picture("b.png"),), fps),)) for fps in (None, 2.0)]
    keys = list(map(key, others))
    assert len({key(record), *keys}) == 1 + len(others)
    assert data_key([key(record), keys[0]]) != data_key([keys[0], key(record)])
    asked = turns[:1], shown_keys(record.images, (), FileKeys(tmp_path)), ["Yes."]
    assert question_key(*asked, "exact") != question_key(*asked, "contains")
