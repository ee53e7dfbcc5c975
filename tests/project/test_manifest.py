"""What users and their code rely on is still there: documented flags, keys of recipes and rules, and imports."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

REFERENCE = Path(__file__).resolve().parents[1] / "reference"
sys.path.insert(0, str(REFERENCE))
import make_manifest  # noqa: E402

MANIFEST: dict[str, Any] = json.loads((REFERENCE / "manifest.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("command", MANIFEST["flags"])
def test_no_flag_is_gone(command: str) -> None:
    assert set(MANIFEST["flags"][command]) - set(make_manifest.flags(command)) == set()


def test_no_key_of_recipes_and_rules_is_gone() -> None:
    now = make_manifest.manifest_of_keys()
    for kind in ("recipe_keys", "rule_keys"):
        assert set(MANIFEST[kind]) - set(now[kind]) == set()


@pytest.mark.parametrize("name", MANIFEST["imports"])
def test_documented_imports_work(name: str) -> None:
    module, _, attribute = name.partition(":")
    assert getattr(importlib.import_module(module), attribute) is not None
