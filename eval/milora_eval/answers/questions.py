"""Read and select the questions of an evaluation before a model loads; check names, ids and pictures."""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from milora_data.keys import data_key, digest, file_key
from milora_eval.benchmark import Benchmark, Item, MissingData, content_of, key_of_question
from milora_eval.benchmarks.own_data import OwnData
from milora_eval.data_files import load_items, other_questions
from milora_eval.registry import SEE, Chosen, choose, data_folder, folder_of, has_files
from milora_vl.common.errors import DataError, Key, UserError, at_flag
from milora_vl.common.evaluator_protocol import QuestionSet

Items = dict[str, list[Item]]
"""The items of each benchmark, by its name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationPlan:
    """The benchmarks and the generation settings. `suite` names the results; `shard` is (number from 1, count).

    `batch_size` is the number of questions that are asked at once. `which` (base, final, checkpoint-N, served-NAME),
    `model_name`, `adapter` and `scale` (of its update) name the weights that answer; `settings` is everything except
    the question that their answers depend on.
    """

    suite: str
    benchmarks: tuple[Benchmark, ...]
    data_dir: Path
    template: str = "vicuna_v1"
    image_aspect_ratio: Literal["pad", "plain", "anyres"] = "pad"
    limit: int | None = None
    shard: tuple[int, int] = (1, 1)
    batch_size: int = 16
    which: str = "final"
    model_name: str = ""
    adapter: str | Path | None = None
    scale: float = 1.0
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Question:
    """An item of a benchmark with the key of its answer, and what identifies its pictures."""

    benchmark: Benchmark
    item: Item
    key: str
    content: Sequence[Any] = ()


def answer_key(settings: Mapping[str, Any], benchmark: Benchmark, item: Item, content: Sequence[Any]) -> str:
    """Return the key of one answer: a digest of the settings, the prompt, and the content of pictures and videos.

    Weights are among the settings by their content, so a model that trained on is asked again.
    """
    turns = [[turn.role, turn.text] for turn in benchmark.prompt(item)]
    decoding = [benchmark.max_new_tokens, benchmark.num_beams, benchmark.form, *["boxes"] * item.asks_boxes]
    return digest([settings, decoding, turns, list(content)])


def questions_of(plan: EvaluationPlan, items: Items) -> list[Question]:
    """Return the items of the plan's benchmarks, each with the key of its answer. Each picture is read once."""
    read = cache(file_key)
    questions = []
    for benchmark in plan.benchmarks:
        for item in items[benchmark.name]:
            content = content_of(item, read)
            questions.append(Question(benchmark, item, answer_key(plan.settings, benchmark, item, content), content))
    return questions


def questions_key(questions: QuestionSet) -> str:
    """Return the key of the questions of an evaluation; their order and the names of their files do not count."""
    value, read = questions.suite or questions.benchmarks, cache(file_key)
    plan, items = plan_of(choose(value), data_folder(value, questions.data), questions.limit)
    asked = ((benchmark, item) for benchmark in plan.benchmarks for item in items[benchmark.name])
    return data_key(sorted(key_of_question(benchmark, item, content_of(item, read)) for benchmark, item in asked))


def read_items(benchmarks: Sequence[Benchmark], data_dir: Path, limit: int | None = None) -> Items:
    """Read the items of some benchmarks, for all shards.

    Raises UserError for missing data, missing pictures, duplicate ids and two benchmarks with one name.
    """
    _check_names(benchmarks)
    result: Items = {}
    missing: list[MissingData] = []
    for benchmark in benchmarks:
        try:
            items = select(load_items(benchmark, folder_of(benchmark, data_dir)), limit)
        except MissingData as error:
            missing.append(error)
            continue
        if not items:
            hint = "download the files of the benchmark again; python -m milora_eval ls  lists them"
            message = f"no questions in the data of benchmark {benchmark.name} in {data_dir}"
            raise UserError(message, where="--data", hint=hint)
        _check_ids(benchmark, items)
        _check_pictures(benchmark, items)
        result[benchmark.name] = items
    if missing:
        raise MissingData(problems=[problem for error in missing for problem in error.problems])
    return result


def plan_of(chosen: Chosen, data_dir: Path, limit: int | None = None) -> tuple[EvaluationPlan, Items]:
    """Return the plan of a suite or a list of benchmarks, and its items: at most `limit` of each, or the suite's limit.

    A partial suite skips benchmarks without files. One line counts them and names the files with other questions.
    Raises UserError for missing data, or if all benchmarks are skipped.
    """
    limit = limit or chosen.limit
    items = (_items_that_exist if chosen.partial else read_items)(chosen.benchmarks, data_dir, limit)
    benchmarks = tuple(benchmark for benchmark in chosen.benchmarks if benchmark.name in items)
    return EvaluationPlan(suite=chosen.name, benchmarks=benchmarks, data_dir=data_dir, limit=limit), items


