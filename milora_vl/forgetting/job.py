"""One measurement from end to end: models loaded, probes read, forgetting.json written, a table for people."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from milora_data import load_records
from milora_data.errors import UserError
from milora_data.whole import read_json, write_json
from milora_vl.adapters.folders import base_of, holds_adapter
from milora_vl.forgetting.answers import answer_batches, drawn_questions
from milora_vl.forgetting.measure import compare_on, hides_its_base, measure_forgetting
from milora_vl.forgetting.text import sampled_batches
from milora_vl.load import load_model
from milora_vl.models.devices import device_named, dtype_named
from milora_vl.models.loading import load_processor, split_processor
from milora_vl.recipe.yaml_file import trained_prompts

Results = dict[str, Any]
FILE = "forgetting.json"


@dataclass
class Job:
    """What to measure: the flags of the command. Results go to `file`, each probe as soon as it is done."""

    model: str
    adapter: Path | None
    base: str | None
    probes: tuple[str, ...] | None
    folder: Path
    texts: list[Path] | None
    data_path: Path | None
    image_folder: Path | None
    num_tokens: int
    limit: int | None
    batch_size: int
    seed: int
    template: str | None
    dtype: str | None
    device: str | None

    @property
    def file(self) -> Path:
        """Where the results are."""
        return self.folder / FILE

    def run(self) -> Results:
        """Measure what was asked for. UserError for what does not fit together."""
        if self.adapter is None and holds_adapter(Path(self.model)):
            self.model, self.adapter = base_of(Path(self.model)), Path(self.model)
        if self.adapter is None and self.base is None:
            raise UserError("forgetting is measured against a base\nsay:  --adapter A, or --base B for a full --model")
        if self.adapter is not None and self.base is not None:
            raise UserError("--base is for a fully trained --model; the base of an adapter is its --model")
        missing = [path for path in (*(self.texts or ()), self.data_path) if path is not None and not path.is_file()]
        if missing:
            raise UserError(f"no file {missing[0]}")
        measures: dict[str, Callable[[], Any]] = {
            "text": self._text, "samples": self._samples, "pictures": self._pictures
        }  # fmt: skip
        asked = self.probes or tuple(measures)
        if "pictures" in asked and not self._sees:
            if self.probes:
                raise UserError(f"--on pictures: {self.model} reads only text")
            asked = tuple(name for name in asked if name != "pictures")
        results = self._begun(asked)
        for name in asked:
            sys.stderr.write(f"forgetting on {name} ...\n")
            try:
                results[name] = asdict(measures[name]())
            except UserError:
                raise
            except ValueError as error:  # too little text, text that is none, models of two vocabularies
                raise UserError(f"--on {name}: {error}") from None
            write_json(self.file, results)
        return results

    def _begun(self, asked: Sequence[str]) -> Results:
        """The file's results of the same weights and seed that are not asked for again; of others none."""
        is_of: Results = {"model": self.model, "adapter": None if self.adapter is None else str(self.adapter)}
        is_of |= {"base": self.base, "seed": self.seed}
        tuned = self.adapter or Path(self.model)
        weights = [file for name in ("*.safetensors", "*.bin", "adapter_config.json") for file in tuned.glob(name)]
        before = read_json(self.file) or {}
        if {key: before.get(key) for key in is_of} != is_of:
            return is_of
        if any(file.stat().st_mtime > self.file.stat().st_mtime for file in weights):  # trained again since
            return is_of
        return {key: value for key, value in before.items() if key not in asked}

    def scores(self, suite: str, data: Path | None) -> list[Results]:
        """Evaluate a suite before and after, in a process of its own, and return the change of its headline scores."""
        what = ["--model", self.model, *(["--adapter", str(self.adapter)] if self.adapter else [])]
        what += ["--base", self.base] if self.base else []
        options = [*(["--data", str(data)] if data else []), *(["--limit", str(self.limit)] if self.limit else [])]
        options += [
            *(["--dtype", self.dtype] if self.dtype else []),
            *(["--device", self.device] if self.device else []),
        ]
        command = [
            sys.executable, "-m", "milora_eval", "run", *what, "--suite", suite, *options, "--with_base",
            "--forgetting_tokens", "0", "--output_dir", str(self.folder), "--format", "json",
        ]  # fmt: skip
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode != 0:
            raise UserError(f"the evaluation of {suite} failed (see above)", exit_code=1)
        sides = json.loads(done.stdout)
        after = next(side for which, side in sides.items() if which != "base")
        found = score_changes(sides["base"], after)
        write_json(self.file, (read_json(self.file) or {}) | {"scores": found})
        return found

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

        template, image_aspect_ratio = trained_prompts(self.adapter or Path(self.model))
        with tempfile.TemporaryDirectory() as drawn:
            if self.data_path is None:
                folder, records, what = Path(drawn), drawn_questions(Path(drawn)), "80 questions on 20 drawn shapes"
            else:
                folder, what = self.image_folder or self.data_path.parent, str(self.data_path)
                records = self._records()
            batches = list(
                answer_batches(
                    self._reference or self._tuned,
                    self._processor,
                    records[: self.limit],
                    image_folder=folder,
                    without_adapter=self._reference is None,
                    batch_size=self.batch_size,
                    template=self.template or template,
                    image_aspect_ratio=image_aspect_ratio,
                )
            )
        return compare_on(batches, self._tuned, base=self._reference, what=what)

    def _records(self) -> list[Any]:

        records = [r for r in load_records(str(self.data_path)) if any(turn.role == "user" for turn in r.turns)]
        if not records:
            raise UserError(f"{self.data_path} holds no question")
        return records

    @property
    def _sees(self) -> bool:

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
        """The base as a model of its own, where switching off an adapter does not give it."""

        if hides_its_base(self._tuned):
            return None
        return self._load(self.base or self.model, None)  # a projector alone, the whole model or biases were trained

    def _load(self, name: str, adapter: Path | None) -> Any:

        device = device_named(self.device)
        return load_model(name, adapter=adapter, dtype=dtype_named(self.dtype, device), device=device)[0]


