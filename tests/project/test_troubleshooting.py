"""Every problem has a code, and docs/troubleshooting.md has an entry for each code, with its message."""

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
INDIRECT = {"data-folder", "policy-rank-too-large"}
INDIRECT |= {f"{area}-unknown-key" for area in ("policy", "recipe", "study")}  # of pydantic's errors
HOLDERS = {
    "milora_vl/base/errors.py",
    "data_tools/milora_data/formats/jsonfile.py",
    "data_tools/milora_data/pictures/files.py",
    "milora_vl/recipe/on_model.py",
    "milora_vl/base/strict_models.py",
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


def test_the_place_of_a_flag_is_the_flag_and_the_message_has_its_value() -> None:
    """A program that reads the problems finds them by the flag; the value belongs to the message."""
    places = [
        (place, pattern(keyword.value))
        for place, call in raising()
        for keyword in call.keywords
        if keyword.arg == "where"
    ]
    assert [(place, text) for place, text in places if text.startswith("--") and " " in text] == []


def raising() -> Iterator[tuple[str, ast.Call]]:
    """Calls that make a problem or an error, also as the base class of an error."""
    yield from calls("Problem", "expected_format", *error_classes())
    for path, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "__init__":
                yield f"{path.relative_to(ROOT)}:{node.lineno}", node


MESSAGES = re.findall(r"^\| `([a-z0-9-]+)` \| (.*?) \|", PAGE, re.MULTILINE)
ANY = "\0"  # what an f-string puts in, and `...` on the page
# The share of a quoted text that must stand in the source literally; the rest may fill placeholders of an f-string.
LITERAL = 0.6


def pattern(node: ast.expr) -> str:
    """The text of a string in the source, with ANY for every placeholder."""
    if isinstance(node, ast.JoinedStr):
        return "".join(pattern(value) for value in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ANY


def patterns() -> set[str]:
    """Every string of the source that is no docstring."""
    found = set()
    for _, tree in trees():
        parts = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        parts |= {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
        found |= {pattern(node) for node in ast.walk(tree) if isinstance(node, ast.expr) and id(node) not in parts}
    return found


def num_literal(quoted: str, text: str) -> int:
    """How many characters of `quoted` a part of `text` holds literally, if ANY stands for the others; else 0."""
    states = dict.fromkeys(range(len(text) + 1), 0)  # position in `text` -> characters matched so far
    for character in quoted:
        following: dict[int, int] = {}
        for place, matched in states.items():
            if character == ANY:
                reached = dict.fromkeys(range(place, len(text) + 1), matched)
            elif text[place : place + 1] == character:
                reached = {place + 1: matched + 1}
            else:
                reached = {place: matched} if text[place : place + 1] == ANY else {}
            for after, count in reached.items():
                while count > following.get(after, -1):
                    following[after] = count
                    after += text[after : after + 1] == ANY  # a placeholder may stay empty
        states = following
    return max(states.values(), default=0)


def is_in_source(quoted: str, texts: set[str]) -> bool:
    needed = LITERAL * len(quoted.replace(ANY, ""))
    return any(quoted in text for text in texts) or any(
        ANY in quoted + text and num_literal(quoted, text) >= needed for text in texts
    )


def test_every_quoted_message_is_a_text_of_the_source() -> None:
    """In parentheses stands what other programs say."""
    texts = {text.replace("...", ANY) for text in patterns() if len(text.replace(ANY, "")) > 3}
    quoted = [(code, part) for code, cell in MESSAGES for part in cell.split(" / ") if not part.startswith("(")]
    assert len(quoted) > 250
    stale = [row for row in quoted if not is_in_source(row[1].replace("...", ANY), texts)]
    assert not stale, "\n".join(map(str, stale))


def test_a_message_with_other_words_is_noticed() -> None:
    texts = {f"the weight contains {ANY} NaN or infinite values, of {ANY}", f"{ANY}: {ANY}"}
    assert is_in_source("the weight contains 3 NaN or infinite values", texts)
    assert is_in_source(f"{ANY} NaN or infinite values", texts)
    assert not is_in_source("the weight contains 3 NaN or endless values", texts)
    assert not is_in_source("the weight: it contains 3 NaN or infinite values", texts)
