"""Load an adapter into a model whose modules have other names: HF's layout and LLaVA's own are one base.

PEFT finds modules by the paths in the file. Here the paths of config and weights are replaced first, then PEFT loads.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import load_peft_weights
from torch import nn

from milora_vl.lora.config import quiet_peft
from milora_vl.lora.sidecar import AdapterError, Sidecar

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
