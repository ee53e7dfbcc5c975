"""Answers on disk: one line each, written batch by batch; a line holds all that is needed to score it again.

predictions.jsonl   the answers behind results.json, in the order of the items
predictions.K-of-N.jsonl   the answers of one shard, until all shards are complete
spare.jsonl         answers of earlier selections or settings; reused if their key matches, never scored
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from milora_data.records import parse_video
from milora_data.records.record import Turn
from milora_eval.benchmark import Answer, Benchmark, Item, content_of, key_of_question
from milora_eval.registry import reference
from milora_vl.common.atomic_write import atomic_file, json_lines
from milora_vl.common.errors import UserError, expected_format
from milora_vl.models.generate import Reply

Line = dict[str, Any]
RESTORE = "evaluate again, or restore the file"
PREDICTIONS, SPARE = "predictions.jsonl", "spare.jsonl"


def each_line(path: Path) -> Iterator[Line]:
    """Yield the answers in a file, none if it does not exist. Skips a last line that a kill has truncated."""
    for line in json_lines(path):
        if "key" in line:
            if not all(isinstance(line.get(name), str) for name in ("benchmark", "id", "prediction", "question_key")):
                message = "a stored answer has no texts for benchmark, id, prediction and question_key"
                raise UserError(message, code="predictions-format", where=str(path), hint=RESTORE)
            yield line


def read_lines(path: Path) -> list[Line]:
    return list(each_line(path))


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Write a file atomically, line by line: the file is complete or does not exist."""
    with atomic_file(path) as partial, partial.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(_text(line) for line in lines)


class Store:
    """The answers of one model on one suite, in one folder. `shard` is (number from 1, count)."""

    def __init__(self, folder: Path, shard: tuple[int, int] = (1, 1)) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        number, count = shard
        self.path = folder / (PREDICTIONS if count == 1 else f"predictions.{number}-of-{count}.jsonl")

    def known(self) -> dict[str, Reply]:
        """Return the texts of all answers in the folder by key, including other shards; of equal keys, the last."""
        return {
            line["key"]: Reply(line["prediction"], bool(line.get("truncated")))
            for path in self._paths()
            for line in each_line(path)
        }

    def open(self) -> None:
        """Prepare for `append`: drop a truncated last line, so that the next line does not continue it."""
        if self.path.is_file():
            write_lines(self.path, each_line(self.path))

    def append(self, lines: Sequence[Mapping[str, Any]]) -> None:
        with self.path.open("a", encoding="utf-8", newline="\n") as file:
            file.writelines(_text(line) for line in lines)
            file.flush()
            os.fsync(file.fileno())

    def finish(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Write `lines` as predictions.jsonl, in their order; move all other answers to spare.jsonl."""
        keys = {line["key"] for line in lines}
        spare = {line["key"]: line for path in self._paths() for line in each_line(path) if line["key"] not in keys}
        if spare:
            write_lines(self.folder / SPARE, spare.values())
        write_lines(self.folder / PREDICTIONS, lines)
        for path in self._paths():
            if path.name not in (SPARE, PREDICTIONS) or (path.name == SPARE and not spare):
                path.unlink(missing_ok=True)

    def _paths(self) -> list[Path]:
        return [self.folder / SPARE, *sorted(self.folder.glob("predictions*.jsonl"))]


def to_line(
    benchmark: Benchmark, item: Item, reply: Reply, key: str, data_dir: Path, content: Sequence[Any] = ()
) -> Line:
    """Return the scored line of one answer; `correct` stays empty (None) if a server or an official script scores it.

    `content` identifies the pictures; without it they are read.
    """
    line = unscored_line(benchmark, item, reply, key, data_dir, content)
    return line | {"correct": benchmark.score(item, reply.text)}


def unscored_line(
    benchmark: Benchmark, item: Item, reply: Reply, key: str, data_dir: Path, content: Sequence[Any]
) -> Line:
    """Return the line of one answer without its score; an answer that was stopped at `max_new_tokens` is marked."""
    picture, root = next(iter(item.images), None), data_dir.absolute()
    is_inside = picture is not None and Path(picture).is_relative_to(root)
    turns = benchmark.prompt(item)
    line: Line = {
        "id": item.id,
        "benchmark": reference(benchmark),
        "type": item.kind,
        "question": turns[-1].text,
        "image": Path(picture).relative_to(root).as_posix() if picture and is_inside else picture,
        "image_file": picture,
        "prediction": reply.text,
        "answers": list(item.answers),
        "correct": None,
        "baseline": item.baseline,
        "group": item.group,
        "key": key,
        "question_key": key_of_question(benchmark, item, content or content_of(item)),
    }
    if reply.truncated:
        line["truncated"] = True
    if len(turns) > 1:
        line["context"] = [[turn.role, turn.text] for turn in turns[:-1]]
    if len(item.images) > 1:
        line["more_images"] = list(item.images[1:])
    if item.videos:
        line["videos"] = [video.as_json() for video in item.videos]
    if content := content or content_of(item):
        line["content"] = list(content)
    if item.meta:
        line["meta"] = dict(item.meta)
    return line


def to_answer(line: Mapping[str, Any]) -> Answer:
    """Return the answer of a line with its stored score. Raises UserError for a line of another form."""
    with expected(f"the stored answer {line.get('id')!r:.60} is damaged"):
        turns = [*line.get("context", ()), ["user", line["question"]]]
        first = [line["image_file"]] if line["image_file"] else []
        item = Item(
            id=line["id"],
            turns=tuple(Turn(role, text) for role, text in turns),
            images=(*first, *line.get("more_images", ())),
            answers=tuple(line["answers"]),
            kind=line["type"],
            group=line["group"],
            baseline=line["baseline"],
            meta=line.get("meta", {}),
            videos=tuple(map(parse_video, line.get("videos", ()))),
        )
        return Answer(item, line["prediction"], None if line["correct"] is None else float(line["correct"]))


def by_question(lines: Iterable[Line]) -> dict[tuple[str, int], Line]:
    """Return the lines by the key of their question, and the number of equal questions before it in the file."""
    found: dict[tuple[str, int], Line] = {}
    times: Counter[str] = Counter()
    for line in lines:
        found[line["question_key"], times[line["question_key"]]] = line
        times[line["question_key"]] += 1
    return found


def expected_of(benchmark: Benchmark, what: str) -> AbstractContextManager[None]:
    """Return a context that turns errors of a benchmark of ours into a UserError about the stored answer.

    Errors of a user's own class are not caught: the traceback shows where.
    """
    if not type(benchmark).__module__.startswith("milora_eval."):
        return nullcontext()
    return expected(f"the stored answer {what!r:.60} does not fit the benchmark {benchmark.name}")


def expected(message: str) -> AbstractContextManager[None]:
    return expected_format(message, code="predictions-format", where=PREDICTIONS, hint=RESTORE)


def _text(line: Mapping[str, Any]) -> str:
    text = json.dumps(line, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair: JSON can escape it, UTF-8 cannot encode it
        text = json.dumps(line)
    return text + "\n"
