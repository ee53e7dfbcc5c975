"""`export`: read an adapter of any origin and write one form of it; its folder appears when it is complete."""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from milora_data.encode.templates import OWN, TRAINED_WITH
from milora_vl.common.atomic_write import complete_folder
from milora_vl.common.compat.transformers import quiet_bars
from milora_vl.common.errors import UserError
from milora_vl.core.adapter.apply import merge
from milora_vl.core.adapter.folders import from_there, moved
from milora_vl.core.adapter.load import load_adapter
from milora_vl.core.adapter.sidecar import fitted, locate, new_paths, read_sidecar
from milora_vl.core.policy.towers import canonical_names
from milora_vl.export.base_model import ExportBase, copy_processor, has_timm_tower, save_model
from milora_vl.export.choose_scale import measure_scales
from milora_vl.export.request import Options, parse_form
from milora_vl.interop.imported import (
    AdapterKind,
    import_adapter,
    kind_of,
    names_residual_base,
    require_copies,
    require_unchanged_base,
)
from milora_vl.interop.llava_layout import config_for_llava, read_llava, write_llava
from milora_vl.interop.lora_folder import LowRank, PlainAdapter, read_config, read_plain, write_ours, write_plain
from milora_vl.interop.scale import require_linear, require_scale, scaled
from milora_vl.models.names import SAME_WEIGHTS
from milora_vl.models.prompts import trained_template

# What loading a full model needs.
LoadsWith = Literal["transformers", "milora_vl"]


@dataclass(frozen=True, slots=True)
class Exported:
    """The result of an export. `template`: the prompt format of the training. `layers`: rank and error per module.

    `total`: relative error of the whole change by recompression, or by rounding to another data type. `loads_with`:
    what is needed to load a merged model; None for an adapter. `exact_rank`: the N at which rank-N keeps the whole
    change. `dtype`: the data type of a merged model. `scales`: the content of scales.json, if the scale was `auto`.
    """

    folder: Path
    form: str
    origin: AdapterKind
    template: str
    layers: Mapping[str, tuple[int, float]] = field(default_factory=dict)
    total: float | None = None
    loads_with: LoadsWith | None = None
    exact_rank: int | None = None
    dtype: str | None = None
    scales: Mapping[str, Any] | None = None


def export(folder: str | Path, to: str, output_dir: str | Path, options: Options | None = None) -> Exported:
    """Write the adapter in `folder` to `output_dir` in the form `to`, one of `FORMS`.

    Raises UserError if folder, form and options do not fit, or if the output folder is not empty.
    """
    options, source, target = options or Options(), Path(folder), Path(output_dir)
    form, rank = parse_form(to)
    if options.scale != "auto":
        require_scale(options.scale)
    if not isinstance(options.dtype, torch.dtype | None):
        hint = "for example  Options(dtype=torch.bfloat16)"
        raise UserError(f"expected a torch.dtype, got {options.dtype!r}", where="dtype", hint=hint)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        message, hint = "exists and is not empty; an export overwrites nothing", "use:  --output_dir ANOTHER"
        raise UserError(message, code="output-exists", where=str(target), hint=hint)
    kind = kind_of(source)
    with (
        complete_folder(target.absolute()) as partial,  # "." has no name
        nullcontext() if sys.stderr.isatty() else quiet_bars(),
        tempfile.TemporaryDirectory() as scratch,
    ):
        job = ExportJob(source, kind, options, partial, Exported(target, to, kind, trained_template(source)), rank)
        scale = options.scale
        if scale == "auto":
            curve = measure_scales(source, ExportBase(job.base, None).name, options)
            scale, job = float(curve["chosen"]), replace(job, result=replace(job.result, scales=curve))
        if scale != 1:
            _write_scaled(job, scale, Path(scratch))
            job = replace(job, folder=Path(scratch), kind="ours")
        return WRITERS[form](job)


