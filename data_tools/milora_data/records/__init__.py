"""`parse_record`: LLaVA's format, OpenAI's `messages`, TRL's `prompt` and `completion`, ms-swift's `query`.

Every error names file and line.

LLaVA's `train.py` defines the format: {"id", "image"?, "conversations": [{"from": "human"|"gpt", "value"}, ...]}.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from milora_data.pictures.load import Picture, decoded, described, is_embedded, local_name
from milora_data.records.boxes import BOX, REF, marked
from milora_data.records.record import IMAGE, VIDEO, Record, Role, Turn, Video
from milora_vl.common.errors import DataError, with_context

ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",  # LLaMA-Factory's names, with function_call; ms-swift's are tool_response and tool_call
    "tool_response": "tool",
    "function_call": "assistant",
    "tool_call": "assistant",
}
SPEAKERS = {"user": "human", "assistant": "gpt", "system": "system", "tool": "tool"}
KEYS_OF_TURN = ("from", "value", "weight", "loss", "tool_calls")
KEYS_OF_PART = ("type", "text", "image", "image_url", "path", "url", "video", "video_url", "fps", "num_frames")
CALLS = ("function_call", "tool_call")  # turns whose text is a call, as JSON
KEYS_OF_RESULT = ("name", "tool_call_id")
EMPTY: tuple[object, ...] = (None, "", [], {})
KNOWN_KEYS = ("id", "image", "images", "video", "videos", "conversations", "tools")


def identifier_of(row: Mapping[str, Any], keys: Sequence[str], default: object) -> str:
    """Return the first value of a row under `keys`, as text; 0 is a value, None and an empty text are none.

    >>> identifier_of({"id": None, "question_id": 0}, ("id", "question_id"), 7)
    '0'
    """
    return str(next((row[key] for key in keys if row.get(key) not in (None, "")), default))


def parse_record(value: object, *, source: str = "") -> Record:
    """Return the `Record` of one decoded LLaVA dict; raises `DataError` at `source` if it is not a record.

    A picture in base64 becomes one with bytes.

    >>> parse_record({"id": 7, "conversations": [{"from": "human", "value": "Hi"}]}).turns[0].text
    'Hi'
    """
    try:
        if not isinstance(value, dict):
            raise DataError(f"expected a record (an object), got {type(value).__name__}")
        value = as_llava(value)
        images, turns, videos = _images(value), _turns(value), _videos(value)
        text = "".join(turn.text for turn in turns)
        if videos and not images and VIDEO not in text and text.count(IMAGE) == len(videos):  # LLaVA-Video's marks
            turns = tuple(replace(turn, text=turn.text.replace(IMAGE, VIDEO)) for turn in turns)
        if value.get("objects") and (BOX in text or REF in text):
            shown = marked([turn.text for turn in turns], value["objects"], len(images))
            turns = tuple(replace(turn, text=one) for turn, one in zip(turns, shown, strict=True))
            value = {key: item for key, item in value.items() if key != "objects"}
        extra = {key: item for key, item in value.items() if key not in KNOWN_KEYS}
        unread = tuple(key for turn in value["conversations"] for key in turn if _is_unread(turn, key))
        record = Record(identifier_of(value, ("id",), ""), images, turns, source, extra, videos, unread)
        return record.with_files(_decoded) if record.files else record
    except DataError as error:
        raise with_context(error, source or "record") from None


def _is_unread(turn: Mapping[str, Any], key: str) -> bool:
    known = (*KEYS_OF_TURN, *KEYS_OF_RESULT) if ROLES[turn["from"]] == "tool" else KEYS_OF_TURN
    return key not in known and turn[key] not in EMPTY


def _pictures(value: Mapping[str, Any]) -> list[Any]:
    field = value.get("images") or value.get("image")  # joined tables have both columns, one of them empty
    return field if isinstance(field, list) else [] if field is None else [field]


def _images(value: Mapping[str, Any]) -> tuple[Picture, ...]:
    named = _pictures(value)
    if not all(isinstance(name, str | Picture) and name for name in named):
        raise DataError(f'"image" must be a file name or a list of file names, got {_short(named)}')
    return tuple(map(_picture, named))


def _picture(value: object) -> Picture:
    file = _file(value)
    return Picture(file) if isinstance(file, str) else file


def _decoded(picture: Picture) -> Picture:
    return decoded(picture.name) if picture.content is None and is_embedded(picture.name) else picture


def _videos(value: Mapping[str, Any]) -> tuple[Video, ...]:
    """Return the videos of "videos", a list of them, or of "video", a single one, which may be a list of frames."""
    listed = value.get("videos")
    if listed is None:
        listed = [] if value.get("video") is None else [value["video"]]
    return tuple(map(parse_video, listed if isinstance(listed, list) else [listed]))


def parse_video(value: object) -> Video:
    """Return a video from a file or a list of frames, or from an object with one of them, "fps" and "num_frames"."""
    field: Mapping[str, Any] = value if isinstance(value, Mapping) else {"frames": value}
    fps, num_frames = field.get("fps"), field.get("num_frames")
    shown = next((field[key] for key in ("frames", "file", "video", "path", "url") if field.get(key) is not None), None)
    is_file = isinstance(shown, str) and shown != "" and not is_embedded(shown)
    wrong = ""
    if fps is not None and (isinstance(fps, bool) or not isinstance(fps, int | float) or not 0 < fps < math.inf):
        wrong = f'"fps" of a video must be a number above 0, got {_short(fps)}'
    elif num_frames is not None and (isinstance(num_frames, bool) or not isinstance(num_frames, int) or num_frames < 1):
        wrong = f'"num_frames" of a video must be a whole number above 0, got {_short(num_frames)}'
    elif isinstance(field.get("bytes"), bytes):
        wrong = "a video inside a table is not read; write it to a file and name the file"
    elif is_file and fps is not None and num_frames is not None:
        wrong = 'a video has "fps" and "num_frames", expected one of them'
    elif not is_file and (not isinstance(shown, list) or not shown):
        found = described(shown) if isinstance(shown, str) and shown else _short(value)
        wrong = f"a video must be a file, or a list of picture files, its frames; got {found}"
    elif not is_file and num_frames is not None:
        wrong = '"num_frames" is for a video file; all frames of a list are used'
    if wrong:
        raise DataError(wrong)
    fps = None if fps is None else float(fps)
    if isinstance(shown, str):
        return Video((), fps, _picture(shown), num_frames)
    assert isinstance(shown, list)
    return Video(tuple(map(_picture, shown)), fps)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{type(value).__name__} of {len(text):,} characters"


def _turns(value: Mapping[str, Any]) -> tuple[Turn, ...]:
    listed = value.get("conversations")
    if not isinstance(listed, list):
        keys = ", ".join(map(str, value)) or "none"
        hint = "records of other formats (tables, Alpaca, ...): python -m milora_data convert --help"
        raise DataError(f'"conversations" must be a list of turns; the keys of this record: {keys}', hint=hint)
    if value.get("loss") is False or value.get("weight") == 0:
        hint = "remove the record, or write it beside each answer that is not trained"
        raise DataError('"loss" or "weight" of a whole record is not read', code="record-weight", hint=hint)
    turns: list[Turn] = []
    if value.get("tools") not in (*EMPTY, "[]"):
        turns.append(Turn("tools", json.dumps(_definitions(value["tools"]), ensure_ascii=False)))
    for number, turn in enumerate(listed, start=1):
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise DataError(f'turn {number} must be {{"from": ..., "value": text}}, got {_short(turn)}')
        role = ROLES.get(str(turn.get("from")))
        if role is None:
            expected = ", ".join(ROLES)
            raise DataError(f'turn {number}: unknown "from": {turn.get("from")!r}; expected {expected}')
        text, more, weight = turn["value"], dict[str, Any](), _weight(turn, role, number)
        if turn["from"] in CALLS or turn.get("tool_calls"):
            more["tool_calls"] = _calls(text if turn["from"] in CALLS else turn["tool_calls"], role, number)
        elif role == "tool":
            more = {key: turn[key] for key in KEYS_OF_RESULT if turn.get(key)}
        if turn["from"] in CALLS:
            # ms-swift has a message for each call, and one for the text before them.
            before = turns.pop() if turns and turns[-1].role == "assistant" else Turn("assistant", "", weight)
            text, weight = before.text, min(weight, before.weight)
            more["tool_calls"] = [*json.loads(before.keys or "{}").get("tool_calls", ()), *more["tool_calls"]]
        turns.append(Turn(role, text, weight, json.dumps(more, ensure_ascii=False) if more else ""))
    return tuple(turns)


def _definitions(tools: object) -> list[object]:
    """Return the definitions of tools, a list or its JSON, in OpenAI's form. Raises `DataError`."""
    listed = _from_json(tools)
    is_list = isinstance(listed, list)
    functions = [tool.get("function", tool) if isinstance(tool, dict) else {} for tool in listed] if is_list else []
    if not is_list or not all(isinstance(one, dict) and one.get("name") for one in functions):
        hint = '"tools": [{"type": "function", "function": {"name": "NAME", "parameters": {...}}}]'
        raise DataError(f"not a list of tools: {_short(tools)}", code="record-tools", hint=hint)
    return [{"type": "function", "function": function} for function in functions]


