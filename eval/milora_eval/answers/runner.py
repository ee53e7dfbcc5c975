"""Ask one model the questions of some benchmarks and store the answers, so that a killed run can resume.

Every batch is written when it is complete. A stored answer with the same key (see `identity`) is reused.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from milora_data.errors import UserError
from milora_eval.answers.identity import answer_key
from milora_eval.answers.lines import to_line
from milora_eval.answers.selection import select, take_shard
from milora_eval.answers.store import Line, Store
from milora_eval.benchmark import Benchmark, Item, MissingData
from milora_eval.data_files import load_items
from milora_eval.suites import folder_of


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationPlan:
    """The benchmarks and the generation settings. `shard` is (number from 1, count).

    `audit` is the number of items that are asked a second time, one by one.
    """

    benchmarks: tuple[Benchmark, ...]
    data_dir: Path
    template: str = "vicuna_v1"
    image_aspect_ratio: Literal["pad", "plain", "anyres"] = "pad"
    limit: int | None = None
    shard: tuple[int, int] = (1, 1)
    batch_size: int = 16
    audit: int = 0
    label: str = ""
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Question:
    """An item of a benchmark with the key of its answer."""

    benchmark: Benchmark
    item: Item
    key: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """How many questions the model answered, and how many seconds that took."""

    asked: int
    seconds: float


def questions(plan: EvaluationPlan) -> list[Question]:
    """Read the items of all benchmarks and all shards.

    Raises UserError for missing data, missing pictures, duplicate ids and two benchmarks with one name.
    """
    _check_names(plan.benchmarks)
    result: list[Question] = []
    missing: dict[str, MissingData] = {}
    for benchmark in plan.benchmarks:
        try:
            loaded = load_items(benchmark, folder_of(benchmark, plan.data_dir))
        except MissingData as error:
            missing[benchmark.name] = error
            continue
        items = select(loaded, plan.limit)
        if not items:
            raise UserError(
                f"no questions in the data of benchmark {benchmark.name} in {plan.data_dir}", code="benchmark-empty"
            )
        _check_ids(benchmark, items)
        _check_pictures(benchmark, items)
        result += [Question(benchmark, item, answer_key(plan.settings, benchmark, item)) for item in items]
    if missing:
        first, *others = missing
        problem, *further = missing[first].problems
        hint = [problem.hint]
        if others:
            hint += [
                f"the files of {', '.join(others)} are missing too: python -m milora_eval ls --data {plan.data_dir}"
            ]
        if available := ",".join(benchmark.name for benchmark in plan.benchmarks if benchmark.name not in missing):
            hint += [f"without them: --benchmarks {available}"]
        raise MissingData(problems=[replace(problem, hint="\n".join(filter(None, hint))), *further])
    return result


def ask(model: Any, processor: Any, plan: EvaluationPlan, asked: Sequence[Question], folder: Path) -> Outcome:
    """Generate the answers of the plan's shard that are missing in `folder`."""
    store, start = Store(folder, plan.shard), time.perf_counter()
    known = store.known()
    keys = {question.key for question in _of_shard(asked, plan.shard)}
    # POPE repeats some questions in its sets. The same question about the same picture is asked once.
    new = {question.key: question for question in asked if question.key in keys and question.key not in known}
    todo = list(new.values())
    stored = len(keys.intersection(known))
    if todo:
        if stored:
            sys.stderr.write(f"{stored:,} of {len(keys):,} answers are stored already\n")
        store.open()
        _generate(model, processor, plan, todo, store)
    return Outcome(len(todo), time.perf_counter() - start)


def finish(plan: EvaluationPlan, asked: Sequence[Question], folder: Path) -> bool:
    """Write the complete predictions.jsonl; return False without writing while answers of other shards are missing."""
    store = Store(folder, plan.shard)
    known = store.known()
    if any(question.key not in known for question in asked):
        return False
    # All answers are scored again, so that an answer of an older version follows the current rules.
    store.finish(_line(plan, question, known[question.key]) for question in asked)
    return True


