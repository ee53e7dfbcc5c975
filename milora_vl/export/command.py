"""`python -m milora_vl.export FOLDER --to FORM`: an adapter of any origin, written in another form.

FOLDER is ours, a plain PEFT one, one of LLaVA's LoRA runs, or a PiSSA/MiLoRA checkpoint with its residual base; which,
is told by its files. Nothing is overwritten, and an interrupted export leaves no half-written folder.
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

from milora_data.command import next_step, parser, suggest
from milora_data.errors import UserError
from milora_data.flags import shared
from milora_vl.adapters.folders import base_of, holds_text_model

if TYPE_CHECKING:
    import torch
    from torch import nn

FORMS = {
    "adapter": "stock PEFT LoRA on the untouched base, with milora.json",
    "merged": "a whole model: float32 arithmetic, the base's dtype, loads in plain transformers",
    "residual": "the papers' form: a base without the initial components, and (A, B) of rank r",
    "llava": "LoRA folder of haotian-liu/LLaVA, for its own load_pretrained_model",
    "rank-N": "plain LoRA of rank N nearest to the adapter, with its error (rank-r: each module's r)",
}
_EXAMPLES = """\
examples:
  python -m milora_vl.export runs/a --to merged --output_dir merged
  python -m milora_vl.export runs/a --to rank-64 --dtype bfloat16 --with_base      # for servers that take small LoRAs
  python -m milora_vl.export llava-v1.5-7b-lora --to adapter --base vicuna-clip   # from LLaVA's own run
