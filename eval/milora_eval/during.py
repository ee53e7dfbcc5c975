"""Score a small suite on a model that is training (`--eval_suite_every`), for the log, without files."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Mapping
from contextlib import redirect_stderr
from typing import Any, Literal

from milora_eval.answers.questions import EvaluationPlan, Items, read_chosen
from milora_eval.evaluate import evaluate
from milora_eval.scores.results import metrics_of
from milora_eval.suites import choose, data_folder

BATCH_SIZE = 16


class Suites:
    """Suites, or lists of benchmarks and files, whose items are read once, here. Raises UserError for missing data.

    `suites` has the data folder of each. `names` has the names of the benchmarks; `measure` returns a score
    `eval_suite_NAME` for each.
    """

    def __init__(
        self,
        suites: Mapping[str, str | None],
        limit: int,
        *,
        template: str,
        image_aspect_ratio: Literal["pad", "plain", "anyres"],
    ) -> None:
        self._planned: list[tuple[EvaluationPlan, Items]] = []
        for value, data in suites.items():
            folder, chosen = data_folder(value, data), choose(value)
            items = read_chosen(chosen, folder, limit)
            plan = EvaluationPlan(
                suite=chosen.name,
                benchmarks=tuple(benchmark for benchmark in chosen.benchmarks if benchmark.name in items),
                data_dir=folder,
                template=template,
                image_aspect_ratio=image_aspect_ratio,
                limit=limit,
                batch_size=BATCH_SIZE,
            )
            self._planned.append((plan, items))
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
