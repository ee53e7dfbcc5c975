"""Web addresses in place of paths, which are refused with a command to download them, and whether the hub answers."""

from __future__ import annotations

import re
import shlex
import socket
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from milora_vl.common.errors import Problem


def web_address(path: str | Path) -> str | None:
    """Return `path` as an http or https address, or None if it is a path.

    `Path` collapses the two slashes to one; they are restored.

    >>> web_address(Path("https://example.org/cat.png")), web_address("images/cat.png")
    ('https://example.org/cat.png', None)
    """
    match = re.match(r"(https?):/+", str(path), re.IGNORECASE)
    return None if match is None else f"{match[1]}://{str(path)[match.end() :]}"


def url_problem(path: str | Path) -> Problem | None:
    """Return the problem of a web address in place of a path; None for a path. The hint is a command to download it."""
    address = web_address(path)
    if address is None:
        return None
    name = Path(urlsplit(address).path).name
    hint = f"download it:  curl -L -o {shlex.quote(name)} {shlex.quote(address)}\nand name:     {name}"
    return Problem(
        f"{address} is a web address; only files on this machine are read",
        hint=hint if "." in name else "download it, and name the file or folder",
    )


def hub_is_known() -> bool:
    """Return whether the host of the hub resolves; without a network the client would retry for half a minute."""
    from huggingface_hub.constants import ENDPOINT

    if getproxies().keys() & {"https", "all"}:  # not `no`, the hosts that NO_PROXY excepts
        return True
    try:
        socket.getaddrinfo(urlsplit(ENDPOINT).hostname, 443)
    except OSError:
        return False
    return True
