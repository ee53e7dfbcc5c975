"""Render HTML pages from templates that extend base.html.j2: self-contained, escaped, written atomically."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from milora_vl.common.atomic_write import write_text

if TYPE_CHECKING:
    from jinja2 import Environment

MAX_BYTES = 5_000_000
"""Maximum size of a page: it must open quickly on a phone and fit into an e-mail."""


def render(template: Path, content: Mapping[str, Any]) -> str:
    """Return the page. All content is escaped, and a name that `content` lacks is an error."""
    return _environment(template.parent).get_template(template.name).render(content)


@cache
def _environment(folder: Path) -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader([folder, Path(__file__).parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def write(page: Path, text: str) -> None:
    text = text.encode("utf-8", "replace").decode("utf-8")  # captions may contain half a surrogate pair
    write_text(page, text, hides_secrets=True)