def _calls(value: object, role: Role, number: int) -> list[object]:
    """Return the tool calls of a turn in OpenAI's form, with arguments as objects, as chat templates read them."""
    listed, calls = _from_json(value), list[object]()
    for call in listed if isinstance(listed, list) else [listed]:
        function = call.get("function", call) if isinstance(call, dict) else {}
        name, arguments = function.get("name"), _from_json(function.get("arguments") or {})
        if role != "assistant" or not name or not isinstance(name, str) or not isinstance(arguments, dict):
            hint = 'an answer may have  "tool_calls": [{"function": {"name": "NAME", "arguments": {...}}}]'
            raise DataError(f"turn {number}: not a tool call: {_short(call)}", code="record-tools", hint=hint)
        identity = {"id": call["id"]} if call.get("id") else {}
        calls.append({**identity, "type": "function", "function": {"name": name, "arguments": arguments}})
    return calls


def _from_json(value: Any) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return None


def _weight(turn: Mapping[str, Any], role: Role, number: int) -> Literal[0, 1]:
    """Return the weight of a turn: `weight` of OpenAI's messages, or `loss` of ms-swift's. An answer has 1 without."""
    if key := next((key for key in ("reasoning_content", "reasoning") if turn.get(key)), None):
        hint = "write it into the text of the answer, as the model does, for example  <think>...</think>"
        raise DataError(f"turn {number}: {key} is not read", code="record-reasoning", hint=hint)
    for key, allowed in (("weight", (0, 1)), ("loss", (False, True))):
        if (value := turn.get(key)) is None:
            continue
        if isinstance(value, bool) != (key == "loss") or value not in allowed or (value and role != "assistant"):
            expected = ("0 or 1" if key == "weight" else "true or false") if role == "assistant" else "beside an answer"
            message = f'turn {number} from {role}: "{key}" must be {expected}; got {_short(value)}'
            raise DataError(message, code="record-weight", hint="repeat a record to give it more weight")
        return 1 if value else 0
    return 1


