"""What a resumed run changes, in words, and which changes are refused, because they would train other weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

from milora_vl.base.strict_models import Strict
from milora_vl.models.names import hub_id
from milora_vl.plan.train_section import AUTOCAST
from milora_vl.policy import Policy
from milora_vl.recipe import hf_flags
from milora_vl.recipe.hf_flags import value_of
from milora_vl.recipe.schema import Recipe, same_data

Effect = Literal["decides", "fallback", "dtype", "records", "batch", "length", "selection", "stream"]
Verdict = Literal["allowed", "refused"]

# What a key does to the weights; others are paths, logging, saving and speed. Training arguments have the names of the
# newest transformers, as in a recipe.
KEYS: dict[Effect, str] = {
    # Another value trains different weights, or does not fit the saved optimizer state.
    "decides": """
        model quantization quant_type double_quant projector_weights template form
        parts.vision_tower parts.vision_weights parts.select_layer parts.select_feature
        calibration.samples calibration.pictures calibration.text calibration.data
        data.max_length data.image_aspect_ratio data.min_pixels data.max_pixels data.jpeg_decoding data.packing
        data.bad_images data.web_pictures data.streaming
        data.shuffle_buffer data.limit
        train.accelerator_config train.adam_beta1 train.adam_beta2 train.adam_epsilon
        train.auto_find_batch_size train.average_tokens_across_devices train.bf16 train.data_seed
        train.dataloader_drop_last train.dataloader_in_order train.fp16
        train.ignore_data_skip train.load_best_model_at_end train.lr_scheduler_kwargs
        train.lr_scheduler_type train.max_grad_norm train.neftune_noise_alpha train.optim
        train.optim_args train.optim_target_modules train.parallelism_config train.seed train.tf32
        train.train_sampling_strategy train.warmup_steps
    """,
    "fallback": "train.learning_rate train.weight_decay",  # matter if a rule does not set them
    "dtype": "dtype",  # `auto` and `fastest` depend on the machine
    "records": "data.path",  # another file may hold the same records
    "batch": "train.per_device_train_batch_size train.gradient_accumulation_steps",  # only their product matters
    "length": "train.max_steps train.num_train_epochs",  # matter if the schedule depends on the last step
    # These matter if evaluations choose the best checkpoint or set the learning rate.
    "selection": """
        data.eval_path eval.suite_every eval.suite_limit
        train.bf16_full_eval train.eval_delay train.eval_on_start train.eval_steps train.eval_strategy
        train.fp16_full_eval train.greater_is_better train.metric_for_best_model train.save_steps train.save_strategy
    """,
    "stream": "train.dataloader_num_workers",  # sets the order of the records of a stream
}
EFFECTS: dict[str, Effect] = {key: effect for effect, keys in KEYS.items() for key in keys.split()}
# Schedules whose rates do not depend on the last step, unless the warm-up is a share of all steps.
SCHEDULES_WITHOUT_END = ("constant", "constant_with_warmup", "inverse_sqrt", "reduce_lr_on_plateau", "greedy")
SCHEDULES_BY_EVALUATION = ("reduce_lr_on_plateau", "greedy")
# Keys that hold a path: two spellings may name the same file or folder.
PATHS = (
    "projector_weights", "parts.vision_tower", "parts.vision_weights", "factor_cache", "data.path", "data.image_folder",
    "data.eval_path", "data.feature_cache", "eval.data", "sweep.data",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Side:
    """What the weights of a run depend on: recipe, number of processes, dtype of the frozen weights."""

    recipe: Recipe
    processes: int
    dtype: str

    def train(self, name: str) -> Any:
        """Return a training argument, or its default."""
        if name == AUTOCAST.get(self.recipe.dtype) and self.recipe.train.get(name) is None:
            return True
        return value_of(self.recipe.train, name)

    @property
    def batch(self) -> tuple[int, int, int]:
        """Records per device, accumulation steps, processes."""
        accumulation = self.train("gradient_accumulation_steps")
        return self.train("per_device_train_batch_size"), accumulation, self.processes


@dataclass(frozen=True, slots=True)
class Change:
    """One difference. With a refused one, no recipe would describe the result of the run."""

    key: str
    before: Any
    now: Any
    verdict: Verdict
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
            verdict, why = _judged(key, before, now, identifies_records=identifies_records)
            differences.append(Change(key, old.get(key), new.get(key), verdict, why))
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
    return key in PATHS and same_data(before, now)


def _weights(name: str) -> str:
    """Return the hub id or the folder behind a model name."""

    if Path(name).is_dir():
        return str(Path(name).resolve())
    return hub_id(name)


def _judged(key: str, before: Side, now: Side, *, identifies_records: bool) -> tuple[Verdict, str]:
    """Return whether a run may continue with another value of a key, and why not."""
    effect = EFFECTS.get(key)
    name = key.removeprefix("train.")
    streams = now.recipe.data.streaming
    refused, why = effect == "decides", ""
    if effect == "fallback":
        refused = any(name not in rule for rule in now.recipe.policy or ())
    elif effect == "dtype":
        refused, why = True, f"--dtype {before.dtype} keeps it"
    elif effect == "records":
        refused = streams or not identifies_records
    elif effect == "length":
        # Steps cannot be compared with epochs before the records are read (`require_same_steps` does it then).
        comparable = (before.train("max_steps") > 0) == (now.train("max_steps") > 0)
        decides = name == "max_steps" or now.train("max_steps") < 1
        refused = comparable and decides and schedule_has_end(now)
        why = because_of_schedule(now) if refused else ""
    elif effect == "selection":
        by_evaluation = now.train("lr_scheduler_type") in SCHEDULES_BY_EVALUATION
        refused = bool(now.train("load_best_model_at_end")) or by_evaluation
    elif effect in ("stream", "batch"):
        refused, why = streams, "the order of a stream depends on it" if streams else ""
    return "refused" if refused else "allowed", why


def because_of_schedule(side: Side) -> str:
    """Return why a run with an ending schedule cannot change its number of steps."""
    return f"the learning rates of the {side.train('lr_scheduler_type')} schedule depend on the last step"


def _batch_change(before: Side, now: Side) -> list[Change]:
    if prod(before.batch) == prod(now.batch):
        return []
    keeps, remainder = divmod(prod(before.batch), now.batch[0] * now.processes)
    hint = f"--gradient_accumulation_steps {keeps} keeps it" if keeps and not remainder else ""
    return [Change("batch in total", _in_words(before), _in_words(now), "refused", hint)]


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
                yield Change(place, first, second, "refused")
            continue
        for name in {**first, **second}:
            values = first.get(name), second.get(name)
            if EFFECTS.get(f"train.{name}") == "fallback":  # a rule without a rate uses the rate of the run
                values = first.get(name, before.train(name)), second.get(name, now.train(name))
            if values[0] != values[1]:
                yield Change(f"{place}.{name}", *values, "refused")


def _rules(side: Side) -> list[dict[str, Any]]:
    rules = side.recipe.policy
    return Policy.parse(list(rules)).to_list() if rules else []
