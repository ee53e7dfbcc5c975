"""Pictures embedded in records as base64 `data:` URLs, as in OpenAI's messages."""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote_to_bytes, urlsplit

from milora_data.pictures.files import ImageError, StoredPicture, load_image, picture_suffix
from milora_vl.common.cli.command_line import command_line
from milora_vl.common.errors import DataError

NOT_FETCHED = (
    "pictures are not fetched from the web: download them and name the files, or train with --web_pictures download"
)


def is_embedded(name: object) -> bool:
    """Return whether a record's picture is a `data:` URL."""
    return isinstance(name, str) and not isinstance(name, StoredPicture) and name[:5].lower() == "data:"


def described(name: str) -> str:
    """Return a short description of a URL, without its content; the name of a file is returned unchanged.

    >>> described("data:image/png;base64,iVBORw0KGgo="), described("https://example.org/a.png?token=1")
    ('data:image/png;base64, 12 characters', 'https://example.org/a.png')
    """
    if is_embedded(name):
        header, _, body = name.partition(",")
        return f"{header[:60]}, {len(body):,} characters"
    address = urlsplit(name)
    if not address.scheme:
        return name[:200]
    return f"{address.scheme}://{address.netloc}{address.path}"[:200]


def refusal(name: str, source: str, form: str) -> DataError:
    """Return the error for a record with an embedded picture; its hint is a command that writes pictures to files."""
    file = source.rpartition(":")[0] or "DATA"
    return DataError(
        f"a picture is embedded as base64 ({described(name)}), and a record names picture files",
        code="image-embedded",
        hint=f"write the pictures to files: {command_line('milora_data', *convert_words(file, form))}",
    )


def convert_words(file: str, form: str) -> tuple[str, ...]:
    """Return the arguments of the milora_data command that writes the embedded pictures of `file` to picture files."""
    return "convert", "--from", form, file, "--output_dir", "OUT"


def decoded(name: str) -> StoredPicture:
    """Return an embedded picture as a stored picture, named by a hash of its content. Raises `ImageError`."""
    header, comma, body = name.partition(",")
    if not comma or not header.lower().endswith(";base64"):
        raise _broken(name, "it is not in base64")
    text = b"".join(unquote_to_bytes(body).split())
    try:
        content = base64.b64decode(text + b"=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise _broken(name, f"its base64 is broken: {error}") from None
    if not content:
        raise _broken(name, "it is empty")
    suffix = picture_suffix(content)
    if suffix == ".img":
        raise _broken(name, "not a picture")
    return StoredPicture(hashlib.blake2b(content, digest_size=8).hexdigest() + suffix, content)


def stored_pictures(value: Mapping[str, Any], place: str, left_out: list[str]) -> Iterator[dict[str, Any]]:
    """Yield a LLaVA dict whose embedded pictures are replaced by stored ones.

    If a picture is broken, yield nothing and add a line that begins with `place` to `left_out`.
    """
    converted = dict(value)
    try:
        for key in ("image", "images"):
            field = value.get(key)
            if isinstance(field, list):
                converted[key] = [_verified(name) if is_embedded(name) else name for name in field]
            elif is_embedded(field):
                converted[key] = _verified(field)
    except ImageError as error:
        left_out.append(f"{place}: {error}")
        return
    yield converted


def _verified(name: Any) -> StoredPicture:
    """Return the picture of a `data:` URL after decoding all of its pixels. Raises `ImageError`."""
    picture = decoded(name)
    try:
        load_image(picture)
    except ImageError as error:
        raise _broken(name, error.reason) from None
    return picture


def _broken(name: str, reason: str) -> ImageError:
    return ImageError(
        f"an embedded picture ({described(name)}) cannot be read: {reason}",
        reason,
        code="image-unreadable",
        hint="embed the picture again, or remove the record",
    )
