"""milora.json, the sidecar file of an adapter: the settings of each module and a fingerprint of its base weight.

Without this file the folder is still a correct LoRA of rank 2r for inference. With it, the trained half and the anchor
are known again, so training can continue.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from milora_vl.adapter_folders import ADAPTER_FILES
from milora_vl.initialize import LayerReport
from milora_vl.lora.errors import AdapterError
from milora_vl.policy.methods import METHODS
from milora_vl.policy.rules import FloorSigma, Protect, Target
from milora_vl.weights.fingerprint import Sketch

FILE_NAME = "milora.json"
FORMAT_VERSION = 1
FORMS = ("anchored", "residual")


@dataclass(frozen=True, slots=True)
class Sidecar:
    """The content of milora.json. `names` maps the path of each target to a name that holds in every layout.

    `inputs` is the hash of the file with the protected inputs, see `milora_vl/calibration/files.py`.
    """

    form: str
    targets: Sequence[Target]
    names: Mapping[str, str]
    sketches: Mapping[str, Sketch]
    reports: Mapping[str, LayerReport]
    inputs: str | None = None

    def to_json(self) -> str:
        """Return the text of the file."""
        modules = {target.path: self._module(target) for target in self.targets}
        header = {"format_version": FORMAT_VERSION, "form": self.form}
        if self.inputs is not None:
            header["protected_inputs"] = self.inputs
        return json.dumps({**header, "modules": modules}, indent=1) + "\n"

    def _module(self, target: Target) -> dict[str, Any]:
        fields = target.to_dict()
        del fields["path"]
        entry = {"name": self.names[target.path], "part": target.part, **fields}
        if target.path in self.sketches:
            entry["fingerprint"] = dataclasses.asdict(self.sketches[target.path])
        if target.path in self.reports:
            entry["report"] = dataclasses.asdict(self.reports[target.path])
        return entry

    @property
    def ranks(self) -> dict[str, int]:
        """Return the rank r of every module that has an anchor, by path."""
        return {t.path: t.rank for t in self.targets if t.has_anchor and t.rank is not None}


def read_sidecar(folder: Path) -> Sidecar | None:
    """Return milora.json of an adapter folder, or None if the folder has none.

    Raises AdapterError if the file is damaged or its format is newer than this version.
    """
    file = folder / FILE_NAME
    if not file.is_file():
        return None
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        version = data["format_version"]
        if version > FORMAT_VERSION:
            raise AdapterError(
                f"this file has format {version}, and this version reads up to {FORMAT_VERSION}",
                code="adapter-newer-format",
                where=str(file),
                hint="update milora-vl, or load the folder with stock PEFT as a plain LoRA",
            )
        if data["form"] not in FORMS:
            raise KeyError(f"form {data['form']!r}")
        return dataclasses.replace(_from_modules(data["form"], data["modules"]), inputs=data.get("protected_inputs"))
    except AdapterError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise AdapterError(
            f"the file is damaged ({type(error).__name__}: {error})",
            code="adapter-damaged-file",
            where=str(file),
            hint="restore the file, or remove it: the folder is then a plain LoRA for inference",
        ) from error


def _from_modules(form: str, modules: Mapping[str, Mapping[str, Any]]) -> Sidecar:
    known = {field.name for field in dataclasses.fields(Target)}
    targets, sketches, reports, names = [], {}, {}, {}
    for path, entry in modules.items():
        fields = {name: value for name, value in entry.items() if name in known}
        sigma = fields.get("sigma", "keep")
        fields["sigma"] = FloorSigma(**sigma) if isinstance(sigma, Mapping) else sigma
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
    """Return the sidecar with the module paths of a model; `model_names` maps its paths to layout-independent names.

    Raises AdapterError for modules that the model does not have.
    """
    if all(target.path in model_names for target in sidecar.targets):
        return sidecar
    path_by_name = {name: path for path, name in model_names.items()}
    missing = [name for name in sidecar.names.values() if name not in path_by_name]
    if missing:
        raise AdapterError(
            f"the model lacks {len(missing):,} of the {len(sidecar.names):,} modules that the adapter trains: "
            f"{', '.join(missing[:3])}",
            code="adapter-missing-modules",
            hint="load the base model that the adapter was trained on",
        )
    path_of = {path: path_by_name[name] for path, name in sidecar.names.items()}
    return Sidecar(
        sidecar.form,
        [dataclasses.replace(t, path=path_of[t.path]) for t in sidecar.targets],
        {path_of[path]: name for path, name in sidecar.names.items()},
        {path_of[path]: sketch for path, sketch in sidecar.sketches.items()},
        {path_of[path]: dataclasses.replace(r, path=path_of[path]) for path, r in sidecar.reports.items()},
        sidecar.inputs,
    )


_PREFIX = "base_model.model."


def require_weights(folder: Path, sidecar: Sidecar) -> None:
    """Raise AdapterError unless adapter_model.safetensors holds the modules and ranks that milora.json lists.

    Reads the header of the file only, names and shapes. PEFT checks pickled files.
    """
    file = folder / ADAPTER_FILES[0]
    if not file.is_file():
        return
    with safe_open(file, framework="pt") as stored:
        names = set(stored.keys())
        shapes = {name: stored.get_slice(name).get_shape() for name in names if "lora_" in name}
    for target in sidecar.targets:
        missing = _missing(target, names)
        if missing is not None:
            raise AdapterError(
                f"lacks {missing}, which {FILE_NAME} lists ({target.method}, {target.tower or 'no tower'})",
                code="adapter-missing-weights",
                where=str(file),
                hint="some training code leaves modules out of its checkpoints: use the folder saved at the end",
            )
        rank = _rank(target, shapes)
        if target.rank is None or rank is None:
            continue
        expected = target.rank * (2 if target.has_anchor else 1)
        if rank != expected:
            raise AdapterError(
                f"{target.path} has rank {rank}, but {FILE_NAME} expects {expected}",
                code="adapter-rank-mismatch",
                where=str(file),
                hint="restore the two files of one save",
            )
    known = tuple(f"{_PREFIX}{target.path}." for target in sidecar.targets)
    others = sorted(name for name in shapes if not name.startswith(known))
    if others:
        raise AdapterError(
            f"contains {others[0]}, which {FILE_NAME} does not list ({len(others):,} such tensors)",
            code="adapter-unlisted-weights",
            where=str(file),
            hint="restore the two files of one save",
        )


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
