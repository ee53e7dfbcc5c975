"""One export: read what is needed, write one form. Weights of the base are loaded only where a form needs them."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from milora_data.errors import UserError
from milora_vl.exporting.base import Base, has_timm_tower, save_model, write_code
from milora_vl.exporting.imported import import_adapter, refuse_mutating, require_copies
from milora_vl.exporting.llava import config_for_llava, read_llava, write_llava
from milora_vl.exporting.plain import PlainAdapter, read_config, read_plain, write_plain
from milora_vl.exporting.processor import copy_processor
from milora_vl.exporting.recompress import loss_of, recompress, total_error
from milora_vl.exporting.residual import write_residual
from milora_vl.exporting.source import Source
from milora_vl.lora.base_check import fitted
from milora_vl.lora.sidecar import FILE_NAME, Sidecar
from milora_vl.models import SAME_WEIGHTS

Layers = Mapping[str, tuple[int, float]]
# What a whole model needs to load: transformers alone, this package, or its own code and trust_remote_code=True.
LoadsWith = Literal["transformers", "milora_vl", "trust_remote_code"]


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
    remote_code: bool = False

    def write(self, form: str, rank: int | None, with_base: bool) -> tuple[Layers, float | None, LoadsWith | None]:
        """Write one form.

        Returns what it cost per layer (rank and error) and in total, and what the whole model in it, if any, needs to
        load.
        """
        # A merge or a residual in fewer bits is rounded once, at its end.
        base = Base(self._base_for(form), self.dtype, is_rounded_later=form in ("merged", "residual"))
        whole = self.out / "base" if with_base else self.out if form in ("merged", "residual") else None
        loads_with = None if whole is None else self._loads_with(base)
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
        if whole is not None and loads_with == "trust_remote_code":
            write_code(whole)
        return layers, total, loads_with

    def _loads_with(self, base: Base) -> LoadsWith:
        """What the whole model that is written needs to load. UserError for code that it does not need."""
        if has_timm_tower(base.config):
            return "trust_remote_code" if self.remote_code else "milora_vl"
        if self.remote_code:
            raise UserError(
                f"--remote_code: {base.name} has no vision tower from timm, so it loads in plain transformers\n"
                "leave the flag out"
            )
        return "transformers"

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
        from milora_vl.adapter import merge
        from milora_vl.adapter_io import load_adapter

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
        if adapter.whole:
            sys.stderr.write(
                f"note: {self.target / 'base'} holds what this run trained in full ({len(adapter.whole):,} tensors): "
                "adapters of other runs do not belong on it\n"
            )
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
