"""milora.json, the sidecar file of an adapter: the settings of each module and a fingerprint of its base weight.

Without this file the folder is still a correct LoRA for inference. With it, the trained difference and the anchor, or
the A that never changes, are known again, so training can continue.

In the folder of a run that trained after others (`earlier.py`), `modules` describes one plain LoRA for all tasks.
`tasks` then lists the tasks in order, and `own` is the sidecar of the last one alone.

Format version 3 stores the factors [D; A0] and [B0 + E, E] (`anchored.py`), and B0 itself in
milora_anchors.safetensors where it cannot be computed from them bit for bit, above all for float32 bases. Other
versions are refused.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, TypeVar

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from milora_vl.common.errors import expected_format
from milora_vl.core.adapter.fixed_a import Protection
from milora_vl.core.adapter.folders import ADAPTER_FILES, ANCHORS_FILE, RESTORE, AdapterError, are_sizes, module_path
from milora_vl.core.adapter.initialize import LayerReport
from milora_vl.core.adapter.lora import base_layer, base_model_of
from milora_vl.core.evaluation_mode import keep_weights_readable
from milora_vl.core.policy.rules import METHODS, Target
from milora_vl.core.policy.towers import canonical_names
from milora_vl.core.weights.matrices import (
    QUANTIZED_EPS,
    Fingerprint,
    distance,
    fingerprint,
    matrix_shape,
    read_matrix,
    read_parameter,
)
from milora_vl.core.weights.tensor_files import read_weights

Kind = TypeVar("Kind")
logger = logging.getLogger(__name__)
FILE_NAME = "milora.json"
FORMAT_VERSION = 3
MERGE = "python -m milora_vl.export --to merged --output_dir MERGED"


@dataclass(frozen=True, slots=True)
class Sidecar:
    """The content of milora.json. `names` maps the path of each target to a name that holds in every layout.

    `anchors` holds the names of the modules whose B0 is in ANCHORS_FILE. `fixed` holds the fingerprint of each A that
    never changes, and `protection` what the calibration found for its layer. `frozen` holds the fingerprints of all
    other parameters that do not train, by names that hold in every layout. `tasks` holds one entry per task, as the
    training writes it; it is empty for a single task.
    """

    targets: Sequence[Target]
    names: Mapping[str, str]
    fingerprints: Mapping[str, Fingerprint]
    reports: Mapping[str, LayerReport]
    anchors: Sequence[str] = ()
    fixed: Mapping[str, Fingerprint] = field(default_factory=dict)
    protection: Mapping[str, Protection] = field(default_factory=dict)
    frozen: Mapping[str, Fingerprint] = field(default_factory=dict)
    tasks: Sequence[Mapping[str, Any]] = ()
    own: Sidecar | None = None

    def to_json(self) -> str:
        content: dict[str, Any] = {"format_version": FORMAT_VERSION, **self._content()}
        if self.own is not None:
            content |= {"tasks": list(self.tasks), "own": self.own._content()}
        return json.dumps(content, indent=1) + "\n"

    def _content(self) -> dict[str, Any]:
        frozen = {name: dataclasses.asdict(one) for name, one in self.frozen.items()}
        modules = {t.path: self._module(t) for t in self.targets}
        return {"anchors": list(self.anchors), "modules": modules, "frozen": frozen}

    def _module(self, target: Target) -> dict[str, Any]:
        fields = target.to_dict()
        del fields["path"]
        parts = ((key, getattr(self, name).get(target.path)) for key, (name, _) in _PARTS.items())
        described = {key: dataclasses.asdict(part) for key, part in parts if part is not None}
        return {"name": self.names[target.path], "part": target.part, **fields, **described}

    @property
    def ranks(self) -> dict[str, int]:
        return {t.path: t.rank for t in self.targets if t.has_anchor and t.rank is not None}

    def write(self, folder: Path, anchors: Mapping[str, Tensor]) -> None:
        """Write milora.json, and ANCHORS_FILE with `anchors`, the B0 (out, r) that the factors do not give, by path."""
        named = {self.names[path]: B0.detach().cpu().contiguous() for path, B0 in anchors.items()}
        content = dataclasses.replace(self, anchors=sorted(named)).to_json()
        if named:
            save_file(named, folder / ANCHORS_FILE, metadata={"format": "pt"})
        (folder / FILE_NAME).write_text(content, encoding="utf-8")

    def read_anchors(self, folder: Path) -> dict[str, Tensor]:
        """Return the B0 (out, r) in ANCHORS_FILE of `folder`, by path. Raises AdapterError if the file lacks one."""
        if not self.anchors:
            return {}
        file = folder / ANCHORS_FILE
        stored = load_file(file) if file.is_file() else {}
        missing = [name for name in self.anchors if name not in stored]
        if missing:
            message = f"lacks the anchor of {missing[0]}, which {FILE_NAME} lists ({len(missing):,} are missing)"
            raise AdapterError(message, where=str(file), hint=RESTORE)
        path_of = {name: path for path, name in self.names.items()}
        return {path_of[name]: stored[name] for name in self.anchors}


# The parts of a module in the file: the name of the field of Sidecar that holds them by path, and their class.
_PARTS: dict[str, tuple[str, type]] = {
    "fingerprint": ("fingerprints", Fingerprint),
    "report": ("reports", LayerReport),
    "fixed_A": ("fixed", Fingerprint),
    "protection": ("protection", Protection),
}


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of an adapter folder by their names in PEFT's file. Raises UserError for a damaged file."""
    file = next(folder / name for name in ADAPTER_FILES if (folder / name).is_file())
    tensors: dict[str, Tensor] = read_weights(file)
    return tensors


