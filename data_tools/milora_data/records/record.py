"""`Record`: parse and check LLaVA's format, and OpenAI's `messages` or TRL's `prompt` and `completion`; tools, videos.

Every error names file and line.

LLaVA's `train.py` defines the format: {"id", "image"?, "conversations": [{"from": "human"|"gpt", "value"}, ...]}.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from milora_data.pictures.embedded import decoded, described, is_embedded
from milora_data.pictures.files import StoredPicture
from milora_vl.common.errors import DataError, with_context

Role = Literal["user", "assistant", "system", "tool"]

ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
}
# What a message of OpenAI's form may have besides role and content, for chat templates that write tools.
CALL_KEYS = ("tool_calls", "tool_call_id", "name")
IMAGE = "<image>"
VIDEO = "<video>"  # marks a video in a record that has videos, and is a text like any other elsewhere
# Characters without a width that are no white space to Python: zero-width space and joiners, word joiner, BOM.
_ZERO_WIDTH = dict.fromkeys(map(ord, "\u200b\u200c\u200d\u2060\ufeff"))
KNOWN_KEYS = ("id", "image", "images", "video", "videos", "conversations")


class Reply(str):
    """A model's answer. `truncated` is whether the model was stopped at its largest length, before it ended."""

    __slots__ = ("truncated",)
    truncated: bool

    def __new__(cls, text: str, truncated: bool = False) -> Reply:
        """Return the text with its mark."""
        reply = super().__new__(cls, text)
        reply.truncated = truncated
        return reply


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a conversation; `text` has `<image>` at the position of each picture.

    `call` is a JSON object with the other keys of a message about tools (CALL_KEYS), or empty.
    """

    role: Role
    text: str
    call: str = field(default="", repr=False)

    @property
    def is_blank(self) -> bool:
        """Whether the text shows nothing: only `<image>`, white space and zero-width characters.

        >>> Turn("assistant", " \u00a0\u200b").is_blank
        True
        """
        return not self.call and not self.text.replace(IMAGE, "").translate(_ZERO_WIDTH).strip()


class Video(NamedTuple):
    """A video: the picture files of its frames in order, or a video file (`file`, without `frames`).

    `fps` is the number of frames per second, if it is known. For a file, `fps` is the number to read per second and
    `num_frames` the number to read in all; without both, the settings of the training or of the processor count.
    """

    frames: tuple[str, ...] = ()
    fps: float | None = None
    file: str | None = None
    num_frames: int | None = None

    @property
    def files(self) -> tuple[str, ...]:
        """The names of the files of the video."""
        return self.frames if self.file is None else (self.file,)


@dataclass(frozen=True, slots=True)
class Record:
    """One conversation with its pictures. `source` is "file:line"; `extra` holds the keys outside LLaVA's format."""

    id: str
    images: tuple[str, ...]
    turns: tuple[Turn, ...]
    source: str = ""
    extra: Mapping[str, object] = field(default_factory=dict)
    videos: tuple[Video, ...] = ()

    @property
    def files(self) -> tuple[str, ...]:
        """The names of all pictures and videos, with the frames of videos."""
        return self.images + tuple(name for video in self.videos for name in video.files)

    @property
    def video_files(self) -> tuple[str, ...]:
        """The names of the video files."""
        return tuple(video.file for video in self.videos if video.file is not None)


def identifier_of(row: Mapping[str, Any], keys: Sequence[str], default: object) -> str:
    """Return the first value of a row under `keys`, as text; 0 is a value, None and an empty text are none.

    >>> identifier_of({"id": None, "question_id": 0}, ("id", "question_id"), 7)
    '0'
    """
    return str(next((row[key] for key in keys if row.get(key) not in (None, "")), default))


def content_digest(record: Record) -> bytes:
    """Return 16 bytes that differ for different pictures, videos, turns or tools; a million records need 100 MB."""
    calls = [turn.call for turn in record.turns]  # the repr of a turn leaves its call out
    parts = (record.images, record.videos, record.turns, calls, record.extra.get("tools"))
    digest = hashlib.blake2b(repr(parts).encode(errors="surrogatepass"), digest_size=16)
    for picture in record.files:
        if isinstance(picture, StoredPicture):
            digest.update(picture.content)
    return digest.digest()


def with_names(record: Record, new_name: Callable[[str], str]) -> Record:
    """Return a record with other names of its pictures, frames and videos."""
    videos = tuple(renamed_video(video, new_name) for video in record.videos)
    return replace(record, images=tuple(map(new_name, record.images)), videos=videos)


def renamed_video(video: Video, new_name: Callable[[str], str]) -> Video:
    """Return a video with other names of its files."""
    file = None if video.file is None else new_name(video.file)
    return video._replace(frames=tuple(map(new_name, video.frames)), file=file)


