"""Load a tuned model and its base, measure the probes and write forgetting.json."""

from __future__ import annotations

import sys
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from typing import Any

from milora_data import load_records
from milora_data.formats.stored import is_saved
from milora_data.keys import digest
from milora_vl.common.atomic_write import read_json, write_json
from milora_vl.common.errors import UserError, at_flag, beside
from milora_vl.core.adapter.folders import require_no_base
from milora_vl.core.weights.tensor_files import weights_digest
from milora_vl.forgetting.answers import measure_on_answers
from milora_vl.forgetting.measure import can_recover_base, measure_forgetting
from milora_vl.interop.load_model import load_by_flags
from milora_vl.models.base import load_processor, split_processor
from milora_vl.models.prompts import prompts_of

FILE = "forgetting.json"


def measure(model: str, adapter: Path | None, folder: Path, options: Namespace) -> dict[str, Any]:
    """Measure the probes that the command's options ask for; write and return them.

    Other probes stay in the file if it has the same models. Raises UserError without a base, for a missing file, for
    pictures and a model of text, and for a probe without text.
    """
    if adapter is None and options.base is None:
        hint = "add:  --adapter FOLDER, or --base MODEL for a fully trained --model"
        raise UserError("forgetting needs a base model to compare with", hint=hint)
    require_no_base(model, adapter, options.base)
    for flag, path in (*(("--text", path) for path in options.text or ()), ("--data_path", options.data_path)):
        if path is not None and not (path.is_file() or is_saved(path)):
            raise UserError(f"{path}: no such file", code="data-missing-file", where=flag, hint=beside(path))
    tokenizer, image_processor = split_processor(load_processor(model))
    if image_processor is None and "pictures" in (options.on or ()):
        raise UserError(f"{model} reads only text", where="--on", hint="remove pictures from --on")
    with at_flag("--model"):
        tuned, processor = load_by_flags(model, adapter, options.dtype, options.device)
    base = None
    if not can_recover_base(tuned):  # a projector, the full model or biases trained
        with at_flag("--base" if options.base else "--model"):
            base, _ = load_by_flags(options.base or model, None, options.dtype, options.device)
    key = digest([weights_digest(tuned), None if base is None else weights_digest(base)])
    before = read_json(folder / FILE) or {}
    results: dict[str, Any] = {**(before if before.get("key") == key else {}), "key": key, "model": model}
    for name in options.on or ("text", *(() if image_processor is None else ("pictures",))):
        sys.stderr.write(f"forgetting on {name} ...\n")
        try:
            if name == "text":
                texts = {str(path): path.read_text(encoding="utf-8") for path in options.text or ()}
                results[name] = asdict(measure_forgetting(
                    tuned, tokenizer, base=base, texts=texts or None, num_tokens=options.num_tokens,
                    batch_size=options.batch_size,
                ))  # fmt: skip
            else:
                prompts = prompts_of(model, adapter, options.template)
                prompts.limit(processor)
                results[name] = asdict(measure_on_answers(
                    tuned, processor, base=base, records=_records(options), template=prompts.template,
                    image_folder=options.image_folder or (options.data_path and options.data_path.parent),
                    image_aspect_ratio=prompts.image_aspect_ratio, batch_size=options.batch_size, limit=options.limit,
                ))  # fmt: skip
        except UserError:
            raise
        except ValueError as error:  # too little text, a file without text, two vocabularies
            hint = "leave this probe out of --on, or give it more text"
            raise UserError(f"{name}: {error}", where="--on", hint=hint) from None
        write_json(folder / FILE, results)
    return results


def _records(options: Namespace) -> list[Any] | None:
    if options.data_path is None:
        return None
    records = [r for r in load_records(str(options.data_path)) if any(turn.role == "user" for turn in r.turns)]
    if not records:
        hint = "name records with a turn of the user, as for a training"
        raise UserError("contains no question", where=str(options.data_path), hint=hint)
    return records
