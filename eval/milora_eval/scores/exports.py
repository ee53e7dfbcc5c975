"""Write stored answers for other programs: submissions for servers and official scripts, LLaVA's answers files."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from milora_eval.answers.lines import to_answer
from milora_eval.answers.store import PREDICTIONS, each_line
from milora_eval.benchmark import Answer, Benchmark
from milora_eval.scores.llava_files import write_llava_files
from milora_eval.scores.results import judgements, read_results, review_of
from milora_eval.suites import folder_of, stored_benchmark
from milora_vl.base.errors import UserError

SUBMISSION = "submission"


class StoredAnswers(Collection[Answer]):
    """The answers to one benchmark, read from the disk on each iteration, so that a million take little memory."""

    def __init__(
        self, benchmark: Benchmark, reference: str, path: Path, reviews: Mapping[tuple[str, str, str], str]
    ) -> None:
        self._benchmark, self._reference, self._path, self._reviews = benchmark, reference, path, reviews

    def __iter__(self) -> Iterator[Answer]:
        for line in each_line(self._path):
            if line["benchmark"] == self._reference:
                yield to_answer(self._benchmark, line, review_of(line, self._reviews))

    def __len__(self) -> int:
        return sum(line["benchmark"] == self._reference for line in each_line(self._path))

    def __contains__(self, answer: object) -> bool:
        return any(answer == stored for stored in self)


def export(folder: Path) -> list[Path]:
    """Write submission/BENCHMARK/* for all benchmarks of a results folder that have a submission format.

    A run with --limit has no submission. A submission that cannot be written causes a warning, and the others are still
    written. Submissions of earlier answers are deleted.
    """
    results = read_results(folder)
    shutil.rmtree(folder / SUBMISSION, ignore_errors=True)
    if results.get("limit") is not None:
        return []
    data, model, written = Path(results.get("data") or "."), str(results.get("model", "")), []
    reviews = judgements(folder)
    for entry in results.get("benchmarks", ()):
        benchmark = stored_benchmark(entry["reference"])
        answers = StoredAnswers(benchmark, entry["reference"], folder / PREDICTIONS, reviews)
        target = folder / SUBMISSION / benchmark.name
        try:
            written += benchmark.submission(answers, target, folder_of(benchmark, data))
            if benchmark.form == "exact":
                written += write_llava_files(benchmark, answers, target, model)
        except UserError as error:
            sys.stderr.write(f"warning: no submission for {benchmark.name}: {error}\n")
    return written
