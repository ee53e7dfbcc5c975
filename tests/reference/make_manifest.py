"""Extend tests/reference/manifest.json: what users and their code rely on.  python tests/reference/make_manifest.py

What is in it stays: this only adds, so run it when something is added. What may go, with a deprecation, is removed by
hand.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from milora_vl.__main__ import main as milora
from milora_vl.core.policy import Rule
from milora_vl.train.recipe import Recipe
from studies.__main__ import main as studies

ROOT = Path(__file__).resolve().parents[2]
TARGET = Path(__file__).with_name("manifest.json")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMANDS = [
    *(f"milora_vl.{name}" for name in "train compose report sweep chat export forgetting analyze demo".split()),
    "milora_vl.interop.llava",
    "milora_vl.interop.replace",
    *(f"milora_data {name}" for name in "check convert show emoji easy-vqa".split()),
    *(f"milora_eval {name}" for name in "run ls score compare view".split()),
    "milora_eval.lm_eval",
    "studies",
]


def flags(command: str) -> list[str]:
    """The long flags in the help of a command, also those of its examples."""
    return _flags_in(_help(command))


def declared(command: str) -> list[str]:
    """The long flags that a command declares: those at the start of a line of its help."""
    return _flags_in("\n".join(line for line in _help(command).splitlines() if line.lstrip().startswith("-")))


def _help(command: str) -> str:
    module, *rest = command.split()
    words = [module.removeprefix("milora_"), *rest] if rest else [module.rpartition(".")[2]]
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        if command == "studies":
            studies(["--help"])
        else:
            milora([*words, "--help"])
    return shown.getvalue()


def _flags_in(text: str) -> list[str]:
    return sorted(set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text)))


def keys(model: Any, prefix: str = "") -> list[str]:
    """The dotted keys of a recipe's schema."""
    found = []
    for name, field in model.model_fields.items():
        found.append(prefix + name)
        if hasattr(field.annotation, "model_fields"):
            found += keys(field.annotation, f"{prefix}{name}.")
    return found


def imports() -> list[str]:
    """`from module import name` of ours as the pages show it, and what docs/api.md documents."""
    found = set()
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for module, names in re.findall(
            r"from ((?:milora_vl|milora_data|milora_eval|llava_recipes)[\w.]*) import ([\w, ]+)", text
        ):
            found |= {f"{module}:{name.strip()}" for name in names.split(",")}
        for path in re.findall(r"^::: ((?:milora_vl|milora_data|milora_eval)[\w.]*)\.(\w+)$", text, re.MULTILINE):
            found.add(":".join(path))
    return sorted(name for name in found if _exists(name.partition(":")[0]))


def _exists(module: str) -> bool:
    """Whether a module is ours, and not the example of one that a reader writes."""
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def manifest_of_keys() -> dict[str, list[str]]:
    """The keys of recipes and of policy rules."""
    return {"recipe_keys": keys(Recipe), "rule_keys": list(Rule.model_fields)}


def manifest() -> dict[str, Any]:
    """All of it."""
    return {"flags": {command: declared(command) for command in COMMANDS}, **manifest_of_keys(), "imports": imports()}


def extended(old: Any, new: Any) -> Any:
    """Return the old manifest with everything of the new one that it lacks."""
    if isinstance(new, dict):
        return old | {key: extended(old.get(key, type(value)()), value) for key, value in new.items()}
    return [*old, *(entry for entry in new if entry not in old)]


if __name__ == "__main__":
    before = json.loads(TARGET.read_text(encoding="utf-8"))
    TARGET.write_text(json.dumps(extended(before, manifest()), indent=1) + "\n", encoding="utf-8")
