"""Records of LLaVA's data format, from JSON (a list) or JSONL, read one by one; every error names file and line.

The format is that of LLaVA's `train.py`: {"id", "image"?, "conversations": [{"from": "human"|"gpt", "value"}, ...]}.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from milora_data.errors import DataError
from milora_data.jsonfile import read_objects

Role = Literal["user", "assistant", "system"]

ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
CHARACTERS_PER_TOKEN = 4
KNOWN_KEYS = ("id", "image", "images", "conversations")


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a conversation; `text` holds `<image>` where a picture stands."""

    role: Role
    text: str


@dataclass(frozen=True, slots=True)
class Record:
    """One conversation with its pictures. `source` is "file:line"; `extra` holds what the format does not know."""

    id: str
    images: tuple[str, ...]
    turns: tuple[Turn, ...]
    source: str = ""
    extra: Mapping[str, object] = field(default_factory=dict)


def load_records(path: str | Path) -> Iterator[Record]:
    """Yield the records of a data set, in order and one by one: nothing is held in memory.

    A JSON file (a list) or JSON lines of LLaVA's records or of `messages`; .parquet, .tar (webdataset) and
    hub:OWNER/NAME[:SPLIT] through `datasets`; .yaml, a mixture of such sources (mix.py).
    Raises `DataError` with file and line: no such file, broken JSON, a record that is not one.
    """
    if is_json(path):
        for place, value in read_objects(Path(path)):
            yield parse_record(value, source=f"{path}:{place}")
    elif str(path).endswith((".yaml", ".yml")):
        from milora_data.mix import mixed_records, read_sources

        yield from mixed_records(*read_sources(Path(path)))
    else:
        from milora_data.stored import stored_records

        yield from stored_records(str(path))


def is_json(path: str | Path) -> bool:
    """Return whether `path` is read as JSON: what is neither a mixture nor stored in a format of `datasets`."""
    return not str(path).startswith("hub:") and Path(path).suffix not in (".yaml", ".yml", ".parquet", ".tar", ".arrow")


def parse_record(value: object, *, source: str = "") -> Record:
    """Return the `Record` of one decoded LLaVA dict; raises `DataError` that starts with `source`.

    >>> parse_record({"id": 7, "conversations": [{"from": "human", "value": "Hi"}]}).turns
    (Turn(role='user', text='Hi'),)
    """
    try:
        if not isinstance(value, dict):
            raise DataError(f"expected a record (an object), got {type(value).__name__}")
        if "messages" in value and "conversations" not in value:
            from milora_data.messages import from_messages

            value = from_messages(value, number=0) | ({} if "id" in value else {"id": ""})
        return Record(
            id=str(value.get("id", "")),
            images=_images(value),
            turns=_turns(value),
            source=source,
            extra={key: item for key, item in value.items() if key not in KNOWN_KEYS},
        )
    except DataError as error:
        place = source or "record"
        raise DataError(f"{place}: {error}") from None


def estimated_length(record: Record, image_tokens: int) -> int:
    """Return about how many tokens a record takes, without a tokenizer: for sorting, not for counting.

    >>> estimated_length(Record("a", ("a.png",), (Turn("user", "<image>\\nWhat is it?"),), "x:1", {}), 576)
    580
    """
    return sum(len(turn.text) for turn in record.turns) // CHARACTERS_PER_TOKEN + len(record.images) * image_tokens


def _images(value: dict[str, Any]) -> tuple[str, ...]:
    found = value.get("images") or value.get("image")  # tables that were joined hold both columns, one of them empty
    if found is None:
        return ()
    names = found if isinstance(found, list) else [found]
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise DataError(f'"image" must be a file name or a list of file names, got {found!r}')
    return tuple(names)


def _turns(value: dict[str, Any]) -> tuple[Turn, ...]:
    turns = value.get("conversations")
    if not isinstance(turns, list):
        keys = ", ".join(map(str, value)) or "none"
        raise DataError(
            f'"conversations" must be a list of turns; the keys of this record: {keys}\n'
            "records of other forms (tables, Alpaca, ...): python -m milora_data convert --help"
        )
    return tuple(_turn(turn, number) for number, turn in enumerate(turns, start=1))


def _turn(turn: object, number: int) -> Turn:
    if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
        raise DataError(f'turn {number} must be {{"from": ..., "value": text}}, got {str(turn)[:80]}')
    role = ROLES.get(str(turn.get("from")))
    if role is None:
        raise DataError(f'turn {number}: unknown "from": {turn.get("from")!r}; expected {", ".join(ROLES)}')
    return Turn(role, turn["value"])
