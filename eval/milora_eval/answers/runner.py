"""Ask one model the questions of some benchmarks: batches, generation settings, early end, resume of a killed run.

Every batch is written when it is complete. A stored answer with the same key (see `identity`) is reused.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from milora_eval.answers.lines import to_line
from milora_eval.answers.questions import EvaluationPlan, Question, Questions
from milora_eval.answers.selection import selected, shard_places
from milora_eval.answers.store import Line, Store
from milora_eval.benchmark import Benchmark, Item, ends_early
from milora_eval.suites import folder_of
from milora_vl.models.generate import Prompt, generate_batches


@dataclass(frozen=True, slots=True)
class Outcome:
    """How many questions the model answered, and how many seconds that took."""

    asked: int
    seconds: float


def ask(model: Any, processor: Any, plan: EvaluationPlan, asked: Questions, folder: Path) -> Outcome:
    """Generate the answers of the plan's shard that are missing in `folder`."""
    store, start = Store(folder, plan.shard), time.perf_counter()
    own = np.arange(len(asked)) if plan.shard[1] == 1 else shard_places(asked.orders, plan.shard)
    # POPE repeats some questions in its sets. The same question about the same picture is asked once.
    keys, first = np.unique(asked.keys[own], return_index=True)
    with store.known() as known:
        is_stored = known.holds(keys)
    todo = np.sort(own[first[~is_stored]])
    if len(todo):
        if is_stored.any():
            sys.stderr.write(f"{is_stored.sum():,} of {len(keys):,} answers are stored already\n")
        store.open()
        _generate(model, processor, plan, asked, todo, store)
    return Outcome(len(todo), time.perf_counter() - start)


def finish(plan: EvaluationPlan, asked: Questions, folder: Path) -> bool:
    """Write the complete predictions.jsonl; return False without writing while answers of other shards are missing."""
    store = Store(folder, plan.shard)
    with store.known() as known:
        if not known.holds(asked.keys).all():
            return False
        # All answers are scored again, so that an answer of an older version follows the current rules.
        store.finish(_line(plan, question, known[question.key]) for question in asked)
    return True


def audit(model: Any, processor: Any, plan: EvaluationPlan, asked: Questions, folder: Path) -> dict[str, Any]:
    """Ask `plan.audit` questions again, one by one without shared pictures, and report which answers changed."""
    again = selected(asked.orders, plan.audit)
    texts: dict[str, str] = {}

    def keep(done: Sequence[Question], answers: Sequence[str]) -> None:
        texts.update(zip((question.key for question in done), answers, strict=True))

    _run_model(model, processor, plan, asked, again, keep, batch_size=1, share_pictures=False)
    questions = [asked[place] for place in again.tolist()]
    with Store(folder).known() as stored:
        changed = [q.item.id for q in questions if stored[q.key] != texts[q.key]]
    return {"n": len(questions), "changed": len(changed), "ids": changed}


def _generate(
    model: Any, processor: Any, plan: EvaluationPlan, asked: Questions, todo: NDArray[np.int64], store: Store
) -> None:
    from tqdm import tqdm

    interval = 0.5 if sys.stderr.isatty() else 10.0
    with tqdm(
        total=len(todo), desc=f"{plan.suite} {plan.which}", unit="question", file=sys.stderr, mininterval=interval
    ) as bar:

        def keep(done: Sequence[Question], answers: Sequence[str]) -> None:
            store.append([_line(plan, question, text) for question, text in zip(done, answers, strict=True)])
            bar.update(len(done))

        _run_model(model, processor, plan, asked, todo, keep, batch_size=plan.batch_size, share_pictures=True)


def prompt_of(benchmark: Benchmark, item: Item) -> Prompt:
    """Return what the model is asked; errors name the question by its file and number, or by benchmark and id."""
    source = item.source or f"benchmark {benchmark.name}, question {item.id}"
    return Prompt(benchmark.prompt(item), item.images, benchmark.form, source=source)


class _Prompts(Sequence[Prompt]):
    """The prompts of some questions, each made when it is read."""

    def __init__(self, asked: Questions, places: NDArray[np.int64]) -> None:
        self.asked, self.places = asked, places

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, number: int) -> Prompt: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[Prompt]: ...
    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return _Prompts(self.asked, self.places[number])
        question = self.asked[int(self.places[number])]
        return prompt_of(question.benchmark, question.item)


def _run_model(
    model: Any,
    processor: Any,
    plan: EvaluationPlan,
    asked: Questions,
    todo: NDArray[np.int64],
    keep: Callable[[Sequence[Question], Sequence[str]], None],
    *,
    batch_size: int,
    share_pictures: bool,
) -> None:
    for benchmark, part in asked.by_benchmark(todo):

        def on_batch(numbers: list[int], texts: list[str], part: NDArray[np.int64] = part) -> None:
            keep([asked[int(part[number])] for number in numbers], texts)

        def is_decided(number: int, text: str, part: NDArray[np.int64] = part) -> bool:
            question = asked[int(part[number])]
            return question.benchmark.is_decided(question.item, text)

        generate_batches(
            model,
            processor,
            _Prompts(asked, part),
            on_batch,
            template=plan.template,
            max_new_tokens=benchmark.max_new_tokens,
            num_beams=benchmark.num_beams,
            batch_size=batch_size,
            image_aspect_ratio=plan.image_aspect_ratio,
            share_pictures=share_pictures,
            is_decided=is_decided if ends_early(type(benchmark)) else None,
        )


def _line(plan: EvaluationPlan, question: Question, text: str) -> Line:
    folder = folder_of(question.benchmark, plan.data_dir)
    return to_line(question.benchmark, question.item, text, question.key, folder)
