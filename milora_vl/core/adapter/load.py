"""`load_adapter`: stock PEFT files with milora.json beside them, checked against the base model.

The module names of a model may differ from those in the file, because HF's and LLaVA's layouts name the same modules
differently. PEFT finds modules by the paths in the file, so `load_renamed` replaces the paths of config and weights
before PEFT loads them.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from milora_vl.common.errors import MALFORMED
from milora_vl.core.adapter.earlier import hold, split_tasks
from milora_vl.core.adapter.folders import (
    ADAPTER_FILES,
    CONFIG,
    RESTORE,
    AdapterError,
    are_sizes,
    moved,
    newest_checkpoint,
    not_a_folder,
)
from milora_vl.core.adapter.lora import quiet_peft, read_by_peft, require_module
from milora_vl.core.adapter.peft_model import restore
from milora_vl.core.adapter.rates import check_rates_at_first_step
from milora_vl.core.adapter.sidecar import (
    FILE_NAME,
    Sidecar,
    fitted,
    new_paths,
    read_sidecar,
    require_trainable,
    stored_tensors,
)
from milora_vl.core.policy.towers import is_wrapped_by_peft
from milora_vl.core.weights.tensor_files import AGAIN

logger = logging.getLogger(__name__)


def load_adapter(
    base: nn.Module, path: str | Path, *, is_trainable: bool = False, allow_base_mismatch: bool = False
) -> Any:
    """Return `base` with the adapter in the folder `path`; with `is_trainable`, training can continue.

    A folder without milora.json is loaded as a plain LoRA.

    Raises AdapterError if the folder contains no adapter, if the adapter does not fit the model, and if this is not the
    base model that it was made for.
    """
    folder = Path(path)
    require_module(base)
    require_adapter_files(folder)
    if is_wrapped_by_peft(base):
        hint = "pass the base model, or use the model's own load_adapter(path, name)"
        raise AdapterError("this model already has an adapter", hint=hint)
    saved = read_sidecar(folder)
    if saved is None:
        message = f"{folder} has no {FILE_NAME}: loaded as a plain LoRA"
        logger.info(message)
        if is_trainable:  # stock PEFT may have trained an adapter of ours, and saved it here
            warnings.warn(f"{message}, of which all factors train: no input is protected", stacklevel=2)
        return _load_stock(base, folder, is_trainable)
    require_trainable(folder, saved, is_trainable=is_trainable)
    here = fitted(base, saved, allow_base_mismatch=allow_base_mismatch)
    anchors, paths = here.read_anchors(folder), new_paths(saved, here)
    if all(old == new for old, new in paths.items()):
        model = _load_stock(base, folder, is_trainable)
    else:
        model = _load_renamed(base, folder, here, paths, is_trainable)
    ours = restore(model, "default", here, anchors)
    ours.warn_of_changed_A()  # stock PEFT may have trained it, and saved into this folder
    if is_trainable:
        check_rates_at_first_step(ours, allow_one_rate=True)
    return ours


def load_checkpoint(base: nn.Module, path: str | Path) -> Any:
    """Return `base` with the adapter in a checkpoint, to train further. A base of a run after others holds theirs.

    Raises AdapterError as `load_adapter`, and for a base with other frozen parameters.
    """
    saved = read_sidecar(Path(path))
    if saved is None or saved.own is None:
        if saved is not None:
            fitted(base, saved, allow_base_mismatch=False, is_resumed=True)
        return load_adapter(base, path, is_trainable=True, allow_base_mismatch=saved is not None)
    with TemporaryDirectory() as own:
        earlier = split_tasks(Path(path), base, Path(own))
        hold(base, earlier)
        model = load_checkpoint(base, own)
    model.earlier = earlier
    return model


def _load_stock(base: nn.Module, folder: Path, is_trainable: bool) -> PeftModel:
    with quiet_peft(), read_by_peft(base, folder):
        return PeftModel.from_pretrained(base, str(folder), is_trainable=is_trainable)


def require_adapter_files(folder: Path) -> None:
    problem = not_a_folder(folder)
    if problem is not None:
        raise AdapterError(problems=[problem])
    names = sorted(entry.name for entry in folder.iterdir())
    if CONFIG not in names or not set(ADAPTER_FILES) & set(names):
        missing = CONFIG if CONFIG not in names else ADAPTER_FILES[0]
        newest = newest_checkpoint(folder)
        message = f"the folder contains no adapter: {missing} is missing, found {', '.join(names[:6]) or 'nothing'}"
        hint = f"did you mean {newest}? It is the newest checkpoint there." if newest else ""
        raise AdapterError(message, where=str(folder), hint=hint)
    file = str(folder / CONFIG)
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        imports_code = config.get("megatron_config") is not None
        patterns = [config.get(name) or {} for name in ("rank_pattern", "alpha_pattern")]
        sizes = [config.get("r", 1), config.get("lora_alpha", 1), *(n for each in patterns for n in each.values())]
    except MALFORMED as error:
        raise AdapterError(f"not a mapping in JSON: {error}", where=file, hint=AGAIN) from error
    if not are_sizes(sizes):
        raise AdapterError("a rank or lora_alpha is no number that a LoRA can have", where=file, hint=AGAIN)
    if imports_code:  # PEFT would import the module that the file names beside it
        message = "the config names a module of Megatron, which would be imported: it was not read"
        hint = "remove megatron_config and megatron_core from the file if you trust it"
        raise AdapterError(message, code="adapter-unsupported-kind", where=file, hint=hint)


def _load_renamed(
    base: nn.Module, folder: Path, here: Sidecar, paths: Mapping[str, str], is_trainable: bool
) -> PeftModel:
    """Return `base` with the adapter in `folder`, loaded under other module paths.

    `here` is the sidecar with the paths of this model; `paths` maps the paths in the file to them.
    Raises AdapterError if the file contains other modules than milora.json lists.
    """
    config = LoraConfig.from_pretrained(str(folder))
    config.inference_mode = not is_trainable
    config.target_modules = {t.path for t in here.targets if t.rank is not None}
    config.modules_to_save = [t.path for t in here.targets if t.rank is None] or None
    patterns = (config.rank_pattern, config.alpha_pattern)
    config.rank_pattern, config.alpha_pattern = (
        {"^" + paths[key.removeprefix("^")]: value for key, value in pattern.items()} for pattern in patterns
    )
    with quiet_peft():
        model = get_peft_model(base, config)
    state = {moved(key, paths): tensor for key, tensor in stored_tensors(folder).items()}
    expected = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    if expected != state.keys():
        wrong = sorted(expected ^ state.keys())
        message, hint = f"the weights do not match {FILE_NAME}: {wrong[0]} ({len(wrong)} differ)", RESTORE
        raise AdapterError(message, where=str(folder), hint=hint)
    set_peft_model_state_dict(model, state)
    if not is_trainable:
        model.eval()
    return model
