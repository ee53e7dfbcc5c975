"""Write stored answers for other programs: submissions for servers and official scripts, LLaVA's answers files."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from milora_eval.answers.store import PREDICTIONS, read_lines, to_answer
from milora_eval.scores.llava_files import write_llava_files
from milora_eval.scores.results import judgements, read_results, review_of
from milora_eval.suites import folder_of, stored_benchmark
from milora_vl.base.errors import UserError

SUBMISSION = "submission"


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
    reviews, lines = judgements(folder), read_lines(folder / PREDICTIONS)
    for entry in results.get("benchmarks", ()):
        benchmark = stored_benchmark(entry["reference"])
        own = (line for line in lines if line["benchmark"] == entry["reference"])
        answers = [to_answer(benchmark, line, review_of(line, reviews)) for line in own]
        target = folder / SUBMISSION / benchmark.name
        try:
            written += benchmark.submission(answers, target, folder_of(benchmark, data))
            if benchmark.form == "exact":
                written += write_llava_files(benchmark, answers, target, model)
        except UserError as error:
            sys.stderr.write(f"warning: no submission for {benchmark.name}: {error}\n")
    return written
