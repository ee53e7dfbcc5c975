"""Strict pydantic models (recipes, rules of a policy, studies) and their errors as problems that a user can fix."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from milora_vl.common.errors import Key, Problem, UserError
from milora_vl.common.yaml_text import FLOAT

# What a value must be, by pydantic's type of error; the fields of Strict models raise no other types.
EXPECTED = {
    "bool_type": "true or false",
    "dict_type": "a mapping",
    "finite_number": "a finite number",
    "float_type": "a number",
    "greater_than": "a number above {gt:g}",
    "greater_than_equal": "a number of at least {ge:g}",
    "int_from_float": "a whole number",
    "int_type": "a whole number",
    "less_than": "a number below {lt:g}",
    "less_than_equal": "a number of at most {le:g}",
    "list_type": "a list",
    "literal_error": "one of {expected}",
    "model_type": "a mapping",
    "string_unicode": "text that UTF-8 can encode",
    "string_too_short": "text with at least {min_length} characters",
    "string_type": "text",
    "too_short": "a list of at least {min_length}",
}


class Strict(BaseModel):
    """A section of a YAML file: an unknown key or a value of the wrong type is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def problems_of(error: ValidationError, model: type[BaseModel], area: str) -> list[Problem]:
    """Return pydantic's errors about `model` as problems with the codes `area`-value and `area`-unknown-key.

    Each `where` is a key of the model: `data.path[0].weight`. A field with a `description` has one message
    for all wrong values: expected DESCRIPTION, got VALUE. A UserError of a validator keeps its own problems.
    """
    found: dict[Key, list[Problem]] = {}
    for fault in error.errors():
        key, field, section = _located(fault["loc"], model)
        cause = fault.get("ctx", {}).get("error")  # the exception of a validator
        if isinstance(cause, UserError):
            found[key] = [problem.inside(*key.parts) for problem in cause.problems]
        elif cause is not None:
            found[key] = [Problem(str(cause), f"{area}-value", key)]
        elif fault["type"] == "extra_forbidden":
            found[key] = [unknown_key(key, section.model_fields, f"{area}-unknown-key")]
        elif key not in found:  # every type of a union has its own error
            found[key] = [_wrong_value(fault, key, field, section, f"{area}-value")]
    # A value that fits one type of a union in part has the errors inside it, and no error as a whole.
    inner = [key for key in found if not any(_is_inside(other, key) for other in found)]
    return [problem for key in inner for problem in found[key]]


def _is_inside(inner: Key, outer: Key) -> bool:
    return inner != outer and inner.parts[: len(outer.parts)] == outer.parts


def _located(loc: tuple[int | str, ...], model: type[BaseModel]) -> tuple[Key, FieldInfo | None, type[BaseModel]]:
    """Return the key of an error, the last field on it, and the section that holds its last part."""
    key, field, section, parts = Key(()), None, model, iter(loc)
    for part in parts:
        key = key.below(part)
        field = section.model_fields.get(str(part), field)
        if field is not None and part in section.model_fields:
            section = next(_sections(field.annotation), section)
            is_union = get_origin(field.annotation) in (Union, UnionType)
            if is_union and len(set(get_args(field.annotation)) - {NoneType}) > 1:
                next(parts, None)  # the type, which is not a key
    return key, field, section


def _sections(kind: Any) -> Iterator[type[BaseModel]]:
    for inner in get_args(kind):
        yield from _sections(inner)
    if not get_args(kind) and isinstance(kind, type) and issubclass(kind, BaseModel):
        yield kind


def _wrong_value(fault: Any, key: Key, field: FieldInfo | None, section: type[BaseModel], code: str) -> Problem:
    value, described = fault["input"], field.description if field is not None else None
    if fault["type"] == "missing":
        examples = (field.examples if field is not None else None) or ()
        hint = "".join(f"for example  {fault['loc'][-1]}: {example}" for example in examples[:1])
        return Problem("missing" + (f": {described}" if described else ""), code, key, hint)
    if fault["type"] == "literal_error" and not described:
        words = re.findall(r"'([^']*)'", fault["ctx"]["expected"])
        near = difflib.get_close_matches(str(value), words, n=1)
        hint = f"did you mean {near[0]}?" if near else ""
        return Problem(f"expected one of {', '.join(words)}, got {value!r}", code, key, hint)
    if fault["type"] == "model_type" and not described:
        hint = f"its keys: {', '.join(section.model_fields)}"
        return Problem(f"expected a mapping, got {value!r}", code, key, hint)
    expected = described or EXPECTED[fault["type"]].format(**fault.get("ctx", {}))
    hint = f"without quotes it is a number:  {value}" if isinstance(value, str) and FLOAT.match(value) else ""
    return Problem(f"expected {expected}, got {value!r}", code, key, hint)


def unknown_key(key: Key, known: Iterable[str], code: str) -> Problem:
    """Return the problem of a key whose last part is not `known`; its hint names similar keys."""
    known = list(known)
    near = difflib.get_close_matches(str(key.parts[-1]), known, n=3, cutoff=0.6)
    if near:
        hint = f"did you mean {' or '.join(near)}?"
    else:
        few = len(known) < 15
        hint = f"known keys: {', '.join(known)}" if few else "known keys: the TrainingArguments of transformers"
    return Problem("unknown key", code, key, hint)