def parse_record(value: object, *, source: str = "", embedded: Literal["read", "keep"] = "read") -> Record:
    """Return the `Record` of one decoded LLaVA dict; raises `DataError` at `source` if it is not a record.

    embedded: read base64 pictures as stored pictures, or keep them unchanged.

    >>> parse_record({"id": 7, "conversations": [{"from": "human", "value": "Hi"}]}).turns
    (Turn(role='user', text='Hi'),)
    """
    try:
        if not isinstance(value, dict):
            raise DataError(f"expected a record (an object), got {type(value).__name__}", code="record-not-an-object")
        value = as_llava(value)
        images, turns, videos = _images(value), _turns(value), _videos(value)
        record = Record(
            id=identifier_of(value, ("id",), ""),
            images=images,
            turns=_with_video_marks(turns, len(videos)) if videos and not images else turns,
            source=source,
            extra={key: item for key, item in value.items() if key not in KNOWN_KEYS},
            videos=videos,
        )
        if embedded == "read" and any(map(is_embedded, record.files)):
            return with_names(record, lambda name: decoded(name) if is_embedded(name) else name)
        return record
    except DataError as error:
        raise with_context(error, source or "record") from None


def _images(value: dict[str, Any]) -> tuple[str, ...]:
    field = value.get("images") or value.get("image")  # joined tables have both columns, one of them empty
    if field is None:
        return ()
    names = field if isinstance(field, list) else [field]
    if not all(isinstance(name, str) and name for name in names):
        raise DataError(
            f'"image" must be a file name or a list of file names, got {_short(field)}', code="record-image-field"
        )
    return tuple(names)


def _videos(value: dict[str, Any]) -> tuple[Video, ...]:
    """Return the videos of "videos", a list of them, or of "video", a single one."""
    listed = value.get("videos")
    if listed is None:
        listed = [] if value.get("video") is None else [value["video"]]
    return tuple(map(_video, listed if isinstance(listed, list) else [listed]))


def _with_video_marks(turns: tuple[Turn, ...], num_videos: int) -> tuple[Turn, ...]:
    """Return the turns of a record without pictures; LLaVA-Video marks its videos with `<image>`."""
    text = "".join(turn.text for turn in turns)
    if VIDEO in text or text.count(IMAGE) != num_videos:
        return turns
    return tuple(replace(turn, text=turn.text.replace(IMAGE, VIDEO)) for turn in turns)


def _video(value: object) -> Video:
    """Return a video from a file or a list of frames, or from an object with one of them, "fps" and "num_frames"."""
    field: Mapping[str, Any] = value if isinstance(value, Mapping) else {"frames": value}
    fps, num_frames = field.get("fps"), field.get("num_frames")
    if fps is not None and (isinstance(fps, bool) or not isinstance(fps, int | float) or not 0 < fps < math.inf):
        raise DataError(f'"fps" of a video must be a number above 0, got {_short(fps)}', code="record-video-field")
    if num_frames is not None and (isinstance(num_frames, bool) or not isinstance(num_frames, int) or num_frames < 1):
        raise DataError(
            f'"num_frames" of a video must be a whole number above 0, got {_short(num_frames)}',
            code="record-video-field",
        )
    fps = None if fps is None else float(fps)
    shown = next((field[key] for key in ("frames", "file", "video", "path", "url") if field.get(key) is not None), None)
    if isinstance(field.get("bytes"), bytes):  # a video of a table
        shown = StoredPicture(Path(str(shown or "video")).name, field["bytes"])
    if isinstance(shown, str) and shown and not is_embedded(shown):
        if fps is not None and num_frames is not None:
            raise DataError('a video has "fps" and "num_frames", expected one of them', code="record-video-field")
        return Video((), fps, shown, num_frames)
    if not isinstance(shown, list) or not shown:
        found = described(shown) if isinstance(shown, str) and shown else _short(value)
        raise DataError(
            f"a video must be a file, or a list of picture files, its frames; got {found}", code="record-video-field"
        )
    if num_frames is not None:
        raise DataError('"num_frames" is for a video file; all frames of a list are used', code="record-video-field")
    return Video(tuple(map(_file, shown)), fps)


def _short(value: object) -> str:
    """Return the value as text if it is short, else its type and length."""
    text = repr(value)
    return text if len(text) <= 80 else f"{type(value).__name__} of {len(text):,} characters"


def _turns(value: dict[str, Any]) -> tuple[Turn, ...]:
    turns = value.get("conversations")
    if not isinstance(turns, list):
        keys = ", ".join(map(str, value)) or "none"
        raise DataError(
            f'"conversations" must be a list of turns; the keys of this record: {keys}',
            code="record-no-conversations",
            hint="records of other formats (tables, Alpaca, ...): python -m milora_data convert --help",
        )
    return tuple(_turn(turn, number) for number, turn in enumerate(turns, start=1))


