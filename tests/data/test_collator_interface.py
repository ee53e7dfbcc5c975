"""What every collator answers about a record without making a batch equals what it puts into one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from milora_data.batches.lengths import lengths_of
from milora_data.batches.record_collator import RecordCollator
from milora_data.encode.labels import NoSupervisedTokens
from milora_data.encode.tokens import IGNORE
from milora_data.pictures.load import Picture
from milora_data.records import parse_record
from milora_vl.models.collator_for import collator_for
from milora_vl.models.tiny import tiny_llama, tiny_llava
from support.drawn import encoded
from support.tiny_next import tiny_next
from support.versions import needs_spans
from support.vlm_families import model_of, processor_of
from support.vlm_runs import write_pictures

pytestmark = pytest.mark.filterwarnings("ignore")
SEEN = {"conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dog."}]}
TEXT = {"conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "It is a long answer."}]}
SIZES = ((48, 32), (640, 224))
KINDS = ["llava", "next", "text", pytest.param("qwen2_5_vl", marks=needs_spans)]
Make = Callable[..., tuple[RecordCollator[Any], Any, list[Any]]]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Return a collator, its tokenizer, and records that it takes."""
    pictures = write_pictures(tmp_path)

    def made(kind: str, **options: Any) -> tuple[RecordCollator[Any], Any, list[Any]]:
        models: dict[str, Callable[[], Any]] = {"llava": tiny_llava, "next": tiny_next, "text": tiny_llama}
        if kind in models:
            model, processor = models[kind]()
        else:
            processor = processor_of(kind)
            model = model_of(kind, processor)
        collate = collator_for(model, processor, image_folder=pictures, **options)
        values = [TEXT] if kind == "text" else [TEXT, {**SEEN, "image": "0.png"}, {**SEEN, "image": "1.png"}]
        return collate, getattr(processor, "tokenizer", processor), [parse_record(value) for value in values]

    return made


@pytest.mark.parametrize("kind", KINDS)
def test_counts_and_segments_are_those_of_the_batch(kind: str, make: Make) -> None:
    collate, tokenizer, records = make(kind)
    for record in records:
        batch = collate([record])
        labels = batch["labels"][batch["labels"] != IGNORE]
        assert collate.num_tokens(record) == int(batch["attention_mask"].sum())
        assert collate.num_supervised(record) == len(labels)
        supervised = "".join(segment.text for segment in collate.segments(record) if segment.supervised)
        assert supervised.strip() == tokenizer.decode(labels).strip()
        assert sum(segment.text.count("<image>") for segment in collate.segments(record)) == len(record.images)
        collate.require_usable(record)


@pytest.mark.parametrize("kind", KINDS)
def test_lengths_are_counted_once_and_again_for_other_settings(
    kind: str, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collate, _, records = make(kind)
    expected = [collate.num_tokens(record) for record in records]
    data = tmp_path / "data.json"
    assert lengths_of(records, collate, beside=data) == expected
    monkeypatch.setattr(type(collate), "full_length", None)
    collate.max_length = min(expected) - 1
    assert lengths_of(records, collate, beside=data) == [collate.max_length] * len(records)
    for changed in ([*records, records[0]], records[1:] or records * 2):
        with pytest.raises(TypeError):
            lengths_of(changed, collate, beside=data)
    monkeypatch.setattr(type(collate), "length_settings", lambda _: "others")
    with pytest.raises(TypeError):
        lengths_of(records, collate, beside=data)


@pytest.mark.parametrize("kind", ["next", pytest.param("qwen2_5_vl", marks=needs_spans)])
def test_lengths_follow_an_image_of_another_size_and_no_name(
    kind: str, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    collate, _, records = make(kind)
    before = lengths_of(records, collate, beside=tmp_path / "data.json")
    Image.new("RGB", (640, 224)).save(collate.image_folder / "0.png")
    after = lengths_of(records, collate, beside=tmp_path / "data.json")
    assert after[1] == collate.num_tokens(records[1]) != before[1]
    assert after[2] == before[2]
    stored = [replace(records[1], images=(Picture("same.png", content=encoded("red", size)),)) for size in SIZES]
    counted = [lengths_of([record], collate, beside=tmp_path / "data.json") for record in stored]
    assert counted == [[collate.num_tokens(record)] for record in stored]
    assert counted[0] != counted[1]
    (collate.image_folder / "0.png").rename(collate.image_folder / "new.png")
    records[1] = replace(records[1], images=(Picture("new.png"),))
    monkeypatch.setattr(type(collate), "full_length", None)
    assert lengths_of(records, collate, beside=tmp_path / "data.json") == after


@pytest.mark.parametrize("excluded", [{"weight": 0}, {"loss": False}])
@pytest.mark.parametrize("kind", KINDS)
def test_an_excluded_answer_is_read_and_not_trained(kind: str, excluded: dict[str, Any], make: Make) -> None:
    collate, tokenizer, _ = make(kind)
    said = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "A wrong one."}]
    more = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "A good one.", "weight": 1}]
    whole, part = (parse_record({"messages": [said[0], said[1] | keys, *more]}) for keys in ({}, excluded))
    batch = collate([part])
    assert batch["input_ids"].tolist() == collate([whole])["input_ids"].tolist()
    trained = tokenizer.decode(batch["labels"][batch["labels"] != IGNORE])
    assert "A good one." in trained
    assert "wrong" not in trained
    assert "wrong" in tokenizer.decode(batch["input_ids"][0])
    with pytest.raises(NoSupervisedTokens):
        collate.require_usable(parse_record({"messages": [said[0], said[1] | excluded]}))


@pytest.mark.parametrize("kind", KINDS)
def test_a_list_of_records_becomes_one_row(kind: str, make: Make) -> None:
    collate, _, records = make(kind)
    batch = collate([records])
    lengths = [collate.num_tokens(record) for record in records]
    assert batch["input_ids"].shape == (1, sum(lengths))
    supervised = sum(collate.num_supervised(record) for record in records)
    assert int((batch["labels"] != IGNORE).sum()) == supervised
    assert "attention_mask" not in batch
    assert collate.kind(records[0]) == collate.kind(records[0])