def read_sidecar(folder: Path) -> Sidecar | None:
    """Return milora.json of an adapter folder, or None if the folder has none.

    Raises AdapterError if the file is damaged or it has another format version.
    """
    file = folder / FILE_NAME
    if not file.is_file():
        return None
    hint = "restore the file, or remove it: the folder is then a plain LoRA for inference"
    with expected_format("the file is damaged", code="sidecar-damaged", where=str(file), hint=hint, kind=AdapterError):
        data = json.loads(file.read_text(encoding="utf-8"))
        if data["format_version"] != FORMAT_VERSION:
            message = f"has format version {data['format_version']!r}, and only version {FORMAT_VERSION} is read"
            hint = "use the version of milora-vl that wrote it, or load the folder with stock PEFT as a plain LoRA"
            raise AdapterError(message, where=str(file), hint=hint)
        own = _from_content(data["own"]) if "own" in data else None
        return dataclasses.replace(_from_content(data), tasks=tuple(data.get("tasks", ())), own=own)


def require_trainable(folder: Path, saved: Sidecar | None, *, is_trainable: bool) -> None:
    """Raise AdapterError for an adapter that would train further, and cannot: of several tasks."""
    if saved is None or not is_trainable:
        return
    if saved.own is not None:
        message = f"holds the updates of {len(saved.tasks)} tasks in one LoRA, which cannot train further"
        hint = (
            f"train another task after it:  python -m milora_vl.train --after {folder}\nor merge it:  {MERGE} {folder}"
        )
        raise AdapterError(message, code="adapter-several-tasks", where=str(folder), hint=hint)


def _from_content(content: Mapping[str, Any]) -> Sidecar:
    targets, names = [], {}
    parts: dict[str, Any] = {name: {} for name, _ in _PARTS.values()}
    for path, entry in content["modules"].items():
        values = {**entry, "path": path}
        if entry["method"] not in METHODS:
            raise KeyError(f"method {entry['method']!r}")
        target = _restored(Target, values)
        if target.rank is not None and not are_sizes((target.rank, target.alpha)):
            raise ValueError(f"rank {target.rank} and alpha {target.alpha} of {path}")
        targets.append(target)
        names[path] = entry["name"]
        for key, (name, kind) in _PARTS.items():
            if key in entry:
                parts[name][path] = _restored(kind, entry[key])
    frozen = {name: _restored(Fingerprint, values) for name, values in content["frozen"].items()}
    anchors = tuple(content["anchors"])
    return Sidecar(targets, names, anchors=anchors, frozen=frozen, **parts)


