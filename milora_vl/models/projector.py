"""The projector's weights as a small file of their own: what a stage-1 run saves, and what a run may start from.

Written with HF's names (`multi_modal_projector.linear_1.weight`); LLaVA's `mm_projector.bin` is read too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from milora_data.errors import UserError
from milora_vl.models import original
from milora_vl.models.names import PROJECTOR_FILES
from milora_vl.towers import find_towers
from milora_vl.weights.torch_files import UNREAD, read_pickled, why_unread

PREFIX = "multi_modal_projector."
_OURS = re.compile(r"(?:^|.*\.)multi_modal_projector\.(.+)")
_LLAVA = re.compile(r"(?:^|.*\.)mm_projector\.(?:(\d+)\.)?(.+)")


def projector_of(model: nn.Module) -> nn.Module:
    """The projector module of a model; UserError where it has none."""
    path = find_towers(model).projector
    if path is None:
        raise UserError(f"{type(model).__name__} has no projector")
    return model.get_submodule(path)


def save_projector(model: nn.Module, folder: Path, state: Mapping[str, Tensor] | None = None) -> Path:
    """Write mm_projector.safetensors, in the dtype that was trained, and mm_projector.bin, the same by LLaVA's names.

    `state` is a gathered state dict of the model.
    """
    from safetensors.torch import save_file

    if state is None:
        weights = {PREFIX + name: t for name, t in projector_of(model).state_dict().items()}
    else:
        weights = {PREFIX + _inner(name): t for name, t in state.items() if _OURS.match(name)}
    target = folder / PROJECTOR_FILES[0]
    weights = {name: t.detach().cpu().contiguous() for name, t in weights.items()}
    torch.save({_llava_name(name): t for name, t in weights.items()}, folder / PROJECTOR_FILES[1])
    save_file(weights, target, metadata={"format": "pt"})
    return target


def load_projector(model: nn.Module, source: Path) -> None:
    """Put the weights of a file, or of a folder that holds one, into the model's projector.

    UserError, with what was found, where names or shapes do not fit.
    """
    found = read_projector(source)
    projector = projector_of(model)
    have = {name: tuple(t.shape) for name, t in projector.state_dict().items()}
    got = {name: tuple(t.shape) for name, t in found.items()}
    if have != got:
        raise UserError(f"{source} does not fit the projector of this model\n  has       {got}\n  expected  {have}")
    projector.load_state_dict(found)


def read_projector(source: Path) -> dict[str, Tensor]:
    """The projector's weights in a file or folder, by their names inside the module (`linear_1.weight`).

    Of a whole model in LLaVA's original layout, its projector alone is read.
    """
    from safetensors.torch import load_file

    if original.is_original(source):
        inside = original.read_original(source).tensors(original.PROJECTOR)
        return {_inner(f"mm_projector.{name}"): tensor for name, tensor in inside.items()}
    file = projector_file(source)
    try:
        state = load_file(file) if file.suffix == ".safetensors" else read_pickled(file)
    except (SafetensorError, *UNREAD) as error:
        raise UserError(why_unread(file, error)) from None
    if not isinstance(state, dict):
        raise UserError(f"{file} holds no weights by name, but a {type(state).__name__}")
    weights = {_inner(name): t for name, t in state.items() if _OURS.match(name) or _LLAVA.match(name)}
    if not weights:
        raise UserError(f"{file} holds no projector weights; its names: {', '.join(list(state)[:3])}, ...")
    if "weight" in weights:
        raise UserError(
            f"{file} is a single linear layer (LLaVA's --mm_projector_type linear)\n"
            "expected:  two layers, mlp2x_gelu, as LLaVA-1.5 and Hugging Face's LLaVA have them"
        )
    return weights


def projector_file(source: Path) -> Path:
    """The file with a projector that `source` is or holds; UserError where there is none."""
    files = [source / name for name in PROJECTOR_FILES if (source / name).is_file()] if source.is_dir() else [source]
    if not files or not files[0].is_file():
        raise UserError(
            f"no projector weights at {source}: expected a file or a folder with {' or '.join(PROJECTOR_FILES)}"
        )
    return files[0]


def _llava_name(name: str) -> str:
    """LLaVA's name of a weight of ours.

    >>> _llava_name("multi_modal_projector.linear_2.bias")
    'model.mm_projector.2.bias'
    """
    layer, _, leaf = name.removeprefix(PREFIX).rpartition(".")
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
