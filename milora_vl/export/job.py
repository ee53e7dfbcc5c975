"""One export: read what is needed, write one form. Weights of the base are loaded only where a form needs them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from milora_data.errors import UserError
from milora_vl.adapter import merge
from milora_vl.adapter_io import load_adapter
from milora_vl.adapters.imported import import_adapter, refuse_mutating, require_copies
from milora_vl.adapters.llava import config_for_llava, read_llava, write_llava
from milora_vl.adapters.plain import PlainAdapter, read_config, read_plain, write_plain
from milora_vl.adapters.source import Source
from milora_vl.export.base import Base, copy_processor, save_model
from milora_vl.export.recompress import loss_of, recompress, total_error
from milora_vl.export.residual import write_residual
from milora_vl.lora.base_check import fitted
from milora_vl.lora.sidecar import FILE_NAME, Sidecar
from milora_vl.models.names import SAME_WEIGHTS

Layers = Mapping[str, tuple[int, float]]


@dataclass(frozen=True, slots=True)
class Job:
    """What `milora_vl.export.export` was asked for. `out` is written to, `target` is where it will be."""

    source: Source
    given_base: str | Path | nn.Module | None
    dtype: torch.dtype | None
    out: Path
    target: Path
    vision_tower: str | None
    allow_base_mismatch: bool

    def write(self, form: str, rank: int | None, with_base: bool) -> tuple[Layers, float | None]:
        """Write one form; return what it cost per layer (rank and error), and in total."""
        # A merge or a residual in fewer bits is rounded once, at its end.
        base = Base(self._base_for(form), self.dtype, is_rounded_later=form in ("merged", "residual"))
        layers: Layers = {}
        total = None
        if form == "merged":
            self._write_merged(base)
        elif form == "llava":
            self._write_llava(base)
        elif form == "residual":
            adapter, _ = self._read(base, needs_base=True)
            drift = write_residual(adapter, base.model, self.out, str(self.target), self.dtype)
            layers = {path: (adapter.factors[path].rank // 2, value) for path, value in drift.items()}
        else:
            layers, total = self._write_adapter(base, form, rank, with_base)
        copy_processor(self.source.folder, self.out, base)
        return layers, total

    def _write_llava(self, base: Base) -> None:
        if self.source.kind == "llava":
            adapter = read_llava(self.source.folder)
            config = json.loads((self.source.folder / "config.json").read_text(encoding="utf-8"))
        else:
            adapter, _ = self._read(base, needs_base=False)
            config = config_for_llava(base.config, self.vision_tower)
        write_llava(adapter, self.out, config, self.dtype)

    def _write_adapter(self, base: Base, form: str, rank: int | None, with_base: bool) -> tuple[Layers, float | None]:
        needs_base = with_base or (form == "adapter" and self.source.kind != "ours")
        adapter, drift = self._read(base, needs_base)
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
            (self.out / FILE_NAME).write_text(adapter.sidecar.to_json(), encoding="utf-8")
        return layers, total

    def _base_for(self, form: str) -> str | Path | nn.Module | None:
        """The base that was given, or the one that the adapter names; of a residual one only to merge with it."""
        if self.given_base is not None:
            return self.given_base
        if self.source.kind == "residual":
            if form == "merged" and self.source.residual is not None:
                return self.source.residual
            raise UserError(
                "which base model was the residual made of? an adapter for the untouched base has to know it\n"
                "say:  --base NAME-OR-FOLDER   (not needed for --to merged)"
            )
        named = read_config(self.source.folder, any_lora=True).base_model_name_or_path
        return SAME_WEIGHTS.get(str(named), named)

    def _read(self, base: Base, needs_base: bool) -> tuple[PlainAdapter, Mapping[str, float]]:
        """The adapter for the untouched base, with the paths of `base` where that is loaded or was given."""
        is_foreign = self.source.kind in ("llava", "residual") or (self.source.kind == "plain" and needs_base)
        if is_foreign:
            made = import_adapter(self.source, base.model, base.name)
            return made.adapter, made.drift
        if self.source.kind == "plain":
            refuse_mutating(self.source.folder)
        adapter = read_plain(self.source.folder)
        if adapter.copies:
            require_copies(adapter, base.model)
        if self.given_base is not None:
            adapter = replace(adapter, base=base.name)
        if needs_base and adapter.sidecar is not None:
            sidecar = fitted(base.model, adapter.sidecar, allow_base_mismatch=self.allow_base_mismatch)
            adapter = _moved(adapter, adapter.sidecar, sidecar)
        return adapter, {}

    def _write_merged(self, base: Base) -> None:

        with tempfile.TemporaryDirectory() as temporary:
            folder = self.source.folder
            on_residual = self.source.kind == "residual" and self.given_base is None
            if self.source.kind in ("llava", "residual") and not on_residual:
                folder = Path(temporary)
                adapter = import_adapter(self.source, base.model, base.name).adapter
                write_plain(adapter, folder)
                assert adapter.sidecar is not None
                (folder / FILE_NAME).write_text(adapter.sidecar.to_json(), encoding="utf-8")
            dtypes = {name: p.dtype for name, p in base.model.named_parameters()}
            tuned = load_adapter(base.model, folder, allow_base_mismatch=self.allow_base_mismatch)
            try:
                merged = merge(tuned)
            except (NotImplementedError, RuntimeError, ValueError) as error:
                raise UserError(f"PEFT cannot merge the adapter in {self.source.folder}\n{error}") from None
        for name, parameter in merged.named_parameters():
            parameter.data = parameter.data.to(self.dtype or dtypes.get(name, parameter.dtype))
        save_model(merged, self.out, self.dtype)

    def _into_base(self, adapter: PlainAdapter, base: Base) -> PlainAdapter:
        """Write the base with the modules trained in full in it; return the adapter without them, on that base."""
        _, unknown = base.model.load_state_dict(dict(adapter.whole), strict=False)
        if unknown:
            raise UserError(f"the base model has no {unknown[0]}\nis it the right one?  --base NAME-OR-FOLDER")
        save_model(base.model, self.out / "base", self.dtype)
        copy_processor(self.source.folder, self.out / "base", base)
        sidecar = adapter.sidecar
        if sidecar is not None:
            sidecar = replace(sidecar, targets=[t for t in sidecar.targets if t.method != "full"])
        return replace(adapter, whole={}, base=str(self.target / "base"), sidecar=sidecar)


def _moved(adapter: PlainAdapter, before: Sidecar, after: Sidecar) -> PlainAdapter:
    """The adapter with the paths that a model has for the same modules."""
    path_of = {old.path: new.path for old, new in zip(before.targets, after.targets, strict=True)}
    factors = {path_of.get(path, path): low for path, low in adapter.factors.items()}
    whole = {}
    for name, tensor in adapter.whole.items():
        module, _, leaf = name.rpartition(".")
        whole[f"{_renamed(module, path_of)}.{leaf}"] = tensor
    return replace(adapter, factors=factors, whole=whole, sidecar=after)


def _renamed(module: str, path_of: Mapping[str, str]) -> str:
    holder = next((old for old in path_of if module == old or module.startswith(f"{old}.")), None)
    return module if holder is None else path_of[holder] + module.removeprefix(holder)
