"""Records with `messages` (OpenAI's form, as TRL and others use it for pictures) as LLaVA records."""

from __future__ import annotations

from typing import Any

from milora_data.errors import DataError
from milora_data.images import StoredPicture
from milora_data.records import ROLES
from milora_data.templates import IMAGE

_SPEAKERS = {"user": "human", "assistant": "gpt", "system": "system"}


def from_messages(value: object, *, number: int) -> dict[str, Any]:
    """Return the LLaVA record of {"messages": [...], "images"?: [...]}; further keys are kept.

    `number` is the id of a record that has none.
    Pictures are named by the parts of a message ({"type": "image", "image": path}) or, in order, by "images".
    Raises `DataError`: no messages, an unknown role or part, a picture that is not a file name.
    """
    if not isinstance(value, dict) or not isinstance(value.get("messages"), list):
        raise DataError('expected an object with "messages", a list')
    named: list[str] = []
    turns = [_turn(message, place, named) for place, message in enumerate(value["messages"], start=1)]
    given = value.get("images") or []
    listed = [_file(image) for image in (given if isinstance(given, list) else [given])]
    if named and listed:
        raise DataError('pictures are named by the messages and by "images"; expected one of both')
    images = named or listed
    missing = len(images) - sum(turn["value"].count(IMAGE) for turn in turns)
    first = next((turn for turn in turns if turn["from"] == "human"), None)
    if missing == len(images) and first is not None:
        first["value"] = f"{IMAGE}\n" * missing + first["value"]
    rest = {key: item for key, item in value.items() if key not in ("messages", "images", "id")}
    pictures = {"image": images[0] if len(images) == 1 else images} if images else {}
    return {"id": str(value.get("id", number)), **pictures, "conversations": turns, **rest}


def _turn(message: object, place: int, named: list[str]) -> dict[str, str]:
    role = message.get("role") if isinstance(message, dict) else message
    if not isinstance(message, dict) or not isinstance(role, str) or role not in ROLES:
        raise DataError(f"message {place}: unknown role {role!r}; expected {', '.join(_SPEAKERS)}")
    content = message.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list):
        raise DataError(f'message {place}: "content" must be a text or a list of parts')
    texts = [_part(part, place, named) for part in parts]
    return {"from": _SPEAKERS[ROLES[role]], "value": "".join(texts)}


def _part(part: object, place: int, named: list[str]) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    if isinstance(part, dict) and part.get("type") in ("image", "image_url"):
        given = part.get("image", part.get("image_url", part.get("path", part.get("url"))))
        if given is not None:
            named.append(_file(given))
        return f"{IMAGE}\n"
    raise DataError(f"message {place}: cannot use this part: {str(part)[:80]}")


def _file(image: object) -> str:
    if isinstance(image, StoredPicture):
        return image
    name = (image.get("path") or image.get("url")) if isinstance(image, dict) else image
    if not isinstance(name, str) or name.startswith(("http://", "https://", "data:")):
        raise DataError(f"a picture must be a file name, got {str(image)[:60]}; save it to a file first")
    return name
