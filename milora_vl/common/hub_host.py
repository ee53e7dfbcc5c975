"""Whether the model hub can be reached (offline mode, no name resolution), asked before slow retries."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit
from urllib.request import getproxies


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
