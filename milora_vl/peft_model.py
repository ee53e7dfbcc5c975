"""PEFT's own model classes with a mixin in front: adapters in halves are saved, added and loaded as such.

Everything else (forward, merge, disable_adapter, generate, ...) is PEFT's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
from peft import PeftConfig, PeftModel
from torch import nn

from milora_vl.fingerprint import distance
from milora_vl.initialize import LayerReport
from milora_vl.install import (
    base_layer,
    has_halves,
    install_copy,
    install_loaded,
    joined_state,
    lora_layer,
)
from milora_vl.policy import Target
from milora_vl.sidecar import FILE_NAME, AdapterError, Sidecar, locate, read_sidecar
from milora_vl.towers import find_towers
from milora_vl.weights import read_matrix


class MiloraMixin(PeftModel):
    """What a PeftModel with adapters in halves does differently. `sidecars` holds what is known, by adapter name."""

    sidecars: dict[str, Sidecar]
    milora_targets: list[Target]
    milora_report: list[LayerReport]

    def save_pretrained(
        self,
        save_directory: str,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Save as PEFT does, and milora.json beside it. A gathered `state_dict` with raw names is joined first.

        Raises AdapterError for `path_initial_model_for_weight_conversion`: what is saved needs no conversion.
        """
        if path_initial_model_for_weight_conversion is not None:
            raise AdapterError(
                "path_initial_model_for_weight_conversion is for PiSSA and its kin: this adapter is saved as a plain\n"
                "LoRA for the untouched base model already; leave the argument out"
            )
        if kwargs.get("state_dict") is not None:
            kwargs["state_dict"] = joined_state(kwargs["state_dict"])
        super().save_pretrained(
            save_directory, safe_serialization, selected_adapters, save_embedding_layers, is_main_process, **kwargs
        )
        if is_main_process:
            for name in selected_adapters or list(self.peft_config):
                self._write_sidecar(Path(save_directory), name)

    def _write_sidecar(self, folder: Path, name: str) -> None:
        if name in self.sidecars:
            where = folder if name == "default" else folder / name
            (where / FILE_NAME).write_text(self.sidecars[name].to_json(), encoding="utf-8")

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Add an adapter as PEFT does; with the config of one of ours it gets the same halves and anchor.

        TRL's trainers make their reference adapter so, and copy the trained halves into it.
        """
        source = None if self._loading else self._adapter_with(peft_config)
        super().add_adapter(adapter_name, peft_config, low_cpu_mem_usage, autocast_adapter_dtype)
        if source is not None:
            for path in self.sidecars[source].ranks:
                install_copy(lora_layer(self, path), adapter_name, source)
            self.remember(adapter_name, self.sidecars[source])

    def load_adapter(
        self,
        model_id: str,
        adapter_name: str,
        is_trainable: bool = False,
        *args: Any,
        allow_base_mismatch: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Load as PEFT does; adapters with a milora.json get their halves back, trained half and anchor as saved.

        Into an adapter that exists only one of the same kind and ranks fits. Raises AdapterError otherwise, and when
        this is not the base model that the adapter was made for.
        """
        sidecar = read_sidecar(Path(model_id))
        if adapter_name in self.sidecars:
            _require_same(Path(model_id), sidecar, self.sidecars[adapter_name])
        if sidecar is not None:
            sidecar = fitted(self, sidecar, allow_base_mismatch=allow_base_mismatch)
        self._loading = True
        try:
            result = super().load_adapter(model_id, adapter_name, is_trainable, *args, **kwargs)
        finally:
            self._loading = False
        if sidecar is not None:
            restore(self, adapter_name, sidecar)
        return result

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter as PEFT does, and what is known of it."""
        super().delete_adapter(adapter_name)
        self.sidecars.pop(adapter_name, None)

    def remember(self, adapter_name: str, sidecar: Sidecar) -> None:
        """Keep what is known of an adapter; the report and targets are those of the first one."""
        self.sidecars[adapter_name] = sidecar
        if len(self.sidecars) == 1:
            self.milora_targets = list(sidecar.targets)
            self.milora_report = list(sidecar.reports.values())

    def _adapter_with(self, config: PeftConfig) -> str | None:
        return next((name for name in self.sidecars if self.peft_config[name] == config), None)

    _loading = False


class MiloraModel(MiloraMixin, peft.PeftModel):
    """PeftModel with adapters in halves."""


class MiloraModelForCausalLM(MiloraMixin, peft.PeftModelForCausalLM):
    """PeftModelForCausalLM with adapters in halves."""


class MiloraModelForSeq2SeqLM(MiloraMixin, peft.PeftModelForSeq2SeqLM):
    """PeftModelForSeq2SeqLM with adapters in halves."""


class MiloraModelForSequenceClassification(MiloraMixin, peft.PeftModelForSequenceClassification):
    """PeftModelForSequenceClassification with adapters in halves."""


class MiloraModelForTokenClassification(MiloraMixin, peft.PeftModelForTokenClassification):
    """PeftModelForTokenClassification with adapters in halves."""


class MiloraModelForQuestionAnswering(MiloraMixin, peft.PeftModelForQuestionAnswering):
    """PeftModelForQuestionAnswering with adapters in halves."""


class MiloraModelForFeatureExtraction(MiloraMixin, peft.PeftModelForFeatureExtraction):
    """PeftModelForFeatureExtraction with adapters in halves."""


_CLASSES: dict[type[PeftModel], type[MiloraMixin]] = {cls.__mro__[2]: cls for cls in MiloraMixin.__subclasses__()}


def adopt(model: PeftModel) -> MiloraMixin:
    """Give a stock PeftModel our class, in place."""
    if not isinstance(model, MiloraMixin):
        model.__class__ = _CLASSES[type(model)]
        assert isinstance(model, MiloraMixin)
        model.sidecars = {}
    return model


def restore(model: PeftModel, adapter: str, sidecar: Sidecar) -> MiloraMixin:
    """Turn an adapter just loaded as stock LoRA into halves, with the dropout of each module."""
    ours = adopt(model)
    for target in sidecar.targets:
        if target.rank is None:
            continue
        layer = lora_layer(ours, target.path)
        if target.part is not None and not has_halves(layer, adapter):
            install_loaded(layer, adapter)
        set_dropout(layer, adapter, target.dropout)
    ours.remember(adapter, sidecar)
    return ours


def set_dropout(layer: nn.Module, adapter: str, probability: float) -> None:
    """Set the dropout of one adapter of one layer: PEFT's config has one value for all."""
    dropout = nn.Dropout(probability) if probability > 0 else nn.Identity()
    layer.get_submodule("lora_dropout").update({adapter: dropout})


