"""`python -m milora_vl.export FOLDER --to FORM`: convert an adapter of any origin to another form.

FOLDER holds an adapter of ours, a plain PEFT adapter or a LoRA run of LLaVA; its files show which. An export overwrites
nothing, and an interrupted one leaves no incomplete folder.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from milora_data.encode.templates import OWN
from milora_vl.common.cli.console import next_step, run
from milora_vl.common.cli.parser import Command, from_zero, option, shared
from milora_vl.common.cli.table import show
from milora_vl.common.compat.transformers import silence_deepspeed
from milora_vl.common.errors import UserError
from milora_vl.core.adapter.folders import base_of, holds_text_model, step_of
from milora_vl.export.request import FORMS, Options, parse_form
from milora_vl.report.page import regenerate_report
from milora_vl.report.tables import scales_table

if TYPE_CHECKING:
    from milora_vl.export.write import Exported


def _scale(text: str) -> float | str:
    return text if text == "auto" else from_zero(text)


forms = "\n".join(f"  {name:<10} {meaning}" for name, meaning in FORMS.items())
SCALE = "size of the finished update (default: 1); auto: the smallest that keeps 95 %% of the fall of held-out loss"
COMMAND = Command(
    "milora_vl.export",
    f"Convert an adapter to another form.\n\nforms:\n{forms}",
    """\
examples:
  python -m milora_vl.export runs/a --to merged --output_dir merged
  python -m milora_vl.export runs/a --to rank-64 --dtype bfloat16                 # for servers that limit the rank
  python -m milora_vl.export runs/a --scale 0.7 --to adapter --output_dir weaker  # 0.7 of the update
  python -m milora_vl.export llava-v1.5-7b-lora --to adapter --base vicuna-clip   # from a run of LLaVA
""",
    inputs=(
        option("folder", type=Path, metavar="FOLDER", help="adapter of this package, PEFT or LLaVA"),
        shared("base", about="unchanged base model (default: the model that the adapter names)"),
    ),
    settings=(
        option("--scale", type=_scale, default=1.0, metavar="X", help=SCALE),
        option("--vision_tower", metavar="NAME", help="CLIP model for LLaVA's config.json"),
        shared("allow_base_mismatch"),
    ),
    outputs=(
        option("--to", required=True, metavar="FORM", help="adapter, merged, llava, rank-N"),
        shared(
            "dtype", about="data type of all tensors (default: as stored)", choices=("float32", "bfloat16", "float16")
        ),
        shared("output_dir", about="output folder (default: FOLDER-FORM; a checkpoint's is next to its run)"),
        shared("format"),
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    options = COMMAND.parse(argv)
    silence_deepspeed()
    import torch

    from milora_vl.export import write

    done = write.export(
        options.folder,
        options.to,
        options.output_dir or _beside(options.folder, options.to, options.scale),
        Options(
            **{field.name: getattr(options, field.name) for field in fields(Options) if field.name != "dtype"},
            dtype=None if options.dtype is None else getattr(torch, options.dtype),
        ),
    )
    _show(done, options.format)
    if done.scales is not None:
        regenerate_report(options.folder)
    _print_next(done)
    return 0


def _beside(folder: Path, to: str, scale: float | str) -> Path:
    """Return FOLDER-FORM, with a scale FOLDER-FORM-scale-0.5. `.` and `..` are resolved first: they have no name.

    For a checkpoint it is RUN-checkpoint-N-FORM next to the run: inside the run, the Trainer would delete the result
    like an old checkpoint.
    """
    to = to if scale == 1 else f"{to}-scale-{scale if isinstance(scale, str) else format(scale, 'g')}"
    named = folder.resolve() if folder.name in ("", "..") else folder
    if step_of(folder.resolve()) >= 0:
        run = named.parent if named.parent.name not in ("", "..") else named.resolve().parent
        return run.with_name(f"{run.name}-{folder.resolve().name}-{to}")
    return named.with_name(f"{folder.resolve().name}-{to}")


def _show(done: Exported, style: str) -> None:
    if style == "json":
        layers = [{"module": path, "rank": rank, "error": error} for path, (rank, error) in done.layers.items()]
        content = {"folder": str(done.folder), "form": done.form, "origin": done.origin, "layers": layers}
        errors = {"total": done.total, "exact_rank": done.exact_rank, "dtype": done.dtype}
        sys.stdout.write(json.dumps({**content, **errors, "loads_with": done.loads_with, "scales": done.scales}) + "\n")
        return
    if done.scales is not None:
        show(scales_table(done.scales), "human")
    for path, (rank, error) in done.layers.items():
        sys.stdout.write(f"{path}  rank {rank}  relative error {error:.3e}\n")
    if done.total is not None:
        sys.stdout.write(f"total  relative error {done.total:.3e}\n")
    sys.stdout.write(f"{done.folder}\n")
    sys.stderr.write(f"read {_ORIGINS[done.origin]}, wrote {FORMS.get(done.form, 'plain LoRA of lower rank')}\n")
    if done.dtype is not None:
        sys.stderr.write(f"saved in {done.dtype}\n")
    requested, largest = parse_form(done.form)[1], max((rank for rank, _ in done.layers.values()), default=0)
    if requested is not None and largest < requested:
        sys.stderr.write(f"no change has a rank above {largest}, so {done.form} keeps all of it\n")
    if done.exact_rank is not None and (done.total or 0) > LOSSY:
        lost = f"{100 * (done.total or 0):.0f} % of the update"
        sys.stderr.write(f"warning: {done.form} loses {lost}; rank-{done.exact_rank} keeps all of it\n")
    if done.loads_with in _TO_LOAD:
        sys.stderr.write(_TO_LOAD[done.loads_with])


def _print_next(done: Exported) -> None:
    folder, name = done.folder, done.folder.resolve().name.lower()
    if done.form == "llava":
        if "llava" not in name or "lora" not in name:
            sys.stderr.write(
                f"warning: LLaVA's loader needs `llava` and `lora` in the folder's name: rename {folder}\n"
            )
        flags = f"--model-path {folder} --model-base BASE --save-model-path OUT"
        sys.stderr.write(
            f"next: in LLaVA's repository, BASE in its layout: python scripts/merge_lora_weights.py {flags}\n"
        )
    else:
        model = (folder,) if done.form == "merged" else (_base_name(folder), "--adapter", folder)
        is_text = holds_text_model(folder)
        question = ("QUESTION",) if is_text else ("--image", "PICTURE", "What is this?")
        is_known = done.form == "merged" and (is_text or done.template == OWN)  # from the folder's chat template
        prompts = () if is_known or done.template == "vicuna_v1" else ("--template", done.template)
        next_step("milora_vl.chat", "--model", *model, *prompts, *question)
        if done.loads_with == "transformers":
            sys.stderr.write(f"serve: transformers serve {folder}   or: vllm serve {folder}\n")
        elif done.form != "merged":
            sys.stderr.write("serve: docs/export.md lists what servers take; --to merged is the safe choice\n")


def _base_name(folder: Path) -> str:
    try:
        return base_of(folder)
    except UserError:  # the adapter names no base model
        return "MODEL"


LOSSY = 0.01  # relative error of rank-N above which the export warns
_TO_LOAD = {
    "transformers": "the model loads in plain transformers\n",
    "milora_vl": (
        "note: its vision tower is a network from timm, which transformers and servers do not know\n"
        "      in Python:                  milora_vl.load_model\n"
    ),
}
_ORIGINS = {"ours": "an adapter of milora-vl", "plain": "a plain PEFT adapter", "llava": "a LoRA run of LLaVA"}


if __name__ == "__main__":
    run(main)