def _restored(kind: type[Kind], values: Mapping[str, Any]) -> Kind:
    """Return the dataclass whose fields JSON holds, with tuples for its lists and without other keys."""
    known = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items() if name in known})


def locate(sidecar: Sidecar, model_names: Mapping[str, str]) -> Sidecar:
    """Return the sidecar with the module paths of a model; `model_names` maps its paths to layout-independent names.

    Raises AdapterError for modules that the model does not have.
    """
    if all(target.path in model_names for target in sidecar.targets):
        return sidecar
    path_by_name = {name: path for path, name in model_names.items()}
    missing = [name for name in sidecar.names.values() if name not in path_by_name]
    if missing:
        count = f"{len(missing):,} of the {len(sidecar.names):,} modules"
        message = f"the model lacks {count} that the adapter trains: {', '.join(missing[:3])}"
        raise AdapterError(message, hint="load the base model that the adapter was trained on")
    path_of = {path: path_by_name[name] for path, name in sidecar.names.items()}
    changes: dict[str, Any] = {}
    for name in ("names", *(name for name, _ in _PARTS.values())):
        changes[name] = {path_of[path]: value for path, value in getattr(sidecar, name).items()}
    changes["reports"] = {path: dataclasses.replace(report, path=path) for path, report in changes["reports"].items()}
    targets = [dataclasses.replace(t, path=path_of[t.path]) for t in sidecar.targets]
    return dataclasses.replace(sidecar, targets=targets, own=None, **changes)


def new_paths(saved: Sidecar, here: Sidecar) -> dict[str, str]:
    return {old.path: new.path for old, new in zip(saved.targets, here.targets, strict=True)}


def require_layers(model: nn.Module, sidecar: Sidecar) -> None:
    """Raise AdapterError if the layers of a base, which needs no weights, are not those that the adapter changes."""
    located = locate(sidecar, canonical_names(model))
    for target in (target for target in located.targets if target.rank is not None):
        shape = matrix_shape(model.get_submodule(target.path))
        is_vocabulary = located.names[target.path].count(".") == 1
        if shape != target.shape and not is_vocabulary:  # it may be padded
            message = f"this is not the base model that the adapter was made for: {target.shape} there, here {shape}"
            hint = "name the base model that adapter_config.json names"
            raise AdapterError(message, code="adapter-wrong-base", where=target.path, hint=hint)


def fitted(model: nn.Module, sidecar: Sidecar, *, allow_base_mismatch: bool, is_resumed: bool = False) -> Sidecar:
    """Return the sidecar with the module paths of `model`, after comparing its fingerprints with the weights.

    Raises AdapterError for missing modules and, without `allow_base_mismatch`, for adapted weights that differ. Warns
    if other parameters differ; with `is_resumed` this is an AdapterError too. Modules that the model lacks are not
    compared (LLaVA loads its vision tower later), and neither is a shorter vocabulary (without padding).
    """
    base = base_model_of(model)
    require_readable(base)
    names = canonical_names(base)
    located = locate(sidecar, names)
    if not allow_base_mismatch:
        _require_base(base, located)
        paths = {"": "", **{name: path for path, name in names.items()}}
        here = {name: saved for name, saved in located.frozen.items() if name.rpartition(".")[0] in paths}
        differ = [name for name, saved in here.items() if _differs(saved, base, name, paths)]
        message = "this frozen parameter is not that of the base model that the adapter was made for"
        message += f" ({len(differ):,} of {len(here):,} differ)"
        hint = "load the base model that adapter_config.json names"
        if differ and is_resumed:
            raise AdapterError(message, code="adapter-wrong-base", where=differ[0], hint=hint)
        if differ:
            warnings.warn(f"{differ[0]}: {message}: {hint}", stacklevel=3)
    return located