def _turn(turn: object, number: int) -> Turn:
    if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
        raise DataError(
            f'turn {number} must be {{"from": ..., "value": text}}, got {_short(turn)}', code="record-turn-format"
        )
    role = ROLES.get(str(turn.get("from")))
    if role is None:
        raise DataError(
            f'turn {number}: unknown "from": {turn.get("from")!r}; expected {", ".join(ROLES)}',
            code="record-unknown-role",
        )
    return Turn(role, turn["value"], _call(turn, role, number))


def _call(turn: Mapping[str, Any], role: Role, number: int) -> str:
    """Return the keys about tools of a turn as JSON. Arguments are objects, as chat templates expect them."""
    kept = {key: turn[key] for key in CALL_KEYS if turn.get(key) is not None and role in ("assistant", "tool")}
    if role == "assistant":
        kept.pop("name", None)
        if "tool_calls" in kept:
            kept["tool_calls"] = [_tool_call(call, number) for call in _listed(kept["tool_calls"], number)]
        if not kept.get("tool_calls"):
            return ""
    return json.dumps(kept, ensure_ascii=False) if kept else ""


def _listed(calls: object, number: int) -> list[Any]:
    if not isinstance(calls, list):
        raise _no_call(number, f'"tool_calls" is {type(calls).__name__}')
    return calls


def _tool_call(call: object, number: int) -> dict[str, Any]:
    """Return a call of OpenAI's form, whose arguments are an object in place of the JSON text that OpenAI stores."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise _no_call(number, f"got {_short(call)}")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except json.JSONDecodeError as error:
            raise _no_call(number, f"its arguments are no JSON: {error}") from None
    if not isinstance(arguments, Mapping):
        raise _no_call(number, f"its arguments are {type(arguments).__name__}, not an object")
    identifier = {} if call.get("id") is None else {"id": call["id"]}
    return {**identifier, "type": "function", "function": {"name": function["name"], "arguments": dict(arguments)}}


def _no_call(number: int, found: str) -> DataError:
    return DataError(
        f'turn {number}: a tool call must be {{"function": {{"name": ..., "arguments": {{...}}}}}}; {found}',
        code="record-tool-call",
    )


def tools_of(record: Record) -> list[Any]:
    """Return the tools that a record offers to the model (its key "tools", a list or JSON text of one).

    Raises `DataError` for another value.

    >>> tools_of(Record("a", (), (), extra={"tools": '[{"type": "function"}]'}))
    [{'type': 'function'}]
    """
    tools = record.extra.get("tools") or []
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError:
            tools = None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise DataError(
            f'"tools" must be a list of objects, got {_short(record.extra["tools"])}', code="record-tools-field"
        )
    return tools


def uses_tools(record: Record) -> bool:
    """Return whether a record offers, calls or answers for tools."""
    return bool(tools_of(record)) or any(turn.role == "tool" or turn.call for turn in record.turns)


SPEAKERS = {"user": "human", "assistant": "gpt", "system": "system", "tool": "tool"}


def as_llava(value: dict[str, Any], identifier: object = "") -> dict[str, Any]:
    """Return a record with `conversations`, from `messages` or from TRL's prompt and completion; others unchanged.

    Messages may also be under "conversations"; ms-swift's `query` and `response` are read with `history` and `system`.
    `identifier` is the default id. Pictures are named by the parts of a message ({"type": "image", "image": path}) or,
    in order, by "images". Base64 pictures are kept unchanged (embedded.py).
    Raises `DataError` if a role or a part is unknown.
    """
    turns = value.get("conversations")
    if "conversations" in value:
        if not (isinstance(turns, list) and turns and isinstance(turns[0], dict) and "role" in turns[0]):
            return value
        value = {**{key: item for key, item in value.items() if key != "conversations"}, "messages": turns}
    elif "messages" not in value:
        if "prompt" in value and "completion" in value:
            value = from_completion(value)
        elif "query" in value and "response" in value:
            value = _from_query(value)
    if "messages" not in value:
        return value
    if not isinstance(value["messages"], list):
        raise DataError('"messages" must be a list', code="messages-missing")
    named: list[str] = []
    videos: list[Any] = []
    turns = [_message_turn(message, place, named, videos) for place, message in enumerate(value["messages"], start=1)]
    field = value.get("images") or value.get("image") or []
    listed = [_file(image) for image in (field if isinstance(field, list) else [field])]
    if named and listed:
        raise DataError(
            'the messages and "images" both name pictures; expected only one of them', code="messages-images-twice"
        )
    images = named or listed
    missing = len(images) - sum(turn["value"].count(IMAGE) for turn in turns)
    first = next((turn for turn in turns if turn["from"] == "human"), None)
    if missing == len(images) and first is not None:
        first["value"] = f"{IMAGE}\n" * missing + first["value"]
    others = {key: item for key, item in value.items() if key not in ("messages", "images", "image", "id")}
    own = [video for video in videos if video is not None]
    listed_videos = others.get("videos") or others.get("video")
    if own and listed_videos:
        raise DataError(
            'the messages and "videos" both name videos; expected only one of them', code="messages-images-twice"
        )
    if len(own) < len(videos) and not listed_videos:
        raise DataError(
            "a part of type video names no video, and the record lists none",
            code="record-image-count",
            hint='name it in the record\'s "videos", or remove the part',
        )
    pictures = {"image": images[0] if len(images) == 1 else images} if images else {}
    shown = {"videos": own} if own else {}
    return {"id": str(value.get("id", identifier)), **pictures, "conversations": turns, **others, **shown}


def from_completion(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return TRL's {"prompt", "completion", "images"?} with `messages` instead; texts become one turn each.

    >>> [turn["role"] for turn in from_completion({"prompt": "1 + 1?", "completion": "2"})["messages"]]
    ['user', 'assistant']
    """
    messages: list[Any] = []
    for key, role in (("prompt", "user"), ("completion", "assistant")):
        turns = value[key]
        messages += turns if isinstance(turns, list) else [{"role": role, "content": turns}]
    others = {key: item for key, item in value.items() if key not in ("prompt", "completion")}
    return {**others, "messages": messages}


