"""Evaluate one model on one suite, or a tuned model and its base: files go to OUTPUT_DIR/eval/SUITE/WHICH."""

from __future__ import annotations

import io
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, redirect_stderr
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock
from peft import PeftModel

from milora_data.batches.processor_inputs import takes_videos
from milora_data.encode.templates import OWN, template_name
from milora_data.encode.tokens import fast_backend, own_template
from milora_data.keys import digest
from milora_eval.answers.questions import EvaluationPlan, Items, plan_of, questions_of
from milora_eval.answers.runner import Asker, ask, ask_model, finish, prompt_of
from milora_eval.answers.served import ChatServer, ask_server, require_servable, served_name, served_settings
from milora_eval.answers.target import EvalTarget
from milora_eval.benchmark import Benchmark
from milora_eval.benchmarks.own_data import OwnData
from milora_eval.registry import Chosen, choose, data_folder, find_benchmark, folder_of, list_name, name_apart
from milora_eval.scores.exports import export
from milora_eval.scores.results import Results, headlines, numbers, read_results, write_results
from milora_eval.scores.table import write_tables
from milora_vl.common.errors import at_flag
from milora_vl.core.weights.tensor_files import weights_digest
from milora_vl.forgetting.answers import measure_on_answers
from milora_vl.forgetting.measure import can_recover_base, general_text, measure_forgetting
from milora_vl.interop.load_model import load_by_flags, require_scalable
from milora_vl.interop.scale import Update
from milora_vl.models.base import find_base, split_processor
from milora_vl.models.generate import require_prompts
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

    `adapter` is the folder of the adapter that `model` carries, as the results name it. The files go to
    `output_dir`/eval/BENCHMARKS/final. Stored answers are reused if model, prompt and pictures have the same content.
    `evaluate` takes a plan with more settings, such as shards. Raises UserError for unknown benchmarks or missing data.
    """
    resolved = tuple(find_benchmark(name) if isinstance(name, str) else name for name in benchmarks)
    name_apart(resolved, Path(data_dir), Path(output_dir))
    chosen = Chosen(list_name(resolved), resolved)
    plan, items = plan_of(chosen, Path(data_dir), limit)
    plan = replace(
        plan, template=template, image_aspect_ratio=image_aspect_ratio, batch_size=batch_size, adapter=adapter
    )
    results = evaluate(model, processor, plan, items, output_dir)
    assert results is not None  # a single shard is always complete
    return results


def evaluate(model: Any, processor: Any, plan: EvaluationPlan, items: Items, output_dir: str | Path) -> Results | None:
    """Evaluate a loaded model on items that have been read. The plan's `settings` are set here.

    Returns the content of results.json, None while other shards are missing.
    """
    plan = replace(plan, settings=settings(model, processor, plan.template, plan.image_aspect_ratio))
    return _evaluate(partial(ask_model, model, processor, plan), plan, items, output_dir)


def _evaluate(asker: Asker, plan: EvaluationPlan, items: Items, output_dir: str | Path) -> Results | None:
    folder = results_folder(output_dir, plan.suite, plan.which)
    questions = questions_of(plan, items)
    outcome = ask(asker, plan, questions, folder)
    # The last two shards may finish at the same time. The system releases the lock also after a kill.
    with nullcontext() if plan.shard[1] == 1 else FileLock(folder / ".lock"):
        if not finish(plan, questions, folder):
            return None
        return _write(plan, outcome, folder)


def _write(plan: EvaluationPlan, asked: tuple[int, float], folder: Path) -> Results:
    before, (num_asked, seconds), key = read_results(folder), asked, digest(plan.settings)
    # Forgetting is kept only if the weights and settings are still the ones it was measured with.
    same = before if (before.get("generation") or {}).get("key") == key else {}
    own = [benchmark for benchmark in plan.benchmarks if isinstance(benchmark, OwnData)]
    limits = {benchmark.name: benchmark.max_new_tokens for benchmark in plan.benchmarks}
    results: Results = {
        "suite": plan.suite,
        "which": plan.which,
        "model": plan.model_name,
        "adapter": plan.adapter and str(plan.adapter),
        **({} if plan.scale == 1 else {"scale": plan.scale}),
        "template": plan.template,
        "data": str(plan.data_dir),
        "limit": plan.limit,
        "generation": plan.settings | {"key": key, "batch_size": plan.batch_size, "max_new_tokens": limits},
        "seconds": round(seconds if num_asked else before.get("seconds", seconds), 1),
        "asked": num_asked,
        **numbers(folder, plan.suite),
        "forgetting": same.get("forgetting"),
        **({"questions": {each.name: each.identity(folder_of(each, plan.data_dir)) for each in own}} if own else {}),
    }
    write_results(folder, results)
    write_tables(folder)
    export(folder)
    return read_results(folder)


def results_folder(output_dir: str | Path, suite: str, which: str) -> Path:
    return Path(output_dir) / "eval" / suite / which


def settings(model: Any, processor: Any, template: str, image_aspect_ratio: str) -> dict[str, Any]:
    """Return everything except the question that an answer depends on; weights and tokenizer as digests."""
    tokenizer, image_processor = split_processor(processor)
    own: dict[str, Any] = {}
    if template_name(template) == OWN:  # a model whose processor has a plain prompt has no chat template
        chosen = own_template(tokenizer) if tokenizer.chat_template else ""
        own["chat_template"] = digest([chosen, processor.chat_template])
    return {
        "weights": weights_digest(model),
        "tokenizer": digest(fast_backend(tokenizer).to_str()),
        "pictures": None if image_processor is None else digest([image_processor.to_dict(), image_aspect_ratio]),
        **({"videos": digest(processor.video_processor.to_dict())} if takes_videos(processor) else {}),
        "template": template,
        **own,
        "dtype": str(model.dtype).removeprefix("torch."),
        "decoding": "greedy",
        "milora_vl": version("milora-vl"),
        "transformers": version("transformers"),
    }


def add_forgetting(
    folder: Path, model: Any, processor: Any, base: Any | None, plan: EvaluationPlan, key: str, num_tokens: int
) -> None:
    """Measure the forgetting of text, and of pictures if the model reads them, and write it to results.json.

    Nothing is measured if the file holds values with the same key.
    """
    results = read_results(folder)
    key = digest([key, num_tokens, general_text(), "errors by document"])
    if (results.get("forgetting") or {}).get("key") != key:
        sys.stderr.write(f"measuring forgetting on {num_tokens:,} tokens of general text\n")
        tokenizer, images = split_processor(processor)
        measured = asdict(measure_forgetting(model, tokenizer, base=base, num_tokens=num_tokens)) | {"key": key}
        if images is not None:
            sys.stderr.write("measuring forgetting on the base's answers about drawn shapes\n")
            asked: dict[str, Any] = {"template": plan.template, "image_aspect_ratio": plan.image_aspect_ratio}
            measured["pictures"] = asdict(measure_on_answers(model, processor, base=base, **asked))
        write_results(folder, results | {"forgetting": measured})


def run_loaded(
    target: EvalTarget, plan: EvaluationPlan, items: Items, output_dir: Path, forgetting_tokens: int
) -> list[Path] | None:
    """Load and evaluate the model at each scale of its update; 0 `forgetting_tokens`: no forgetting is measured.

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
    with at_flag("--model"):
        model, processor = load_by_flags(target.model, target.adapter, target.dtype, target.device)
    prompts.limit(processor)
    base: Any = None
    base_name = target.base or target.model
    is_trained = target.base or isinstance(model, PeftModel) or target.scales != (1.0,)
    if is_trained and not can_recover_base(model):
        with at_flag("--base" if target.base else "--model"):
            base, _ = load_by_flags(base_name, None, target.dtype, target.device)
    is_scaled = bool(set(target.scales) - {0.0, 1.0})
    if is_scaled and isinstance(model, PeftModel) and target.adapter is not None:
        require_scalable(model.get_base_model(), target.adapter)
    update = Update(model, None if base is None else base.state_dict()) if is_scaled else None
    folders = []
    for scale in target.scales:
        sized = replace(plan, which=target.named(scale), model_name=target.model, adapter=target.adapter, scale=scale)
        if scale == 0:
            sized = replace(plan, which="base", model_name=base_name)
            with nullcontext() if base is not None else model.disable_adapter():
                done = evaluate(base or model, processor, sized, items, output_dir)
        else:
            if update is not None:
                update.set(scale)
            done = evaluate(model, processor, sized, items, output_dir)
        if done is None:
            continue
        folders.append(results_folder(output_dir, plan.suite, sized.which))
        if scale and forgetting_tokens and (base is not None or can_recover_base(model)):
            add_forgetting(folders[-1], model, processor, base, plan, done["generation"]["key"], forgetting_tokens)
    return folders if len(folders) == len(target.scales) else None