@dataclass(frozen=True, slots=True)
class ExportJob:
    """One adapter to write. `out` is the folder to write, `result.folder` its final path, `rank` the N of rank-N."""

    folder: Path
    kind: AdapterKind
    options: Options
    out: Path
    result: Exported
    rank: int | None = None

    @property
    def base(self) -> str | Path | None:
        if self.options.base is not None:
            return self.options.base
        named = read_config(self.folder, any_lora=True).base_model_name_or_path
        return from_there(self.folder, SAME_WEIGHTS.get(str(named), str(named))) if named else None

    def read(self, base: ExportBase, needs_base: bool) -> PlainAdapter:
        """Return the adapter for the unchanged base model.

        Module paths are those in `base` if it is an argument or its weights load.
        """
        if self.kind == "llava" or (self.kind == "plain" and needs_base):
            return import_adapter(self.folder, base.model, base.name)
        if self.kind == "plain":
            require_unchanged_base(self.folder, base.name)
        adapter = read_plain(self.folder)
        if adapter.copies:
            require_copies(adapter, base.model)
        if self.options.base is not None:
            adapter = replace(adapter, base=base.name)
        if needs_base and adapter.sidecar is not None:
            sidecar = fitted(base.model, adapter.sidecar, allow_base_mismatch=self.options.allow_base_mismatch)
            path_of = new_paths(adapter.sidecar, sidecar)
            adapter = replace(adapter.moved(lambda path: moved(path, path_of)), sidecar=sidecar)
        return adapter

    def merged(self, base: ExportBase) -> nn.Module:
        """Return the base model with the adapter merged.

        Each layer is merged in float32, and its weight rounded to the data type of the base or the requested one.
        """
        with tempfile.TemporaryDirectory() as temporary:
            folder = self.folder
            if self.kind == "llava":
                folder = Path(temporary)
                write_ours(import_adapter(self.folder, base.model, base.name), folder)
            elif names_residual_base(folder):
                require_unchanged_base(folder, base.name)
            dtypes = {name: p.dtype for name, p in base.model.named_parameters()}
            for path in _trained_in_full(base.model, folder):
                base.model.get_submodule(path).float()
            tuned = load_adapter(base.model, folder, allow_base_mismatch=self.options.allow_base_mismatch)
            try:
                for layer in [module for module in tuned.modules() if isinstance(module, LoraLayer)]:
                    weight = getattr(layer.get_base_layer(), "weight", None)
                    if isinstance(weight, nn.Parameter) and weight.is_floating_point():  # bitsandbytes has its own way
                        dtype, weight.data = self.options.dtype or weight.dtype, weight.data.float()
                        layer.merge()
                        weight.data = weight.data.to(dtype)
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "All adapters are already merged")  # layer by layer, above
                    merged = merge(tuned)
            except (NotImplementedError, RuntimeError, ValueError) as error:
                message, hint = f"PEFT cannot merge the adapter: {error}", "--to adapter and --to rank-r need no merge"
                raise UserError(message, where=str(self.folder), hint=hint) from None
        for name, parameter in merged.named_parameters():
            parameter.data = parameter.data.to(self.options.dtype or dtypes.get(name, parameter.dtype))
        return merged


def _write_scaled(job: ExportJob, scale: float, folder: Path) -> None:
    require_linear(job.folder)
    base = ExportBase(job.base, None)
    needs_base = job.kind != "ours" or bool(read_plain(job.folder).whole)
    adapter = scaled(job.read(base, needs_base), scale, base.model if needs_base else None)
    write_ours(replace(adapter, base=base.name), folder)
    copy_processor(job.folder, folder, base)


def write_merged(job: ExportJob) -> Exported:
    base = ExportBase(job.base, job.options.dtype, is_rounded_later=True)
    model = job.merged(base)
    save_model(model, job.out, job.options.dtype)
    copy_processor(job.folder, job.out, base)
    written = job.out / "chat_template.jinja"
    if job.result.template == OWN and written.is_file():
        written.write_text(TRAINED_WITH + written.read_text(encoding="utf-8"), encoding="utf-8")
    loads_with: LoadsWith = "milora_vl" if has_timm_tower(base.config) else "transformers"
    dtypes = {str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()}
    return replace(job.result, loads_with=loads_with, dtype=", ".join(sorted(dtypes)))


def write_llava_form(job: ExportJob) -> Exported:
    base = ExportBase(job.base, job.options.dtype)
    if job.kind == "llava":
        adapter = read_llava(job.folder)
        config = json.loads((job.folder / "config.json").read_text(encoding="utf-8"))
    else:
        adapter = job.read(base, needs_base=False)
        config = config_for_llava(base.config, job.options.vision_tower)
    write_llava(adapter, job.out, config, job.options.dtype)
    copy_processor(job.folder, job.out, base)
    return job.result


