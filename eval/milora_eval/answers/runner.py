"""Ask one model the questions of some benchmarks and store the answers, so that a killed run can resume.

Every batch is written when it is complete. A stored answer with the same key (see `identity`) is reused.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from milora_eval.answers.lines import to_line
from milora_eval.answers.questions import EvaluationPlan, Question
from milora_eval.answers.selection import select, take_shard
from milora_eval.answers.store import Line, Store
from milora_eval.benchmark import Benchmark
from milora_eval.suites import folder_of
from milora_vl.generate import Prompt, generate


@dataclass(frozen=True, slots=True)
class Outcome:
    """How many questions the model answered, and how many seconds that took."""

    asked: int
    seconds: float


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
    with tqdm(
        total=len(todo), desc=f"{plan.suite} {plan.which}", unit="question", file=sys.stderr, mininterval=interval
    ) as bar:

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
    for benchmark in plan.benchmarks:
        part = [question for question in todo if question.benchmark is benchmark]
        prompts = [Prompt(benchmark.prompt(q.item), q.item.images, benchmark.form) for q in part]

        def on_batch(places: list[int], texts: list[str], part: list[Question] = part) -> None:
            keep([part[place] for place in places], texts)

        def is_decided(place: int, text: str, part: list[Question] = part) -> bool:
            return part[place].benchmark.is_decided(part[place].item, text)

        ends_early = _ends_early(type(benchmark))
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
            is_decided=is_decided if ends_early else None,
        )


def _line(plan: EvaluationPlan, question: Question, text: str) -> Line:
    folder = folder_of(question.benchmark, plan.data_dir)
    return to_line(question.benchmark, question.item, text, question.key, folder)


def _of_shard(asked: Sequence[Question], shard: tuple[int, int]) -> list[Question]:
    kept = {id(item) for item in take_shard([question.item for question in asked], shard)}
    return [question for question in asked if id(question.item) in kept]


def _ends_early(kind: type[Benchmark]) -> bool:
    """Return whether `is_decided` fits the scores: no class below the one that defines it scores in its own way."""
    own = next(base for base in kind.__mro__ if "is_decided" in vars(base))
    below = kind.__mro__[: kind.__mro__.index(own)]
    scores = {"score", "grade", "summarise"}
    return own is not Benchmark and not any(scores & vars(base).keys() for base in below)