def require_questions(questions: QuestionSet, *, at: str | Key = "--suite", data_at: str | Key = "--data") -> None:
    """Raise UserError, at the flags `at` and `data_at`, for what an evaluation after a training would fail with.

    That is unknown names, missing files, and mistakes in own files of questions, which are read.
    """
    value = questions.suite or questions.benchmarks
    with at_flag(data_at):
        folder = data_folder(value, questions.data)
    with at_flag(at):
        chosen = choose(value)
    own = [benchmark for benchmark in chosen.benchmarks if isinstance(benchmark, OwnData)]
    with at_flag(data_at):
        read_items(own, folder)
        found = [has_files(benchmark, folder) for benchmark in chosen.benchmarks]
        if not (any(found) if chosen.partial else all(found)):
            files = ", ".join(chosen.benchmarks[found.index(False)].files)
            message, hint = f"the files of {value} are not in {folder} ({files})", f"{SEE} --data {folder}"
            raise UserError(message, code="eval-missing-files", hint=hint)


def _items_that_exist(benchmarks: Sequence[Benchmark], data_dir: Path, limit: int | None) -> Items:
    items: Items = {}
    others: dict[Path, str] = {}  # files with the name of a benchmark's questions that it does not read -> the reason
    for benchmark in benchmarks:
        folder = folder_of(benchmark, data_dir)
        if has_files(benchmark, data_dir):
            try:
                items |= read_items([benchmark], data_dir, limit)
            except DataError as error:
                others[folder] = error.first.message
        elif (path := other_questions(benchmark, folder)) is not None:
            others[path] = f"other questions; ask them with --benchmarks {path}"
    if not items:
        hint = "\n".join([*(f"{path}: {reason}" for path, reason in others.items()), f"{SEE} --data {data_dir}"])
        raise UserError(f"no benchmark's files are in {data_dir}", code="eval-missing-files", hint=hint)
    if len(items) < len(benchmarks):
        reasons = "".join(f"; {path.name}: {reason}" for path, reason in others.items())
        sys.stderr.write(f"skipped: {len(benchmarks) - len(items)} benchmarks without files in {data_dir}{reasons}\n")
    return items


def select(items: Sequence[Item], limit: int | None) -> list[Item]:
    """Return at most `limit` items, in their order; a smaller limit gives a subset of a larger one.

    The order of the questions and, in own files, the names of the pictures do not change the choice. A picture brings
    all its questions.
    """

    def order(index: int) -> tuple[Any, ...]:
        item = items[index]
        return group_order(item.group), [turn.text for turn in item.turns], item.answers, item.kind

    chosen = sorted(range(len(items)), key=order)[:limit]
    return [items[index] for index in sorted(chosen)]


def shard_of(questions: Sequence[Question], shard: tuple[int, int]) -> list[Question]:
    """Return the questions of shard `number` (from 1) of `count`; questions about one picture stay together.

    Every question is in one shard; a shard may be empty.
    """
    number, count = shard
    groups = sorted({question.item.group for question in questions}, key=group_order)
    own = set(groups[number - 1 :: count])
    return [question for question in questions if question.item.group in own]


def group_order(group: str) -> int:
    """Return the number that sorts a group (a picture): 64 bits of a hash of its name."""
    return int.from_bytes(hashlib.sha256(group.encode()).digest()[:8], "big")


def parse_shard(text: str) -> tuple[int, int]:
    """Return (number, count) of "2/4". Raises UserError for any other form.

    >>> parse_shard("2/4")
    (2, 4)
    """
    number, _, count = text.partition("/")
    if number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count):
        return int(number), int(count)
    hint = "for example: --shard 1/4, --shard 2/4, ..."
    raise UserError(f"expected i/n with i from 1 to n, got {text!r}", where="--shard", hint=hint)


def _check_names(benchmarks: Sequence[Benchmark]) -> None:
    for name, times in Counter(benchmark.name for benchmark in benchmarks).items():
        if times > 1:  # its numbers and files would replace the other's
            raise UserError(f"the benchmark {name} is listed twice", hint="use a separate --output_dir for each")


def _check_ids(benchmark: Benchmark, items: Sequence[Item]) -> None:
    for name, times in Counter(item.id for item in items).items():
        if times > 1:
            message, hint = f'the id "{name}" appears twice in the questions', "give every question its own id"
            raise UserError(message, where=f"benchmark {benchmark.name}", hint=hint)


def _check_pictures(benchmark: Benchmark, items: Sequence[Item]) -> None:
    pictures = {image for item in items for image in item.images}
    videos = {str(file) for item in items for video in item.videos for file in video.files}
    missing = sorted(name for name in pictures | videos if not Path(name).is_file())
    if missing:
        shown = [*missing[:3], *(["..."] if len(missing) > 3 else [])]
        folders = [names.removesuffix("|.") for names in benchmark.files if names.endswith("|.")]
        shown += [f"put their folder next to the questions: {names.replace('|', ' or ')}" for names in folders]
        what = f"{len(missing)} pictures{' or videos' if videos else ''} of benchmark {benchmark.name} are missing"
        hint = "\n".join([*shown, "or name the folder with the pictures:  --data FOLDER"])
        raise UserError(what, code="benchmark-missing-pictures", where="--data", hint=hint)
