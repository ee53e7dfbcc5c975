"""Run one measurement of forgetting: load the models, measure the probes, write forgetting.json, format the table."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from milora_data import load_records
from milora_data.formats.stored import is_saved
from milora_vl.common.atomic_write import read_json, write_json
from milora_vl.common.cli.console import beside
from milora_vl.common.errors import UserError, at_flag
from milora_vl.core.adapter.folders import CONFIG, require_no_base
from milora_vl.forgetting.answers import answer_batches, drawn_questions
from milora_vl.forgetting.measure import can_recover_base, compare_on, measure_forgetting
from milora_vl.forgetting.text import sampled_batches
from milora_vl.interop.load_model import load_by_flags
from milora_vl.models.loading import load_processor, split_processor
from milora_vl.models.prompts import prompts_of

Measurements = dict[str, Any]
FILE = "forgetting.json"


@dataclass(frozen=True, kw_only=True)
class Job:
    folder: Path
    model: str
    adapter: Path | None
    base: str | None  # of a fully trained model
    on: Sequence[str] | None  # None: all probes that the model takes
    texts: Sequence[Path]  # none: the package's
    data_path: Path | None  # records with questions about pictures; without them, drawn shapes
    image_folder: Path | None
    template: str | None
    num_tokens: int
    limit: int | None
    batch_size: int
    seed: int
    device: str | None
    dtype: str | None

    @property
    def file(self) -> Path:
        return self.folder / FILE

    def run(self) -> Measurements:
        if self.adapter is None and self.base is None:
            hint = "add:  --adapter FOLDER, or --base MODEL for a fully trained --model"
            raise UserError("forgetting needs a base model to compare with", hint=hint)
        require_no_base(self.model, self.adapter, self.base)
        missing = [path for path in (*self.texts, self.data_path) if path is not None and not _exists(path)]
        if missing:
            path, flag = missing[0], "--data_path" if missing[0] == self.data_path else "--text"
            raise UserError(f"{path}: no such file", code="data-missing-file", where=flag, hint=beside(path))
        measures: dict[str, Callable[[], Any]] = {
            "text": self._text, "samples": self._samples, "pictures": self._pictures
        }  # fmt: skip
        probes = self.on or tuple(measures)
        if "pictures" in probes and not self._has_vision:
            if self.on:
                raise UserError(f"{self.model} reads only text", where="--on", hint="remove pictures from --on")
            probes = tuple(name for name in probes if name != "pictures")
        results = self._kept_results(probes)
        for name in probes:
            sys.stderr.write(f"forgetting on {name} ...\n")
            try:
                results[name] = asdict(measures[name]())
            except UserError:
                raise
            except ValueError as error:  # too little text, a file without text, two vocabularies
                hint = "leave this probe out of --on, or give it more text"
                raise UserError(f"{name}: {error}", where="--on", hint=hint) from None
            write_json(self.file, results)
        return results

    def _kept_results(self, probes: Sequence[str]) -> Measurements:
        """Return the results in `file` except for `probes`, or none if weights or seed have changed."""
        identity: Measurements = {"model": self.model, "adapter": None if self.adapter is None else str(self.adapter)}
        identity |= {"base": self.base, "seed": self.seed}
        tuned = self.adapter or Path(self.model)
        weights = [file for name in ("*.safetensors", "*.bin", CONFIG) for file in tuned.glob(name)]
        before = read_json(self.file) or {}
        if {key: before.get(key) for key in identity} != identity:
            return identity
        if any(file.stat().st_mtime > self.file.stat().st_mtime for file in weights):  # trained again since
            return identity
        return {key: value for key, value in before.items() if key not in probes}

    def _text(self) -> Any:
        texts = None
        if self.texts:
            texts = {str(path): path.read_text(encoding="utf-8") for path in self.texts}
        return measure_forgetting(
            self._tuned, self._tokenizer, base=self._reference, texts=texts, num_tokens=self.num_tokens,
            batch_size=self.batch_size,
        )  # fmt: skip

    def _samples(self) -> Any:
        batches = sampled_batches(
            self._reference or self._tuned, self._tokenizer, without_adapter=self._reference is None,
            num_tokens=self.num_tokens, batch_size=self.batch_size, seed=self.seed,
        )  # fmt: skip
        return compare_on(list(batches), self._tuned, base=self._reference, what="the base model's own text")

    def _pictures(self) -> Any:
        prompts = prompts_of(self.model, self.adapter, self.template)
        prompts.limit(self._processor)
        with tempfile.TemporaryDirectory() as drawn:
            if self.data_path is None:
                folder, records, what = Path(drawn), drawn_questions(Path(drawn)), "80 questions on 20 drawn shapes"
            else:
                folder, what = self.image_folder or self.data_path.parent, str(self.data_path)
                records = self._records()
            batches = list(answer_batches(
                self._reference or self._tuned, self._processor, records[: self.limit], image_folder=folder,
                without_adapter=self._reference is None, batch_size=self.batch_size, template=prompts.template,
                image_aspect_ratio=prompts.image_aspect_ratio,
            ))  # fmt: skip
        return compare_on(batches, self._tuned, base=self._reference, what=what)

    def _records(self) -> list[Any]:
        records = [r for r in load_records(str(self.data_path)) if any(turn.role == "user" for turn in r.turns)]
        if not records:
            hint = "name records with a turn of the user, as for a training"
            raise UserError("contains no question", where=str(self.data_path), hint=hint)
        return records

    @property
    def _has_vision(self) -> bool:
        return split_processor(self._processor)[1] is not None

    @property
    def _tokenizer(self) -> Any:
        return split_processor(self._processor)[0]

    @cached_property
    def _tuned(self) -> Any:
        return self._load(self.model, self.adapter)

    @cached_property
    def _processor(self) -> Any:
        return load_processor(self.model)

    @cached_property
    def _reference(self) -> Any | None:
        if can_recover_base(self._tuned):
            return None
        return self._load(self.base or self.model, None)  # a projector, the full model or biases trained

    def _load(self, name: str, adapter: Path | None) -> Any:
        with at_flag("--base" if name == self.base else "--model"):
            return load_by_flags(name, adapter, self.dtype, self.device)[0]


def _exists(path: Path) -> bool:
    return path.is_file() or is_saved(path)