def score_changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Results]:
    """Return the change of each benchmark's first score; `was_good` tells whether the base beat the answer by rote.

    A drop says that something was forgotten only where the base was good before.
    """
    new = {benchmark["name"]: benchmark["metrics"][0] for benchmark in after["benchmarks"] if benchmark["metrics"]}
    changes = []
    for benchmark in before["benchmarks"]:
        if not benchmark["metrics"] or benchmark["name"] not in new:
            continue
        old, now = benchmark["metrics"][0], new[benchmark["name"]]
        error, floor = old.get("stderr") or 0.0, old.get("baseline") or 0.0
        changes.append(
            {
                "benchmark": benchmark["name"],
                "metric": old["name"],
                "before": old["value"],
                "after": now["value"],
                "change": now["value"] - old["value"],
                "baseline": floor,
                "was_good": bool(old["value"] > floor + 2 * error),
            }
        )
    return changes


def table(results: Mapping[str, Any]) -> str:
    """Return the results as lines for a terminal."""
    lines = [
        f"{'':<10} {'forgotten (KL)':>18} {'cross-entropy':>18} {'base entropy':>13} {'change of loss':>18} tokens"
    ]
    for name in ("text", "samples", "pictures"):
        if found := results.get(name):
            cells = [
                _with_error(found["kl"], found["kl_stderr"]), _with_error(found["cross_entropy"], found["stderr"]),
                f"{found['base_entropy']:.3f}", _with_error(found["loss_change"], found["loss_change_stderr"]),
            ]  # fmt: skip
            lines.append(
                f"{name:<10} {cells[0]:>18} {cells[1]:>18} {cells[2]:>13} {cells[3]:>18} {found['n_tokens']:,} "
                f"in {found['n_documents']} documents"
            )
    for score in results.get("scores", ()):
        note = "" if score["was_good"] else "   (the base was not good at it: says nothing about forgetting)"
        lines.append(f"{score['benchmark']} {score['metric']}: {score['before']:.3f} -> {score['after']:.3f}{note}")
    return "\n".join(lines) + "\n"


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}")
