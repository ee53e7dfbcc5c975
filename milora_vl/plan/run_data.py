"""The records of a run, read and checked before the model is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

from milora_data.check import check_for_training, readable
from milora_data.compact import CompactRecords
from milora_data.errors import DataError, UserError
from milora_data.findings import Finding, examine
from milora_data.mix import Source, mixed_records
from milora_data.pictures import find_missing, uses
from milora_data.records import Record, load_records
from milora_data.report import Report
from milora_data.stream import record_stream
from milora_vl.recipe.schema import DataConfig, SourceConfig

LOOKED_AT = 100  # records of a stream, before it is trained on


@dataclass(frozen=True, slots=True)
class RunData:
    """What is trained and evaluated on. The counts are of records that were left out."""

    train: Sequence[Record]
    evaluation: Sequence[Record] | None
    skipped: int = 0  # a picture of theirs is missing, and --bad_images skip says so
    unlearnable: int = 0  # they have no answer
    broken: tuple[Finding, ...] = ()  # they are no records, and --bad_images is not raise
    streamed: bool = False  # `train` holds the first records of a stream

    @property
    def num_with_images(self) -> int:
        """How many training records have a picture."""
        return sum(bool(record.images) for record in self.train)

    def describe(self) -> str:
        """As the header says it."""
        if self.streamed:
            return f"a stream, of which the first {len(self.train):,} records were looked at"
        pictures = f"{self.num_with_images:,} with pictures" if self.num_with_images else "text only"
        return f"{len(self.train):,} records, {pictures}"

    def counts(self) -> dict[str, int]:
        """As environment.json holds them; of a stream, nobody knows how many there are to train on."""
        known = {} if self.streamed else {"train": len(self.train)}
        return {**known, "eval": len(self.evaluation or ()), "skipped": self.skipped}


def read(config: DataConfig) -> RunData:
    """The records that `config` names. UserError for anything in the files that would fail later."""
    if config.path is None:
        raise UserError("nothing to train on: name the records with --data_path, or data.path in the recipe")
    train = _looked_at(config) if config.streaming else _checked(config.path, config)
    if config.eval_path is None:
        return train
    held_out = _checked(config.eval_path, config)
    return RunData(
        train.train,
        held_out.train,
        train.skipped + held_out.skipped,
        train.unlearnable + held_out.unlearnable,
        train.broken + held_out.broken,
        train.streamed,
    )


def describe(config: DataConfig) -> str:
    """The data in a few words: its file, or the files of its sources with their weights."""
    if not isinstance(config.path, list):
        return str(config.path)
    return ", ".join(f"{source.weight:g} x {source.path}" for source in config.path)


def _looked_at(config: DataConfig) -> RunData:
    """The first records of a stream: what would be wrong with all of them is found before the model loads."""

    if find_spec("torchdata") is None:
        raise UserError('data.streaming needs torchdata: pip install "milora-vl[data]"')
    assert config.path is not None
    stream = record_stream(sources_of(config.path), shuffle_buffer=0)
    items = list(islice(stream, LOOKED_AT))
    errors = [item for item in items if isinstance(item, DataError)]
    if errors and config.bad_images == "raise":
        raise errors[0]
    # An endless stream of a few records comes back to its first ones.
    records = list({record.source: record for record in items if isinstance(record, Record)}.values())
    if not records:
        raise errors[0] if errors else UserError(f"{describe(config)} holds no records")
    if config.bad_images != "raise":
        report = Report(describe(config), str(config.image_folder))
        records = list(_usable(records, report))
    check_for_training(records, config.image_folder, config.bad_images)
    return RunData(CompactRecords(records), None, streamed=True)


def sources_of(path: str | list[SourceConfig]) -> str | list[Source]:
    """What a recipe names, as the functions of `milora_data` take it."""
    if isinstance(path, str):
        return path
    return [Source(source.path, source.weight, source.image_folder) for source in path]


def _checked(path: str | list[SourceConfig], config: DataConfig) -> RunData:
    report = Report(str(path), str(config.image_folder))
    read = load_records if config.bad_images == "raise" else partial(readable, report=report)
    if isinstance(path, list):
        found_records = mixed_records([Source(s.path, s.weight, s.image_folder) for s in path], read=read)
        path = describe(config)
    else:
        found_records = read(path)
    if config.bad_images != "raise":
        found_records = _usable(found_records, report)
    try:
        records = list(islice(found_records, config.limit))
    except DataError as error:
        if not Path(path).is_file():
            raise
        raise DataError(f"{error}\nsee: python -m milora_data check {path}; --fix OUT writes a file without") from None
    if not records:
        raise UserError(f"{path} holds no records")
    found = check_for_training(records, config.image_folder, config.bad_images)
    kept = records
    if config.bad_images == "skip" and found["missing_pictures"]:
        missing = set(find_missing(uses(records), Path(config.image_folder or "")))
        kept = [record for record in records if missing.isdisjoint(record.images)]
    skipped = len(records) - len(kept)
    if found["unlearnable"]:
        kept = [record for record in kept if all(finding.kind != "no_answer" for finding in examine(record))]
    if not kept:
        raise UserError(f"no record of {path} is left: their pictures are missing, or they have no answers")
    return RunData(CompactRecords(kept), None, skipped, len(records) - skipped - len(kept), tuple(report.findings))


def _usable(records: Iterable[Record], report: Report) -> Iterator[Record]:
    """The records that can be encoded; why another one cannot is added to the findings of `report`."""
    for record in records:
        errors = [finding for finding in examine(record) if finding.severity == "error"]
        if all(finding.kind == "no_answer" for finding in errors):
            yield record
        else:
            report.findings.append(errors[0])
