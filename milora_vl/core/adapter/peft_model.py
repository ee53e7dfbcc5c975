"""PEFT's model classes with our mixin: save, add, load, delete and disable adapters; state dicts.

Everything else (forward, merge, generate, set_adapter, ...) is PEFT's own code.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import peft
from huggingface_hub import try_to_load_from_cache
from peft import PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from milora_vl.common.atomic_write import atomic_folder
from milora_vl.common.compat.peft import keep_hooks_apart, set_variant
from milora_vl.common.compat.torch import change_class, ignore_in_ddp
from milora_vl.core.adapter.anchored import (
    ANCHOR,
    DELTA,
    factors,
    fixed_names,
    has_anchor,
    install_copy,
    install_loaded,
    joined_state,
    unrecoverable,
)
from milora_vl.core.adapter.earlier import Earlier, join, split
from milora_vl.core.adapter.fixed_a import Protection, fix_A, has_fixed_A
from milora_vl.core.adapter.folders import PREFIX, AdapterError
from milora_vl.core.adapter.initialize import LayerReport
from milora_vl.core.adapter.lora import lora_layer, read_by_peft, set_dropout
from milora_vl.core.adapter.sidecar import Sidecar, fitted, read_sidecar, require_same_kind, require_trainable
from milora_vl.core.policy.rules import Target
from milora_vl.core.weights.matrices import Fingerprint, distance, fingerprint


class MiloraMixin(PeftModel):
    """The methods in which a PeftModel with trained differences and anchors differs from a stock one.

    `sidecars` holds the metadata of each adapter.
    """

    sidecars: dict[str, Sidecar]
    earlier: Earlier | None = None  # the update that the base holds; every saved adapter of ours is joined with it
    milora_targets: list[Target]
    milora_report: list[LayerReport]
    milora_protection: dict[str, Protection]

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
        """Save the adapter as PEFT does, and milora.json beside it.

        In a gathered `state_dict` the raw names `delta` and `anchor` are joined first. Raises AdapterError for
        `path_initial_model_for_weight_conversion`, because the saved adapter needs no conversion.
        """
        if path_initial_model_for_weight_conversion is not None:
            message = "the saved adapter is already a plain LoRA for the unchanged base model, and needs no conversion"
            raise AdapterError(message, where="path_initial_model_for_weight_conversion", hint="remove the argument")
        self._require_own_factors()
        self.warn_of_changed_A()
        if save_embedding_layers == "auto":
            save_embedding_layers = self._vocabulary_has_grown()
        if kwargs.get("state_dict") is not None:
            kwargs["state_dict"] = joined_state(self._with_buffers(kwargs["state_dict"]))
        with atomic_folder(Path(save_directory), is_main_process) as folder:
            super().save_pretrained(
                str(folder), safe_serialization, selected_adapters, save_embedding_layers, is_main_process, **kwargs
            )
            for name in selected_adapters or self.peft_config:
                if is_main_process and name in self.sidecars:
                    adapter_folder = folder if name == "default" else folder / name
                    anchors = self._unrecoverable(name, kwargs.get("state_dict") or {})
                    self.sidecars[name].write(adapter_folder, anchors)
                    if self.earlier is not None:
                        join(adapter_folder, self.earlier, self)

    def _unrecoverable(self, adapter: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the B0 that the saved factors do not give back bit for bit, by path. `state` is a gathered one."""
        saved = {name.removeprefix("_forward_module."): tensor for name, tensor in state.items()}
        pairs = (
            (path, unrecoverable(lora_layer(self, path), adapter, saved.get(f"{PREFIX}{path}.lora_B.{adapter}.weight")))
            for path in self.sidecars[adapter].ranks
        )
        return {path: B0 for path, B0 in pairs if B0 is not None}

    def train(self, mode: bool = True) -> MiloraMixin:
        """Set the training mode as PyTorch does. Raises AdapterError if other code has replaced our factors."""
        if mode:
            self._require_own_factors()
        return super().train(mode)

    def _require_own_factors(self) -> None:
        """Raise AdapterError if stock factors have replaced ours: then the anchor or the fixed A would train too.

        PEFT's prepare_model_for_compiled_hotswap does this to pad the factors.
        """
        for adapter, sidecar in self.sidecars.items():
            replaced = [path for path in sidecar.ranks if not has_anchor(lora_layer(self, path), adapter)]
            replaced += [path for path in sidecar.fixed if not has_fixed_A(lora_layer(self, path), adapter)]
            if replaced:
                message = f"stock factors have replaced ours ({len(replaced):,} modules of adapter {adapter!r})"
                hint = "save the adapter before that, or serve it by loading the folder with stock PEFT"
                raise AdapterError(message, where=replaced[0], hint=hint)

    def changed_A(self) -> list[str]:
        return [path for path, start, A in self._fixed() if distance(start, A) > 1]

    def warn_of_changed_A(self) -> None:
        """Warn if the fixed A of any module has changed since the start, or was rounded."""
        changed = self.changed_A()
        if changed:
            warnings.warn(
                f"{changed[0]}: A has changed, so its inputs are no longer protected ({len(changed):,} modules)",
                stacklevel=3,
            )
        rounded = [path for path, start, A in self._fixed() if fingerprint(A).eps > start.eps]
        if rounded:
            warnings.warn(
                f"{rounded[0]}: A was rounded to half precision, which leaves about a thousandth of the update on "
                f"protected inputs ({len(rounded):,} modules). Convert the base model before the adapter is made.",
                stacklevel=3,
            )

    def _fixed(self) -> Iterator[tuple[str, Fingerprint, Tensor]]:
        """Yield the path of each module with a fixed A, the fingerprint of its start, and A (r, in)."""
        for adapter, sidecar in self.sidecars.items():
            for path, start in sidecar.fixed.items():
                yield path, start, factors(lora_layer(self, path), adapter)[0].detach().flatten(1)

    def _with_buffers(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the state dict with our missing buffers added: LLaVA collects parameters only.

        Anchors belong to the differences in `state`, and each fixed A to its B.
        """

        def partner(name: str) -> str:
            is_A = name.endswith(".weight")
            return name.replace(".lora_A.", ".lora_B.") if is_A else name.replace(f".{ANCHOR}", f".{DELTA}")

        missing = {name for name in fixed_names(self) if partner(name) in state and name not in state}
        return {**state, **{name: buffer for name, buffer in self.named_buffers() if name in missing}}

    def _vocabulary_has_grown(self) -> bool:
        """Return True if the embeddings were resized, compared with a locally available config of the base model.

        PEFT would query the hub at every save, which costs half a minute of retries on a machine without network.
        """
        original = _local_config(next(iter(self.peft_config.values())).base_model_name_or_path or "")
        current = BaseTuner.get_model_config(self.get_base_model())
        return "vocab_size" in original and original["vocab_size"] != current.get("vocab_size")

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
                split(Path(model_id), self, Path(own), allow_base_mismatch=allow_base_mismatch)
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


def _local_config(name: str) -> dict[str, Any]:
    """Return config.json of a base model from its folder or the hub's cache; empty if it is in neither."""
    file: Any = Path(name) / "config.json"
    if not file.is_file() and name.count("/") <= 1:
        file = try_to_load_from_cache(name, "config.json") if name else None
    if not isinstance(file, str) and not (isinstance(file, Path) and file.is_file()):
        return {}
    return dict(json.loads(Path(file).read_text(encoding="utf-8")))
