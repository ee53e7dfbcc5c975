"""What differs between the recipe of a run so far and the one it is resumed with, and what of that is refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from milora_vl.config import Recipe, Strict
from milora_vl.policy import Policy
from milora_vl.training import hf_arguments
from milora_vl.training.resume_table import (
    SCHEDULES_BY_EVALUATION,
    SCHEDULES_WITHOUT_END,
    effect_of,
)

# Keys with a file or folder: the same place may be written in two ways.
PLACES = (
    "projector_weights", "parts.vision_tower", "parts.vision_weights", "factor_cache", "data.path", "data.image_folder",
    "data.eval_path", "data.feature_cache", "eval.data", "sweep.data", "train.logging_dir",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Side:
    """What the weights of a run depend on: its recipe, its number of processes, the dtype of its frozen weights."""

    recipe: Recipe
    processes: int
    dtype: str

    def train(self, name: str) -> Any:
        """Return a training argument, or its default."""
        half = {"bfloat16": "bf16", "float16": "fp16"}.get(self.recipe.dtype)
        default = True if name == half else hf_arguments.flags()[name].default
        given = self.recipe.train.get(name)
        return default if given is None else given

    @property
    def batch(self) -> tuple[int, int, int]:
        """Records per device, accumulation steps, processes."""
        accumulation = self.train("gradient_accumulation_steps")
        return self.train("per_device_train_batch_size"), accumulation, self.processes


@dataclass(frozen=True, slots=True)
class Change:
    """One difference. `is_refused` where a run that continues with it would hold a mixture that no recipe describes."""

    key: str
    before: Any
    now: Any
    is_refused: bool
    why: str = ""

    def __str__(self) -> str:
        """Return it as `key old -> new`."""
        return f"{self.key} {shown(self.before)} -> {shown(self.now)}"

    def row(self) -> tuple[str, str, str]:
        """Return key, old and new value as text."""
        return self.key, shown(self.before), shown(self.now) + (f"   ({self.why})" if self.why else "")


def changes(before: Side, now: Side, *, identifies_records: bool) -> list[Change]:
    """Return every difference of two runs, in the order of a recipe.

    identifies_records: the records of the earlier run can be told from others by their contents.
    """
    old, new = dict(_flat(before)), dict(_flat(now))
    found = []
    for key in {**old, **new}:
        if not _is_same(key, old.get(key), new.get(key)):
            refused, why = _refusal(key, before, now, identifies_records=identifies_records)
            found.append(Change(key, old.get(key), new.get(key), refused, why))
    return [*_policy_changes(before, now), *found, *_batch_change(before, now)]


def schedule_has_end(side: Side) -> bool:
    """Tell whether the learning rate of a step depends on which step is the last."""
    schedule, warmup = side.train("lr_scheduler_type"), side.train("warmup_steps")
    is_share = 0 < warmup < 1 and schedule in ("constant_with_warmup", "inverse_sqrt")
    return is_share or schedule not in SCHEDULES_WITHOUT_END


def shown(value: Any) -> str:
    """Return a value as in a recipe, on one line.

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
    """All keys of a recipe with their values, but for the policy; training arguments with their defaults."""
    for name in type(side.recipe).model_fields:
        value = getattr(side.recipe, name)
        if isinstance(value, Strict):
            yield from ((f"{name}.{inner}", entry) for inner, entry in value.model_dump().items())
        elif name not in ("train", "policy"):
            yield name, side.dtype if name == "dtype" else value
    for name in hf_arguments.flags():
        if name not in hf_arguments.RENAMED and name not in hf_arguments.REFUSED:
            yield f"train.{name}", side.train(name)


def _is_same(key: str, before: Any, now: Any) -> bool:
    if before == now:
        return True
    if key == "model":
        return _weights(before) == _weights(now)
    return key in PLACES and _place(before) == _place(now)


def _weights(name: str) -> str:
    """The hub id or the folder behind a model's name."""
    from milora_vl.models import NAMED_MODELS, SAME_WEIGHTS

    if Path(name).is_dir():
        return str(Path(name).resolve())
    name = SAME_WEIGHTS.get(name, name)
    return NAMED_MODELS.get(name, name)


def _place(value: Any) -> Any:
    if isinstance(value, list):
        return [{**source, "path": _place(source["path"])} for source in value]
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
        # Steps against epochs: how many steps these are is known when the records are read.
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
    keeps, rest = divmod(prod(before.batch), now.batch[0] * now.processes)
    hint = f"--gradient_accumulation_steps {keeps} keeps it" if keeps and not rest else ""
    return [Change("batch in total", _in_words(before), _in_words(now), True, hint)]


def _in_words(side: Side) -> str:
    return f"{prod(side.batch)} ({' x '.join(map(str, side.batch))})"


def _policy_changes(before: Side, now: Side) -> Iterator[Change]:
    """Differences field by field of rules for the same modules, else rule by rule. All are refused."""
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
            if effect_of(f"train.{name}") == "fallback":  # a rate that a rule does not name is that of the run
                values = first.get(name, before.train(name)), second.get(name, now.train(name))
            if values[0] != values[1]:
                yield Change(f"{place}.{name}", *values, True)


def _rules(side: Side) -> list[dict[str, Any]]:
    rules = side.recipe.policy
    return Policy.parse(list(rules)).to_list() if rules else []
