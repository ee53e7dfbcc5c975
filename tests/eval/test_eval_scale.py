"""A question takes few bytes of memory, from its file to its score."""

from __future__ import annotations

import gc
import json
import random
import resource
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import Any

import numpy as np
import pytest

from milora_data.records.record import Turn
from milora_eval.answers import item_file
from milora_eval.answers.item_file import ItemFile
from milora_eval.answers.questions import EvaluationPlan, Questions, read_items
from milora_eval.answers.selection import select, selected
from milora_eval.answers.store import Store
from milora_eval.benchmark import Answer, Item, means
from milora_eval.benchmarks.own_data import OwnData
from milora_vl.models.generate import Prompt, _batches
from support.problems import raises_code


def items(count: int) -> list[Item]:
    return [
        Item(
            f"{number}",
            (Turn("user", f"What is {number}?"),),
            answers=("a",),
            group=f"{number % 7}",
            meta={"n": number},
        )
        for number in range(count)
    ]


def bytes_of(work: Callable[[], Any]) -> int:
    """Return the largest memory of a call, beyond what was there before."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        kept = work()
        assert kept is not None
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("in_memory", [1, 1 << 20])
def test_items_come_back_from_their_file(in_memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(item_file, "IN_MEMORY", in_memory)
    whole = items(50)
    stored = ItemFile(whole)
    assert list(stored) == whole
    assert [stored[place] for place in (3, 49, -1)] == [whole[3], whole[49], whole[-1]]
    some = stored.take(selected(stored.orders, 20))
    assert list(some) == select(whole, 20)
    assert list(some.take(selected(some.orders, 5))) == select(whole, 5)


@pytest.mark.parametrize("in_memory", [1, 1 << 20])
def test_the_file_of_items_is_closed(in_memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Any] = []

    def spooled(**options: Any) -> Any:
        opened.append(SpooledTemporaryFile(**options))  # noqa: SIM115
        return opened[-1]

    def broken() -> Iterator[Item]:
        yield from items(3)
        raise ValueError("row 4")

    monkeypatch.setattr(item_file, "IN_MEMORY", in_memory)
    monkeypatch.setattr(item_file, "SpooledTemporaryFile", spooled)
    with pytest.raises(ValueError, match="row 4"):
        ItemFile(broken())
    assert opened.pop().closed

    some = ItemFile(items(20)).take(np.arange(3))
    gc.collect()
    assert not opened[0].closed
    assert list(some) == items(3)
    del some
    gc.collect()
    assert opened[0].closed


@pytest.mark.parametrize("cause", ["full disk", "limit of file sizes", "no folder"])
@pytest.mark.parametrize("count", [3, 300], ids=["buffered", "large"])
def test_a_full_temporary_folder_is_named(
    cause: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(item_file, "IN_MEMORY", 1)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if cause == "full disk":
        monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: Path("/dev/full").open("w+b"))  # noqa: SIM115
    elif cause == "no folder":
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with raises_code("disk-full", hint="export TMPDIR=FOLDER") as error:
            ItemFile(items(count))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"temporary folder {tmp_path}" in str(error.value)


def test_a_question_takes_few_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(item_file, "IN_MEMORY", 1)
    monkeypatch.setattr(item_file, "RECENT", 16)
    count, path = 4000, tmp_path / "mine.jsonl"
    rows = [json.dumps({"id": f"q{n}", "question": f"Is it {n}? " * 5, "answer": "yes"}) for n in range(count)]
    path.write_text("\n".join(rows))
    benchmark = OwnData(str(path))
    plan = EvaluationPlan(suite="own", benchmarks=(benchmark,), data_dir=tmp_path)
    fixed = 300_000
    assert bytes_of(lambda: Questions(plan, read_items([benchmark], tmp_path))) < fixed + 100 * count

    asked = Questions(plan, read_items([benchmark], tmp_path))
    assert asked[1234].key == f"{int(asked.keys[1234]):016x}"
    store = Store(tmp_path / "out")
    store.append(
        [
            {"key": question.key, "benchmark": "own", "id": question.item.id, "prediction": "x" * 200}
            for question in asked
        ]
    )
    assert bytes_of(store.known) < fixed + 100 * count


def test_a_scored_answer_takes_few_bytes() -> None:
    count = 5000
    answers = (Answer(item, "", 0.5) for item in items(count))
    assert bytes_of(lambda: means(answers, "accuracy")) < 100_000 + 150 * count


def test_batches_have_the_order_of_a_sort_by_pictures_and_length() -> None:
    draw = random.Random(0)
    pictures = [(), ("a.png",), ("b.png",), ("c.png",), ("a.png", "b.png")]
    prompts = [Prompt((Turn("user", "x" * draw.randrange(1, 6)),), draw.choice(pictures)) for _ in range(300)]
    lengths = [len(prompt.turns[0].text) for prompt in prompts]
    longest = {
        images: max(n for n, p in zip(lengths, prompts, strict=True) if p.images == images) for images in pictures
    }

    def order(place: int) -> tuple[int, int, str, int]:
        images = prompts[place].images
        return len(images), longest[images], str(images), lengths[place]

    batches = list(_batches(prompts, lambda prompt: len(prompt.turns[0].text), 8))
    assert [place for batch in batches for place in batch] == sorted(range(300), key=order, reverse=True)
    assert all(len({len(prompts[place].images) for place in batch}) == 1 for batch in batches)
    assert len(batches) <= 300 // 8 + 3
