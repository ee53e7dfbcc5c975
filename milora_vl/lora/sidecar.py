"""milora.json, the file beside an adapter: what each module is, how it was made, and a sketch of its base weight.

Without it the folder is still a correct LoRA of rank 2r; with it, training continues as before. `require_weights`
compares the file with the weights beside it, by names and shapes alone.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from milora_vl.initialize import LayerReport
from milora_vl.lora.errors import AdapterError
from milora_vl.policy.protect import Protect
from milora_vl.policy.rules import METHODS, FloorSigma, Target
from milora_vl.weights.fingerprint import Sketch

FILE_NAME = "milora.json"
FORMAT_VERSION = 1
FORMS = ("anchored", "residual")


@dataclass(frozen=True, slots=True)
class Sidecar:
    """The content of milora.json. `names` holds the layout-free name of each target, by path."""

    form: str
    targets: Sequence[Target]
    names: Mapping[str, str]
    sketches: Mapping[str, Sketch]
    reports: Mapping[str, LayerReport]

    def to_json(self) -> str:
        """Return the file's text."""
        modules = {target.path: self._module(target) for target in self.targets}
        return json.dumps({"format_version": FORMAT_VERSION, "form": self.form, "modules": modules}, indent=1) + "\n"

    def _module(self, target: Target) -> dict[str, Any]:
        fields = dataclasses.asdict(target)
        del fields["path"]
        if isinstance(target.sigma, FloorSigma):
            fields["sigma"] = {"floor": target.sigma.floor}
        entry = {"name": self.names[target.path], "part": target.part, **fields}
        if target.path in self.sketches:
            entry["fingerprint"] = dataclasses.asdict(self.sketches[target.path])
        if target.path in self.reports:
            entry["report"] = dataclasses.asdict(self.reports[target.path])
        return entry

    @property
    def ranks(self) -> dict[str, int]:
        """Return the rank r of every module with a trained half and an anchor, by path."""
        return {t.path: t.rank for t in self.targets if t.has_anchor and t.rank is not None}


def read_sidecar(folder: Path) -> Sidecar | None:
    """Read milora.json of an adapter folder; None where there is none.

    Raises AdapterError if the file is damaged or of a later format.
    """
    file = folder / FILE_NAME
    if not file.is_file():
        return None
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        version = data["format_version"]
        if version > FORMAT_VERSION:
            raise AdapterError(
                f"{file} has format {version}, this version reads up to {FORMAT_VERSION}: update milora-vl,\n"
                "or load the folder with stock PEFT: it is a plain LoRA"
            )
        if data["form"] not in FORMS:
            raise KeyError(f"form {data['form']!r}")
        return _from_modules(data["form"], data["modules"])
    except AdapterError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise AdapterError(
            f"{file} is damaged ({type(error).__name__}: {error})\n"
            "restore it, or remove it: the folder is then a plain LoRA for inference"
        ) from error


def _from_modules(form: str, modules: Mapping[str, Mapping[str, Any]]) -> Sidecar:
    known = {field.name for field in dataclasses.fields(Target)}
    targets, sketches, reports, names = [], {}, {}, {}
    for path, entry in modules.items():
        fields = {name: value for name, value in entry.items() if name in known}
        sigma = fields.get("sigma", "keep")
        fields["sigma"] = FloorSigma(sigma["floor"]) if isinstance(sigma, Mapping) else sigma
        fields["protect"] = Protect(**fields["protect"]) if fields.get("protect") else None
        fields["shape"] = tuple(fields["shape"])
        if fields["method"] not in METHODS:
            raise KeyError(f"method {fields['method']!r}")
        targets.append(Target(path=path, **fields))
        names[path] = entry["name"]
        if "fingerprint" in entry:
            sketches[path] = Sketch.from_dict(entry["fingerprint"])
        if "report" in entry:
            rows, columns = entry["report"]["shape"]
            reports[path] = LayerReport(**{**entry["report"], "shape": (rows, columns)})
    return Sidecar(form, targets, names, sketches, reports)


def locate(sidecar: Sidecar, model_names: Mapping[str, str]) -> Sidecar:
    """Return the sidecar with the module paths of a model; `model_names` gives the layout-free name of each path.

    Raises AdapterError for modules that the model does not have.
    """
    if all(target.path in model_names for target in sidecar.targets):
        return sidecar
    path_by_name = {name: path for path, name in model_names.items()}
    missing = [name for name in sidecar.names.values() if name not in path_by_name]
    if missing:
        raise AdapterError(
            f"the adapter trains {len(sidecar.names):,} modules, {len(missing):,} of which this model does not have:\n"
            f"{', '.join(missing[:3])}"
        )
    path_of = {path: path_by_name[name] for path, name in sidecar.names.items()}
    return Sidecar(
        sidecar.form,
        [dataclasses.replace(t, path=path_of[t.path]) for t in sidecar.targets],
        {path_of[path]: name for path, name in sidecar.names.items()},
        {path_of[path]: sketch for path, sketch in sidecar.sketches.items()},
        {path_of[path]: dataclasses.replace(r, path=path_of[path]) for path, r in sidecar.reports.items()},
    )


_PREFIX = "base_model.model."


def require_weights(folder: Path, sidecar: Sidecar) -> None:
    """Raise AdapterError for modules without weights (a projector, say), other ranks, and factors of other modules.

    Reads the header of adapter_model.safetensors; a pickled file is PEFT's to check.
    """
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        return
    with safe_open(file, framework="pt") as stored:
        names = set(stored.keys())
        shapes = {name: stored.get_slice(name).get_shape() for name in names if "lora_" in name}
    for target in sidecar.targets:
        missing = _missing(target, names)
        if missing is not None:
            raise AdapterError(
                f"{file} lacks {missing}, which {FILE_NAME} tells of ({target.method}, {target.tower or 'no tower'})\n"
                "is it a checkpoint of code that leaves it out? take the folder that was saved at the end"
            )
        rank = _rank(target, shapes)
        if rank is not None and target.rank is not None and rank != target.rank * (2 if target.has_anchor else 1):
            raise AdapterError(f"{target.path}: {file} has rank {rank}, which is not that of {FILE_NAME}")
    known = tuple(f"{_PREFIX}{target.path}." for target in sidecar.targets)
    others = sorted(name for name in shapes if not name.startswith(known))
    if others:
        raise AdapterError(f"{file} holds {others[0]}, of which {FILE_NAME} does not tell ({len(others):,} such)")


def _missing(target: Target, names: set[str]) -> str | None:
    start = f"{_PREFIX}{target.path}."
    if target.rank is None:
        return None if any(name.startswith(start) for name in names) else target.path
    pairs = (("lora_A.weight", "lora_embedding_A"), ("lora_B.weight", "lora_embedding_B"))
    return next((start + pair[0] for pair in pairs if not {start + name for name in pair} & names), None)


def _rank(target: Target, shapes: dict[str, list[int]]) -> int | None:
    start = f"{_PREFIX}{target.path}."
    return next(
        (shapes[start + name][0] for name in ("lora_A.weight", "lora_embedding_A") if start + name in shapes), None
    )
