"""One export: check the request, combine adapters, write one form; its folder appears when it is complete."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch

from milora_vl.common.atomic_write import complete_folder
from milora_vl.common.errors import UserError
from milora_vl.export.base import Base, copy_processor
from milora_vl.export.request import Options, parse_form, require_fitting
from milora_vl.export.write import WRITERS, Job, LoadsWith, write_ours
from milora_vl.interop.adapters.arithmetic import combined, require_linear, require_scale, same_base, scaled
from milora_vl.interop.adapters.plain import read_plain
from milora_vl.interop.adapters.source import Source, find_source
from milora_vl.models.quiet import quiet_bars
from milora_vl.models.recipe_of_run import trained_template


@dataclass(frozen=True, slots=True)
class Exported:
    """The result of an export. `layers`: rank per module, and the error of recompression, or the drift of the residual.

    `total`: relative error of the whole change by recompression, or by rounding to another data type. `loads_with`:
    what is needed to load the full model in the folder (merged, base/); None without one. `exact_rank`: the N
    at which rank-N keeps the whole change. `dtype`, `rounding`: the data type of a merged model, and the largest change
    of a weight by rounding to it.
    """

    folder: Path
    form: str
    origin: str
    layers: Mapping[str, tuple[int, float]] = field(default_factory=dict)
    total: float | None = None
    loads_with: LoadsWith | None = None
    exact_rank: int | None = None
    dtype: str | None = None
    rounding: float | None = None


def export(
    folder: str | Path | Sequence[str | Path], to: str, output_dir: str | Path, options: Options | None = None
) -> Exported:
    """Write the adapter in `folder` to `output_dir` in the form `to`, one of `FORMS`; several folders need weights.

    Raises UserError if folder, form and options do not fit, or if the output folder is not empty.
    """
    options, target = options or Options(), Path(output_dir)
    form, rank = parse_form(to)
    require_fitting(to, options)
    require_scale(options.scale)
    if not isinstance(options.dtype, torch.dtype | None):
        raise UserError(
            f"expected a torch.dtype, got {options.dtype!r}",
            code="flag-value",
            where="dtype",
            hint="for example  Options(dtype=torch.bfloat16)",
        )
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(
            "exists and is not empty; an export overwrites nothing",
            code="output-exists",
            where=str(target),
            hint="use:  --output_dir ANOTHER",
        )
    companions = [None if path is None else Path(path) for path in (options.residual, options.initial)]
    folders = [Path(folder)] if isinstance(folder, str | Path) else [Path(path) for path in folder]
    sources = [find_source(path, *companions) for path in folders]
    _require_weights(sources, options.weights)
    with (
        complete_folder(target.absolute()) as partial,  # "." has no name
        nullcontext() if sys.stderr.isatty() else quiet_bars(),
        tempfile.TemporaryDirectory() as scratch,
    ):
        source = sources[0]
        if options.scale != 1 or options.weights is not None:
            source = _changed(sources, options, Path(scratch))
        written = WRITERS[form](Job(source, options, partial, target, rank, trained_template(folders[0])))
    origin = sources[0].kind if len(sources) == 1 else "combined"
    found = {field.name: getattr(written, field.name) for field in fields(written)}
    return Exported(target, to, origin, **found)


def _require_weights(sources: Sequence[Source], weights: Sequence[float] | None) -> None:
    if weights is not None and len(sources) == 1:
        raise UserError(
            "adds the updates of several adapters, and there is one",
            code="flag-no-effect",
            where="--weights",
            hint=f"to scale its update:  --scale {weights[0]:g}",
        )
    found = len(weights or ())
    if len(sources) > 1 and found != len(sources):
        raise UserError(
            f"{len(sources)} adapters need {len(sources)} weights, found {found}",
            code="flag-required",
            where="--weights",
            hint=f"for example, for the sum of their updates:  --weights {','.join(['1'] * len(sources))}",
        )


def _changed(sources: Sequence[Source], options: Options, folder: Path) -> Source:
    """Write the weighted sum of the adapters' updates to `folder`, as an adapter with milora.json, and return it."""
    for source in sources:
        require_linear(source.folder, "--weights" if len(sources) > 1 else "--scale")
    weights = [options.scale * weight for weight in options.weights or [1.0]]
    jobs = [Job(source, replace(options, dtype=None), folder, folder) for source in sources]
    names = {job.source.folder: str(job.base_for("adapter")) for job in jobs} if options.base is None else {}
    base = Base(same_base(names) if options.base is None else options.base, None)
    if len(jobs) == 1:
        needs_base = sources[0].kind != "ours" or bool(read_plain(sources[0].folder).whole)
        adapter, _ = jobs[0].read(base, needs_base)
        adapter = scaled(adapter, weights[0], base.model if needs_base else None)
    else:
        adapter = combined([job.read(base, needs_base=True)[0] for job in jobs], weights, base.model)
    write_ours(replace(adapter, base=base.name), folder)
    copy_processor(sources[0].folder, folder, base)
    return Source("ours", folder)
