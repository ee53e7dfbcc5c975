"""Save and load adapters: stock PEFT files with milora.json beside them, checked against the base model.

A model may have other module names than the file: HF's layout and LLaVA's own are one base. PEFT finds modules by the
paths in the file, so the paths of config and weights are replaced first, then PEFT loads.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import load_peft_weights
from safetensors import SafetensorError, safe_open
from torch import nn

from milora_vl.lora.base_check import fitted
from milora_vl.lora.config import quiet_peft
from milora_vl.lora.errors import AdapterError, require_module
from milora_vl.lora.install import lora_layer
from milora_vl.lora.peft_model import restore
from milora_vl.lora.residual import make_residual
from milora_vl.lora.sidecar import FILE_NAME, Sidecar, read_sidecar, require_weights
from milora_vl.towers import is_wrapped_by_peft
from milora_vl.weights.torch_files import UNREAD, read_pickled, why_unread

CONFIG_NAME = "adapter_config.json"
WEIGHT_NAMES = ("adapter_model.safetensors", "adapter_model.bin")

logger = logging.getLogger(__name__)


def save_adapter(model: nn.Module, path: str | Path) -> None:
    """Write the adapter of `model` to the folder `path`: PEFT's files and milora.json.

    Raises AdapterError if the model has no adapter (a run that trains weights in full saves the model itself), and
    where the path is a file.
    """
    if not isinstance(model, PeftModel):
        raise AdapterError(
            f"{type(model).__name__} has no adapter to save: use its own save_pretrained for weights trained in full"
        )
    folder = Path(path)  # None is no path, and no folder of that name
    if folder.is_file():
        raise AdapterError(f"{folder} is a file: an adapter is a folder")
    model.save_pretrained(str(folder))


def load_adapter(
    base: nn.Module,
    path: str | Path,
    *,
    is_trainable: bool = False,
    allow_base_mismatch: bool = False,
    cache_dir: str | Path | None = None,
) -> Any:
    """Return `base` with the adapter in the folder `path`; with `is_trainable`, training can go on where it stopped.

    A folder without milora.json is loaded as the plain LoRA it is. Protected directions are found again from the base
    weights, where `is_trainable` needs them, or taken from `cache_dir`. Raises AdapterError for a folder that holds no
    adapter, one that does not fit, and a base model that is not the one it was made for.
    """
    folder = Path(path)
    require_module(base)
    require_adapter(folder)
    if is_wrapped_by_peft(base):
        raise AdapterError(
            "this model holds an adapter already: pass the base model, or use its own load_adapter(path, name)"
        )
    saved = read_sidecar(folder)
    if saved is None:
        logger.info("%s has no %s: loaded as the plain LoRA it is", folder, FILE_NAME)
        return _load_stock(base, folder, is_trainable)
    require_weights(folder, saved)
    here = fitted(base, saved, allow_base_mismatch=allow_base_mismatch)
    paths = new_paths(saved, here)
    if paths:
        model = load_renamed(base, folder, here, paths, is_trainable=is_trainable)
    else:
        model = _load_stock(base, folder, is_trainable)
    # For inference the anchored form is the same function, on the base as it is.
    ours = restore(model, "default", here if is_trainable else replace(here, form="anchored"))
    if is_trainable:
        ours.protect_again("default", cache_dir)
    if here.form == "residual" and is_trainable:
        for module in here.ranks:
            make_residual(lora_layer(ours, module), "default")
    return ours


def _load_stock(base: nn.Module, folder: Path, is_trainable: bool) -> PeftModel:
    """PEFT's own loader, with its soft warnings about missing weights as errors."""
    with quiet_peft():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        try:
            return PeftModel.from_pretrained(base, str(folder), is_trainable=is_trainable)
        except KeyError as error:  # how PEFT meets a module of modules_to_save that is not in the file
            raise AdapterError(f"{folder} lacks {error}: its weights are not those of its {CONFIG_NAME}") from error
        except (RuntimeError, ValueError, UserWarning) as error:
            first = next(line.strip() for line in str(error).splitlines() if line.strip())
            raise AdapterError(f"the adapter in {folder} does not fit {type(base).__name__}\n{first[:300]}") from error


