"""One `milora_eval run`: load the model, evaluate it and optionally its base, and measure forgetting."""

from __future__ import annotations

import argparse
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftModel

from milora_eval.answers.questions import EvaluationPlan, Items
from milora_eval.answers.runner import prompt_of
from milora_eval.answers.target import EvalTarget
from milora_eval.evaluate import add_forgetting, evaluate, results_folder
from milora_vl.base.errors import at_flag
from milora_vl.foreign.load_model import load_by_flags
from milora_vl.foreign.scale import Update
from milora_vl.forgetting.measure import can_recover_base
from milora_vl.models.generate import require_askable
from milora_vl.models.loading import load_processor
from milora_vl.recipe.base_model import prepares_with_processor
from milora_vl.recipe.prompts import prompts_of


def run(options: argparse.Namespace, target: EvalTarget, plan: EvaluationPlan, items: Items) -> list[Path] | None:
    """Evaluate the tuned model and, if asked, its base; return their results folders, None while shards are missing."""
    model: Any
    if prepares_with_processor(target.model):
        processor = load_processor(target.model)
        for benchmark in plan.benchmarks:
            require_askable(processor, (prompt_of(benchmark, item) for item in items[benchmark.name]))
    scale = target.scale if target.adapter is not None else 1.0  # of a fully trained model: below, with its base
    with at_flag("--model"):
        model, processor = load_by_flags(target.model, target.adapter, options.dtype, options.device, scale)
    prompts_of(target.model, target.adapter).limit(processor)
    base: Any = None
    base_name = target.base or target.model
    if (target.base or options.with_base or isinstance(model, PeftModel)) and not can_recover_base(model):
        with at_flag("--base" if target.base else "--model"):
            base, _ = load_by_flags(base_name, None, options.dtype, options.device)
    if target.adapter is None and target.scale != 1:
        Update(model, base.state_dict()).set(target.scale)
    done = []
    if options.with_base:
        of_base = replace(plan, which="base", model_name=base_name)
        with nullcontext() if base is not None else model.disable_adapter():
            done.append(evaluate(base or model, processor, of_base, items, options.output_dir))
    tuned = replace(plan, which=target.which, model_name=target.model, adapter=target.adapter, scale=target.scale)
    done.append(evaluate(model, processor, tuned, items, options.output_dir))
    if not all(done):
        return None
    folders = [results_folder(options.output_dir, plan.suite, result["which"]) for result in done if result]
    if options.forgetting_tokens and (base is not None or can_recover_base(model)):
        sys.stderr.write(f"measuring forgetting on {options.forgetting_tokens:,} tokens of general text\n")
        key = str((done[-1] or {})["generation"]["key"])
        add_forgetting(folders[-1], model, processor, base, key, options.forgetting_tokens)
    return folders