"""


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written. `layers`: per module the error of re-compression or the drift of a residual, and its rank.

    `total`: relative error of the whole change, of re-compression or of rounding to another dtype.
    """

    folder: Path
    form: str
    origin: str
    layers: Mapping[str, tuple[int, float]] = field(default_factory=dict)
    total: float | None = None


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
) -> Exported:
    """Write the adapter in `folder` to `output_dir` in the form `to`: adapter, merged, residual, llava or rank-N.

    base: name, folder or HF id of the base model, or the model itself (it is used up); by default the one the adapter
    names. dtype: of all that is written; by default as stored. with_base: write the modules trained in full into a copy
    of the base (base/), so that the adapter holds LoRA factors alone. residual, initial: the residual base and the
    initial factors of a PiSSA/MiLoRA checkpoint, where the folder does not tell. vision_tower: the CLIP model that
    LLaVA's config.json shall name.

    Raises UserError for folders and forms that do not fit, and for an output folder that holds something.
    """
    from milora_vl.adapters.source import find_source
    from milora_vl.export.job import Job
    from milora_vl.lora.atomic_write import open_to_others
    from milora_vl.models.quiet import quiet_bars

    form, rank = _form(to)
    if with_base and form not in ("adapter", "rank"):
        raise UserError(f"with_base is for --to adapter and rank-N: {to} needs no base of its own")
    target = Path(output_dir)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists and is not empty: nothing is overwritten\nsay:  --output_dir ANOTHER")
    given = [None if path is None else Path(path) for path in (residual, initial)]
    source = find_source(Path(folder), *given)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    job = Job(source, base, dtype, partial, target, vision_tower, allow_base_mismatch)
    try:
        with nullcontext() if sys.stderr.isatty() else quiet_bars():
            layers, total = job.write(form, rank, with_base)
        if target.exists():
            target.rmdir()
        partial.chmod(0o755)  # mkdtemp's folders are for their owner alone
        open_to_others(partial)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Exported(target, to, source.kind, layers, total)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; UserError for what cannot be exported. Returns the exit code."""
    options = _options(argv)
    import torch

    from milora_vl.models.quiet import hush_deepspeed

    hush_deepspeed()

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
    )
    _show(done, options.format)
    _tell_next(done)
    return 0


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    forms = "\n".join(f"  {name:<10} {what}" for name, what in FORMS.items())
    options = parser("python -m milora_vl.export", f"Write an adapter in another form.\n\nforms:\n{forms}", _EXAMPLES)
    given = options.add_argument_group("input")
    given.add_argument("folder", type=Path, metavar="FOLDER", help="ours, PEFT's, LLaVA's, or on a residual base")
    shared(given, "base", about="the base model, untouched (default: the one that the adapter names)")
    given.add_argument("--residual", type=Path, help="the residual base of a PiSSA/MiLoRA checkpoint")
    given.add_argument("--initial", type=Path, help="its initial factors (pissa_init)")
    settings = options.add_argument_group("settings")
    settings.add_argument("--with_base", action="store_true", help="modules trained in full go into a copy of the base")
    settings.add_argument("--vision_tower", metavar="NAME", help="the CLIP model that LLaVA's config.json shall name")
    settings.add_argument("--allow_base_mismatch", action="store_true", help="go on with another base model")
    out = options.add_argument_group("output")
    out.add_argument("--to", required=True, metavar="FORM", help="adapter, merged, residual, llava, rank-N")
    shared(
        out, "dtype", about="of all that is written (default: as stored)", choices=("float32", "bfloat16", "float16")
    )
    shared(out, "output_dir", about="to write (default: FOLDER-FORM, beside it)")
    shared(out, "format")
    parsed: argparse.Namespace = options.parse_args(argv)
    return parsed


def _beside(folder: Path, to: str) -> Path:
    """FOLDER-FORM; of `.` and `..`, which have no name, beside the folder that they mean."""
    named = folder.resolve() if folder.name in ("", "..") else folder
    return named.with_name(f"{folder.resolve().name}-{to}")


def _form(to: str) -> tuple[str, int | None]:
    """Split rank-64 into its two parts; rank-r keeps the r of each module."""
    kind, _, number = to.partition("-")
    if to == "rank-r":
        return "rank", None
    if kind == "rank" and number.isdecimal() and int(number) > 0:
        return "rank", int(number)
    if to not in FORMS or to == "rank-N":
        near = suggest(to, [form for form in FORMS if form != "rank-N"])
        hint = f"\ndid you mean {near[0]} ?" if near else ""
        raise UserError(f"unknown form {to!r}\nknown:  {', '.join(FORMS)}   (N a number: rank-64){hint}")
    return to, None


def _show(done: Exported, style: str) -> None:
    """The layers and the folder on stdout, what it is on stderr."""
    if style == "json":
        layers = [{"module": path, "rank": rank, "error": error} for path, (rank, error) in done.layers.items()]
        content = {"folder": str(done.folder), "form": done.form, "origin": done.origin, "layers": layers}
        sys.stdout.write(json.dumps({**content, "total": done.total}) + "\n")
        return
    what = "drift" if done.form == "residual" or not done.form.startswith("rank") else "error"
    for path, (rank, error) in done.layers.items():
        sys.stdout.write(f"{path}  rank {rank}  {what} {error:.3e}\n")
    if done.total is not None:
        sys.stdout.write(f"total  error {done.total:.3e}\n")
    sys.stdout.write(f"{done.folder}\n")
    sys.stderr.write(f"{_ORIGINS[done.origin]}, now: {FORMS.get(done.form, 'plain LoRA of lower rank')}\n")
    asked, most = _form(done.form)[1], max((rank for rank, _ in done.layers.values()), default=0)
    if asked is not None and most < asked:
        sys.stderr.write(f"no change has a rank above {most}: {done.form} is the whole of it\n")


def _tell_next(done: Exported) -> None:
    """What to type (or, of the papers' form, to write) to use the folder."""
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
        next_step("milora_vl.chat", "--model", *model, *question)


def _base_name(folder: Path) -> str:
    try:
        return base_of(folder)
    except UserError:  # an adapter of a model without a name
        return "MODEL"


_ORIGINS = {
    "ours": "was: an adapter of ours",
    "plain": "was: a plain PEFT adapter",
    "llava": "was: a LoRA run of LLaVA",
    "residual": "was: an adapter on a residual base",
}