def as_llava(value: dict[str, Any], identifier: object = "") -> dict[str, Any]:
    """Return a record with `conversations`, from `messages` or from TRL's prompt and completion; others unchanged.

    Messages may also be under "conversations"; ms-swift's `query` and `response` are read with `history`. A text under
    "system", as in ShareGPT's records, becomes the first turn. `identifier` is the default id. Pictures are named by
    the parts of a message ({"type": "image", "image": path}) or, in order, by "images". Base64 pictures are kept
    unchanged (pictures/load.py).
    Raises `DataError` if a role or a part is unknown.
    """
    turns = value.get("conversations")
    if isinstance(turns, list) and turns and isinstance(turns[0], dict) and "role" in turns[0]:
        value = {**{key: item for key, item in value.items() if key != "conversations"}, "messages": turns}
    elif "conversations" not in value and "messages" not in value:
        if "prompt" in value and "completion" in value:
            value = from_completion(value)
        elif "query" in value and "response" in value:
            value = _from_query(value)
    if "messages" in value and "conversations" not in value:
        if not isinstance(value["messages"], list):
            raise DataError('"messages" must be a list')
        value = _from_messages(value, identifier)
    turns = value.get("conversations")
    if not isinstance(turns, list) or not value.get("system"):
        return value
    system = {"from": "system", "value": value["system"]}
    first = turns[0] if turns and isinstance(turns[0], dict) else {}
    is_twice = first.get("from") == "system"
    if not isinstance(value["system"], str) or (is_twice and first != system):
        raise DataError('"system" must be a text, and the only system text of its record')
    others = {key: item for key, item in value.items() if key != "system"}
    return {**others, "conversations": [*([] if is_twice else [system]), *turns]}


