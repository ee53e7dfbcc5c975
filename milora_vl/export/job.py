"""One export: read the adapter, write one form, merge into the base (its dtype), name the written files."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from milora_vl.adapter.apply import merge
from milora_vl.adapter.base_check import fitted
from milora_vl.adapter.files import load_adapter, new_paths
from milora_vl.adapter.names import moved
from milora_vl.adapter.sidecar import Sidecar
from milora_vl.base.atomic_write import complete_folder
from milora_vl.base.errors import UserError
from milora_vl.calibration.errors import CalibrationError
from milora_vl.calibration.files import read_inputs, write_inputs
from milora_vl.export.base import Base, copy_processor, has_timm_tower, save_model, write_code
from milora_vl.export.forms import parse_form
from milora_vl.export.gguf.files import OutType
from milora_vl.export.gguf.language import language_of
from milora_vl.export.gguf.lora import write_lora
from milora_vl.export.gguf.model import write_model
from milora_vl.export.gguf.modelfile import modelfile
from milora_vl.export.recompress import loss_of, recompress, total_error
from milora_vl.export.residual import write_residual
from milora_vl.foreign.arithmetic import combined, require_linear, require_scale, same_base, scaled
from milora_vl.foreign.imported import import_adapter, refuse_mutating, require_copies
from milora_vl.foreign.llava import config_for_llava, read_llava, write_llava
from milora_vl.foreign.plain import PlainAdapter, read_config, read_plain, write_plain
from milora_vl.foreign.source import Source, find_source
from milora_vl.models.loading import split_processor
from milora_vl.models.names import SAME_WEIGHTS
from milora_vl.models.quiet import quiet_bars
from milora_vl.recipe.yaml_file import trained_prompts

MODELFILE = "Modelfile"

Layers = Mapping[str, tuple[int, float]]
# What loading a full model needs: only transformers, this package, or its own code with trust_remote_code=True.
LoadsWith = Literal["transformers", "milora_vl", "trust_remote_code"]


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
    folder: str | Path | Sequence[str | Path],
    to: str,
    output_dir: str | Path,
    *,
    scale: float = 1.0,
    weights: Sequence[float] | None = None,
    base: str | Path | nn.Module | None = None,
    dtype: torch.dtype | None = None,
    with_base: bool = False,
    residual: str | Path | None = None,
    initial: str | Path | None = None,
    vision_tower: str | None = None,
    allow_base_mismatch: bool = False,
    remote_code: bool = False,
    outtype: OutType | None = None,
) -> Exported:
    """Write the adapter in `folder` to `output_dir` in the form `to`, one of `FORMS`.

    scale: size of the finished update; modules trained in full become W + scale (W' - W). weights: for several folders,
    one number each; the result is the weighted sum of their updates, times `scale`.
    base: name, folder or HF id of the base model, or a loaded model, which is modified; by default the model that the
    adapter names. dtype: data type of all written tensors; by default as stored. with_base: write fully trained modules
    into a copy of the base model (base/), so that the adapter holds only LoRA factors. residual, initial: the residual
    base and the initial factors of a PiSSA/MiLoRA checkpoint, if the folder does not name them. vision_tower: the CLIP
    model for LLaVA's config.json. remote_code: write the code of a timm vision tower into the folder of the full
    model, which then loads with trust_remote_code=True without this package. outtype: the type of the matrices in GGUF
    files, by default f16, and f32 for gguf-lora.

    Raises UserError if folder and form do not fit, or if the output folder is not empty.
    """
    form, rank = parse_form(to)
    if with_base and form not in ("adapter", "rank", "gguf-lora"):
        message = f"only applies to --to adapter, rank-N and gguf-lora, not to {to}"
        raise UserError(message, code="flag-no-effect", where="--with_base", hint="remove the flag")
    if remote_code and not (with_base or form in ("merged", "residual")):
        message = f"only applies to a full model, which --to {to} does not write"
        raise UserError(message, code="flag-no-effect", where="--remote_code", hint="add:  --with_base")
    is_gguf = form in ("gguf", "gguf-lora")
    for flag, value, applies in (("--outtype", outtype, is_gguf), ("--dtype", dtype, not is_gguf)):
        if value is not None and not applies:
            message = f"does not apply to --to {to}"
            raise UserError(message, code="flag-no-effect", where=flag, hint="remove the flag")
    require_scale(scale)
    target = Path(output_dir)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(
            "exists and is not empty; an export overwrites nothing",
            code="output-exists",
            where=str(target),
            hint="use:  --output_dir ANOTHER",
        )
    companions = [None if path is None else Path(path) for path in (residual, initial)]
    folders = [Path(folder)] if isinstance(folder, str | Path) else [Path(path) for path in folder]
    sources = [find_source(path, *companions) for path in folders]
    _require_weights(sources, weights)
    with (
        complete_folder(target.absolute()) as partial,  # "." has no name
        nullcontext() if sys.stderr.isatty() else quiet_bars(),
        tempfile.TemporaryDirectory() as scratch,
    ):
        source = sources[0]
        if scale != 1 or weights is not None:
            shares = [scale * weight for weight in weights or [1.0]]
            source = _changed(sources, shares, base, Path(scratch), allow_base_mismatch=allow_base_mismatch)
        job = Job(
            source, base, dtype, partial, target, vision_tower, allow_base_mismatch, remote_code,
            outtype or ("f32" if form == "gguf-lora" else "f16"), trained_prompts(folders[0])[0],
        )  # fmt: skip
        layers, total, loads_with = job.write(form, rank, with_base)
    origin = sources[0].kind if len(sources) == 1 else "combined"
    return Exported(target, to, origin, layers, total, loads_with)


def _require_weights(sources: Sequence[Source], weights: Sequence[float] | None) -> None:
    if weights is None and len(sources) > 1:
        raise UserError(
            f"{len(sources)} adapters need {len(sources)} weights",
            code="flag-required",
            where="--weights",
            hint=f"add, for the sum of their updates:  --weights {','.join(['1'] * len(sources))}",
        )
    if weights is not None and len(sources) != len(weights):
        found = f"{len(weights)} for {len(sources)} adapters"
        raise UserError(
            f"expected one weight per adapter, found {found}",
            code="flag-value",
            where="--weights",
            hint="for example  --weights 0.5,0.5  for two adapters",
        )
    if weights is not None and len(sources) == 1:
        raise UserError(
            "adds the updates of several adapters, and there is one",
            code="flag-no-effect",
            where="--weights",
            hint=f"to scale its update:  --scale {weights[0]:g}",
        )


def _changed(
    sources: Sequence[Source],
    weights: Sequence[float],
    given_base: str | Path | nn.Module | None,
    folder: Path,
    *,
    allow_base_mismatch: bool,
) -> Source:
    """Write the weighted sum of the adapters' updates to `folder`, as an adapter with milora.json, and return it."""
    for source in sources:
        require_linear(source.folder, "--weights" if len(sources) > 1 else "--scale")
    jobs = [Job(source, given_base, None, folder, folder, None, allow_base_mismatch) for source in sources]
    names = {job.source.folder: str(job.base_for("adapter")) for job in jobs} if given_base is None else {}
    base = Base(same_base(names) if given_base is None else given_base, None)
    if len(jobs) == 1:
        needs_base = sources[0].kind != "ours" or bool(read_plain(sources[0].folder).whole)
        adapter, _ = jobs[0].read(base, needs_base)
        adapter = scaled(adapter, weights[0], base.model if needs_base else None)
    else:
        adapter = combined([job.read(base, needs_base=True)[0] for job in jobs], weights, base.model)
    write_plain(adapter, folder)
    assert adapter.sidecar is not None
    adapter.sidecar.write(folder, adapter.anchors)
    _copy_inputs(adapter.sidecar, sources[0].folder, folder)
    copy_processor(sources[0].folder, folder, base)
    return Source("ours", folder)


@dataclass(frozen=True, slots=True)
class Job:
    """The arguments of `export`. `out` is the folder to write, `target` its final path."""

    source: Source
    given_base: str | Path | nn.Module | None
    dtype: torch.dtype | None
    out: Path
    target: Path
    vision_tower: str | None
    allow_base_mismatch: bool
    remote_code: bool = False
    outtype: OutType = "f16"
    template: str = "vicuna_v1"

    def write(self, form: str, rank: int | None, with_base: bool) -> tuple[Layers, float | None, LoadsWith | None]:
        """Write one form.

        Return (rank, error) per layer, the total error, and what the full model in the folder needs to load (or None).
        """
        # A merged or residual model in half precision is rounded once, at the end.
        base = Base(self.base_for(form), self.dtype, is_rounded_later=form in ("merged", "residual"))
        if form in ("gguf", "gguf-lora"):
            self._write_gguf(base, form, with_base)
            return {}, None, None
        model_folder = self.out / "base" if with_base else self.out if form in ("merged", "residual") else None
        loads_with = None if model_folder is None else self._loads_with(base)
        layers: Layers = {}
        total = None
        if form == "merged":
            self._write_merged(base)
        elif form == "llava":
            self._write_llava(base)
        elif form == "residual":
            adapter, _ = self.read(base, needs_base=True)
            drift = write_residual(adapter, base.model, self.out, str(self.target), self.dtype)
            layers = {path: (adapter.factors[path].rank // 2, value) for path, value in drift.items()}
        else:
            layers, total = self._write_adapter(base, form, rank, with_base)
        copy_processor(self.source.folder, self.out, base)
        if model_folder is not None and loads_with == "trust_remote_code":
            write_code(model_folder)
        return layers, total, loads_with

    def _loads_with(self, base: Base) -> LoadsWith:
        """Return what the written model needs to load. Raises UserError if `--remote_code` is set without need."""
        if has_timm_tower(base.config):
            return "trust_remote_code" if self.remote_code else "milora_vl"
        if self.remote_code:
            raise UserError(
                f"{base.name} has no vision tower from timm, so it loads in plain transformers",
                code="flag-no-effect",
                where="--remote_code",
                hint="remove the flag",
            )
        return "transformers"

    def _write_llava(self, base: Base) -> None:
        if self.source.kind == "llava":
            adapter = read_llava(self.source.folder)
            config = json.loads((self.source.folder / "config.json").read_text(encoding="utf-8"))
        else:
            adapter, _ = self.read(base, needs_base=False)
            config = config_for_llava(base.config, self.vision_tower)
        write_llava(adapter, self.out, config, self.dtype)

    def _write_adapter(self, base: Base, form: str, rank: int | None, with_base: bool) -> tuple[Layers, float | None]:
        needs_base = with_base or (form == "adapter" and self.source.kind != "ours")
        adapter, drift = self.read(base, needs_base)
        layers = {path: (adapter.factors[path].rank // 2, value) for path, value in drift.items()}
        total = None
        if form == "rank":
            adapter, losses = recompress(adapter, rank, self.dtype)
            layers = {path: (loss.rank, loss.error) for path, loss in losses.items()}
            total = total_error(losses)
        elif self.dtype is not None:
            total = total_error({path: loss_of(low, low.cast(self.dtype)) for path, low in adapter.factors.items()})
        if with_base:
            adapter = self._into_base(adapter, base)
        write_plain(adapter.cast(self.dtype), self.out, uniform=form == "rank")
        if adapter.sidecar is not None:
            adapter.sidecar.write(self.out, {} if self.dtype is not None else adapter.anchors)
            _copy_inputs(adapter.sidecar, self.source.folder, self.out)
        return layers, total

    def base_for(self, form: str) -> str | Path | nn.Module | None:
        """Return the base model of the arguments, or the model that the adapter names.

        An adapter on a residual base names only that; it is enough to merge. Raises UserError for other forms.
        """
        if self.given_base is not None:
            return self.given_base
        if self.source.kind == "residual":
            if form == "merged" and self.source.residual is not None:
                return self.source.residual
            raise UserError(
                "the base model of the residual is unknown; an adapter for the unchanged base model needs it",
                code="adapter-no-base-name",
                where="--base",
                hint="add:  --base NAME-OR-FOLDER   (not needed for --to merged)",
            )
        named = read_config(self.source.folder, any_lora=True).base_model_name_or_path
        return SAME_WEIGHTS.get(str(named), named)

    def read(self, base: Base, needs_base: bool) -> tuple[PlainAdapter, Mapping[str, float]]:
        """Return the adapter for the unchanged base model and the drift per layer.

        Module paths are those in `base` if it is an argument or its weights load.
        """
        is_foreign = self.source.kind in ("llava", "residual") or (self.source.kind == "plain" and needs_base)
        if is_foreign:
            imported = import_adapter(self.source, base.model, base.name)
            return imported.adapter, imported.drift
        if self.source.kind == "plain":
            refuse_mutating(self.source.folder)
        adapter = read_plain(self.source.folder)
        if adapter.copies:
            require_copies(adapter, base.model)
        if self.given_base is not None:
            adapter = replace(adapter, base=base.name)
        if needs_base and adapter.sidecar is not None:
            sidecar = fitted(base.model, adapter.sidecar, allow_base_mismatch=self.allow_base_mismatch)
            path_of = new_paths(adapter.sidecar, sidecar)
            adapter = replace(adapter.moved(lambda path: moved(path, path_of)), sidecar=sidecar)
        return adapter, {}

    def _write_gguf(self, base: Base, form: str, with_base: bool) -> None:
        adapter_file = None
        if form == "gguf":
            files = write_model(self._merged(base), self._processor(base), self.out, "model", self.outtype)
        else:
            adapter, _ = self.read(base, needs_base=with_base)
            files = []
            if with_base:
                _write_into(adapter, base)
                files = write_model(base.model, self._processor(base), self.out, "base", "f16")
                adapter = replace(adapter, whole={})
            adapter_file = f"adapter-{self.outtype}.gguf"
            is_text = "vision_config" not in base.config.to_dict()
            write_lora(self.out / adapter_file, adapter, language_of(base.config), is_text, self.outtype)
        if files:
            (self.out / MODELFILE).write_text(modelfile(files, self.template, adapter_file), encoding="utf-8")

    def _processor(self, base: Base) -> Any:
        """Return the base model's processor, with the chat template of the training if the run folder has one."""
        processor, template = base.processor(), self.source.folder / "chat_template.jinja"
        if processor is not None and template.is_file():
            split_processor(processor)[0].chat_template = template.read_text(encoding="utf-8")
        return processor

    def _write_merged(self, base: Base) -> None:
        save_model(self._merged(base), self.out, self.dtype)

    def _merged(self, base: Base) -> nn.Module:
        """Return the base model with the adapter merged, in the data type of the base or the requested one."""
        with tempfile.TemporaryDirectory() as temporary:
            folder = self.source.folder
            on_residual = self.source.kind == "residual" and self.given_base is None
            if self.source.kind in ("llava", "residual") and not on_residual:
                folder = Path(temporary)
                adapter = import_adapter(self.source, base.model, base.name).adapter
                write_plain(adapter, folder)
                assert adapter.sidecar is not None
                adapter.sidecar.write(folder, adapter.anchors)
            dtypes = {name: p.dtype for name, p in base.model.named_parameters()}
            tuned = load_adapter(base.model, folder, allow_base_mismatch=self.allow_base_mismatch)
            try:
                merged = merge(tuned)
            except (NotImplementedError, RuntimeError, ValueError) as error:
                raise UserError(
                    f"PEFT cannot merge the adapter: {error}",
                    code="adapter-not-mergeable",
                    where=str(self.source.folder),
                    hint="use --to adapter, or --to rank-r, which need no merge",
                ) from None
        for name, parameter in merged.named_parameters():
            parameter.data = parameter.data.to(self.dtype or dtypes.get(name, parameter.dtype))
        return merged

    def _into_base(self, adapter: PlainAdapter, base: Base) -> PlainAdapter:
        """Write a copy of the base model with the fully trained modules; return the adapter without them."""
        if adapter.whole:
            sys.stderr.write(
                f"note: {self.target / 'base'} contains the fully trained modules of this run "
                f"({len(adapter.whole):,} tensors); do not use it with adapters of other runs\n"
            )
        _write_into(adapter, base)
        save_model(base.model, self.out / "base", self.dtype)
        copy_processor(self.source.folder, self.out / "base", base)
        sidecar = adapter.sidecar
        if sidecar is not None:
            sidecar = replace(sidecar, targets=[t for t in sidecar.targets if t.method != "full"])
        return replace(adapter, whole={}, base=str(self.target / "base"), sidecar=sidecar)


def _copy_inputs(sidecar: Sidecar, source: Path, target: Path) -> None:
    """Copy the protected inputs of an adapter, which a continued training needs, or note that they are missing."""
    if sidecar.inputs is None:
        return
    try:
        inputs = read_inputs(source, sidecar.inputs, sidecar.names)
    except CalibrationError as error:
        sys.stderr.write(f"note: training cannot continue from this export: {error}\n")
        return
    write_inputs(target, inputs, sidecar.names)


def _write_into(adapter: PlainAdapter, base: Base) -> None:
    """Write the modules trained in full into the loaded base model. Raises UserError if it has not all of them."""
    _, unknown = base.model.load_state_dict(dict(adapter.whole), strict=False)
    if unknown:
        raise UserError(
            f"the base model has no {unknown[0]}, which the adapter trained",
            code="adapter-wrong-base",
            where="--base",
            hint="name the base model of the adapter:  --base NAME-OR-FOLDER",
        )
