"""`python -m milora_eval.lm_eval`: run lm-evaluation-harness on a base and an adapter, to measure forgetting of text.

The released harness has no entry point for models. Its `peft=` argument does not support LLaVA's language tower or a
trained projector. Its multiple-choice scores compare likelihoods and are not comparable with the suite `text`.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from milora_vl.common.atomic_write import write_text
from milora_vl.common.cli.console import next_step, run
from milora_vl.common.cli.parser import OR_ADAPTER, Command, option, shared
from milora_vl.common.errors import UserError
from milora_vl.core.adapter.folders import model_of
from milora_vl.interop.load_model import load_by_flags
from milora_vl.models.base import split_processor

COMMAND = Command(
    "milora_eval.lm_eval",
    "Run tasks of lm-evaluation-harness on a base model and an adapter.",
    """\
examples:
  python -m milora_eval.lm_eval --model llava-1.5-7b --adapter runs/a --tasks hellaswag,arc_easy --limit 200
  python -m milora_eval.lm_eval --model smol-llava --tasks my_task --include_path my_tasks --output_dir out
""",
    inputs=(
        shared("model", about=OR_ADAPTER),
        shared("adapter"),
        option("--tasks", required=True, metavar="a,b", help="names of tasks of the harness"),
        option("--include_path", type=Path, help="folder with your own tasks"),
    ),
    settings=(
        option("--num_fewshot", type=int, help="number of examples in the prompt (default: set by the task)"),
        shared("limit", about="the first N questions of each task"),
        shared("batch_size", default=8),
        shared("device"),
        shared("dtype"),
    ),
    outputs=(
        shared("output_dir", about="results go to FOLDER/lm_eval.json"),
        shared("format"),
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    options = COMMAND.parse(argv)
    options.model = model_of(options.model, options.adapter, "milora_eval.lm_eval", "--adapter")
    evaluator, tasks, harness, utils = _harness()
    manager = tasks.TaskManager(include_path=None if options.include_path is None else str(options.include_path))
    names = [name.strip() for name in options.tasks.split(",") if name.strip()]
    unknown = [name for name in names if not manager.match_tasks([name])]
    if unknown:
        message, hint = f"lm_eval has no task {', '.join(unknown)}", "for your own task: --include_path DIR"
        raise UserError(message, where="--tasks", hint=hint)
    results = evaluator.simple_evaluate(
        model=model(harness.HFLM, options.model, options.adapter, options.dtype, options.device, options.batch_size),
        tasks=names,
        num_fewshot=options.num_fewshot,
        limit=options.limit,
        task_manager=manager,
        log_samples=False,
    )
    if options.output_dir is not None:
        kept = {key: results[key] for key in ("results", "versions", "n-shot", "higher_is_better", "n-samples")}
        about = {"model": options.model, "adapter": None if options.adapter is None else str(options.adapter)}
        path = write_text(options.output_dir / "lm_eval.json", json.dumps(about | kept, indent=1, default=str) + "\n")
        sys.stderr.write(f"written: {path}\n")
    if options.format == "json":
        sys.stdout.write(json.dumps(results["results"], indent=1, default=str) + "\n")
    else:
        sys.stdout.write(utils.make_table(results) + "\n")
    tuned = ("--adapter", options.adapter or "FOLDER")
    next_step("milora_vl.forgetting", "--model", options.model, *tuned)
    return 0


def model(wrapper: Any, name: str, adapter: Path | None, dtype: str | None, device: str | None, batch_size: int) -> Any:
    """Return the harness' wrapper (HFLM) around base + adapter, loaded with `load_model`."""
    loaded, processor = load_by_flags(name, adapter, dtype, device)
    tokenizer = split_processor(processor)[0]
    return wrapper(pretrained=loaded, tokenizer=tokenizer, backend="causal", batch_size=batch_size)


def _harness() -> tuple[Any, Any, Any, Any]:
    names = ("lm_eval.evaluator", "lm_eval.tasks", "lm_eval.models.huggingface", "lm_eval.utils")
    try:
        evaluator, tasks, harness, utils = map(importlib.import_module, names)
    except ImportError as error:
        message, hint = f"lm-evaluation-harness is not installed: {error}", "pip install 'lm_eval[hf]'"
        raise UserError(message, code="package-missing", hint=hint) from None
    return evaluator, tasks, harness, utils


if __name__ == "__main__":
    run(main)
