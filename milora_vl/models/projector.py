"""Save and load a projector in a separate file (mm_projector.bin, stage 1), and the names of its weights.

The file has HF's names (`multi_modal_projector.linear_1.weight`); LLaVA's `mm_projector.bin` is also supported.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from peft.utils.integrations import gather_params_ctx
from torch import Tensor, nn

from milora_vl.common.errors import UserError
from milora_vl.core.adapter.folders import PROJECTOR_FILES, projector_file
from milora_vl.core.policy.towers import find_towers
from milora_vl.core.weights.tensor_files import read_weights
from milora_vl.models.base import PROJECTOR_WEIGHTS, is_original, read_original

PROJECTOR_PREFIX = "multi_modal_projector."
_OURS = re.compile(r"(?:^|.*\.)multi_modal_projector\.(.+)")
_LLAVA = re.compile(r"(?:^|.*\.)mm_projector\.(?:(\d+)\.)?(.+)")


def projector_of(model: nn.Module) -> nn.Module:
    path = find_towers(model).projector
    if path is None:
        raise UserError(
            f"{type(model).__name__} has no projector", hint="use a model with a projector, such as llava-1.5-7b"
        )
    return model.get_submodule(path)


def save_projector(model: nn.Module, folder: Path, state: Mapping[str, Tensor] | None = None) -> Path:
    """Write mm_projector.safetensors in the trained dtype, and mm_projector.bin with LLaVA's names.

    `state` is a gathered state dict of the model.
    """
    from safetensors.torch import save_file

    if state is None:
        weights = {PROJECTOR_PREFIX + name: t for name, t in projector_of(model).state_dict().items()}
    else:
        weights = {PROJECTOR_PREFIX + _inner(name): t for name, t in state.items() if _OURS.match(name)}
    target = folder / PROJECTOR_FILES[0]
    weights = {name: t.detach().cpu().contiguous() for name, t in weights.items()}
    torch.save({_llava_name(name): t for name, t in weights.items()}, folder / PROJECTOR_FILES[1])
    save_file(weights, target, metadata={"format": "pt"})
    return target


def load_projector(model: nn.Module, source: Path) -> None:
    weights = read_projector(source)
    projector = projector_of(model)
    with gather_params_ctx(list(projector.parameters()), modifier_rank=0):  # ZeRO-3 has shards of them
        expected = {name: tuple(t.shape) for name, t in projector.state_dict().items()}
        shapes = {name: tuple(t.shape) for name, t in weights.items()}
        if shapes != expected:
            message = "the weights do not fit the projector of this model"
            hint = f"  has       {shapes}\n  expected  {expected}"
            raise UserError(message, where=str(source), hint=hint)
        projector.load_state_dict(weights)


def read_projector(source: Path) -> dict[str, Tensor]:
    """Return the projector weights in a file or folder, by their names in the module (`linear_1.weight`).

    `source` may also be a model in LLaVA's original layout. Raises UserError for a file without projector weights.
    """

    if is_original(source):
        inside = read_original(source).tensors(PROJECTOR_WEIGHTS)
        return {_inner(f"mm_projector.{name}"): tensor for name, tensor in inside.items()}
    file = projector_file(source)
    state = read_weights(file)
    names = list(state) if isinstance(state, dict) else []
    weights = {_inner(name): state[name] for name in names if _OURS.match(name) or _LLAVA.match(name)}
    if not weights:
        message = f"no projector weights in this file; found: {', '.join(names[:3]) or type(state).__name__}, ..."
        hint = "name mm_projector.bin of LLaVA, or mm_projector.safetensors of a run"
        raise UserError(message, where=str(file), hint=hint)
    if "weight" in weights:
        message = "the projector is a single linear layer (LLaVA's --mm_projector_type linear)"
        hint = "expected:  two layers (mlp2x_gelu), as in LLaVA-1.5 and Hugging Face's LLaVA"
        raise UserError(message, where=str(file), hint=hint)
    return weights


def _llava_name(name: str) -> str:
    """Return LLaVA's name of a projector weight.

    >>> _llava_name("multi_modal_projector.linear_2.bias")
    'model.mm_projector.2.bias'
    """
    layer, _, leaf = name.removeprefix(PROJECTOR_PREFIX).rpartition(".")
    number = 2 * (int(layer.removeprefix("linear_")) - 1) if layer.startswith("linear_") else layer
    return f"model.mm_projector.{number}.{leaf}"


def _inner(name: str) -> str:
    ours = _OURS.match(name)
    if ours:
        return ours[1]
    llava = _LLAVA.match(name)
    assert llava is not None
    number = llava[1]  # LLaVA's Sequential: 0 is the first layer, 1 the activation, 2 the second layer
    return f"linear_{int(number) // 2 + 1}.{llava[2]}" if number else llava[2]
