"""`python -m milora_vl.export FOLDER --to FORM`: convert an adapter of any origin to another form.

FOLDER holds an adapter of ours, a plain PEFT adapter, a LoRA run of LLaVA, or a PiSSA/MiLoRA checkpoint with its
residual base; its files show which. An export overwrites nothing, and an interrupted one leaves no incomplete folder.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from milora_data.command.cli import next_step, parser, suggest
from milora_data.command.flags import shared
from milora_data.errors import UserError
from milora_vl.adapter_folders import base_of, holds_text_model
from milora_vl.checkpoints import step_of
from milora_vl.recipe.yaml_file import trained_prompts

if TYPE_CHECKING:
    import torch
    from torch import nn

    from milora_vl.export.job import LoadsWith

FORMS = {
    "adapter": "stock PEFT LoRA on the unchanged base model, with milora.json",
    "merged": "full model, merged in float32 and saved in the data type of the base model",
    "residual": "form of the papers: a base model without the initial components, and (A, B) of rank r",
    "llava": "LoRA folder for load_pretrained_model of haotian-liu/LLaVA",
    "rank-N": "plain LoRA of rank N nearest to the adapter, and its error (rank-r: the r of each module)",
}
_EXAMPLES = """\
examples:
  python -m milora_vl.export runs/a --to merged --output_dir merged
  python -m milora_vl.export runs/a --to rank-64 --dtype bfloat16 --with_base      # for servers that limit the rank
  python -m milora_vl.export llava-v1.5-7b-lora --to adapter --base vicuna-clip   # from a run of LLaVA
"""


@dataclass(frozen=True, slots=True)
class Exported:
    """The result of an export. `layers`: rank per module, and the error of recompression or the drift of a residual.

    `total`: relative error of the whole change by recompression, or by rounding to another data type. `loads_with`:
    what is needed to load the full model in the folder (merged, residual, base/); None without one.
    """

    folder: Path
    form: str
    origin: str
    layers: Mapping[str, tuple[int, float]] = field(default_factory=dict)
    total: float | None = None
    loads_with: LoadsWith | None = None


def export(
    folder: str | Path,
    to: str,
    output_dir: str | Path,
    *,
    base: str | Path | nn.Module | None = None,
    dtype: torch.dtype | None = None,
    with_base: bool = False,
    residual: str | Path | None = None,
    initial: str | Path | None = None,
    vision_tower: str | None = None,
    allow_base_mismatch: bool = False,
    remote_code: bool = False,
) -> Exported:
    """Write the adapter in `folder` to `output_dir` in the form `to`: adapter, merged, residual, llava or rank-N.

    base: name, folder or HF id of the base model, or a loaded model, which is modified; by default the model that the
    adapter names. dtype: data type of all written tensors; by default as stored. with_base: write fully trained modules
    into a copy of the base model (base/), so that the adapter holds only LoRA factors. residual, initial: the residual
    base and the initial factors of a PiSSA/MiLoRA checkpoint, if the folder does not name them. vision_tower: the CLIP
    model for LLaVA's config.json. remote_code: write the code of a timm vision tower into the folder of the full
    model, which then loads with trust_remote_code=True without this package.

    Raises UserError if folder and form do not fit, or if the output folder is not empty.
    """
    from milora_vl.adapters.source import find_source
    from milora_vl.export.job import Job
    from milora_vl.lora.atomic_write import open_to_others
    from milora_vl.models.quiet import quiet_bars

    form, rank = _form(to)
    if with_base and form not in ("adapter", "rank"):
        message = f"only applies to --to adapter and rank-N, not to {to}"
        raise UserError(message, code="flag-no-effect", where="--with_base", hint="remove the flag")
    if remote_code and not (with_base or form in ("merged", "residual")):
        message = f"only applies to a full model, which --to {to} does not write"
        raise UserError(message, code="flag-no-effect", where="--remote_code", hint="add:  --with_base")
    target = Path(output_dir)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(
            "exists and is not empty; an export overwrites nothing",
            code="output-exists",
            where=str(target),
            hint="use:  --output_dir ANOTHER",
        )
    companions = [None if path is None else Path(path) for path in (residual, initial)]
    source = find_source(Path(folder), *companions)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    job = Job(source, base, dtype, partial, target, vision_tower, allow_base_mismatch, remote_code)
    try:
        with nullcontext() if sys.stderr.isatty() else quiet_bars():
            layers, total, loads_with = job.write(form, rank, with_base)
        if target.exists():
            target.rmdir()
        partial.chmod(0o755)  # only the owner can read a folder of mkdtemp
        open_to_others(partial)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Exported(target, to, source.kind, layers, total, loads_with)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit code. Raises UserError if the adapter cannot be exported."""
    options = _options(argv)
    import torch

    from milora_vl.models.quiet import silence_deepspeed

    silence_deepspeed()
    target = options.output_dir or _beside(options.folder, options.to)
    done = export(
        options.folder,
        options.to,
        target,
        base=options.base,
        dtype=None if options.dtype is None else getattr(torch, options.dtype),
        with_base=options.with_base,
        residual=options.residual,
        initial=options.initial,
        vision_tower=options.vision_tower,
        allow_base_mismatch=options.allow_base_mismatch,
        remote_code=options.remote_code,
    )
    _show(done, options.format)
    _print_next(done, trained_prompts(options.folder)[0])
    return 0


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    forms = "\n".join(f"  {name:<10} {meaning}" for name, meaning in FORMS.items())
    options = parser("python -m milora_vl.export", f"Convert an adapter to another form.\n\nforms:\n{forms}", _EXAMPLES)
    inputs = options.add_argument_group("input")
    inputs.add_argument(
        "folder", type=Path, metavar="FOLDER", help="adapter of this package, PEFT or LLaVA, or of a residual base"
    )
    shared(inputs, "base", about="unchanged base model (default: the model that the adapter names)")
    inputs.add_argument("--residual", type=Path, help="residual base of a PiSSA/MiLoRA checkpoint")
    inputs.add_argument("--initial", type=Path, help="initial factors of a PiSSA/MiLoRA checkpoint (pissa_init)")
    settings = options.add_argument_group("settings")
    settings.add_argument(
        "--with_base", action="store_true", help="write fully trained modules into a copy of the base"
    )
    settings.add_argument(
        "--remote_code", action="store_true", help="add the code of a timm tower, for trust_remote_code=True"
    )
    settings.add_argument("--vision_tower", metavar="NAME", help="CLIP model for LLaVA's config.json")
    settings.add_argument("--allow_base_mismatch", action="store_true", help="continue with another base model")
    out = options.add_argument_group("output")
    out.add_argument("--to", required=True, metavar="FORM", help="adapter, merged, residual, llava, rank-N")
    shared(
        out, "dtype", about="data type of all tensors (default: as stored)", choices=("float32", "bfloat16", "float16")
    )
    shared(out, "output_dir", about="output folder (default: FOLDER-FORM; for a checkpoint, next to its run)")
    shared(out, "format")
    parsed: argparse.Namespace = options.parse_args(argv)
    return parsed


