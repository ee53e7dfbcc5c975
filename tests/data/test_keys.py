"""Content keys: the same bytes have one key under any name, and other bytes another."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from milora_data.keys import FileKeys, data_key, question_key, record_key, shown_keys
from milora_data.pictures.load import StoredPicture
from milora_data.records.record import Record, Turn, Video


def test_a_record_is_known_by_its_texts_and_the_bytes_it_shows(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name, content in {"a.png": b"one", "b.png": b"two", "sub/a.png": b"one"}.items():
        (tmp_path / name).write_bytes(content)
    turns = (Turn("user", "<image>\nHi \ud83d?"), Turn("assistant", "Yes."))
    record = Record("1", ("a.png",), turns, "train.json:1", {"type": "x"})

    def key(record: Record) -> str:
        return record_key(record, FileKeys(tmp_path))

    same = [replace(record, id="2", source="moved.json:7", extra={}), replace(record, images=("sub/../sub/a.png",))]
    same.append(replace(record, images=(StoredPicture("c.png", b"one"),)))
    assert {key(record)} == set(map(key, same))
    others = [
        replace(record, images=images) for images in (("b.png",), ("none.png",), ("../a.png",), ("a.png", "b.png"))
    ]
    others += [replace(record, turns=turns[:1]), replace(record, turns=(Turn("system", turns[0].text), turns[1]))]
    others += [replace(record, videos=(Video(("b.png",), fps),)) for fps in (None, 2.0)]
    keys = list(map(key, others))
    assert len({key(record), *keys}) == 1 + len(others)
    assert data_key([key(record), keys[0]]) != data_key([keys[0], key(record)])
    asked = turns[:1], shown_keys(record.images, (), FileKeys(tmp_path)), ["Yes."]
    assert question_key(*asked, "exact") != question_key(*asked, "contains")