def write_adapter(job: ExportJob) -> Exported:
    base, dtype = ExportBase(job.base, job.options.dtype), job.options.dtype
    adapter = job.read(base, needs_base=job.kind != "ours")
    total = None
    if dtype is not None:
        total = total_error({path: loss_of(low, low.cast(dtype)) for path, low in adapter.factors.items()})
    write_ours(adapter.cast(dtype), job.out)
    copy_processor(job.folder, job.out, base)
    return replace(job.result, total=total)


def write_rank(job: ExportJob) -> Exported:
    base = ExportBase(job.base, job.options.dtype)
    adapter = job.read(base, needs_base=False)
    exact = max((low.rank for low in adapter.factors.values()), default=None)
    adapter, losses = recompress(adapter, job.rank, job.options.dtype)
    write_plain(adapter.cast(job.options.dtype), job.out, uniform=True)
    copy_processor(job.folder, job.out, base)
    layers = {path: (loss.rank, loss.error) for path, loss in losses.items()}
    return replace(job.result, layers=layers, total=total_error(losses), exact_rank=exact)


WRITERS: dict[str, Callable[[ExportJob], Exported]] = {
    "adapter": write_adapter,
    "merged": write_merged,
    "llava": write_llava_form,
    "rank": write_rank,
}


def _trained_in_full(model: nn.Module, folder: Path) -> list[str]:
    """Return the paths in `model` of the modules that the adapter in `folder` has trained in full."""
    sidecar = read_sidecar(folder)
    if sidecar is not None:
        return [target.path for target in locate(sidecar, canonical_names(model)).targets if target.rank is None]
    names = tuple(read_config(folder, any_lora=True).modules_to_save or ())
    return [path for path, _ in model.named_modules() if names and path.endswith(names)]


@dataclass(frozen=True, slots=True)
class Loss:
    """The error of recompression: squared norms of the change and of the lost part, and the rank kept."""

    rank: int
    total: float
    lost: float

    @property
    def error(self) -> float:
        return (self.lost / self.total) ** 0.5 if self.total > 0 else 0.0


def recompress(
    adapter: PlainAdapter, rank: int | None, dtype: torch.dtype | None = None
) -> tuple[PlainAdapter, dict[str, Loss]]:
    """Return the adapter with factors of `rank`, and the loss per module.

    None means the r of each module: its rule's rank, else half the rank of its joined factors. Modules of lower rank
    keep their rank. The loss includes the rounding of the stored factors to `dtype`.
    """
    targets = adapter.sidecar.targets if adapter.sidecar is not None else ()
    own = {target.path: target.rank for target in targets}
    factors, losses = {}, {}
    for path, low in adapter.factors.items():
        small = _truncate(low, rank or own.get(path) or max(1, low.rank // 2))
        factors[path] = small if dtype is None else small.cast(dtype)
        losses[path] = loss_of(low, factors[path])
    return replace(adapter, factors=factors, sidecar=None), losses


def loss_of(low: LowRank, stored: LowRank) -> Loss:
    """Return the loss of `stored` relative to the change of `low`, by QR without a full-size matrix."""
    (A, B), (A1, B1) = ([t.double() for t in factors.matrices()] for factors in (low, stored))
    return Loss(stored.rank, _square(B, A), _square(torch.cat([B, -B1], dim=1), torch.cat([A, A1])))


def _square(B: Tensor, A: Tensor) -> float:
    R_B, R_A = torch.linalg.qr(B).R, torch.linalg.qr(A.T).R
    return float((R_B @ R_A.T).square().sum())


def total_error(losses: dict[str, Loss]) -> float:
    """Return the relative error of the whole adapter, as if all changes were blocks of one matrix."""
    return Loss(0, sum(loss.total for loss in losses.values()), sum(loss.lost for loss in losses.values())).error


def _truncate(low: LowRank, rank: int) -> LowRank:
    A, B = (t.double() for t in low.matrices())
    Q_B, R_B = torch.linalg.qr(B)
    Q_A, R_A = torch.linalg.qr(A.T)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.T)
    kept = min(rank, S.numel())
    root = S[:kept].sqrt()
    new_A, new_B = root[:, None] * (Vh[:kept] @ Q_A.T), (Q_B @ U[:, :kept]) * root
    return low.replaced(_like(new_A, low.A), _like(new_B, low.B), 1.0)


def _like(tensor: Tensor, stored: Tensor) -> Tensor:
    return tensor.to(stored.dtype).contiguous()
