"""`Record`: one conversation with its pictures and videos; `CompactRecords`: many of them in little memory."""

from __future__ import annotations

import pickle
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, overload

from milora_data.pictures.load import Picture
from milora_data.records.boxes import Boxes

Role = Literal["user", "assistant", "system", "tools", "tool"]
IMAGE = "<image>"
VIDEO = "<video>"  # marks a video in a record that has videos, and is a text like any other elsewhere
# Characters without a width that are no white space to Python: zero-width space and joiners, word joiner, BOM.
_ZERO_WIDTH = dict.fromkeys(map(ord, "\u200b\u200c\u200d\u2060\ufeff"))


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn; `text` has `<image>` at the position of each picture. An answer of weight 0 is not trained.

    The turn `tools`, the first of a record with tools, has their definitions as JSON. `keys` has, as JSON, what else a
    chat template reads of a message: `tool_calls` of an answer, `name` and `tool_call_id` of the result of a tool.
    """

    role: Role
    text: str
    weight: Literal[0, 1] = 1
    keys: str = ""

    @property
    def is_blank(self) -> bool:
        """Whether the turn shows nothing: only `<image>`, white space and zero-width characters, and no tool calls.

        >>> Turn("assistant", " \u00a0\u200b").is_blank
        True
        """
        return not self.keys and not self.text.replace(IMAGE, "").translate(_ZERO_WIDTH).strip()


class Video(NamedTuple):
    """A video: the picture files of its frames in order, or a video file (`file`, without `frames`).

    `fps` is the number of frames per second, if it is known. For a file, `fps` is the number to read per second and
    `num_frames` the number to read in all; without both, the settings of the training or of the processor count.
    """

    frames: tuple[Picture, ...] = ()
    fps: float | None = None
    file: Picture | None = None
    num_frames: int | None = None

    @property
    def files(self) -> tuple[Picture, ...]:
        return self.frames if self.file is None else (self.file,)

    def with_files(self, change: Callable[[Picture], Picture]) -> Video:
        file = None if self.file is None else change(self.file)
        return self._replace(frames=tuple(map(change, self.frames)), file=file)

    def as_json(self) -> dict[str, Any]:
        """Return the object that `parse_video` reads: its files by their paths, or names, and how it is sampled."""
        files = {"file": str(self.file)} if self.file is not None else {"frames": list(map(str, self.frames))}
        sampled = {"fps": self.fps, "num_frames": self.num_frames}
        return {**files, **{key: value for key, value in sampled.items() if value is not None}}


@dataclass(frozen=True, slots=True)
class Record:
    """One conversation with its pictures. `source` is "file:line"; `extra` holds the keys outside LLaVA's format.

    `unread` has the keys of turns outside the formats, once for each turn.
    """

    id: str
    images: tuple[Picture, ...]
    turns: tuple[Turn, ...]
    source: str = ""
    extra: Mapping[str, object] = field(default_factory=dict)
    videos: tuple[Video, ...] = ()
    unread: tuple[str, ...] = ()

    @property
    def files(self) -> tuple[Picture, ...]:
        """All pictures and videos, with the frames of videos."""
        return self.images + tuple(file for video in self.videos for file in video.files)

    @property
    def video_files(self) -> tuple[Picture, ...]:
        return tuple(video.file for video in self.videos if video.file is not None)

    @property
    def place(self) -> str:
        """File and line of the record, else its id, for error messages."""
        return self.source or f"record {self.id!r}"

    def with_files(self, change: Callable[[Picture], Picture]) -> Record:
        videos = tuple(video.with_files(change) for video in self.videos)
        return replace(self, images=tuple(map(change, self.images)), videos=videos)

    def within(self, folder: Path) -> Record:
        """Return the record with the paths of its pictures and videos below `folder` (`Picture.within`)."""
        return self.with_files(lambda picture: picture.within(folder)) if self.files else self


class CompactRecords(Sequence[Record]):
    """Records in little memory, shared by loader processes: stored as bytes, and unpickled on each access.

    A list of a million objects is copied page by page into each loader process, because reading an object changes its
    reference count. The bytes and two arrays of offsets are shared. Make them from an iterator: then the objects never
    exist together. Consecutive repeats of a record are stored once.

    A million records of 0.9 KB take 1.1 GB and 64 s. An Arrow file of theirs takes as long, and 1.1 GB of disk for each
    process, which is memory where the temporary folder is.

    >>> records = CompactRecords([Record("a", (), ()), Record("b", (), ())])
    >>> len(records), records[1].id, [record.id for record in records[:1]]
    (2, 'b', ['a'])
    """

    def __init__(self, records: Iterable[Record]) -> None:
        content = bytearray()
        self._starts, self._ends = array("q"), array("q")
        self._content = content
        last, start = None, 0
        for record in records:
            if record is not last:
                last, start = record, len(content)
                content += pickle.dumps(record, pickle.HIGHEST_PROTOCOL)
            self._starts.append(start)
            self._ends.append(len(content))

    def only(self, indices: Iterable[int]) -> CompactRecords:
        """Return the records at these indices, in this order; they share their bytes with this sequence."""
        chosen = CompactRecords(())
        chosen._content = self._content
        for index in indices:
            chosen._starts.append(self._starts[index])
            chosen._ends.append(self._ends[index])
        return chosen

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> Record: ...

    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...

    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        record: Record = pickle.loads(memoryview(self._content)[self._starts[index] : self._ends[index]])
        return record


def with_boxes(turns: Sequence[Turn], boxes: Boxes, sizes: Callable[[], Sequence[tuple[int, int]]]) -> Sequence[Turn]:
    """Return the turns with their boxes as a model writes them; `sizes` gives (height, width) of each picture."""
    if not any("<bbox " in turn.text for turn in turns):
        return turns
    known = sizes()
    return [replace(turn, text=boxes.written(turn.text, known)) for turn in turns]
