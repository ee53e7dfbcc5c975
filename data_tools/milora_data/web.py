"""Web addresses in the place of files: nothing is fetched, so they are refused with what to do."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from urllib.parse import urlsplit


def web_address(path: str | Path) -> str | None:
    """Return the http or https address that stands where a path is expected; None for a path.

    `Path` makes one slash of two.

    >>> web_address(Path("https://example.org/cat.png")), web_address("images/cat.png")
    ('https://example.org/cat.png', None)
    """
    found = re.match(r"(https?):/+", str(path), re.IGNORECASE)
    return None if found is None else f"{found[1]}://{str(path)[found.end() :]}"


def not_fetched(address: str) -> str:
    """Return the message for an address: what is wrong, and how to get a file."""
    lines = f"{address} is a web address; only files on this machine are read"
    name = Path(urlsplit(address).path).name
    if "." not in name:
        return f"{lines}\ndownload it, and name the file or folder"
    return f"{lines}\ndownload it:  curl -L -o {shlex.quote(name)} {shlex.quote(address)}\nand name:     {name}"
