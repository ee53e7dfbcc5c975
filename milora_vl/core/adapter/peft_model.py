"""PEFT's model classes with our mixin: add, load, delete and disable adapters; `save.py` has how they are saved.

Everything else (forward, merge, generate, set_adapter, ...) is PEFT's own code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import peft
from peft import PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from milora_vl.common.compat.peft import keep_hooks_apart, set_variant
from milora_vl.common.compat.torch import change_class, ignore_in_ddp
from milora_vl.core.adapter.anchored import factors, fixed_names, install_copy, install_loaded
from milora_vl.core.adapter.earlier import split_tasks
from milora_vl.core.adapter.fixed_a import Protection, fix_A, has_fixed_A
from milora_vl.core.adapter.initialize import LayerReport
from milora_vl.core.adapter.lora import lora_layer, read_by_peft, set_dropout
from milora_vl.core.adapter.save import SavingMixin
from milora_vl.core.adapter.sidecar import Sidecar, fitted, read_sidecar, require_same_kind, require_trainable
from milora_vl.core.policy.rules import Target


class MiloraMixin(SavingMixin):
    """The methods in which a PeftModel with trained differences and anchors differs from a stock one."""

    milora_targets: list[Target]
    milora_report: list[LayerReport]
    milora_protection: dict[str, Protection]

    def train(self, mode: bool = True) -> MiloraMixin:
        """Set the training mode as PyTorch does. Raises AdapterError if other code has replaced our factors."""
        if mode:
            self._require_own_factors()
        return super().train(mode)

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Add an adapter as PEFT does. The config object of a MiLoRA adapter gives it the same anchor.

        TRL's trainers create their reference adapter this way, `add_adapter("ref", model.peft_config["default"])`, and
        then copy the differences into it.
        """
        # PEFT's load_adapter comes here too, with another config.
        source = next((name for name in self.sidecars if self.peft_config[name] is peft_config), None)
        extra = {} if autocast_adapter_dtype else {"autocast_adapter_dtype": False}  # PEFT has it since 0.19
        super().add_adapter(adapter_name, peft_config, low_cpu_mem_usage, **extra)
        if source is not None:
            for path in self.sidecars[source].ranks:
                install_copy(lora_layer(self, path), adapter_name, source)
            for path in self.sidecars[source].fixed:
                layer = lora_layer(self, path)
                fix_A(layer, adapter_name, factors(layer, source)[0].clone())
            self.remember(adapter_name, self.sidecars[source])

    def load_adapter(  # type: ignore[override]
        self,
        model_id: str,
        adapter_name: str,
        is_trainable: bool = False,
        *args: Any,
        allow_base_mismatch: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Load an adapter as PEFT does, and restore differences and anchors if it has a milora.json.

        Raises AdapterError if an adapter of that name exists and has other modules or ranks, and if this is not the
        base model that the adapter was made for.
        """
        sidecar, existing = read_sidecar(Path(model_id)), self.sidecars.get(adapter_name)
        if sidecar is not None and sidecar.own is not None and self.earlier is not None:
            options = {**kwargs, "allow_base_mismatch": allow_base_mismatch}
            with TemporaryDirectory() as own:
                split_tasks(Path(model_id), self, Path(own), allow_base_mismatch=allow_base_mismatch)
                return self.load_adapter(own, adapter_name, is_trainable, *args, **options)
        require_trainable(Path(model_id), sidecar, is_trainable=is_trainable)
        if existing is not None:
            require_same_kind(Path(model_id), sidecar, existing)
        anchors: Mapping[str, Tensor] = {}
        if sidecar is not None:
            sidecar = fitted(self, sidecar, allow_base_mismatch=allow_base_mismatch)
            anchors = sidecar.read_anchors(Path(model_id))
        with read_by_peft(self.get_base_model(), Path(model_id)):
            result = super().load_adapter(model_id, adapter_name, is_trainable, *args, **kwargs)
            missing = [key for key in result.missing_keys if adapter_name in key.split(".")]
            if missing:
                raise KeyError(missing[0])
        if sidecar is not None:
            restore(self, adapter_name, sidecar, anchors).warn_of_changed_A()
        return result

    def unload(self) -> nn.Module:
        """Return the base model as PEFT does, and with the originals of modules trained in full, which PEFT drops."""
        base = self.get_base_model()
        full = {path: module for path, module in base.named_modules() if isinstance(module, ModulesToSaveWrapper)}
        originals = {path: wrapper.original_module for path, wrapper in full.items()}
        base = self.base_model.unload()  # type: ignore[operator]
        for path, original in originals.items():
            parent, _, name = path.rpartition(".")
            setattr(base.get_submodule(parent), name, original)
        return base  # type: ignore[no-any-return]

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.sidecars.pop(adapter_name, None)
        for module in self.modules():
            if isinstance(module, LoraLayer):
                set_variant(module, adapter_name, None)  # PEFT before 0.19 keeps it

    def remember(self, adapter_name: str, sidecar: Sidecar) -> None:
        self.sidecars[adapter_name] = sidecar
        if next(iter(self.sidecars)) == adapter_name:
            self.milora_targets = list(sidecar.targets)
            self.milora_report = list(sidecar.reports.values())
            self.milora_protection = dict(sidecar.protection)
        # They are equal on all ranks and never change, but DDP would broadcast them in every forward.
        ignore_in_ddp(self, fixed_names(self))


class MiloraModel(MiloraMixin, peft.PeftModel): ...


class MiloraModelForCausalLM(MiloraMixin, peft.PeftModelForCausalLM): ...


class MiloraModelForSeq2SeqLM(MiloraMixin, peft.PeftModelForSeq2SeqLM): ...


class MiloraModelForSequenceClassification(MiloraMixin, peft.PeftModelForSequenceClassification): ...


class MiloraModelForTokenClassification(MiloraMixin, peft.PeftModelForTokenClassification): ...


class MiloraModelForQuestionAnswering(MiloraMixin, peft.PeftModelForQuestionAnswering): ...


class MiloraModelForFeatureExtraction(MiloraMixin, peft.PeftModelForFeatureExtraction): ...


_OURS: dict[type[PeftModel], type[MiloraMixin]] = {kind.__bases__[1]: kind for kind in MiloraMixin.__subclasses__()}


def adopt(model: PeftModel) -> MiloraMixin:
    """Change the class of a stock PeftModel to the matching class above, in place."""
    if isinstance(model, MiloraMixin):
        return model
    ours = change_class(model, _OURS[type(model)])
    ours.sidecars = {}
    keep_hooks_apart(ours)
    return ours


def restore(model: PeftModel, adapter: str, sidecar: Sidecar, anchors: Mapping[str, Tensor]) -> MiloraMixin:
    """Split an adapter that was loaded as a stock LoRA into differences and anchors, fix each A, set the dropout.

    `anchors` has the exact B0 by path, see `Sidecar.read_anchors`.
    """
    ours = adopt(model)
    for target in sidecar.targets:
        if target.rank is None:
            continue
        layer = lora_layer(ours, target.path)
        if target.has_anchor:
            install_loaded(layer, adapter, anchors.get(target.path))
        elif target.has_fixed_A and not has_fixed_A(layer, adapter):
            fix_A(layer, adapter)
        set_dropout(layer, adapter, target.dropout)
    ours.remember(adapter, replace(sidecar, anchors=()))
    return ours