def run_served(
    url: str, key: str, model: str | None, plan: EvaluationPlan, items: Items, output_dir: Path
) -> list[Path] | None:
    """Evaluate the model of this name on a server; return its results folder, None while shards are missing.

    Raises UserError for benchmarks that it cannot be asked, for a name that the server does not list, and (exit code 1)
    if the server stops answering.
    """
    server = ChatServer(url, key)
    require_servable(plan, items)
    model = server.listed(model)
    plan = replace(plan, which=served_name(model), model_name=model)
    plan = replace(plan, settings=served_settings(server, plan, items))
    done = _evaluate(partial(ask_server, server, plan), plan, items, output_dir)
    return None if done is None else [results_folder(output_dir, plan.suite, plan.which)]


class TrainingSuites:
    """Suites, or lists of benchmarks and files, whose items are read once, to ask a model during its training.

    `suites` has the data folder of each. `names` has the names of the benchmarks; `measure` returns a score
    `eval_suite_NAME` for each. Raises UserError for missing data.
    """

    def __init__(
        self,
        suites: Mapping[str, str | None],
        limit: int,
        *,
        template: str,
        image_aspect_ratio: Literal["pad", "plain", "anyres"],
        batch_size: int,
    ) -> None:
        every = [(choose(value), data_folder(value, data)) for value, data in suites.items()]
        name_apart([benchmark for chosen, _ in every for benchmark in chosen.benchmarks], Path())
        self._planned: list[tuple[EvaluationPlan, Items]] = []
        for chosen, folder in every:
            plan, items = plan_of(chosen, folder, limit)
            plan = replace(plan, template=template, image_aspect_ratio=image_aspect_ratio, batch_size=batch_size)
            self._planned.append((plan, items))
        self.names = tuple(benchmark.name for plan, _ in self._planned for benchmark in plan.benchmarks)

    def measure(self, model: Any, processor: Any) -> dict[str, float]:
        """Return the headline of each benchmark and its standard error, for example `eval_suite_emoji`.

        Fractions are in percent, as in tables. The mode of the model and the random state do not change. The next step
        must not find these answers, so they go to a temporary folder, without the key of the weights.
        """
        entries: dict[str, float] = {}
        for plan, items in self._planned:
            with tempfile.TemporaryDirectory() as scratch, redirect_stderr(io.StringIO()):
                results = _evaluate(partial(ask_model, model, processor, plan), plan, items, scratch)
            assert results is not None  # a single shard is always complete
            for benchmark, metric in headlines(results).items():
                entries[f"eval_suite_{benchmark}"] = metric.scale * metric.value
                entries[f"eval_suite_{benchmark}_stderr"] = metric.scale * (metric.stderr or 0.0)
        return entries
