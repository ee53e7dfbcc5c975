"""The records of a run, read and checked before the model is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from milora_data.check import check_for_training
from milora_data.errors import UserError
from milora_data.findings import examine
from milora_data.pictures import find_missing, uses
from milora_data.records import Record, load_records
from milora_vl.config import DataConfig


@dataclass(frozen=True, slots=True)
class RunData:
    """What is trained and evaluated on. The counts are of records that were left out."""

    train: list[Record]
    evaluation: list[Record] | None
    skipped: int = 0  # a picture of theirs is missing, and --bad_images skip says so
    unlearnable: int = 0  # they have no answer

    @property
    def num_with_images(self) -> int:
        """How many training records have a picture."""
        return sum(bool(record.images) for record in self.train)

    def counts(self) -> dict[str, int]:
        """As environment.json holds them."""
        return {"train": len(self.train), "eval": len(self.evaluation or ()), "skipped": self.skipped}


def read(config: DataConfig) -> RunData:
    """The records that `config` names. UserError for anything in the files that would fail later."""
    if config.path is None:
        raise UserError("nothing to train on: name the records with --data_path, or data.path in the recipe")
    train = _checked(Path(config.path), config)
    if config.eval_path is None:
        return RunData(train.train, None, train.skipped, train.unlearnable)
    held_out = _checked(Path(config.eval_path), config)
    skipped, unlearnable = train.skipped + held_out.skipped, train.unlearnable + held_out.unlearnable
    return RunData(train.train, held_out.train, skipped, unlearnable)


def _checked(path: Path, config: DataConfig) -> RunData:
    records = list(islice(load_records(path), config.limit))
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
    return RunData(kept, None, skipped, len(records) - skipped - len(kept))
