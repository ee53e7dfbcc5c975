"""Rewrite milora_vl/train/recipe/hf_flags.json: Hugging Face's training flags.

Run it in an environment with the newest supported transformers:  python tests/reference/make_hf_flags.py
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

TARGET = Path(__file__).parents[2] / "milora_vl" / "train" / "recipe" / "hf_flags.json"
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


if __name__ == "__main__":
    lines = [f"{json.dumps(name)}: {json.dumps(flag)}" for name, flag in sorted(flags().items())]
    TARGET.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"{TARGET.name}: {len(lines)} flags of transformers {transformers.__version__}")
