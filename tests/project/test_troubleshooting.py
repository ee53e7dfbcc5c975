"""Every problem has a code, and docs/troubleshooting.md has an entry for each code."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
ENTRIES = re.findall(r"^\| `([a-z0-9-]+)` \|", PAGE, re.MULTILINE)
PACKAGES = ("milora_vl", "data_tools/milora_data", "eval/milora_eval")


def error_classes() -> set[str]:
    """The names of UserError and of all classes below it."""
    bases = {
        node.name: [base.id for base in node.bases if isinstance(base, ast.Name)]
        for _, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }
    found, before = {"UserError"}, 0
    while len(found) != before:
        before = len(found)
        found |= {name for name, above in bases.items() if found & set(above)}
    return found


def trees() -> Iterator[tuple[Path, ast.Module]]:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            yield path, ast.parse(path.read_text(encoding="utf-8"))


def calls(*names: str) -> Iterator[tuple[str, ast.Call]]:
    for path, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names:
                yield f"{path.relative_to(ROOT)}:{node.lineno}", node


def code_of(call: ast.Call) -> ast.expr | None:
    named = {keyword.arg: keyword.value for keyword in call.keywords}
    is_problem = isinstance(call.func, ast.Name) and call.func.id == "Problem"
    return named.get("code") or (call.args[1] if is_problem and len(call.args) > 1 else None)


def test_every_raised_error_has_a_code() -> None:
    classes = error_classes() - {"RecipeError", "MissingImages"}  # they add the code themselves
    lacking = []
    for path, tree in trees():
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)):
                continue
            call = node.exc
            if not (isinstance(call.func, ast.Name) and call.func.id in classes):
                continue
            names = {keyword.arg for keyword in call.keywords}
            if not names & {"code", "problems"} and call.args:
                lacking.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not lacking


# Codes that a variable holds before they reach the call, and the files with such calls.
INDIRECT = {"data-folder", "path-unusable", "policy-rank-too-large"}
INDIRECT |= {f"{area}-unknown-key" for area in ("policy", "recipe", "study")} | {"study-value"}  # of pydantic's errors
HOLDERS = {
    "data_tools/milora_data/command/cli.py",
    "data_tools/milora_data/errors.py",
    "data_tools/milora_data/formats/jsonfile.py",
    "data_tools/milora_data/images/files.py",
    "milora_vl/adapters/source.py",
    "milora_vl/recipe/on_model.py",
    "milora_vl/strict.py",
}


def texts(node: ast.expr) -> set[str]:
    """The texts that an argument may be: its own, or one of two by a condition."""
    if isinstance(node, ast.IfExp):
        return texts(node.body) | texts(node.orelse)
    return {node.value} if isinstance(node, ast.Constant) and isinstance(node.value, str) else set()


def test_every_problem_has_a_code() -> None:
    made = {place: code_of(call) for place, call in calls("Problem")}
    assert len(made) > 20
    empty = [place for place, code in made.items() if code is None or texts(code) == {""}]
    assert not empty


def test_every_code_has_one_entry_and_every_entry_is_a_code() -> None:
    made = [(place, code) for place, call in raising() if (code := code_of(call)) is not None]
    assert {place.partition(":")[0] for place, code in made if not texts(code)} == HOLDERS
    used = {text for _, code in made for text in texts(code) if text}
    assert len(ENTRIES) == len(set(ENTRIES))
    assert set(ENTRIES) == used | INDIRECT
    assert not used & INDIRECT


def raising() -> Iterator[tuple[str, ast.Call]]:
    """Calls that make a problem or an error, also as the base class of an error."""
    yield from calls("Problem", *error_classes())
    for path, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "__init__":
                yield f"{path.relative_to(ROOT)}:{node.lineno}", node
