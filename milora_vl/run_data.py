"""The records of a run, read and checked before the model is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from milora_data.errors import UserError
from milora_data.records import Record, load_records
from milora_vl.config import DataConfig


@dataclass(frozen=True, slots=True)
class RunData:
    """What is trained and evaluated on."""

    train: list[Record]
    evaluation: list[Record] | None
    skipped: int  # records left out because a picture of theirs is missing

    @property
    def num_with_images(self) -> int:
        """How many training records have a picture."""
        return sum(bool(record.images) for record in self.train)

    def counts(self) -> dict[str, int]:
        """As environment.json holds them."""
        return {"train": len(self.train), "eval": len(self.evaluation or ()), "skipped": self.skipped}


def read(config: DataConfig, *, template: str) -> RunData:
    """The records that `config` names. UserError for anything in the files that would fail later."""
    if config.path is None:
        raise UserError("nothing to train on: name the records with --data_path, or data.path in the recipe")
    train, skipped = _checked(Path(config.path), config, template)
    evaluation, more = (None, 0) if config.eval_path is None else _checked(Path(config.eval_path), config, template)
    return RunData(train, evaluation, skipped + more)


def _checked(path: Path, config: DataConfig, template: str) -> tuple[list[Record], int]:
    records = list(islice(load_records(path), config.limit))
    if not records:
        raise UserError(f"{path} holds no records")
    folder = Path(config.image_folder or "")
    if config.image_folder is not None and not folder.is_dir():
        raise UserError(f"no image folder {folder}\nname it with --image_folder, or data.image_folder in the recipe")
    missing = {name for record in records for name in record.images if not (folder / name).is_file()}
    if missing and config.bad_images == "raise":
        raise UserError(_about_missing(missing, path, folder))
    if config.bad_images != "skip":
        return records, 0
    kept = [record for record in records if missing.isdisjoint(record.images)]
    if not kept:
        raise UserError(f"every record of {path} has a missing picture; is --image_folder {folder} right?")
    return kept, len(records) - len(kept)


def _about_missing(missing: set[str], path: Path, folder: Path) -> str:
    first = sorted(missing)[:3]
    more = ", ..." if len(missing) > len(first) else ""
    where = f"in {folder}" if str(folder) != "." else "here (no --image_folder is given)"
    return (
        f"{len(missing):,} pictures of {path} are not {where}: {', '.join(first)}{more}\n"
        "leave their records out:  --bad_images skip\n"
        "show a plain picture:     --bad_images replace"
    )
