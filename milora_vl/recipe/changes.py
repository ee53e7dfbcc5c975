"""Compare two recipes: what a resumed run changes, in words, and which changes are refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from milora_vl.base.strict_models import Strict
from milora_vl.models.names import hub_id
from milora_vl.policy import Policy
from milora_vl.recipe import hf_flags
from milora_vl.recipe.resume_table import SCHEDULES_BY_EVALUATION, SCHEDULES_WITHOUT_END, effect_of
from milora_vl.recipe.schema import Recipe

# Keys that hold a path: two spellings may name the same file or folder.
PLACES = (
    "projector_weights", "parts.vision_tower", "parts.vision_weights", "factor_cache", "data.path", "data.image_folder",
    "data.eval_path", "data.feature_cache", "eval.data", "sweep.data", "train.logging_dir",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Side:
    """What the weights of a run depend on: recipe, number of processes, dtype of the frozen weights."""

    recipe: Recipe
    processes: int
    dtype: str

    def train(self, name: str) -> Any:
        """Return a training argument, or its default."""
        half = {"bfloat16": "bf16", "float16": "fp16"}.get(self.recipe.dtype)
        default = True if name == half else hf_flags.flags()[name].default
        value = self.recipe.train.get(name)
        return default if value is None else value

    @property
    def batch(self) -> tuple[int, int, int]:
        """Records per device, accumulation steps, processes."""
        accumulation = self.train("gradient_accumulation_steps")
        return self.train("per_device_train_batch_size"), accumulation, self.processes


@dataclass(frozen=True, slots=True)
class Change:
    """One difference. `is_refused`: if the run continued with it, no recipe would describe the result."""

    key: str
    before: Any
    now: Any
    is_refused: bool
    why: str = ""

    def __str__(self) -> str:
        """Return the difference as `key old -> new`."""
        return f"{self.key} {shown(self.before)} -> {shown(self.now)}"

    def row(self) -> tuple[str, str, str]:
        """Return key, old and new value as text."""
        return self.key, shown(self.before), shown(self.now) + (f"   ({self.why})" if self.why else "")


def changes(before: Side, now: Side, *, identifies_records: bool) -> list[Change]:
    """Return every difference of two runs, in the order of a recipe.

    identifies_records: the earlier run stored a fingerprint of its records.
    """
    old, new = dict(_flat(before)), dict(_flat(now))
    differences = []
    for key in {**old, **new}:
        if not _is_same(key, old.get(key), new.get(key)):
            refused, why = _refusal(key, before, now, identifies_records=identifies_records)
            differences.append(Change(key, old.get(key), new.get(key), refused, why))
    return [*_policy_changes(before, now), *differences, *_batch_change(before, now)]


def schedule_has_end(side: Side) -> bool:
    """Return whether the learning rate of a step depends on the total number of steps."""
    schedule, warmup = side.train("lr_scheduler_type"), side.train("warmup_steps")
    is_share = 0 < warmup < 1 and schedule in ("constant_with_warmup", "inverse_sqrt")
    return is_share or schedule not in SCHEDULES_WITHOUT_END


def shown(value: Any) -> str:
    """Return a value as a recipe writes it, on one line.

    >>> shown(None), shown({"energy": 0.5}), shown(2e-05)
    ('none', '{energy: 0.5}', '2e-05')
    """
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {shown(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(shown, value)) + "]"
    if isinstance(value, float):
        return f"{value:g}"
    return "none" if value is None else str(value)


def _flat(side: Side) -> Iterator[tuple[str, Any]]:
    """Yield all keys of a recipe except the policy, with values; training arguments include defaults."""
    for name in type(side.recipe).model_fields:
        value = getattr(side.recipe, name)
        if isinstance(value, Strict):
            yield from ((f"{name}.{inner}", entry) for inner, entry in value.model_dump().items())
        elif name not in ("train", "policy"):
            yield name, side.dtype if name == "dtype" else value
    for name in hf_flags.flags():
        if name not in hf_flags.RENAMED and name not in hf_flags.REFUSED:
            yield f"train.{name}", side.train(name)


def _is_same(key: str, before: Any, now: Any) -> bool:
    if before == now:
        return True
    if key == "model":
        return _weights(before) == _weights(now)
    return key in PLACES and resolved_paths(before) == resolved_paths(now)


def _weights(name: str) -> str:
    """Return the hub id or the folder behind a model name."""

    if Path(name).is_dir():
        return str(Path(name).resolve())
    return hub_id(name)


def resolved_paths(value: Any) -> Any:
    """Return a data path, or the paths of several sources, in absolute form; hub names stay."""
    if isinstance(value, list):
        return [{**source, "path": resolved_paths(source["path"])} for source in value]
    is_path = isinstance(value, str) and not value.startswith("hub:")
    return str(Path(value).resolve()) if is_path else value


def _refusal(key: str, before: Side, now: Side, *, identifies_records: bool) -> tuple[bool, str]:
    effect = effect_of(key)
    name = key.removeprefix("train.")
    streams = now.recipe.data.streaming
    if effect == "fallback":
        return any(name not in rule for rule in now.recipe.policy or ()), ""
    if effect == "dtype":
        return True, f"--dtype {before.dtype} keeps it"
    if effect == "records":
        return streams or not identifies_records, ""
    if effect == "length":
        # Steps cannot be compared with epochs before the records are read (`require_same_steps` does it then).
        comparable = (before.train("max_steps") > 0) == (now.train("max_steps") > 0)
        refused = comparable and _decides_length(name, now) and schedule_has_end(now)
        return refused, because_of_schedule(now) if refused else ""
    if effect == "selection":
        chosen = now.train("load_best_model_at_end") or now.train("lr_scheduler_type") in SCHEDULES_BY_EVALUATION
        return bool(chosen), ""
    if effect in ("stream", "batch"):
        return streams, "the order of a stream depends on it" if streams else ""
    return effect in ("decides", "model"), ""


def because_of_schedule(side: Side) -> str:
    """Return why a run with an ending schedule cannot change its number of steps."""
    return f"the learning rates of the {side.train('lr_scheduler_type')} schedule depend on the last step"


def _decides_length(name: str, side: Side) -> bool:
    return name == "max_steps" or side.train("max_steps") < 1


def _batch_change(before: Side, now: Side) -> list[Change]:
    if prod(before.batch) == prod(now.batch):
        return []
    keeps, remainder = divmod(prod(before.batch), now.batch[0] * now.processes)
    hint = f"--gradient_accumulation_steps {keeps} keeps it" if keeps and not remainder else ""
    return [Change("batch in total", _in_words(before), _in_words(now), True, hint)]


def _in_words(side: Side) -> str:
    return f"{prod(side.batch)} ({' x '.join(map(str, side.batch))})"


def _policy_changes(before: Side, now: Side) -> Iterator[Change]:
    """Yield differences by field for rules with the same modules, else by rule. All are refused."""
    old, new = _rules(before), _rules(now)
    for number in range(max(len(old), len(new))):
        first = old[number] if number < len(old) else None
        second = new[number] if number < len(new) else None
        place = f"policy[{number}]"
        if first is None or second is None or first["modules"] != second["modules"]:
            if first != second:
                yield Change(place, first, second, True)
            continue
        for name in {**first, **second}:
            values = first.get(name), second.get(name)
            if effect_of(f"train.{name}") == "fallback":  # a rule without a rate uses the rate of the run
                values = first.get(name, before.train(name)), second.get(name, now.train(name))
            if values[0] != values[1]:
                yield Change(f"{place}.{name}", *values, True)


def _rules(side: Side) -> list[dict[str, Any]]:
    rules = side.recipe.policy
    return Policy.parse(list(rules)).to_list() if rules else []
