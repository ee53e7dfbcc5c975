"""`save_adapter`, and the `save_pretrained` behind it: PEFT's files and milora.json, written atomically."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from milora_vl.common.atomic_write import atomic_folder, read_json
from milora_vl.core.adapter.anchored import ANCHOR, DELTA, factors, fixed_names, has_anchor, joined_state, unrecoverable
from milora_vl.core.adapter.earlier import Earlier, join_tasks
from milora_vl.core.adapter.fixed_a import has_fixed_A
from milora_vl.core.adapter.folders import PEFT_PREFIX, AdapterError, local_folder
from milora_vl.core.adapter.lora import lora_layer
from milora_vl.core.adapter.sidecar import Sidecar
from milora_vl.core.weights.matrices import Fingerprint, distance, fingerprint


def save_adapter(model: nn.Module, path: str | Path) -> None:
    """Write the adapter of `model` to the folder `path`: PEFT's files and milora.json.

    Where the factors do not give B0 back bit for bit (after training, above all on a float32 base), it is written to
    milora_anchors.safetensors. Training needs it to continue exactly, inference does not.

    Raises AdapterError if the model has no adapter (a run that trains weights in full saves the model itself), and if
    `path` is a file.

    >>> from tempfile import mkdtemp
    >>> from milora_vl import apply_milora
    >>> rules = [{"modules": "language", "method": "lora", "rank": 2}]
    >>> folder = Path(mkdtemp())
    >>> save_adapter(apply_milora(nn.Sequential(nn.Linear(4, 4)), rules), folder)
    >>> sorted(file.name for file in folder.iterdir())
    ['README.md', 'adapter_config.json', 'adapter_model.safetensors', 'milora.json']
    """
    if not isinstance(model, PeftModel):
        hint = "for weights trained in full, use the model's own save_pretrained"
        raise AdapterError(f"{type(model).__name__} has no adapter to save", hint=hint)
    folder = Path(path)  # raises TypeError for None; str(None) would create a folder named None
    if folder.is_file():
        raise AdapterError("this is a file, but an adapter is a folder", where=str(folder))
    model.save_pretrained(str(folder))


class SavingMixin(PeftModel):
    """The part of a PeftModel of ours that saves its adapters, and checks that their fixed parts did not change.

    `sidecars` holds the metadata of each adapter.
    """

    sidecars: dict[str, Sidecar]
    earlier: Earlier | None = None  # the update that the base holds; every saved adapter of ours is joined with it

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
                        join_tasks(adapter_folder, self.earlier, self)

    def _unrecoverable(self, adapter: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the B0 that the saved factors do not give back bit for bit, by path. `state` is a gathered one."""
        saved = {name.removeprefix("_forward_module."): tensor for name, tensor in state.items()}
        pairs = (
            (
                path,
                unrecoverable(
                    lora_layer(self, path), adapter, saved.get(f"{PEFT_PREFIX}{path}.lora_B.{adapter}.weight")
                ),
            )
            for path in self.sidecars[adapter].ranks
        )
        return {path: B0 for path, B0 in pairs if B0 is not None}

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
        folder = local_folder(next(iter(self.peft_config.values())).base_model_name_or_path or "")
        original = (folder and read_json(folder / "config.json")) or {}
        current = BaseTuner.get_model_config(self.get_base_model())
        return "vocab_size" in original and original["vocab_size"] != current.get("vocab_size")