def audit(model: Any, processor: Any, plan: EvaluationPlan, asked: Sequence[Question], folder: Path) -> dict[str, Any]:
    """Ask `plan.audit` questions again, one by one without shared pictures, and report which answers changed."""
    chosen = {id(item) for item in select([question.item for question in asked], plan.audit)}
    again = [question for question in asked if id(question.item) in chosen]
    texts: dict[str, str] = {}

    def keep(done: Sequence[Question], answers: Sequence[str]) -> None:
        texts.update(zip((question.key for question in done), answers, strict=True))

    _run_model(model, processor, plan, again, keep, batch_size=1, share_pictures=False)
    stored = Store(folder).known()
    changed = [q.item.id for q in again if stored[q.key] != texts[q.key]]
    return {"n": len(again), "changed": len(changed), "ids": changed}


def _generate(model: Any, processor: Any, plan: EvaluationPlan, todo: Sequence[Question], store: Store) -> None:
    from tqdm import tqdm

    interval = 0.5 if sys.stderr.isatty() else 10.0
    with tqdm(total=len(todo), desc=plan.label, unit="question", file=sys.stderr, mininterval=interval) as bar:

        def keep(done: Sequence[Question], answers: Sequence[str]) -> None:
            store.append([_line(plan, question, text) for question, text in zip(done, answers, strict=True)])
            bar.update(len(done))

        _run_model(model, processor, plan, todo, keep, batch_size=plan.batch_size, share_pictures=True)


def _run_model(
    model: Any,
    processor: Any,
    plan: EvaluationPlan,
    todo: Sequence[Question],
    keep: Callable[[Sequence[Question], Sequence[str]], None],
    *,
    batch_size: int,
    share_pictures: bool,
) -> None:
    from milora_vl.generate import Prompt, generate

    for benchmark in plan.benchmarks:
        part = [question for question in todo if question.benchmark is benchmark]
        prompts = [Prompt(benchmark.prompt(q.item), q.item.images, benchmark.form) for q in part]

        def on_batch(places: list[int], texts: list[str], part: list[Question] = part) -> None:
            keep([part[place] for place in places], texts)

        generate(
            model,
            processor,
            prompts,
            template=plan.template,
            max_new_tokens=benchmark.max_new_tokens,
            num_beams=benchmark.num_beams,
            batch_size=batch_size,
            image_aspect_ratio=plan.image_aspect_ratio,
            share_pictures=share_pictures,
            on_batch=on_batch,
        )


def _line(plan: EvaluationPlan, question: Question, text: str) -> Line:
    folder = folder_of(question.benchmark, plan.data_dir)
    return to_line(question.benchmark, question.item, text, question.key, folder)


def _of_shard(asked: Sequence[Question], shard: tuple[int, int]) -> list[Question]:
    kept = {id(item) for item in take_shard([question.item for question in asked], shard)}
    return [question for question in asked if id(question.item) in kept]


def _check_names(benchmarks: Sequence[Benchmark]) -> None:
    seen: set[str] = set()
    for benchmark in benchmarks:
        if benchmark.name in seen:  # its numbers and files would replace the other's
            raise UserError(
                f"the benchmark {benchmark.name} is listed twice",
                code="eval-duplicate-benchmark",
                hint="use a separate --output_dir for each protocol, or for each file with the same name",
            )
        seen.add(benchmark.name)


def _check_ids(benchmark: Benchmark, items: Sequence[Item]) -> None:
    seen: set[str] = set()
    for item in items:
        if item.id in seen:
            raise UserError(
                f'the id "{item.id}" appears twice in the questions',
                code="benchmark-duplicate-id",
                where=f"benchmark {benchmark.name}",
            )
        seen.add(item.id)


def _check_pictures(benchmark: Benchmark, items: Sequence[Item]) -> None:
    missing = sorted({image for item in items for image in item.images if not Path(image).is_file()})
    if missing:
        shown = [*missing[:3], *(["..."] if len(missing) > 3 else [])]
        folders = [names.removesuffix("|.") for names in benchmark.files if names.endswith("|.")]
        shown += [f"put their folder next to the questions: {names.replace('|', ' or ')}" for names in folders]
        raise UserError(
            f"{len(missing)} pictures of benchmark {benchmark.name} are missing",
            code="benchmark-missing-pictures",
            hint="\n".join(shown),
        )