def fitted(model: nn.Module, sidecar: Sidecar, *, allow_base_mismatch: bool) -> Sidecar:
    """Return the sidecar with the module paths of `model`, after comparing the fingerprint with its weights.

    Raises AdapterError for modules that are missing and, unless allowed, for weights that differ.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    found = locate(sidecar, {find_names(base)[path]: path for path in find_names(base)})
    if not allow_base_mismatch:
        _require_base(base, found)
    return found


def find_names(base: nn.Module) -> dict[str, str]:
    """Return the layout-free name of every module, by path."""
    towers = find_towers(base)
    return {path: towers.canonical(path) for path, _ in base.named_modules() if path}


def _require_base(base: nn.Module, sidecar: Sidecar) -> None:
    apart = {path: distance(s, read_matrix(base_layer(base, path))) for path, s in sidecar.sketches.items()}
    wrong = sorted((path for path in apart if apart[path] > 1), key=lambda path: -apart[path])
    if wrong:
        raise AdapterError(
            f"this is not the base model that the adapter was made for: {len(wrong):,} of {len(apart):,} weights "
            f"differ,\nmost of all {wrong[0]} ({apart[wrong[0]]:.0f} times what rounding explains)\n"
            "load the right base, or pass allow_base_mismatch=True (--allow-base-mismatch)"
        )


def _require_same(folder: Path, found: Sidecar | None, expected: Sidecar) -> None:
    if found is None:
        raise AdapterError(
            f"{folder} has no {FILE_NAME}: a plain LoRA would replace the anchor of this adapter\n"
            "load it under another adapter name, or into the base model"
        )
    by_name = {found.names[path]: rank for path, rank in found.ranks.items()}
    wanted = {expected.names[path]: rank for path, rank in expected.ranks.items()}
    if by_name != wanted:
        differ = sorted(name for name in by_name | wanted if by_name.get(name) != wanted.get(name))
        raise AdapterError(
            f"{folder} does not fit this adapter: {len(differ):,} modules differ,\n"
            f"first {differ[0]}: rank {by_name.get(differ[0])} there, {wanted.get(differ[0])} here"
        )
