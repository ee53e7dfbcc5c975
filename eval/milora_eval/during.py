"""Score a small suite on a model that is training (`--eval_suite_every`), for the log, without files.

`milora_vl.train.evaluation.suites_of` imports this module by its name; milora_vl does not import milora_eval.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any, Literal

from milora_eval.answers.questions import EvaluationPlan, Items, read_items
from milora_eval.evaluate import evaluate
from milora_eval.scores.results import metrics_of
from milora_eval.suites import find_benchmark, find_suite, has_files

BATCH_SIZE = 16


class Suites:
    """Benchmarks whose items are read once, when this is created. Raises UserError for missing data.

    `names` has the names of the benchmarks; `measure` returns a score `eval_suite_NAME` for each.
    """

    def __init__(
        self,
        suites: Sequence[str],
        data: str | None,
        limit: int,
        *,
        template: str,
        image_aspect_ratio: Literal["pad", "plain", "anyres"],
    ) -> None:
        self._planned: list[tuple[EvaluationPlan, Items]] = []
        for name in suites:
            folder = Path(data or f"data/{name}")
            benchmarks = [find_benchmark(entry) for entry in find_suite(name).benchmarks]
            benchmarks = [benchmark for benchmark in benchmarks if has_files(benchmark, folder)]
            plan = EvaluationPlan(
                suite=name,
                benchmarks=tuple(benchmarks),
                data_dir=folder,
                template=template,
                image_aspect_ratio=image_aspect_ratio,
                limit=limit,
                batch_size=BATCH_SIZE,
            )
            self._planned.append((plan, read_items(benchmarks, folder, limit)))
        self.names = tuple(benchmark.name for plan, _ in self._planned for benchmark in plan.benchmarks)

    def measure(self, model: Any, processor: Any) -> dict[str, float]:
        """Return the headline of each benchmark and its standard error, for example `eval_suite_emoji`.

        Fractions are in percent, as in tables. The mode of the model and the random state do not change.
        """
        entries: dict[str, float] = {}
        for plan, items in self._planned:
            # The next step must not find these answers, so they go to a temporary folder.
            with tempfile.TemporaryDirectory() as scratch, redirect_stderr(io.StringIO()):
                results = evaluate(model, processor, plan, items, scratch)
            assert results is not None  # a single shard is always complete
            for (benchmark, _), metric in metrics_of(results).items():
                key = f"eval_suite_{benchmark}"
                if key not in entries:
                    factor = 100.0 if metric.unit == "fraction" else 1.0
                    entries[key] = factor * metric.value
                    entries[f"{key}_stderr"] = factor * (metric.stderr or 0.0)
        return entries
