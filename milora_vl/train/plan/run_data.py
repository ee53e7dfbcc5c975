"""Read and check the training and held-out records of a run: limits, missing pictures, left-out records, streams."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

from milora_data.check import KINDS, Finding, Report, TrainingCheck, errors_of, readable
from milora_data.records.record import CompactRecords, Record
from milora_data.stream.dataset import record_stream
from milora_data.stream.sources import Source, load_records, mixed_records
from milora_vl.common.cli.command_line import amount, command_line
from milora_vl.common.errors import DataError, Key, Problem, UserError, no_records, with_context
from milora_vl.train.recipe.schema import DataConfig, SourceConfig

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
    stream = record_stream(sources_of(config.path), shuffle_buffer=0)
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
    check = TrainingCheck()
    kept = CompactRecords(check.passing(records))
    check.finish(config.image_folder, config.bad_images)
    return RunData(
        kept,
        None,
        broken=tuple(report.findings),
        streamed=True,
        fingerprint=check.fingerprint(),
        with_images=bytes(check.with_images),
        num_with_videos=check.num_with_videos,
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
    if config.bad_images != "raise":
        stream = _usable(stream, report)
    check = TrainingCheck()
    try:
        records = CompactRecords(check.passing(islice(stream, config.limit)))
    except DataError as error:
        if error.first.hint or not Path(name).is_file():
            raise
        raise with_context(
            error, hint=f"see: python -m milora_data check {name}; --fix OUT writes a file without such records"
        ) from None
    if not records:
        raise UserError(problems=[_none_left(name, report)])
    missing = check.finish(config.image_folder, config.bad_images)
    missing = missing if config.bad_images == "skip" else set()
    kept, skipped = records, 0
    if missing or check.unlearnable:
        complete = [place for place, record in enumerate(records) if missing.isdisjoint(record.files)]
        skipped = len(records) - len(complete)
        unlearnable = set(check.unlearnable)
        kept = records.only(place for place in complete if place not in unlearnable)
        check = TrainingCheck()
        for record in kept:
            check.add(record)
    if not kept:
        raise UserError(problems=[_none_left(name, report, missing_picture=skipped, no_answer=len(records) - skipped)])
    return RunData(
        kept,
        None,
        skipped,
        len(records) - skipped - len(kept),
        tuple(report.findings),
        fingerprint=check.fingerprint(),
        with_images=bytes(check.with_images),
        num_with_videos=check.num_with_videos,
    )


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
        errors = errors_of(record)
        if all(finding.kind == "no_answer" for finding in errors):
            yield record
        else:
            report.findings.append(errors[0])
