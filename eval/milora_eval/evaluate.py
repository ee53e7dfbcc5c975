"""Evaluate one model on one suite, or a tuned model and its base: files go to OUTPUT_DIR/eval/SUITE/WHICH."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from peft import PeftModel

from milora_data.batches.processor_inputs import takes_videos
from milora_data.encode.templates import OWN, template_name
from milora_data.encode.tokens import own_template
from milora_eval.answers.identity import adapter_digest, digest, tokenizer_digest, weights_digest
from milora_eval.answers.questions import EvaluationPlan, Items, questions_of, read_items
from milora_eval.answers.runner import Asker, Outcome, ask, ask_model, audit, finish, prompt_of
from milora_eval.answers.served import ask_server, require_servable, served_name, served_settings
from milora_eval.answers.store import alone
from milora_eval.answers.target import EvalTarget
from milora_eval.benchmark import Benchmark
from milora_eval.chat_server import ChatServer
from milora_eval.scores.exports import export
from milora_eval.scores.results import Results, numbers, read_results, write_results
from milora_eval.scores.table import write_table
from milora_eval.suites import find_benchmark
from milora_vl.common.errors import at_flag
from milora_vl.forgetting.measure import can_recover_base, measure_forgetting
from milora_vl.forgetting.text import general_text
from milora_vl.interop.load_model import load_by_flags
from milora_vl.interop.scale import Update
from milora_vl.models.base import find_base
from milora_vl.models.generate import require_prompts
from milora_vl.models.loading import split_processor
from milora_vl.models.prompts import prompts_of


def run(
    model: Any,
    processor: Any,
    benchmarks: Sequence[str | Benchmark],
    *,
    data_dir: str | Path,
    output_dir: str | Path,
    adapter: str | Path | None = None,
    template: str = "vicuna_v1",
    image_aspect_ratio: Literal["pad", "plain", "anyres"] = "pad",
    limit: int | None = None,
    batch_size: int = 16,
) -> Results:
    """Evaluate a loaded model; return the content of results.json.

    `adapter` is the folder of the adapter that `model` carries; its bytes are part of the key of each answer. The files
    go to `output_dir`/eval/BENCHMARKS/final. Stored answers with the same key are reused. `evaluate` takes a plan with
    more settings, such as shards and an audit. Raises UserError for unknown benchmarks and missing data.
    """
    resolved = tuple(find_benchmark(name) if isinstance(name, str) else name for name in benchmarks)
    plan = EvaluationPlan(
        suite="+".join(benchmark.name for benchmark in resolved),
        benchmarks=resolved,
        data_dir=Path(data_dir),
        template=template,
        image_aspect_ratio=image_aspect_ratio,
        limit=limit,
        batch_size=batch_size,
        adapter=adapter,
    )
    results = evaluate(model, processor, plan, read_items(resolved, plan.data_dir, limit), output_dir)
    assert results is not None  # a single shard is always complete
    return results


def evaluate(model: Any, processor: Any, plan: EvaluationPlan, items: Items, output_dir: str | Path) -> Results | None:
    """Evaluate a loaded model on items that have been read. The plan's `settings` are set here.

    Returns the content of results.json, None while other shards are missing.
    """
    keys = settings(model, processor, plan.adapter, plan.template, plan.image_aspect_ratio)
    plan = replace(plan, settings=keys if plan.scale == 1 else keys | {"scale": plan.scale})
    return _evaluate(partial(ask_model, model, processor, plan), plan, items, output_dir)


def _evaluate(asker: Asker, plan: EvaluationPlan, items: Items, output_dir: str | Path) -> Results | None:
    folder = results_folder(output_dir, plan.suite, plan.which)
    questions = questions_of(plan, items)
    outcome = ask(asker, plan, questions, folder)
    with nullcontext() if plan.shard[1] == 1 else alone(folder):
        if not finish(plan, questions, folder):
            return None
        return _write(plan, outcome, audit(asker, plan, questions, folder) if plan.audit else None, folder)


def _write(plan: EvaluationPlan, outcome: Outcome, checked: dict[str, Any] | None, folder: Path) -> Results:
    """Write results.json, the table and the files for other programs from the answers in `folder`."""
    before = read_results(folder)
    # Forgetting and audit are kept only if the weights and settings are still the ones they were measured with.
    same = before if (before.get("generation") or {}).get("key") == digest(plan.settings) else {}
    results = _results(plan, outcome, before) | numbers(folder, plan.suite)
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
    tokenizer, image_processor = split_processor(processor)
    own = {"chat_template": digest(_own_template(tokenizer))} if template_name(template) == OWN else {}
    return {
        "base": weights_digest(model),
        "adapter": None if adapter is None else adapter_digest(Path(adapter)),
        "tokenizer": tokenizer_digest(tokenizer),
        "pictures": None if image_processor is None else digest([image_processor.to_dict(), image_aspect_ratio]),
        **({"videos": digest(processor.video_processor.to_dict())} if takes_videos(processor) else {}),
        "template": template,
        **own,
        "dtype": str(model.dtype).removeprefix("torch."),
        "decoding": "greedy",
    }


def _own_template(tokenizer: Any) -> str:
    """Return the tokenizer's chat template; empty for a model whose processor has a plain prompt instead."""
    return own_template(tokenizer) if tokenizer.chat_template else ""


