"""Hypothesis strategies for hostile files: valid content with spoiled bytes, values, keys, names and structure."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

Draw = Callable[[st.SearchStrategy[Any]], Any]

PATHS = (
    "../planted-outside.txt",
    "../../../../etc/passwd",
    "/etc/passwd",
    "..\\..\\planted-outside.txt",
    "images/../../planted-outside.txt",
    "C:\\Windows\\win.ini",
    "CON",
    "nul.png",
    "COM1",
    "aux",
    "a:b",
    "file:///etc/passwd",
    "~/planted-outside.txt",
    "${HOME}/x",
    "|id",
    "a\nb",
    "link/planted-outside.txt",
    "a" * 300,
    ".",
    "..",
    "/",
)
NUMBERS = (0, -1, 1, 2**31, 2**63, 2**64, 10**30, -(2**63), 0.5, 1e308, float("nan"), float("inf"), -0.0, 1e-320)
TEXTS = (
    "",
    " ",
    "\x00",
    "\ud800",
    "\u202e",
    "\ufeff",
    "<image>",
    "<image>" * 50,
    "{{ 7 * 7 }}",
    "{% for a in range(9) %}{{ a }}{% endfor %}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "!!python/object/apply:os.system ['id']",
    "__import__('os').system('id')",
    "%s%n",
    "x" * 5000,
    "<script>alert(1)</script>",
    "NaN",
    "null",
    "true",
    "2026-02-30",
    "=cmd|'/c calc'!A1",
    "data:image/png;base64,AAAA",
    "data:image/png;base64",
    "https://user:pass@example.invalid/a.png",
)
NESTED = json.loads("[" * 60 + "]" * 60)
VALUES: tuple[Any, ...] = (None, True, False, [], {}, [[]], [None], {"": None}, NESTED, *PATHS, *NUMBERS, *TEXTS)

values = st.one_of(
    st.sampled_from(VALUES),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.recursive(st.none() | st.integers(-3, 3) | st.text(max_size=5), lambda x: st.lists(x, max_size=3), max_leaves=6),
    st.dictionaries(st.sampled_from(("id", "path", "image", "value", "a")), st.sampled_from(VALUES), max_size=3),
)


def _places(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place, *(found for key, item in inner for found in _places(item, (*place, key)))]


@st.composite
def spoiled(draw: Draw, valid: Any) -> Any:
    """A copy of `valid` in which one to three values are replaced, removed, renamed or doubled."""
    value = copy.deepcopy(valid)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.sampled_from(_places(value)))
        if not place:
            if draw(st.integers(0, 20)) == 0:
                value = copy.deepcopy(draw(values))
            continue
        parent = value
        for key in place[:-1]:
            parent = parent[key]
        act = draw(st.sampled_from(("replace", "replace", "replace", "remove", "rename", "double")))
        if act == "replace":
            parent[place[-1]] = copy.deepcopy(draw(values))  # the samples are shared
        elif act == "remove":
            del parent[place[-1]]
        elif isinstance(parent, list):
            parent.append(copy.deepcopy(parent[place[-1]]))
        else:
            parent[draw(st.sampled_from(TEXTS + PATHS))] = copy.deepcopy(parent[place[-1]])
            if act == "rename":
                del parent[place[-1]]
        if not isinstance(value, dict | list):
            break
    return value


@st.composite
def mangled(draw: Draw, valid: bytes) -> bytes:
    """`valid` with up to six spoiled places: flipped, cut, doubled, inserted bytes; often near the start."""
    content = bytearray(valid)
    for _ in range(draw(st.integers(1, 6))):
        if not content:
            break
        near = draw(st.sampled_from((16, 64, 512, len(content))))
        at = draw(st.integers(0, max(0, min(near, len(content)) - 1)))
        act = draw(st.sampled_from(("flip", "flip", "cut", "insert", "double", "end", "number")))
        if act == "flip":
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif act == "cut":
            del content[at : at + draw(st.integers(1, 64))]
        elif act == "insert":
            content[at:at] = draw(st.binary(min_size=1, max_size=16))
        elif act == "double":
            content[at:at] = content[at : at + draw(st.integers(1, 256))]
        elif act == "number":
            content[at : at + 4] = draw(st.sampled_from((b"\xff" * 4, b"\x00" * 4, b"\x7f\xff\xff\xff")))
        else:
            del content[at:]
    return bytes(content)


def deep(opening: str, closing: str, depth: int = 20_000) -> bytes:
    """Brackets that nest far deeper than Python's stack."""
    return (opening * depth + closing * depth).encode()


BROKEN_JSON = (
    deep("[", "]"),
    deep('{"a":', "}"),
    b'{"a": ' + b"9" * 5000 + b"}",
    b"[1e999, -1e999, NaN]",
    b'{"a": 1, "a": 2}',
    b"\xef\xbb\xbf{}",
    b"\xff\xfe{\x00}\x00",
    b"",
    b"null",
    b"3",
    b'"text"',
    b"[]",
    b"{}",
    b'["\\ud800"]',
    b"\x00" * 100,
)


@st.composite
def json_bytes(draw: Draw, valid: Any, *, lines: bool = False) -> bytes:
    """A JSON file: mostly a spoiled copy of `valid`, sometimes with spoiled bytes, sometimes none at all."""
    kind = draw(st.integers(0, 11))
    if kind == 0:
        return draw(st.sampled_from(BROKEN_JSON))
    value = draw(spoiled(valid))
    if lines and isinstance(value, list):
        content = "\n".join(json.dumps(item) for item in value).encode()
    else:
        content = json.dumps(value, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    return draw(mangled(content)) if kind <= 2 else content
