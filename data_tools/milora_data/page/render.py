"""HTML pages from templates that extend base.html.j2: self-contained, escaped, written whole."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from milora_data.whole import write_text

MAX_BYTES = 5_000_000
"""No page is larger: it must open at once on a phone, and go through a mail."""


def render(template: Path, content: Mapping[str, Any]) -> str:
    """Return the page; a name that the content lacks is an error, and all that it holds is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader([template.parent, Path(__file__).parent]),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_unbroken,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template.name).render(content)


def write(page: Path, text: str) -> None:
    """Write a page as a whole: a reader sees the old one or the new one."""
    write_text(page, text.encode("utf-8", "replace").decode("utf-8"))  # captions may hold half of a surrogate pair


def _unbroken(value: Any) -> Any:
    """Keep a number and its percent sign on one line; what is marked as HTML already stays as it is."""
    from markupsafe import Markup

    if isinstance(value, str) and not isinstance(value, Markup):
        return value.replace(" %", "\N{NO-BREAK SPACE}%")
    return value
