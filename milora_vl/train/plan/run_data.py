"""Read and check the training and held-out records of a run: limits, missing pictures, left-out records, streams."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

from milora_data.check.command import check_for_training, readable
from milora_data.check.findings import KINDS, Finding, Report, examine
from milora_data.check.pictures import find_missing
from milora_data.pictures.files import content_of, place_of
from milora_data.records.compact import CompactRecords
from milora_data.records.record import Record, tools_of, uses_tools
from milora_data.stream.dataset import record_stream
from milora_data.stream.sources import Source, from_web, load_records, mixed_records
from milora_vl.common.cli.command_line import amount, command_line
from milora_vl.common.errors import DataError, Key, Problem, UserError, no_records, with_context
from milora_vl.train.recipe.schema import DataConfig, SourceConfig

HASHED = 64  # pictures of a data set that identify it
INSPECTED = 100  # records of a stream that are checked before training


@dataclass(frozen=True, slots=True)
class RunData:
    """The training and evaluation records, and counts of skipped records."""

    train: Sequence[Record]
    evaluation: Sequence[Record] | None
    skipped: int = 0  # an image is missing, with --bad_images skip
    unlearnable: int = 0  # they have no answers
    broken: tuple[Finding, ...] = ()  # invalid records, if --bad_images is not raise
    streamed: bool = False  # `train` holds the first records of a stream
    fingerprint: str = ""  # of the contents and the order of `train`, independent of paths
    pictures: str = ""  # hash of the contents of some pictures of `train`
    tools_at: str = ""  # place of the first record that uses tools
    with_images: bytes = b""  # 1 for each record of `train` with an image, 0 for each other
    num_with_videos: int = 0  # of `train`

    @property
    def num_with_images(self) -> int:
        """Return the number of training records with an image."""
        return sum(self.with_images)

    def describe(self) -> str:
        """Return the data as the header shows it."""
        if self.streamed:
            return f"a stream; the first {len(self.train):,} records were checked"
        kinds = (("images", self.num_with_images), ("videos", self.num_with_videos))
        shown = ", ".join(f"{number:,} with {what}" for what, number in kinds if number)
        return f"{amount(len(self.train), 'record')}, {shown or 'text only'}"

    def warnings(self) -> list[str]:
        """Return warnings about skipped records and the reasons."""
        messages = []
        if self.skipped:
            messages.append(f"{amount(self.skipped, 'record')} skipped: images missing or empty (--bad_images skip)")
        messages += [f"{finding.where}: {finding.sentence}" for finding in self.broken[:5]]
        if self.broken:
            messages.append(f"{amount(len(self.broken), 'broken record')} skipped (python -m milora_data check)")
        if self.unlearnable:
            messages.append(f"{amount(self.unlearnable, 'record')} without an answer skipped")
        return messages

    @property
    def num_skipped(self) -> int:
        """Return the number of records that the run leaves out, for whatever reason."""
        return self.skipped + self.unlearnable + len(self.broken)

    def counts(self) -> dict[str, int]:
        """Return the counts for environment.json; the length of a stream is unknown."""
        known = {} if self.streamed else {"train": len(self.train)}
        return {**known, "eval": len(self.evaluation or ()), "skipped": self.num_skipped}


def read_records(config: DataConfig) -> RunData:
    """Return the records that `config` names. Raises UserError for everything in the files that would fail later."""
    require_named(config)
    assert config.path is not None
    held_out = None if config.eval_path is None else _load_checked(config.eval_path, config)  # it is small: first
    train = _inspect_stream(config) if config.streaming else _load_checked(config.path, config)
    if held_out is None:
        return train
    return replace(
        train,
        evaluation=held_out.train,
        skipped=train.skipped + held_out.skipped,
        unlearnable=train.unlearnable + held_out.unlearnable,
        broken=train.broken + held_out.broken,
        tools_at=train.tools_at or held_out.tools_at,
    )


def require_named(config: DataConfig) -> None:
    """Raise UserError if the recipe names no training data."""
    if config.path is None:
        raise UserError("no training data", code="data-no-path", hint="set --data_path, or data.path in the recipe")


def source_text(config: DataConfig) -> str:
    """Return the data as text: its file, or the files of its sources with their weights."""
    if not isinstance(config.path, list):
        return str(config.path)
    return ", ".join(f"{source.weight:g} x {source.path}" for source in config.path)


def _inspect_stream(config: DataConfig) -> RunData:
    """Return the first records of a stream, checked: systematic errors appear before the model loads."""

    if find_spec("torchdata") is None:
        raise UserError(
            "the package torchdata is not installed",
            code="package-missing",
            where=Key.of("data.streaming"),
            hint="pip install -e '.[data]'",
        )
    assert config.path is not None
    stream = record_stream(sources_of(config.path), shuffle_buffer=0, web_pictures=config.web_pictures)
    items = list(islice(stream, INSPECTED))
    errors = [item for item in items if isinstance(item, DataError)]
    if errors and config.bad_images == "raise":
        raise errors[0]
    # A stream of few records repeats them.
    records = list({record.source: record for record in items if isinstance(record, Record)}.values())
    report = Report(source_text(config), str(config.image_folder))
    if config.bad_images != "raise":
        records = list(_usable(records, report))
    if not records:
        raise errors[0] if errors else UserError(problems=[_none_left(source_text(config), report)])
    check_for_training(records, config.image_folder, config.bad_images)
    seen = _Seen()
    return RunData(
        CompactRecords(seen.passing(records)),
        None,
        broken=tuple(report.findings),
        streamed=True,
        fingerprint=seen.fingerprint(),
        pictures=picture_digest(records, seen.with_images, config.image_folder),
        tools_at=seen.tools_at,
        with_images=bytes(seen.with_images),
        num_with_videos=seen.num_with_videos,
    )


def sources_of(path: str | list[SourceConfig]) -> str | list[Source]:
    """Return the sources of a recipe in the form that `milora_data` takes."""
    if isinstance(path, str):
        return path
    return [Source(source.path, source.weight, source.image_folder) for source in path]


def _load_checked(path: str | list[SourceConfig], config: DataConfig) -> RunData:
    report = Report(str(path), str(config.image_folder))
    reader = load_records if config.bad_images == "raise" else partial(readable, report=report)
    name, sources = path if isinstance(path, str) else source_text(config), sources_of(path)
    stream = reader(sources) if isinstance(sources, str) else mixed_records(sources, read=reader)
    if config.web_pictures == "download":
        stream = map(from_web, stream)
    if config.bad_images != "raise":
        stream = _usable(stream, report)
    seen = _Seen()
    try:
        records = CompactRecords(seen.passing(islice(stream, config.limit)))
    except DataError as error:
        if error.first.hint or not Path(name).is_file():
            raise
        raise with_context(
            error, hint=f"see: python -m milora_data check {name}; --fix OUT writes a file without such records"
        ) from None
    if not records:
        raise UserError(problems=[_none_left(name, report)])
    counts = check_for_training(records, config.image_folder, config.bad_images)
    missing: set[str] = set()
    if config.bad_images == "skip" and counts["missing_pictures"]:
        names = {name for record in records for name in record.files}
        missing.update(find_missing(names, Path(config.image_folder or "")))
    kept, skipped = records, 0
    if missing or counts["unlearnable"]:
        complete = [place for place, record in enumerate(records) if missing.isdisjoint(record.files)]
        skipped = len(records) - len(complete)
        kept = records.only(place for place in complete if _is_learnable(records[place]))
        seen = _Seen()
        for record in kept:
            seen.add(record)
    if not kept:
        raise UserError(problems=[_none_left(name, report, missing_picture=skipped, no_answer=len(records) - skipped)])
    return RunData(
        kept,
        None,
        skipped,
        len(records) - skipped - len(kept),
        tuple(report.findings),
        fingerprint=seen.fingerprint(),
        pictures=picture_digest(kept, seen.with_images, config.image_folder),
        tools_at=seen.tools_at,
        with_images=bytes(seen.with_images),
        num_with_videos=seen.num_with_videos,
    )


def _is_learnable(record: Record) -> bool:
    return all(finding.kind != "no_answer" for finding in examine(record))


class _Seen:
    """What a run has to know about all of its records, collected while they pass: there may be millions."""

    def __init__(self) -> None:
        self._digest = hashlib.blake2b(digest_size=16)
        self.tools_at = ""
        self.with_images = bytearray()
        self.num_with_videos = 0

    def passing(self, records: Iterable[Record]) -> Iterator[Record]:
        """Yield the records, and add each of them."""
        for record in records:
            self.add(record)
            yield record

    def add(self, record: Record) -> None:
        """Add a record. One whose tools are broken is left out: `check_for_training`, which comes next, reports it."""
        self.with_images.append(bool(record.images))
        self.num_with_videos += bool(record.videos)
        try:
            self._digest.update(_identity(record))
            if not self.tools_at and uses_tools(record):
                self.tools_at = record.source or f"record {record.id!r}"
        except DataError:
            return

    def fingerprint(self) -> str:
        """Return a hash of the contents and the order of the records."""
        return self._digest.hexdigest()


def _identity(record: Record) -> bytes:
    """Return the turns and the image names of a record, without its place.

    >>> _identity(Record("a", (), (), "train.json:1")) == _identity(Record("a", (), (), "moved.json:1"))
    True
    """
    parts = [*record.files, ""]
    parts += [f"{video.fps} {video.num_frames}" for video in record.videos if video.file is not None]
    for turn in record.turns:
        parts += (turn.role, turn.text, *filter(None, [turn.call]))
    if record.extra.get("tools"):
        parts.append(json.dumps(tools_of(record), ensure_ascii=False))
    return "\0".join([*parts, ""]).encode("utf-8", "surrogatepass")


def picture_digest(records: Sequence[Record], with_images: Sequence[int], folder: str | None) -> str:
    """Return a hash of the contents of up to HASHED pictures, evenly spread over the records; "" without pictures."""
    places = [number for number, has_image in enumerate(with_images) if has_image]
    digest = hashlib.blake2b(digest_size=16)
    for number in places[:: -(-len(places) // HASHED) or 1]:
        try:
            digest.update(content_of(place_of(Path(folder or ""), records[number].images[0])))
        except OSError:  # `bad_images` decides about it
            digest.update(b"unreadable")
    return digest.hexdigest() if places else ""


def _none_left(path: str, report: Report, **others: int) -> Problem:
    """Return the problem of data without usable records; `others` counts those that the report does not have."""
    reasons = Counter(finding.kind for finding in report.findings) + Counter(others)
    if not reasons:
        return no_records(path)
    counts = "; ".join(f"{amount(number, 'record')}: {KINDS[kind].title}" for kind, number in reasons.items())
    message = f"every record is left out: {counts}"
    return Problem(message, "data-all-records-left-out", path, f"see: {command_line('milora_data', 'check', path)}")


def _usable(records: Iterable[Record], report: Report) -> Iterator[Record]:
    """Yield the records that can be encoded; add the problem of every other record to `report`."""
    for record in records:
        errors = [finding for finding in examine(record) if finding.severity == "error"]
        if all(finding.kind == "no_answer" for finding in errors):
            yield record
        else:
            report.findings.append(errors[0])