def add_forgetting(
    folder: Path, model: Any, processor: Any, base: Any | None, key: str, num_tokens: int
) -> dict[str, Any]:
    """Measure the text forgetting and write it to results.json, unless it holds a value with the same key."""
    results = read_results(folder)
    key = digest([key, num_tokens, general_text(), "errors by document"])
    if (results.get("forgetting") or {}).get("key") != key:
        measured = measure_forgetting(model, split_processor(processor)[0], base=base, num_tokens=num_tokens)
        results["forgetting"] = asdict(measured) | {"key": key}
        write_results(folder, results)
    return dict(results["forgetting"])


def _results(plan: EvaluationPlan, outcome: Outcome, before: Results) -> Results:
    seconds = outcome.seconds if outcome.asked else before.get("seconds", outcome.seconds)
    return {
        "suite": plan.suite,
        "which": plan.which,
        "model": plan.model_name,
        "adapter": plan.adapter and str(plan.adapter),
        **({} if plan.scale == 1 else {"scale": plan.scale}),
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


def run_loaded(
    target: EvalTarget,
    plan: EvaluationPlan,
    items: Items,
    output_dir: Path,
    *,
    with_base: bool,
    forgetting_tokens: int,
) -> list[Path] | None:
    """Load and evaluate the tuned model, and its base if `with_base`; 0 `forgetting_tokens`: no forgetting is measured.

    Returns their results folders, None while shards are missing.
    """
    model: Any
    with at_flag("--model"):
        named = find_base(target.model)
    prompts = prompts_of(target.model, target.adapter)
    if named.own_pictures:
        prompts.limit(named.processor)
    for benchmark in plan.benchmarks:
        require_prompts(named, (prompt_of(benchmark, item) for item in items[benchmark.name]))
    scale = target.scale if target.adapter is not None else 1.0  # of a fully trained model: below, with its base
    with at_flag("--model"):
        model, processor = load_by_flags(target.model, target.adapter, target.dtype, target.device, scale)
    prompts.limit(processor)
    base: Any = None
    base_name = target.base or target.model
    if (target.base or with_base or isinstance(model, PeftModel)) and not can_recover_base(model):
        with at_flag("--base" if target.base else "--model"):
            base, _ = load_by_flags(base_name, None, target.dtype, target.device)
    if target.adapter is None and target.scale != 1:
        Update(model, base.state_dict()).set(target.scale)
    done = []
    if with_base:
        of_base = replace(plan, which="base", model_name=base_name)
        with nullcontext() if base is not None else model.disable_adapter():
            done.append(evaluate(base or model, processor, of_base, items, output_dir))
    tuned = replace(plan, which=target.which, model_name=target.model, adapter=target.adapter, scale=target.scale)
    done.append(evaluate(model, processor, tuned, items, output_dir))
    if not all(done):
        return None
    folders = [results_folder(output_dir, plan.suite, result["which"]) for result in done if result]
    if forgetting_tokens and (base is not None or can_recover_base(model)):
        sys.stderr.write(f"measuring forgetting on {forgetting_tokens:,} tokens of general text\n")
        key = str((done[-1] or {})["generation"]["key"])
        add_forgetting(folders[-1], model, processor, base, key, forgetting_tokens)
    return folders


def run_served(
    server: ChatServer, model: str | None, plan: EvaluationPlan, items: Items, output_dir: Path
) -> list[Path] | None:
    """Evaluate the model of this name on a server; return its results folder, None while shards are missing.

    Raises UserError for benchmarks that it cannot be asked, for a name that the server does not list, and (exit code 1)
    if the server stops answering.
    """
    require_servable(plan, items)
    model = server.listed(model)
    plan = replace(plan, which=served_name(model), model_name=model, settings=served_settings(model))
    done = _evaluate(partial(ask_server, server, plan), plan, items, output_dir)
    return None if done is None else [results_folder(output_dir, plan.suite, plan.which)]