def _from_messages(value: Mapping[str, Any], identifier: object) -> dict[str, Any]:
    named: list[str | Picture] = []
    videos: list[Any] = []
    turns = [_message_turn(message, number, named, videos) for number, message in enumerate(value["messages"], start=1)]
    listed = list(map(_file, _pictures(value)))
    own = [video for video in videos if video is not None]
    listed_videos = value.get("videos") or value.get("video")
    for what, twice in (("images", named and listed), ("videos", own and listed_videos)):
        if twice:
            raise DataError(f'the messages and "{what}" both name {what}; expected only one of them')
    if len(own) < len(videos) and not listed_videos:
        message, hint = "a part of type video names no video, and the record lists none", "name it, or remove the part"
        raise DataError(message, code="record-image-count", hint=hint)
    images = named or listed
    missing = len(images) - sum(turn["value"].count(IMAGE) for turn in turns)
    first = next((turn for turn in turns if turn["from"] == "human"), None)
    if missing == len(images) and first is not None:
        first["value"] = f"{IMAGE}\n" * missing + first["value"]
    others = {key: item for key, item in value.items() if key not in ("messages", "images", "image", "id")}
    pictures = {"image": images[0] if len(images) == 1 else images} if images else {}
    shown = {"videos": own} if own else {}
    name = identifier_of(value, ("id",), identifier)
    return {"id": name, **pictures, "conversations": turns, **others, **shown}


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
    """Return ms-swift's {"query", "response", "history"?, "images"?} with `messages` instead."""
    exchanges = [*earlier(value), (value["query"], value["response"])]
    texts = [
        {"role": role, "content": text}
        for question, answer in exchanges
        for role, text in (("user", question), ("assistant", answer))
    ]
    others = {key: item for key, item in value.items() if key not in ("query", "response", "history")}
    return {**others, "messages": texts}


def earlier(row: Mapping[str, Any], place: str = "") -> list[tuple[str, str]]:
    """Return the exchanges of `history`, a list of pairs; raises `DataError` for anything else."""
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise DataError(f"history must be a list of pairs [question, answer], got {_short(history)}", where=place)
    return [(str(question), str(answer)) for question, answer in history]


def _message_turn(message: object, number: int, named: list[str | Picture], videos: list[Any]) -> dict[str, Any]:
    role = message.get("role") if isinstance(message, dict) else message
    if not isinstance(message, dict) or not isinstance(role, str) or role not in ROLES:
        raise DataError(f"message {number}: unknown role {role!r}; expected {', '.join(SPEAKERS)}")
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        content = ""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise DataError(f'message {number}: "content" must be a text or a list of parts, which are objects')
    others = {key: value for key, value in message.items() if key not in ("role", "content")}
    of_parts = {key for part in parts for key, item in part.items() if item not in EMPTY and key not in KEYS_OF_PART}
    if of_parts & {"weight", "loss"}:
        hint = 'write "weight" beside "role": an answer is trained as a whole, or not'
        raise DataError(f"message {number}: a part of the content has a weight", code="record-weight", hint=hint)
    others |= {f"content.{key}": True for key in of_parts}  # counted as not read
    value = "".join(_part(part, number, named, videos) for part in parts)
    return {"from": role if role in CALLS else SPEAKERS[ROLES[role]], "value": value, **others}


def _part(part: dict[str, Any], number: int, named: list[str | Picture], videos: list[Any]) -> str:
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
    raise DataError(f"message {number}: unsupported part of type {kind!r}; expected text, an image or a video")


def _file(image: object) -> str | Picture:
    if isinstance(image, Picture):
        return image
    name = (image.get("path") or image.get("url")) if isinstance(image, dict) else image
    if isinstance(image, dict) and isinstance(image.get("bytes"), bytes):  # a picture of a table
        return Picture(Path(str(name or "picture")).name, content=image["bytes"])
    if not isinstance(name, str):
        raise DataError(f"a picture must be a file name, got {type(image).__name__}")
    return local_name(name)
