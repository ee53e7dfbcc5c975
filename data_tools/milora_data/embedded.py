"""Pictures inside the records, as base64 in a `data:` URL. OpenAI's messages have them."""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote_to_bytes, urlsplit

from .command import command_line
from .errors import DataError
from .images import ImageError, StoredPicture, load_image, picture_suffix

NOT_FETCHED = "pictures are not fetched from the web: download them and name the files"


class EmbeddedPicture(DataError):
    """A picture as base64 where the name of a file is expected. `form` is what `convert --from` calls such records."""

    def __init__(self, message: str, form: str = "llava") -> None:
        super().__init__(message)
        self.form = form


def is_embedded(name: object) -> bool:
    """Return whether a record's picture is a `data:` URL."""
    return isinstance(name, str) and not isinstance(name, StoredPicture) and name[:5].lower() == "data:"


def is_web_address(name: object) -> bool:
    """Return whether a record's picture is an http or https URL."""
    return isinstance(name, str) and name[:8].lower().startswith(("http://", "https://"))


def described(name: str) -> str:
    """Return a URL in few words, without its content.

    >>> described("data:image/png;base64,iVBORw0KGgo="), described("https://example.org/a.png?token=1")
    ('data:image/png;base64, 12 characters', 'https://example.org/a.png')
    """
    if is_embedded(name):
        header, _, body = name.partition(",")
        return f"{header[:60]}, {len(body):,} characters"
    address = urlsplit(name)
    return f"{address.scheme}://{address.netloc}{address.path}"[:200]


def refusal(name: str, source: str, form: str) -> EmbeddedPicture:
    """Return the error for a record with such a picture, with the command that writes the pictures to files."""
    file = source.rpartition(":")[0] or "DATA"
    return EmbeddedPicture(
        f"a picture is embedded as base64 ({described(name)}), and a record names picture files\n"
        f"write the pictures to files: {command_line('milora_data', *convert_words(file, form))}",
        form,
    )


def convert_words(file: str, form: str) -> tuple[str, ...]:
    """Return the command of milora_data that writes the embedded pictures of a file of records to files."""
    return "convert", "--from", form, file, "--output_dir", "OUT"


def decoded(name: str) -> StoredPicture:
    """Return an embedded picture as a stored one, whose name is made from its content. Raises `ImageError`."""
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
    return StoredPicture(hashlib.blake2b(content, digest_size=8).hexdigest() + picture_suffix(content), content)


def stored_pictures(value: Mapping[str, Any], place: str, left_out: list[str]) -> Iterator[dict[str, Any]]:
    """Yield a LLaVA dict after decoding its embedded pictures and replacing them by stored ones.

    If a picture is broken, yield nothing and add a line that begins with `place` to `left_out`.
    """
    made = dict(value)
    try:
        for key in ("image", "images"):
            found = value.get(key)
            if isinstance(found, list):
                made[key] = [_whole(name) if is_embedded(name) else name for name in found]
            elif is_embedded(found):
                made[key] = _whole(found)
    except ImageError as error:
        left_out.append(f"{place}: {error}")
        return
    yield made


def _whole(name: Any) -> StoredPicture:
    picture = decoded(name)
    try:
        load_image(picture)
    except ImageError as error:
        raise _broken(name, error.reason) from None
    return picture


def _broken(name: str, reason: str) -> ImageError:
    return ImageError(f"an embedded picture ({described(name)}) cannot be read: {reason}", reason)
