"""Records as a stream: every one comes, in its share, and a stream continues exactly where another one was."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from milora_data.__main__ import main as command
from milora_data.pictures.load import Picture
from milora_data.records.record import Record
from milora_data.stream import Source
from milora_data.stream.dataset import record_stream
from milora_vl.common.errors import DataError

loaders = pytest.importorskip("torchdata.stateful_dataloader", exc_type=ImportError)


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` waits for 5 s at the end of each pass over shuffled shards, for the threads that have read them."""
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)  # newer versions


def ask(name: str, text: str = "Yes.", **more: Any) -> dict[str, Any]:
    return {"id": name, "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": text}], **more}


def write(path: Path, names: list[str]) -> Path:
    objects = [json.dumps(ask(name, "täxt\u2028" * (len(name) % 5))) for name in names]
    path.write_text("[" + ",\n".join(objects) + "]" if path.suffix == ".json" else "\n".join(objects), encoding="utf-8")
    return path


def names(items: list[Any]) -> list[str]:
    return [item.id if isinstance(item, Record) else str(item) for item in items]


@pytest.mark.parametrize(
    ("source", "world_size", "workers"),
    [("a.jsonl", 1, 0), ("a.jsonl", 3, 2), ("a.json", 1, 0), ("a.json", 3, 2), ("a.parquet", 3, 0)],
)
def test_an_epoch_has_every_record_once_over_all_processes(
    source: str, world_size: int, workers: int, tmp_path: Path
) -> None:
    import datasets

    every = [f"r{i}" for i in range(48)]
    path = write(tmp_path / source.replace("parquet", "jsonl"), every)
    if source.endswith(".parquet"):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")]
        path = tmp_path / source
        datasets.Dataset.from_list(rows).to_parquet(path)
    found: list[str] = []
    for rank in range(world_size):
        stream = record_stream(
            [Source(path=str(path))], shuffle_buffer=8, rank=rank, world_size=world_size, num_workers=workers
        )
        share = iter(stream.rows)  # one epoch
        found += [row["record"] for row in share]
        assert len(names(list(islice(stream, 60)))) == 60  # and it never ends
    assert len(set(found)) == len(found) == 48


@pytest.mark.parametrize(("workers", "buffer", "stop"), [(0, 0, 1), (0, 16, 23), (0, 16, 61), (2, 0, 23), (2, 16, 61)])
def test_a_stream_goes_on_with_exactly_what_was_due(workers: int, buffer: int, stop: int, tmp_path: Path) -> None:
    mixture = [
        Source(path=str(write(tmp_path / "a.jsonl", [f"a{i}" for i in range(90)])), weight=3),
        Source(path=str(write(tmp_path / "b.json", [f"b{i}" for i in range(20)]))),
    ]

    def loader() -> Any:
        stream = record_stream(mixture, seed=5, shuffle_buffer=buffer, num_workers=workers)
        return loaders.StatefulDataLoader(stream, batch_size=4, collate_fn=names, num_workers=workers)

    first = loader()
    batches = iter(first)
    before = list(islice(batches, stop))
    state = first.state_dict()
    due = list(islice(batches, 30))
    second = loader()
    second.load_state_dict(state)
    assert list(islice(second, 30)) == due
    counts = Counter(name[0] for batch in before + due for name in batch)
    assert 0.5 < counts["a"] / (3 * counts["b"]) < 2


def test_what_is_broken_comes_as_an_error_in_its_place(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ["one", "two", "three"])
    lines = path.read_text(encoding="utf-8").split("\n")
    path.write_text("\n".join([lines[0], "{", '{"text": 1}', *lines[1:]]), encoding="utf-8")
    found = list(islice(record_stream([Source(path=str(path))], shuffle_buffer=0), 5))
    errors = sorted(str(item).split("\n")[0] for item in found if isinstance(item, DataError))
    assert sorted(item.id for item in found if isinstance(item, Record)) == ["one", "three", "two"]
    assert errors[0].startswith(f"{path}:2: broken JSON")
    assert errors[1].startswith(f'{path}:3: "conversations" must be a list')


def test_shards_of_pictures_stream_with_their_bytes(tmp_path: Path) -> None:
    import datasets

    Image.new("RGB", (8, 6), "red").save(tmp_path / "red.png")
    picture = {"bytes": (tmp_path / "red.png").read_bytes(), "path": None}
    rows = {"image": [picture] * 3, "question": ["q"] * 3, "answer": ["a", "b", "c"]}
    data = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    for number in range(2):
        data.to_parquet(tmp_path / f"part-{number}.parquet")
    found = list(islice(record_stream([Source(path=f"{tmp_path}/part-*.parquet")], shuffle_buffer=2), 6))
    pictures = [item.images[0] for item in found if isinstance(item, Record)]
    assert len(pictures) == 6
    assert all(isinstance(picture, Picture) and picture.content[:4] == b"\x89PNG" for picture in pictures)


def shard(path: Path, texts: list[bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for number, text in enumerate(texts):
            member = tarfile.TarInfo(f"{path.stem}{number}.json")
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text))
    return path


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_breaks_off_costs_what_is_behind_and_says_where(workers: int, tmp_path: Path, capsys: Any) -> None:
    import datasets

    good = json.dumps(ask("x")).encode()
    shard(tmp_path / "a.tar", [*[good] * 6, b"{", good])
    shard(tmp_path / "b.tar", [good] * 3)
    (tmp_path / "c.tar").write_bytes((tmp_path / "b.tar").read_bytes()[:700])
    stream = record_stream([Source(path=f"{tmp_path}/*.tar")], shuffle_buffer=4, num_workers=workers)
    found = list(islice(loaders.StatefulDataLoader(stream, batch_size=None, num_workers=workers), 11))
    errors = sorted(str(item) for item in found if isinstance(item, DataError))
    assert len(found) - len(errors) == 9
    assert errors[0].startswith(f"{tmp_path}/a.tar:6: cannot be read from here on: Expecting property name")
    assert errors[1].startswith(f"{tmp_path}/c.tar:0: cannot be read from here on: unexpected end of data")
    assert command(["check", str(tmp_path / "a.tar")]) == 1
    assert "a.tar:6: cannot be read from here on" in capsys.readouterr().out
    datasets.Dataset.from_list([ask("y")]).to_parquet(tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    found = list(islice(record_stream([Source(path=f"{tmp_path}/*.parquet")], shuffle_buffer=0), 2))
    assert {type(item) for item in found} == {Record, DataError}