def require_adapter(folder: Path) -> None:
    """Raise AdapterError unless the folder holds an adapter whose config and weights can be read."""
    if not folder.is_dir():
        raise AdapterError(f"no adapter folder at {folder}: {'it is a file' if folder.exists() else 'nothing there'}")
    names = sorted(entry.name for entry in folder.iterdir())
    if CONFIG_NAME not in names or not set(WEIGHT_NAMES) & set(names):
        missing = CONFIG_NAME if CONFIG_NAME not in names else WEIGHT_NAMES[0]
        checkpoints = [name for name in names if name.startswith("checkpoint-")]
        hint = f"\ndid you mean {folder / checkpoints[-1]} ?" if checkpoints else ""
        raise AdapterError(
            f"{folder} holds no adapter: {missing} is missing, found {', '.join(names[:6]) or 'nothing'}{hint}"
        )
    try:
        config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    except ValueError as error:
        raise AdapterError(f"{folder / CONFIG_NAME} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise AdapterError(f"{folder / CONFIG_NAME} holds no mapping, but a {type(config).__name__}")
    file = folder / next(name for name in WEIGHT_NAMES if name in names)
    try:
        if file.suffix == ".bin":
            read_pickled(file)  # a pickle has no header that would tell
        else:
            with safe_open(file, framework="pt"):
                pass
    except (SafetensorError, *UNREAD) as error:
        raise AdapterError(why_unread(file, error)) from error


_PREFIX = "base_model.model."


def new_paths(saved: Sidecar, here: Sidecar) -> dict[str, str]:
    """Return the path in the model of every path in the file, where any of them differs; else nothing."""
    pairs = {old.path: new.path for old, new in zip(saved.targets, here.targets, strict=True)}
    return pairs if any(old != new for old, new in pairs.items()) else {}


def load_renamed(
    base: nn.Module, folder: Path, here: Sidecar, paths: Mapping[str, str], *, is_trainable: bool
) -> PeftModel:
    """Return `base` with the adapter in `folder`; `here` has the paths of this model, `paths` maps the file's to them.

    Raises AdapterError if the file holds other modules than milora.json says.
    """
    config = LoraConfig.from_pretrained(str(folder))
    config.inference_mode = not is_trainable
    config.target_modules = {t.path for t in here.targets if t.rank is not None}
    config.modules_to_save = [t.path for t in here.targets if t.rank is None] or None
    config.rank_pattern = {_renamed_pattern(key, paths): rank for key, rank in config.rank_pattern.items()}
    config.alpha_pattern = {_renamed_pattern(key, paths): alpha for key, alpha in config.alpha_pattern.items()}
    with quiet_peft():
        model = get_peft_model(base, config)
    state = {renamed_key(key, paths): tensor for key, tensor in load_peft_weights(str(folder), device="cpu").items()}
    expected = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    if expected != state.keys():
        wrong = sorted(expected ^ state.keys())
        raise AdapterError(
            f"the weights in {folder} are not those milora.json tells of: {wrong[0]} ({len(wrong)} differ)"
        )
    set_peft_model_state_dict(model, state)
    if not is_trainable:
        model.eval()
    return model


def renamed_key(key: str, paths: Mapping[str, str]) -> str:
    """Return the key of a stored tensor with its module path replaced.

    >>> renamed_key("base_model.model.a.b.lora_A.weight", {"a.b": "c"})
    'base_model.model.c.lora_A.weight'
    """
    path = key.removeprefix(_PREFIX)
    while path and path not in paths:
        path = path.rpartition(".")[0]
    return _PREFIX + paths[path] + key.removeprefix(_PREFIX + path) if path else key


def _renamed_pattern(pattern: str, paths: Mapping[str, str]) -> str:
    return "^" + paths[pattern.removeprefix("^")]