def _from_query(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return ms-swift's {"query", "response", "history"?, "system"?, "images"?} with `messages` instead."""
    exchanges = [*earlier(value), (value["query"], value["response"])]
    texts = [
        {"role": role, "content": text}
        for question, answer in exchanges
        for role, text in (("user", question), ("assistant", answer))
    ]
    system = [{"role": "system", "content": value["system"]}] if value.get("system") else []
    others = {key: item for key, item in value.items() if key not in ("query", "response", "history", "system")}
    return {**others, "messages": system + texts}


def earlier(row: Mapping[str, Any], place: str = "") -> list[tuple[str, str]]:
    """Return the exchanges of `history`, a list of pairs; raises `DataError` for anything else."""
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise DataError(
            f"history must be a list of pairs [question, answer], got {str(history)[:80]}",
            code="instructions-history",
            where=place,
        )
    return [(str(question), str(answer)) for question, answer in history]


def _message_turn(message: object, place: int, named: list[str], videos: list[Any]) -> dict[str, Any]:
    role = message.get("role") if isinstance(message, dict) else message
    if not isinstance(message, dict) or not isinstance(role, str) or role not in ROLES:
        raise DataError(
            f"message {place}: unknown role {role!r}; expected {', '.join(SPEAKERS)}", code="record-unknown-role"
        )
    calls = {key: message[key] for key in CALL_KEYS if message.get(key) is not None}
    content = message.get("content")
    if content is None and calls.get("tool_calls"):
        content = ""  # OpenAI's form of an answer that only calls tools
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list):
        raise DataError(f'message {place}: "content" must be a text or a list of parts', code="messages-content")
    texts = [_part(part, place, named, videos) for part in parts]
    return {"from": SPEAKERS[ROLES[role]], "value": "".join(texts), **calls}


def _part(part: object, place: int, named: list[str], videos: list[Any]) -> str:
    if not isinstance(part, dict):
        raise DataError(
            f"message {place}: a part must be an object, got {type(part).__name__}", code="messages-content"
        )
    kind, text = part.get("type"), part.get("text")
    if kind in ("text", "input_text", "output_text") and isinstance(text, str):
        return text
    if kind in ("image", "image_url", "input_image"):
        pictures = [part[key] for key in ("image", "image_url", "path", "url") if part.get(key) is not None]
        named += [_file(picture) for picture in pictures[:1]]
        return f"{IMAGE}\n"
    if kind in ("video", "video_url"):
        shown = next((part[key] for key in ("video", "video_url", "path", "url") if part.get(key) is not None), None)
        sampled = {key: part[key] for key in ("fps", "num_frames") if part.get(key) is not None}
        if shown is not None:
            shown = {**(shown if isinstance(shown, dict) else {"frames": shown}), **sampled}
        videos.append(shown)
        return f"{VIDEO}\n"
    raise DataError(
        f"message {place}: unsupported part of type {kind!r}; expected text, an image or a video",
        code="messages-unsupported-part",
        hint="remove the part, or name its content as a picture or a text",
    )


def _file(image: object) -> str:
    if isinstance(image, StoredPicture):
        return image
    name = (image.get("path") or image.get("url")) if isinstance(image, dict) else image
    if isinstance(image, dict) and isinstance(image.get("bytes"), bytes):  # a picture of a table
        return StoredPicture(Path(str(name or "picture")).name, image["bytes"])
    if not isinstance(name, str):
        raise DataError(f"a picture must be a file name, got {type(image).__name__}", code="record-image-field")
    return name
