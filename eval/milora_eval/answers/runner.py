"""Ask one model the questions of some benchmarks: batches, generation settings, resume of a killed run.

Every batch is written when it is complete. A stored answer with the same key (see `answer_key`) is reused.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from milora_data.encode.tokens import IGNORE
from milora_eval.answers.questions import EvaluationPlan, Question, shard_of
from milora_eval.answers.store import Store, to_line, unscored_line
from milora_eval.benchmark import Benchmark, Item
from milora_eval.registry import folder_of
from milora_vl.common.progress import progress_bar
from milora_vl.models.generate import Prompt, Reader, Reply, generate, reader_of
from milora_vl.models.prompts import Prompts

Keep = Callable[[Sequence[Question], Sequence[Reply]], None]
# Asks questions and passes each batch of answers to a `Keep`.
Asker = Callable[[Sequence[Question], Keep], None]


def ask(asker: Asker, plan: EvaluationPlan, questions: Sequence[Question], folder: Path) -> tuple[int, float]:
    """Generate the answers of the plan's shard that are missing in `folder`; `finish` scores them.

    Returns how many questions the model answered, and the seconds that took.
    """
    store, start = Store(folder, plan.shard), time.perf_counter()
    # POPE repeats some questions in its sets. The same question about the same picture is asked once.
    own = {question.key: question for question in reversed(shard_of(questions, plan.shard))}
    known = store.known()
    todo = [question for question in reversed(own.values()) if question.key not in known]
    if not todo:
        sys.stderr.write(f"nothing was asked: all {len(own):,} answers are stored already, of the same model\n")
        return 0, time.perf_counter() - start
    if len(todo) < len(own):
        sys.stderr.write(f"{len(own) - len(todo):,} of {len(own):,} answers are stored already\n")
    store.open()
    with progress_bar(f"{plan.suite} {plan.which}", len(todo), "questions") as bar:

        def keep(done: Sequence[Question], answers: Sequence[Reply]) -> None:
            pairs = zip(done, answers, strict=True)
            store.append([unscored_line(*_answered(plan, question, reply)) for question, reply in pairs])
            bar.update(len(done))

        asker(todo, keep)
    return len(todo), time.perf_counter() - start


def finish(plan: EvaluationPlan, questions: Sequence[Question], folder: Path) -> bool:
    """Score all answers and write predictions.jsonl; return False, unwritten, while answers of shards are missing."""
    store = Store(folder, plan.shard)
    known = store.known()
    if any(question.key not in known for question in questions):
        return False
    store.finish([to_line(*_answered(plan, question, known[question.key])) for question in questions])
    return True


def prompt_of(benchmark: Benchmark, item: Item) -> Prompt:
    """Return what the model is asked; errors name the question by its file and number, or by benchmark and id."""
    source = item.source or f"benchmark {benchmark.name}, question {item.id}"
    return Prompt(benchmark.prompt(item), item.images, benchmark.form, item.videos, source, item.asks_boxes)


def ask_model(model: Any, processor: Any, plan: EvaluationPlan, todo: Sequence[Question], keep: Keep) -> None:
    for benchmark, group in groupby(todo, key=lambda question: question.benchmark):
        part = list(group)

        def on_batch(numbers: list[int], replies: list[Reply], part: Sequence[Question] = part) -> None:
            keep([part[number] for number in numbers], replies)

        generate(
            model,
            processor,
            [prompt_of(benchmark, question.item) for question in part],
            template=plan.template,
            max_new_tokens=benchmark.max_new_tokens,
            num_beams=benchmark.num_beams,
            batch_size=plan.batch_size,
            image_aspect_ratio=plan.image_aspect_ratio,
            on_batch=on_batch,
        )


def _answered(
    plan: EvaluationPlan, question: Question, reply: Reply
) -> tuple[Benchmark, Item, Reply, str, Path, Sequence[Any]]:
    folder = folder_of(question.benchmark, plan.data_dir)
    return question.benchmark, question.item, reply, question.key, folder, question.content


def loglikelihoods(
    model: Any, processor: Any, pairs: Sequence[tuple[Prompt, str]], prompts: Prompts
) -> list[tuple[float, bool]]:
    """Return per (prompt, answer) the sum of the answer's log-probabilities, and whether greedy decoding produces it.

    The answer has the tokens that it has in a training with this template: a blank before it, or none. Pairs run one at
    a time, so padding has no effect. Benchmarks of other suites rank options by it.
    """
    reader = reader_of(model, processor, prompts.template, prompts.image_aspect_ratio)
    return [_loglikelihood(reader, prompt, answer) for prompt, answer in pairs]


@torch.inference_mode()
def _loglikelihood(reader: Reader, prompt: Prompt, answer: str) -> tuple[float, bool]:
    if not answer:
        return 0.0, True
    inputs = reader.labelled(prompt, answer)
    labels = inputs.pop("labels")[0, 1:]
    is_answer = labels != IGNORE
    logits, targets = reader.model(**inputs).logits[0, :-1][is_answer].float(), labels[is_answer]
    values = logits.log_softmax(-1).gather(1, targets[:, None])
    return float(values.sum()), bool((logits.argmax(-1) == targets).all())