def _beside(folder: Path, to: str) -> Path:
    """Return FOLDER-FORM; `.` and `..` are resolved first, because they have no name.

    For a checkpoint it is RUN-checkpoint-N-FORM next to the run: inside the run, the Trainer would delete the result
    like an old checkpoint.
    """
    named = folder.resolve() if folder.name in ("", "..") else folder
    if step_of(folder.resolve()) >= 0:
        run = named.parent if named.parent.name not in ("", "..") else named.resolve().parent
        return run.with_name(f"{run.name}-{folder.resolve().name}-{to}")
    return named.with_name(f"{folder.resolve().name}-{to}")


def _form(to: str) -> tuple[str, int | None]:
    """Return the kind of form and its rank, ("rank", 64) for rank-64; rank-r keeps the r of each module."""
    kind, _, number = to.partition("-")
    if to == "rank-r":
        return "rank", None
    if kind == "rank" and number.isdecimal() and int(number) > 0:
        return "rank", int(number)
    if to not in FORMS or to == "rank-N":
        near = suggest(to, [form for form in FORMS if form != "rank-N"])
        known = f"known forms: {', '.join(FORMS)}   (N is a number: rank-64)"
        hint = f"{known}\ndid you mean {near[0]} ?" if near else known
        raise UserError(f"unknown form {to!r}", code="export-unknown-form", where="--to", hint=hint)
    return to, None


def _show(done: Exported, style: str) -> None:
    """Print layers and folder to stdout, and what was converted to stderr."""
    if style == "json":
        layers = [{"module": path, "rank": rank, "error": error} for path, (rank, error) in done.layers.items()]
        content = {"folder": str(done.folder), "form": done.form, "origin": done.origin, "layers": layers}
        sys.stdout.write(json.dumps({**content, "total": done.total, "loads_with": done.loads_with}) + "\n")
        return
    measure = "drift" if done.form == "residual" or not done.form.startswith("rank") else "error"
    for path, (rank, error) in done.layers.items():
        sys.stdout.write(f"{path}  rank {rank}  {measure} {error:.3e}\n")
    if done.total is not None:
        sys.stdout.write(f"total  error {done.total:.3e}\n")
    sys.stdout.write(f"{done.folder}\n")
    sys.stderr.write(f"{_ORIGINS[done.origin]}, now: {FORMS.get(done.form, 'plain LoRA of lower rank')}\n")
    requested, largest = _form(done.form)[1], max((rank for rank, _ in done.layers.values()), default=0)
    if requested is not None and largest < requested:
        sys.stderr.write(f"no change has a rank above {largest}, so {done.form} keeps all of it\n")
    if done.loads_with in _TO_LOAD:
        sys.stderr.write(_TO_LOAD[done.loads_with])


def _print_next(done: Exported, template: str) -> None:
    """Print the command or the code that uses the folder; `template` is the prompt format of its training."""
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
    elif done.form == "residual":
        sys.stderr.write(
            f'next: model loaded from {folder}; PeftModel.from_pretrained(model, "{folder}", subfolder="lora")\n'
        )
    else:
        base = folder / "base" if (folder / "base").is_dir() else None
        model = (folder,) if done.form == "merged" else (base or _base_name(folder), "--adapter", folder)
        question = ("QUESTION",) if holds_text_model(folder) else ("--image", "PICTURE", "What is this?")
        prompts = () if template == "vicuna_v1" else ("--template", template)
        next_step("milora_vl.chat", "--model", *model, *prompts, *question)


def _base_name(folder: Path) -> str:
    try:
        return base_of(folder)
    except UserError:  # the adapter names no base model
        return "MODEL"


_TO_LOAD = {
    "transformers": "the model loads in plain transformers\n",
    "milora_vl": (
        "note: transformers and servers do not support its vision tower, a network from timm\n"
        "      in transformers:       import milora_vl     before from_pretrained\n"
        "      without this package:  export with --remote_code, load with trust_remote_code=True\n"
    ),
    "trust_remote_code": (
        "note: servers do not support its vision tower, a network from timm\n"
        "      in transformers:  trust_remote_code=True, with timm installed; or import milora_vl\n"
    ),
}
_ORIGINS = {
    "ours": "was: an adapter of ours",
    "plain": "was: a plain PEFT adapter",
    "llava": "was: a LoRA run of LLaVA",
    "residual": "was: an adapter on a residual base",
}
