"""Rewrite milora_vl/recipe/hf_flags.json: Hugging Face's training flags, the union over the versions it was run with.

Run it in an environment with the transformers version to add:  python tests/reference/make_hf_flags.py
"""

import dataclasses
import enum
import json
import re
import types
import typing
from pathlib import Path
from typing import Any

import transformers
from transformers import TrainingArguments

TARGET = Path(__file__).parents[2] / "milora_vl" / "recipe" / "hf_flags.json"
SCALARS = {bool: "bool", int: "int", float: "float", str: "str"}
NOT_FLAGS = {"_n_gpu", "parallelism_config"}  # an internal counter; a Python object


def kind(hint: object) -> tuple[str, list[str]]:
    """Name of the JSON type of a field, and its choices where it has some."""
    members = [m for m in typing.get_args(hint) if m is not type(None)] or [hint]
    enums = [m for m in members if isinstance(m, type) and issubclass(m, enum.Enum)]
    if enums:
        return "str", [str(e.value) for e in enums[0]]
    if typing.get_origin(hint) not in (typing.Union, types.UnionType):
        members = [hint]
    members = [m for m in members if typing.get_origin(m) is not typing.Literal]
    names = {SCALARS.get(m) or ("list" if "list" in str(m).lower() else "dict") for m in members}
    if "dict" in names:
        return "dict", []
    if "list" in names:
        return "list", []
    if names == {"str", "bool"}:
        return "str", []
    return ("float" if "float" in names else names.pop()), []


def flags() -> dict[str, dict[str, Any]]:
    """Every field of the installed TrainingArguments as {name: {type, choices, default, help}}."""
    hints = typing.get_type_hints(TrainingArguments)
    out: dict[str, dict[str, Any]] = {}
    for field in dataclasses.fields(TrainingArguments):
        if field.name in NOT_FLAGS:
            continue
        type_, choices = kind(hints[field.name])
        default = None if dataclasses.MISSING is field.default else field.default
        text = re.sub(r"\s+", " ", str(field.metadata.get("help", ""))).strip().replace("%%", "%")
        out[field.name] = {
            "type": type_,
            "choices": choices,
            "default": default.value if isinstance(default, enum.Enum) else default,
            "help": text if len(text) <= 160 else text[:160].rsplit(" ", 1)[0] + " ...",
        }
    return out


def merged(old: dict[str, dict[str, Any]], new: dict[str, dict[str, Any]], version: str) -> dict[str, dict[str, Any]]:
    """Union; where both have a flag the newest version's text wins, and `versions` lists who has it."""
    out = {}
    for name in sorted({*old, *new}):
        seen = [v for v in old.get(name, {}).get("versions", []) if v != version]
        versions = sorted([*seen, version] if name in new else seen, key=lambda v: [int(n) for n in v.split(".")])
        newest = name in new and versions[-1] == version
        out[name] = {**(new[name] if newest else old.get(name) or new[name]), "versions": versions}
    return out


if __name__ == "__main__":
    known = json.loads(TARGET.read_text()) if TARGET.exists() else {}
    version = ".".join(transformers.__version__.split(".")[:2])
    lines = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in merged(known, flags(), version).items()]
    TARGET.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"{TARGET.name}: {len(lines)} flags, transformers {version} added")
