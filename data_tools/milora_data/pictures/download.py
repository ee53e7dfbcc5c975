"""Download pictures at web addresses once into the cache (`data.web_pictures`), with limits of size and time."""

from __future__ import annotations

import hashlib
import time
from http.client import HTTPException
from pathlib import Path
from urllib.request import Request, urlopen

from milora_data.assets import cache_dir
from milora_vl.common.atomic_write import atomic_file

MOST_BYTES = 50 * 2**20
MOST_SECONDS = 30.0
_CHUNK = 1 << 16


def downloaded(address: str) -> Path:
    """Return the file of a picture at an http or https address; it is downloaded unless the cache has it.

    Raises `OSError` for an answer that is no success, beyond MOST_BYTES or MOST_SECONDS, or empty. A failure is not
    cached.
    """
    place = cache_dir() / "pictures" / hashlib.blake2b(address.encode(), digest_size=16).hexdigest()
    if place.is_file():
        return place
    try:
        content = _content(address)
    except (HTTPException, ValueError) as error:  # a broken answer, or not an address
        raise OSError(f"the download failed: {error}") from None
    with atomic_file(place) as partial:  # loader processes may download the same picture
        partial.write_bytes(content)
    return place


def _content(address: str) -> bytes:
    begin, parts, size = time.monotonic(), [], 0
    request = Request(address, headers={"User-Agent": "milora-vl", "Accept": "image/*"})
    # It follows no redirection to a file.
    with urlopen(request, timeout=MOST_SECONDS) as answer:
        while part := answer.read1(_CHUNK):
            parts.append(part)
            size += len(part)
            if size > MOST_BYTES:
                raise OSError(f"the download has more than {MOST_BYTES // 2**20} MB")
            if time.monotonic() - begin > MOST_SECONDS:
                raise OSError(f"the download takes more than {MOST_SECONDS:g} seconds")
    if not parts:
        raise OSError("the download is empty")
    return b"".join(parts)
