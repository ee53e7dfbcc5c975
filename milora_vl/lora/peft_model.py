"""PEFT's own model classes with a mixin in front: adapters in halves are saved, added and loaded as such.

Everything else (forward, merge, generate, set_adapter, ...) is PEFT's.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import peft
import torch
from huggingface_hub import try_to_load_from_cache
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from transformers.integrations import is_deepspeed_zero3_enabled

from milora_vl.initialize import LayerReport
from milora_vl.lora.atomic_write import atomic_folder
from milora_vl.lora.base_check import fitted, require_same_kind
from milora_vl.lora.errors import AdapterError
from milora_vl.lora.install import (
    anchor_names,
    anchors_of,
    has_halves,
    install_copy,
    install_loaded,
    joined_state,
    lora_layer,
    set_dropout,
    trained_factors,
)
from milora_vl.lora.layers import ANCHOR, ANCHOR_SUFFIX, TRAINED
from milora_vl.lora.protection import Protected, find_protected
from milora_vl.lora.sidecar import FILE_NAME, Sidecar, read_sidecar, require_weights
from milora_vl.policy.rules import Target

# From 0.19 on PEFT's add_adapter casts the factors to float32; before, only what loads an adapter does.
_ADDING_CASTS = tuple(map(int, version("peft").split(".")[:2])) >= (0, 19)


class MiloraMixin(PeftModel):
    """What a PeftModel with adapters in halves does differently. `sidecars` holds what is known, by adapter name.

    `protections` has the directions that an adapter stays out of while it trains, by adapter name and module path.
    """

    sidecars: dict[str, Sidecar]
    protections: dict[str, dict[str, Protected]]
    milora_targets: list[Target]
    milora_report: list[LayerReport]
    _loading = False

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
        self._require_halves()
        self._warn_of_overlap()
        if kwargs.get("state_dict") is not None:
            kwargs["state_dict"] = joined_state(self._with_anchors(kwargs["state_dict"]))
        if save_embedding_layers == "auto":
            save_embedding_layers = self._vocabulary_has_grown()
        with atomic_folder(Path(save_directory), is_main_process) as folder:
            super().save_pretrained(
                str(folder), safe_serialization, selected_adapters, save_embedding_layers, is_main_process, **kwargs
            )
            for name in selected_adapters or self.peft_config:
                if is_main_process and name in self.sidecars:
                    place = folder if name == "default" else folder / name
                    (place / FILE_NAME).write_text(self.sidecars[name].to_json(), encoding="utf-8")

    def train(self, mode: bool = True) -> MiloraMixin:
        """Switch to training as PyTorch does. AdapterError if something has put stock factors in the place of ours."""
        if mode:
            self._require_halves()
        return super().train(mode)

    def _require_halves(self) -> None:
        """PEFT's prepare_model_for_compiled_hotswap, for one, pads factors by replacing them: all of it would train."""
        for adapter, sidecar in self.sidecars.items():
            lost = [path for path in sidecar.ranks if not has_halves(lora_layer(self, path), adapter)]
            if lost:
                raise AdapterError(
                    f"{lost[0]}: its two halves were replaced by stock factors ({len(lost):,} modules of {adapter!r})\n"
                    "save before, or load the folder into the base model with stock PEFT, to serve it"
                )

    def protect(self, adapter: str, protected: Mapping[str, Protected]) -> None:
        """Keep the directions that an adapter stays out of, for `keep_protected`; its training fails without that."""
        self.protections[adapter] = dict(protected)
        for path, found in protected.items():
            for factor in trained_factors(lora_layer(self, path), adapter):
                if factor.requires_grad:
                    factor.register_hook(found.require_kept)

    def protect_again(self, adapter: str, cache_dir: str | Path | None = None) -> None:
        """Find the protected directions of an adapter that was loaded to train on, from the base weights."""
        self.protect(adapter, find_protected(self, self.sidecars[adapter].targets, cache_dir=cache_dir))

    def _warn_of_overlap(self) -> None:
        """Tell of adapters that something has moved into directions they should stay out of."""
        for adapter, protected in self.protections.items():
            inside = [
                path
                for path, found in protected.items()
                if found.is_violated_by(trained_factors(lora_layer(self, path), adapter))
            ]
            if inside:
                warnings.warn(
                    f"{inside[0]}: the update reaches into protected directions ({len(inside):,} modules of "
                    f"{adapter!r}): was keep_protected called for the optimizer that trained it?",
                    stacklevel=3,
                )

    def _with_anchors(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The state dict with the anchors it lacks: collected from named_parameters (LLaVA) it has no buffers."""
        halves = {
            name: name.replace(f".{ANCHOR}", f".{TRAINED}").removesuffix(ANCHOR_SUFFIX) for name in anchor_names(self)
        }
        missing = {name for name, trained in halves.items() if trained in state and name not in state}
        return {**state, **{name: buffer for name, buffer in self.named_buffers() if name in missing}}

    def _vocabulary_has_grown(self) -> bool:
        """Whether the embeddings were resized, as far as this machine knows the base's config.

        PEFT asks the hub at every save, which costs half a minute of retries on machines without a network.
        """
        known = _known_config(next(iter(self.peft_config.values())).base_model_name_or_path or "")
        now = BaseTuner.get_model_config(self.get_base_model())
        return "vocab_size" in known and known["vocab_size"] != now.get("vocab_size")

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
        self._refuse_residual("a second adapter would sit on the changed base")
        source = None if self._loading else self._adapter_with(peft_config)
        if _ADDING_CASTS:
            super().add_adapter(adapter_name, peft_config, low_cpu_mem_usage, autocast_adapter_dtype)
        else:
            super().add_adapter(adapter_name, peft_config, low_cpu_mem_usage)
            self.base_model._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)  # type: ignore[operator]
        if source is not None:
            for path in self.sidecars[source].ranks:
                install_copy(lora_layer(self, path), adapter_name, source)
            self.remember(adapter_name, self.sidecars[source])
            if source in self.protections:
                self.protect(adapter_name, self.protections[source])

    def load_adapter(  # type: ignore[override]
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
        sidecar, known = read_sidecar(Path(model_id)), self.sidecars.get(adapter_name)
        if known is not None:
            require_same_kind(Path(model_id), sidecar, known)
        if sidecar is not None:
            require_weights(Path(model_id), sidecar)
            # In the residual form the base weights hold W_p: compare with the sketches made of W.
            skip = allow_base_mismatch or (known is not None and known.form == "residual")
            sidecar = fitted(self, sidecar, allow_base_mismatch=skip)
        with self._loads(adapter_name):
            result = super().load_adapter(model_id, adapter_name, is_trainable, *args, **kwargs)
        if sidecar is not None:
            restore(self, adapter_name, sidecar)
            if is_trainable and known is None:
                self.protect_again(adapter_name)
        return result

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter as PEFT does, and what is known of it."""
        super().delete_adapter(adapter_name)
        self.sidecars.pop(adapter_name, None)
        self.protections.pop(adapter_name, None)

    def disable_adapter(self) -> Any:
        """Run the base model alone, as PEFT does. AdapterError in the residual form, whose base weights are W_p."""
        self._refuse_residual("without its adapter the changed base is not the base model")
        return super().disable_adapter()

    def unload(self) -> Any:
        """Return the base model without the adapter, as PEFT does. AdapterError in the residual form."""
        self._refuse_residual("its base weights are changed; merge_and_unload() or load the base anew")
        return self.base_model.unload()  # type: ignore[operator]

    def remember(self, adapter_name: str, sidecar: Sidecar) -> None:
        """Keep what is known of an adapter; targets and report are those of the first one."""
        self.sidecars[adapter_name] = sidecar
        if next(iter(self.sidecars)) == adapter_name:
            self.milora_targets = list(sidecar.targets)
            self.milora_report = list(sidecar.reports.values())
        # Equal on all ranks and never changed; DDP would broadcast them in every forward.
        self._ddp_params_and_buffers_to_ignore = list(anchor_names(self))

    def _adapter_with(self, config: PeftConfig) -> str | None:
        return next((name for name in self.sidecars if self.peft_config[name] == config), None)

    def _refuse_residual(self, why: str) -> None:
        if any(sidecar.form == "residual" for sidecar in self.sidecars.values()):
            raise AdapterError(f"form residual: {why}\nuse form anchored")

    @contextmanager
    def _loads(self, adapter: str) -> Iterator[None]:
        """While PEFT loads: it calls our add_adapter; and the anchors of a residual form must stay as they are."""
        known = self.sidecars.get(adapter)
        fixed = list(known.ranks) if known is not None and known.form == "residual" else []
        before = {path: [a.clone() for a in anchors_of(lora_layer(self, path), adapter)] for path in fixed}
        self._loading = True
        try:
            yield
        finally:
            self._loading = False
        for path, anchors in before.items():
            after = anchors_of(lora_layer(self, path), adapter)
            if not all(torch.equal(a, b) for a, b in zip(anchors, after, strict=True)):
                raise AdapterError(
                    f"{path}: the saved anchor is not the one taken out of this base (form residual)\n"
                    "use load_adapter(base, path, is_trainable=True) on a fresh base model"
                )


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


_OURS: dict[type[PeftModel], type[MiloraMixin]] = {
    peft.PeftModel: MiloraModel,
    peft.PeftModelForCausalLM: MiloraModelForCausalLM,
    peft.PeftModelForSeq2SeqLM: MiloraModelForSeq2SeqLM,
    peft.PeftModelForSequenceClassification: MiloraModelForSequenceClassification,
    peft.PeftModelForTokenClassification: MiloraModelForTokenClassification,
    peft.PeftModelForQuestionAnswering: MiloraModelForQuestionAnswering,
    peft.PeftModelForFeatureExtraction: MiloraModelForFeatureExtraction,
}


def adopt(model: PeftModel) -> MiloraMixin:
    """Give a stock PeftModel our class, in place."""
    if not isinstance(model, MiloraMixin):
        model.__class__ = _OURS[type(model)]
        assert isinstance(model, MiloraMixin)
        model.sidecars, model.protections = {}, {}
        keep_hooks_apart(model)
    return model


def restore(model: PeftModel, adapter: str, sidecar: Sidecar) -> MiloraMixin:
    """Turn an adapter just loaded as stock LoRA into halves, with the dropout of each module."""
    ours = adopt(model)
    for target in sidecar.targets:
        if target.rank is None:
            continue
        layer = lora_layer(ours, target.path)
        if target.has_anchor and not has_halves(layer, adapter):
            install_loaded(layer, adapter)
        set_dropout(layer, adapter, target.dropout)
    ours.remember(adapter, sidecar)
    return ours


def _known_config(name: str) -> dict[str, Any]:
    """Return config.json of a base model from its folder or the hub's cache; empty where it is in neither."""
    file: Any = Path(name) / "config.json"
    if not file.is_file() and name.count("/") <= 1:
        file = try_to_load_from_cache(name, "config.json") if name else None
    if not isinstance(file, str) and not (isinstance(file, Path) and file.is_file()):
        return {}
    return dict(json.loads(Path(file).read_text(encoding="utf-8")))


_OF_DEEPSPEED = ("pre_bwd_fn", "post_bwd_fn", "applied_pre_backward_ref_cnt", "ds_grads_remaining")


class WholeModule(ModulesToSaveWrapper):
    """The wrapper with DeepSpeed's hooks of its own.

    It answers for the module inside, and DeepSpeed before 0.19.4 asks it whether it has hooks: it then gets none, and
    the first forward ends in `'Linear' object has no attribute 'ds_grads_remaining'`.
    """

    def _hasattr_wrapped(self, name: str, modules: dict[str, nn.Module]) -> bool:
        return name not in _OF_DEEPSPEED and bool(super()._hasattr_wrapped(name, modules))


def keep_hooks_apart(model: PeftModel) -> None:
    """Give the wrappers in a model this class, where DeepSpeed will look at them."""
    if is_deepspeed_zero3_enabled():
        for module in model.modules():
            if type(module) is ModulesToSaveWrapper:
                module.__class__ = WholeModule
