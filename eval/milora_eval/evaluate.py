"""Evaluate one model on one suite: write answers, numbers and a table to OUTPUT_DIR/eval/SUITE/WHICH."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from milora_data.command.atomic_write import write_text
from milora_data.templates import OWN, template_name
from milora_data.tokens import own_template
from milora_eval.answers.identity import adapter_digest, digest, tokenizer_digest, weights_digest
from milora_eval.answers.runner import EvaluationPlan, Outcome, ask, audit, finish, questions
from milora_eval.answers.store import PREDICTIONS, alone
from milora_eval.benchmark import Benchmark
from milora_eval.scores.compare import compare
from milora_eval.scores.exports import export
from milora_eval.scores.results import TABLE, Results, numbers, read_results, require_lines, write_results
from milora_eval.scores.table import Table, pairs_table, results_table, with_forgetting
from milora_eval.suites import find_benchmark
from milora_vl.forgetting import general_text, measure_forgetting


def run(
    model: Any,
    processor: Any,
    benchmarks: Sequence[str | Benchmark],
    *,
    data_dir: str | Path,
    output_dir: str | Path,
    suite: str | None = None,
    which: str = "final",
    model_name: str = "",
    adapter: str | Path | None = None,
    template: str = "vicuna_v1",
    image_aspect_ratio: Literal["pad", "plain", "anyres"] = "pad",
    limit: int | None = None,
    shard: tuple[int, int] = (1, 1),
    batch_size: int = 16,
    audit_items: int = 0,
) -> Results | None:
    """Evaluate a loaded model; return the content of results.json, None while other shards are missing.

    `adapter` is the folder of the adapter that `model` carries; its bytes are part of the key of each answer. The files
    go to `output_dir`/eval/`suite`/`which`. Stored answers with the same key are reused.
    Raises UserError for unknown benchmarks and missing data.
    """
    resolved = tuple(find_benchmark(name) if isinstance(name, str) else name for name in benchmarks)
    suite = suite or "+".join(benchmark.name for benchmark in resolved)
    plan = EvaluationPlan(
        benchmarks=resolved,
        data_dir=Path(data_dir),
        template=template,
        image_aspect_ratio=image_aspect_ratio,
        limit=limit,
        shard=shard,
        batch_size=batch_size,
        audit=audit_items,
        label=f"{suite} {which}",
        settings=settings(model, processor, adapter, template, image_aspect_ratio),
    )
    folder = results_folder(output_dir, suite, which)
    asked = questions(plan)
    outcome = ask(model, processor, plan, asked, folder)
    with nullcontext() if shard[1] == 1 else alone(folder):
        if not finish(plan, asked, folder):
            return None
        checked = audit(model, processor, plan, asked, folder) if audit_items else None
        about = {"suite": suite, "which": which, "model": model_name, "adapter": adapter and str(adapter)}
        return _write(plan, outcome, about, checked, folder)


def _write(
    plan: EvaluationPlan, outcome: Outcome, about: dict[str, Any], checked: dict[str, Any] | None, folder: Path
) -> Results:
    """Write results.json, the table and the files for other programs from the answers in `folder`."""
    before = read_results(folder)
    # Forgetting and audit are kept only if the weights and settings are still the ones they were measured with.
    same = before if (before.get("generation") or {}).get("key") == digest(plan.settings) else {}
    results = _results(plan, outcome, before) | numbers(folder, about["suite"]) | about
    results |= {"forgetting": same.get("forgetting"), "audit": checked or same.get("audit")}
    write_results(folder, results)
    write_table(folder)
    export(folder)
    return results


def results_folder(output_dir: str | Path, suite: str, which: str) -> Path:
    """Return the folder for the files of one evaluation."""
    return Path(output_dir) / "eval" / suite / which


def settings(
    model: Any, processor: Any, adapter: str | Path | None, template: str, image_aspect_ratio: str
) -> dict[str, Any]:
    """Return everything except the question that an answer depends on; weights and tokenizer as digests."""
    from milora_vl.models.loading import split_processor

    tokenizer, image_processor = split_processor(processor)
    own = {"chat_template": digest(own_template(tokenizer))} if template_name(template) == OWN else {}
    return {
        "base": weights_digest(model),
        "adapter": None if adapter is None else adapter_digest(Path(adapter)),
        "tokenizer": tokenizer_digest(tokenizer),
        "pictures": None if image_processor is None else digest([image_processor.to_dict(), image_aspect_ratio]),
        "template": template,
        **own,
        "dtype": str(model.dtype).removeprefix("torch."),
        "decoding": "greedy",
    }


def add_forgetting(
    folder: Path, model: Any, processor: Any, base: Any | None, key: str, num_tokens: int
) -> dict[str, Any]:
    """Measure the text forgetting and write it to results.json, unless it holds a value with the same key."""
    from milora_vl.models.loading import split_processor

    results = read_results(folder)
    key = digest([key, num_tokens, general_text(), "errors by document"])
    if (results.get("forgetting") or {}).get("key") != key:
        measured = measure_forgetting(model, split_processor(processor)[0], base=base, num_tokens=num_tokens)
        results["forgetting"] = asdict(measured) | {"key": key}
        write_results(folder, results)
    return dict(results["forgetting"])


def write_table(folder: Path) -> Table:
    """Write table.md next to results.json and return the table; it compares with the base if its answers exist."""
    results = read_results(folder)
    base = folder.parent / "base"
    table = results_table(results)
    if results.get("which") not in ("base", None) and (base / PREDICTIONS).is_file():
        names = ("base", "tuned" if results["which"] == "final" else results["which"])
        means = (read_results(base).get("mean"), results.get("mean"))
        pairs = compare(require_lines(base), require_lines(folder))
        table = pairs_table(table.title, pairs, names, means)
    table = with_forgetting(table, results.get("forgetting"))
    write_text(folder / TABLE, table.markdown())
    return table


def _results(plan: EvaluationPlan, outcome: Outcome, before: Results) -> Results:
    seconds = outcome.seconds if outcome.asked else before.get("seconds", outcome.seconds)
    return {
        "template": plan.template,
        "data": str(plan.data_dir),
        "limit": plan.limit,
        "generation": plan.settings
        | {
            "key": digest(plan.settings),
            "batch_size": plan.batch_size,
            "max_new_tokens": {benchmark.name: benchmark.max_new_tokens for benchmark in plan.benchmarks},
        },
        "seconds": round(seconds, 1),
        "asked": outcome.asked,
    }
