"""The records of a training, read once and checked: everything in the files that would fail later is an error here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

from milora_data.check import KINDS, Finding, Report, TrainingCheck, errors_of, readable
from milora_data.keys import digest
from milora_data.pictures.load import ImagePolicy
from milora_data.records.record import CompactRecords, Record
from milora_data.stream import Source, load_records, mixed_records
from milora_vl.common.cli.console import amount, command_line
from milora_vl.common.errors import DataError, Key, Problem, UserError, no_records, with_context

INSPECTED = 100  # records of a stream that are checked before training


@dataclass(frozen=True, slots=True)
class RunData:
    train: Sequence[Record]
    evaluation: Sequence[Record] | None
    skipped: int = 0  # an image is missing, with --bad_images skip
    unlearnable: int = 0  # they have no answers
    broken: tuple[Finding, ...] = ()  # invalid records, if --bad_images is not raise
    streamed: bool = False  # `train` holds the first records of a stream
    keys: bytes = b""  # of each record of `train`: of its texts and its stored pictures (`TrainingCheck.keys`)
    picture_keys: bytes = b""  # of each picture file of `train` (`TrainingCheck.picture_keys`)
    held_out_keys: bytes = b""  # of each record of `evaluation`, then of each of its picture files
    with_images: bytes = b""  # 1 for each record of `train` with an image, 0 for each other
    num_with_videos: int = 0  # of `train`
    unread: Mapping[str, int] = field(default_factory=dict)  # keys of turns that are not read

    @property
    def fingerprint(self) -> str:
        """Return the key of the records in their order."""
        return digest(self.keys.hex())

    @property
    def pictures(self) -> str:
        """Return the key of the picture files in their order, "" without any."""
        return digest(self.picture_keys.hex()) if self.picture_keys else ""

    def describe(self) -> str:
        if self.streamed:
            return f"a stream; the first {len(self.train):,} records were checked"
        kinds = (("images", sum(self.with_images)), ("videos", self.num_with_videos))
        shown = ", ".join(f"{number:,} with {what}" for what, number in kinds if number)
        return f"{amount(len(self.train), 'record')}, {shown or 'text only'}"

    def warnings(self) -> list[str]:
        messages = []
        if self.skipped:
            messages.append(f"{amount(self.skipped, 'record')} skipped: images missing or empty (--bad_images skip)")
        messages += [f"{finding.where}: {finding.sentence}" for finding in self.broken[:5]]
        if self.broken:
            messages.append(f"{amount(len(self.broken), 'broken record')} skipped (python -m milora_data check)")
        if self.unlearnable:
            messages.append(f"{amount(self.unlearnable, 'record')} without an answer skipped")
        messages += [f'"{key}" of {amount(count, "turn")} is not read' for key, count in self.unread.items()]
        return messages

    def counts(self) -> dict[str, int]:
        """Return the counts for environment.json; the length of a stream is unknown."""
        known = {} if self.streamed else {"train": len(self.train)}
        skipped = self.skipped + self.unlearnable + len(self.broken)
        return {**known, "eval": len(self.evaluation or ()), "skipped": skipped}


def read_training_records(
    path: str | list[Source],
    *,
    eval_path: str | None = None,
    image_folder: str | None = None,
    bad_images: ImagePolicy = "raise",
    limit: int | None = None,
    streaming: bool = False,
) -> RunData:
    """Return all records, of a stream the first ones. Raises UserError for data with which a training would fail."""
    read = partial(_load_checked, image_folder=image_folder, bad_images=bad_images, limit=limit)
    held_out = None if eval_path is None else read(eval_path)  # it is small: first
    train = _inspect_stream(path, image_folder, bad_images) if streaming else read(path)
    if held_out is None:
        return train
    return replace(
        train,
        evaluation=held_out.train,
        held_out_keys=held_out.keys + held_out.picture_keys,
        skipped=train.skipped + held_out.skipped,
        unlearnable=train.unlearnable + held_out.unlearnable,
        broken=train.broken + held_out.broken,
    )


def source_text(path: str | list[Source] | None) -> str:
    return ", ".join(f"{each.weight:g} x {each.path}" for each in path) if isinstance(path, list) else str(path)


def _inspect_stream(path: str | list[Source], image_folder: str | None, bad_images: ImagePolicy) -> RunData:
    """Return the first records of a stream, checked: systematic errors appear before the model loads."""
    if find_spec("torchdata") is None:
        hint, where = "pip install -e '.[data]'", Key.of("data.streaming")
        raise UserError("the package torchdata is not installed", code="package-missing", where=where, hint=hint)
    from milora_data.stream.dataset import record_stream

    items = list(islice(record_stream(sources_of(path), shuffle_buffer=0), INSPECTED))
    errors = [item for item in items if isinstance(item, DataError)]
    if errors and bad_images == "raise":
        raise errors[0]
    # A stream of few records repeats them.
    records = list({record.source: record for record in items if isinstance(record, Record)}.values())
    report = Report(source_text(path), str(image_folder))
    if bad_images != "raise":
        records = list(_usable(records, report))
    if not records:
        raise errors[0] if errors else UserError(problems=[_none_left(source_text(path), report)])
    check = TrainingCheck()
    kept = CompactRecords(check.passing(records))
    check.finish(image_folder, bad_images)
    return _described(RunData(kept, None, broken=tuple(report.findings), streamed=True), check, image_folder)


def sources_of(path: str | list[Source]) -> list[Source]:
    return [Source(path=path)] if isinstance(path, str) else path


def _load_checked(
    path: str | list[Source], image_folder: str | None, bad_images: ImagePolicy, limit: int | None
) -> RunData:
    report = Report(str(path), str(image_folder))
    reader = load_records if bad_images == "raise" else partial(readable, report=report)
    name, stream = source_text(path), mixed_records(sources_of(path), reader)
    if bad_images != "raise":
        stream = _usable(stream, report)
    check = TrainingCheck()
    try:
        records = CompactRecords(check.passing(islice(stream, limit)))
    except DataError as error:
        if error.first.hint or not Path(name).is_file():
            raise
        hint = f"see: python -m milora_data check {name}; --fix OUT writes a file without such records"
        raise with_context(error, hint=hint) from None
    if not records:
        raise UserError(problems=[_none_left(name, report)])
    missing = check.finish(image_folder, bad_images)
    missing = missing if bad_images == "skip" else set()
    kept, skipped = records, 0
    if missing or check.unlearnable:
        complete = [place for place, record in enumerate(records) if missing.isdisjoint(record.files)]
        skipped = len(records) - len(complete)
        unlearnable = set(check.unlearnable)
        kept = records.only(place for place in complete if place not in unlearnable)
        check = check.without(kept)
    if not kept:
        raise UserError(problems=[_none_left(name, report, missing_picture=skipped, no_answer=len(records) - skipped)])
    found = RunData(kept, None, skipped, len(records) - skipped - len(kept), tuple(report.findings))
    return _described(found, check, image_folder)


def _described(data: RunData, check: TrainingCheck, image_folder: str | None) -> RunData:
    return replace(
        data,
        keys=bytes(check.keys),
        picture_keys=check.picture_keys(image_folder),
        with_images=bytes(check.with_images),
        num_with_videos=check.num_with_videos,
        unread=check.unread,
    )


def _none_left(path: str, report: Report, **others: int) -> Problem:
    """Return the problem of data without usable records; `others` counts those that the report does not have."""
    reasons = Counter(finding.kind for finding in report.findings) + Counter(others)
    if not reasons:
        return no_records(path)
    counts = "; ".join(f"{amount(number, 'record')}: {KINDS[kind].title}" for kind, number in reasons.items())
    hint = f"see: {command_line('milora_data', 'check', path)}"
    return Problem(f"every record is left out: {counts}", "data-all-records-left-out", path, hint)


def _usable(records: Iterable[Record], report: Report) -> Iterator[Record]:
    """Yield the records that can be encoded; add the problem of every other record to `report`."""
    for record in records:
        errors = errors_of(record)
        if all(finding.kind == "no_answer" for finding in errors):
            yield record
        else:
            report.findings.append(errors[0])