def frozen_fingerprints(model: nn.Module, targets: Sequence[Target]) -> dict[str, Fingerprint]:
    """Return the fingerprints of all parameters outside `targets`, see `Sidecar`."""
    names, found = canonical_names(model), {}
    adapted = {target.path for target in targets if target.rank is not None}
    full = {target.path for target in targets if target.rank is None}
    for parameter, _ in model.named_parameters():
        path, _, leaf = parameter.rpartition(".")
        if not (module_path(path, full) or (leaf == "weight" and path in adapted)):
            module = model.get_submodule(path)
            here = fingerprint(read_parameter(module, leaf))
            found[f"{names.get(path, path)}.{leaf}"] = dataclasses.replace(here, eps=max(here.eps, precision(module)))
    return found


def _differs(saved: Fingerprint, base: nn.Module, parameter: str, paths: Mapping[str, str]) -> bool:
    """Return whether a parameter differs from `saved`; `paths` maps names of modules to paths."""
    name, _, leaf = parameter.rpartition(".")
    layer = base_layer(base, paths[name])
    if leaf not in dict(layer.named_parameters(recurse=False)):
        return True
    W = read_parameter(layer, leaf)
    is_shorter = name.startswith("language.") and name.count(".") == 1 and W.numel() < prod(saved.shape)
    return not is_shorter and distance(saved, W, precision(layer)) > 1


def _require_base(base: nn.Module, sidecar: Sidecar) -> None:
    layers = {path: base_layer(base, path) for path in sidecar.fingerprints}
    if any(precision(layer) for layer in layers.values()):
        logger.warning("The base model is quantized: the check finds only a clearly different base model.")
    distances = {
        path: distance(saved, read_matrix(layers[path]), precision(layers[path]))
        for path, saved in sidecar.fingerprints.items()
    }
    # A distance of 1 is what rounding to half precision explains.
    wrong = sorted((path for path in distances if distances[path] > 1), key=lambda path: -distances[path])
    if wrong:
        raise AdapterError(
            f"this is not the base model that the adapter was made for: {len(wrong):,} of {len(distances):,} weights "
            f"differ, this one most ({distances[wrong[0]]:.0f} times what rounding explains)",
            code="adapter-wrong-base",
            where=wrong[0],
            hint="load the base model that adapter_config.json names; export, analyze and load_adapter can skip this "
            "check (allow_base_mismatch)",
        )


def precision(layer: nn.Module) -> float:
    """Return the relative precision of a quantized weight; 0 for others, whose dtype determines it."""
    weight = dict(layer.named_parameters(recurse=False)).get("weight")
    return 0.0 if weight is None else QUANTIZED_EPS.get(weight.dtype, 0.0)


def require_readable(base: nn.Module) -> None:
    """Raise AdapterError if bitsandbytes has repacked 4-bit weights, which makes them unreadable."""
    repacked = keep_weights_readable(base)
    if repacked:
        message = f"a forward in eval mode has repacked this 4-bit weight, so it is unreadable ({len(repacked):,} are)"
        hint = "reload the base model and add the adapter before any forward pass"
        raise AdapterError(message, where=repacked[0], hint=hint)


def require_same_kind(folder: Path, saved: Sidecar | None, expected: Sidecar) -> None:
    """Raise AdapterError unless the adapter in `folder` has the same modules and ranks as the loaded one."""
    hint = "load it under another adapter name, or into the base model"
    if saved is None:
        message = f"has no {FILE_NAME}: a plain LoRA would replace the anchor of this adapter"
        raise AdapterError(message, where=str(folder), hint=hint)
    saved_ranks = {saved.names[path]: rank for path, rank in saved.ranks.items()}
    ranks = {expected.names[path]: rank for path, rank in expected.ranks.items()}
    differ = sorted(name for name in saved_ranks | ranks if saved_ranks.get(name) != ranks.get(name))
    if differ:
        both = f"saved rank {saved_ranks.get(differ[0])}, loaded rank {ranks.get(differ[0])}"
        message = f"the saved adapter differs from the loaded one in {len(differ):,} modules, first {differ[0]}: {both}"
        raise AdapterError(message, where=str(folder), hint=hint)
