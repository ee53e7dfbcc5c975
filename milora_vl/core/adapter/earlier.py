"""A run after others: their update is a frozen part of its base, and its folder holds one LoRA for all of them.

    y = W x + B' A' x + s B A x        A' (r', in), B' (out, r'): buffers of the base layer, never trained

`hold` adds B' A' x in a hook of the base layer, before PEFT wraps it. To all other code this is the base: calibration,
the task's gradient and `disable_adapter` see the model after the earlier runs. It works on quantized weights too.

`join_tasks` makes what the run saves a stock LoRA for the untouched base: in each module the rows of the new run come
first, then the earlier ones, so ranks add. A module that an earlier run trained in full is whole, with the update of
the new run in its weight. `split_tasks` is the inverse: a resumed run needs its own folder alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.integrations import gather_params_ctx
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from milora_vl.core.adapter.fixed_a import plus_update
from milora_vl.core.adapter.folders import (
    ADAPTER_FILES,
    EARLIER,
    PEFT_PREFIX,
    RESTORE,
    AdapterError,
    module_path,
    moved,
)
from milora_vl.core.adapter.lora import base_layer, base_model_of, config_of_targets, peft_rank
from milora_vl.core.adapter.sidecar import FILE_NAME, MERGE, Sidecar, fitted, new_paths, read_sidecar, stored_tensors
from milora_vl.core.policy.rules import Target

APART_FILE = "milora_apart.safetensors"  # the adapter of the new run on modules that are whole, and their weights


@dataclass(frozen=True, slots=True)
class Earlier:
    """The update of the runs before this one, in float32.

    - `factors`: A' (r', in), B' (out, r') and their scaling, by module path.
    - `whole`: weights of modules that trained in full, by their names in the base model.
    - `sidecar`: what milora.json says of their modules.
    - `tasks`: the entries of milora.json for all tasks in order, the new one last.
    """

    factors: Mapping[str, tuple[Tensor, Tensor, float]]
    whole: Mapping[str, Tensor]
    sidecar: Sidecar
    tasks: Sequence[Mapping[str, Any]]


def read_earlier(
    base: nn.Module, folder: Path, targets: Sequence[Target], tasks: Sequence[Mapping[str, Any]] = ()
) -> Earlier:
    """Return the update in an adapter folder of ours, for a run on `base` that trains `targets`.

    Raises AdapterError for another base model, and for an update that is no pair of factors of a linear layer.
    """
    saved = read_sidecar(folder)
    if saved is None:
        raise AdapterError(f"has no {FILE_NAME}", where=str(folder))
    here = fitted(base, saved, allow_base_mismatch=False)
    paths = new_paths(saved, here)
    state = {moved(name, paths).removeprefix(PEFT_PREFIX): tensor for name, tensor in stored_tensors(folder).items()}
    scalings = {target.path: target.scaling for target in targets if target.rank is not None}
    factors: dict[str, tuple[Tensor, Tensor, float]] = {}
    for target in here.targets:
        if target.rank is None:
            continue
        A, B = (state.pop(name, None) for name in _names(target.path))
        if A is None or B is None or A.ndim != 2 or target.method == "dora":
            message = f"the update of {target.path} is no pair of factors of a linear layer (method {target.method})"
            hint = f"use it merged, as a base:  {MERGE} {folder}"
            raise AdapterError(message, code="adapter-unsupported-kind", where=str(folder), hint=hint)
        scaling = scalings.get(target.path, target.scaling)  # `join_tasks` writes one scaling per module
        change = target.scaling / scaling
        factors[target.path] = A.float(), B.float() if change == 1 else B.float() * change, scaling
    in_full = [target.path for target in here.targets if target.rank is None]
    for name in state:
        if not module_path(name, in_full):
            raise AdapterError(f"contains {name}, which {FILE_NAME} does not list", where=str(folder), hint=RESTORE)
    return Earlier(factors, {name: tensor.float() for name, tensor in state.items()}, here, tuple(tasks))


def hold(base: nn.Module, earlier: Earlier) -> None:
    """Make an earlier update a frozen part of `base`, which has no adapter yet.

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> update = {"0": (torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0]]), 2.0)}
    >>> before = layer(torch.ones(1, 2))
    >>> hold(nn.Sequential(layer), Earlier(update, {}, Sidecar([], {}, {}, {}), ()))
    >>> round(float((layer(torch.ones(1, 2)) - before).detach()), 4)
    6.0
    """
    for path, (A, B, scaling) in earlier.factors.items():
        layer = base.get_submodule(path)
        device = layer.get_parameter("weight").device
        for name, tensor in zip(EARLIER, (A, B if scaling == 1 else scaling * B), strict=True):
            layer.register_buffer(name, tensor.to(device), persistent=False)
        layer.register_forward_hook(_add_earlier, with_kwargs=True)
    held = [parameter for name, parameter in base.named_parameters() if name in earlier.whole]
    with gather_params_ctx(held, modifier_rank=0):
        base.load_state_dict(dict(earlier.whole), strict=False)


def _add_earlier(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
    """Return the output of a base layer plus B' A' x. It reads the buffers of the layer, so that a copy has its own."""
    x = args[0] if args else next(iter(kwargs.values()))
    A, B = (layer.get_buffer(name) for name in EARLIER)
    return plus_update(output, x, A, B, 1.0, output.dtype)


def join_tasks(folder: Path, earlier: Earlier, model: nn.Module) -> None:
    """Replace the adapter of a run in `folder` by one LoRA of all tasks; milora.json keeps the sidecar of the run."""
    own = read_sidecar(folder)
    assert own is not None
    state = {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in stored_tensors(folder).items()}
    targets = {t.path: _joined(t, peft_rank(t)) for t in own.targets if t.rank is not None}
    full = {t.path: t for t in (*earlier.sidecar.targets, *own.targets) if t.rank is None}
    apart: dict[str, Tensor] = {}
    whole = dict(earlier.whole)
    for path in [path for path in targets if f"{path}.weight" in whole]:
        scaling, weight = targets.pop(path).scaling, f"{path}.weight"
        A, B = (state.pop(name).float() for name in _names(path))
        apart |= {**dict(zip(_names(path), (A, B), strict=True)), weight: whole[weight]}
        update = scaling * (B @ A)
        whole[weight] = whole[weight] + (update.T if isinstance(base_layer(model, path), Conv1D) else update)
    shapes = {target.path: target for target in earlier.sidecar.targets}
    for path, (A, B, scaling) in earlier.factors.items():
        rank = len(A)
        if path in targets:
            first = [state[name].float() for name in _names(path)]
            rank += len(first[0])
            A, B = torch.cat([first[0], A]), torch.cat([first[1], B], dim=1)
            targets[path] = _joined(targets[path], rank)
        else:
            targets[path] = _joined(shapes[path], rank, scaling)
        state |= dict(zip(_names(path), (A, B), strict=True))
    every = [*targets.values(), *full.values()]
    _write(folder, _config(folder, model, every), {**state, **whole})
    if apart:
        save_file({name: t.contiguous() for name, t in apart.items()}, folder / APART_FILE, metadata={"format": "pt"})
    names, prints = {**earlier.sidecar.names, **own.names}, {**earlier.sidecar.fingerprints, **own.fingerprints}
    named, printed = {target.path: names[target.path] for target in every}, {path: prints[path] for path in targets}
    in_full = [names[path] for path in full]
    frozen = {name: one for name, one in own.frozen.items() if not module_path(name, in_full)}
    Sidecar(every, named, printed, {}, tasks=earlier.tasks, frozen=frozen, own=own).write(folder, {})


def split_tasks(folder: Path, model: nn.Module, own_folder: Path, *, allow_base_mismatch: bool = False) -> Earlier:
    """Write the adapter of the last task in `folder` to `own_folder`, and return the earlier update.

    `model` is the base model of the run, or has its adapter already. Bits do not change.
    """
    saved = read_sidecar(folder)
    assert saved is not None
    assert saved.own is not None
    fitted(model, saved, allow_base_mismatch=allow_base_mismatch)
    own = saved.own
    state = {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in stored_tensors(folder).items()}
    apart = load_file(folder / APART_FILE) if (folder / APART_FILE).is_file() else {}
    factors: dict[str, tuple[Tensor, Tensor, float]] = {}
    whole, mine = {}, dict[str, Tensor]()
    scalings = {target.path: target.scaling for target in saved.targets if target.rank is not None}
    for target in own.targets:
        names, weight = _names(target.path), f"{target.path}.weight"
        if weight in apart:
            whole[weight], _ = apart[weight], state.pop(weight)
            mine |= {name: apart[name] for name in names}
        elif names[0] in state:
            A, B = (state.pop(name) for name in names)
            rank = peft_rank(target)
            mine |= dict(zip(names, (A[:rank], B[:, :rank]), strict=True))
            if len(A) > rank:
                factors[target.path] = A[rank:].contiguous(), B[:, rank:].contiguous(), target.scaling
        else:  # trained in full, or an embedding
            mine |= {name: state.pop(name) for name in list(state) if module_path(name, [target.path])}
    for path, scaling in scalings.items():
        if _names(path)[0] in state:
            A, B = (state.pop(name) for name in _names(path))
            factors[path] = A, B, scaling
    _write(own_folder, _config(folder, model, own.targets), mine)
    own.write(own_folder, own.read_anchors(folder))
    return Earlier(factors, {**whole, **state}, saved, saved.tasks)


def joined_rank(earlier: Earlier, targets: Sequence[Target]) -> int:
    """Return the largest rank of the LoRA that `join_tasks` writes for a run that trains `targets`."""
    ranks = Counter({path: len(A) for path, (A, _, _) in earlier.factors.items()})
    new = [target for target in targets if target.rank is not None and f"{target.path}.weight" not in earlier.whole]
    ranks.update({target.path: peft_rank(target) for target in new})
    return max(ranks.values())


def _names(path: str) -> tuple[str, str]:
    return f"{path}.lora_A.weight", f"{path}.lora_B.weight"


def _joined(target: Target, rank: int, scaling: float | None = None) -> Target:
    alpha = (target.scaling if scaling is None else scaling) * rank
    return Target(path=target.path, shape=target.shape, tower=target.tower, method="lora", rank=rank, alpha=alpha)


def _config(folder: Path, model: nn.Module, targets: Sequence[Target]) -> LoraConfig:
    present = LoraConfig.from_pretrained(str(folder))
    full = [target.path for target in targets if target.rank is None]
    config = config_of_targets(base_model_of(model), [target for target in targets if target.rank is not None], full)
    config.base_model_name_or_path, config.auto_mapping = present.base_model_name_or_path, present.auto_mapping
    config.inference_mode = True
    return config


def _write(folder: Path, config: LoraConfig, state: Mapping[str, Tensor]) -> None:
    config.save_pretrained(str(folder))
    whole = {PEFT_PREFIX + name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    save_file(whole, folder / ADAPTER_FILES[0], metadata={"format": "pt"})
    (folder / ADAPTER_FILES[1]).unlink(missing_ok=True)
