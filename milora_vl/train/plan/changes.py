"""What a resumed run changes, in words, and which changes are refused, because they would train other weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from milora_vl.common.strict_models import Strict
from milora_vl.core.policy import Policy
from milora_vl.train.plan.train_section import AUTOCAST
from milora_vl.train.recipe import hf_flags
from milora_vl.train.recipe.hf_flags import value_of
from milora_vl.train.recipe.schema import Recipe

# Another value trains different weights, or does not fit the saved optimizer state. Other keys are paths, logging,
# saving and speed. The records and the number of steps are compared when they are known: see resuming.py.
DECISIVE = frozenset(
    """
    model adapter after quantization quant_type double_quant projector_weights template dtype
    parts.vision_tower parts.vision_weights parts.select_layer parts.select_feature
    calibration.samples calibration.pictures calibration.text calibration.data
    base_kl.weight base_kl.texts base_kl.every
    data.max_length data.image_aspect_ratio data.min_pixels data.max_pixels
    data.video_min_pixels data.video_max_pixels data.fps data.num_frames data.packing
    data.bad_images data.streaming data.shuffle_buffer data.limit
    train.accelerator_config train.adam_beta1 train.adam_beta2 train.adam_epsilon
    train.auto_find_batch_size train.average_tokens_across_devices train.bf16 train.data_seed
    train.dataloader_drop_last train.dataloader_in_order train.fp16
    train.ignore_data_skip train.load_best_model_at_end train.lr_scheduler_kwargs
    train.lr_scheduler_type train.max_grad_norm train.neftune_noise_alpha train.optim
    train.optim_args train.optim_target_modules train.parallelism_config train.seed train.tf32
    train.train_sampling_strategy train.warmup_steps
    """.split()
)
# Decisive if evaluations choose the best checkpoint or set the learning rate.
OF_EVALUATION = frozenset(
    """
    data.eval_path eval.suite_every eval.suite_limit
    train.bf16_full_eval train.eval_delay train.eval_on_start train.eval_steps train.eval_strategy
    train.fp16_full_eval train.greater_is_better train.metric_for_best_model train.save_steps train.save_strategy
    """.split()
)
# Decisive for a stream, whose records have no fingerprint, and which is divided among processes.
OF_STREAM = frozenset({"data.path", "train.per_device_train_batch_size", "train.dataloader_num_workers", "processes"})
# Schedules whose rates do not depend on the last step, unless the warm-up is a share of all steps.
SCHEDULES_WITHOUT_END = ("constant", "constant_with_warmup", "inverse_sqrt", "reduce_lr_on_plateau", "greedy")
SCHEDULES_BY_EVALUATION = ("reduce_lr_on_plateau", "greedy")


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
    is_refused: bool

    def __str__(self) -> str:
        """Return the difference as `key old -> new`."""
        return f"{self.key} {shown(self.before)} -> {shown(self.now)}"


def changes(before: Side, now: Side) -> list[Change]:
    """Return every difference of two runs: rules first, then in the order of a recipe."""
    old, new = dict(_flat(before)), dict(_flat(now))
    decisive = set(DECISIVE)
    if now.recipe.data.streaming:
        decisive |= OF_STREAM
    if now.train("load_best_model_at_end") or now.train("lr_scheduler_type") in SCHEDULES_BY_EVALUATION:
        decisive |= OF_EVALUATION
    found = [
        Change(key, old.get(key), new.get(key), key in decisive or key.startswith("policy["))
        for key in {**old, **new}
        if old.get(key) != new.get(key)
    ]
    if prod(before.batch) != prod(now.batch):
        found.append(Change("batch in total", _in_words(before), _in_words(now), is_refused=True))
    return found


def schedule_has_end(side: Side) -> bool:
    """Return whether the learning rate of a step depends on the total number of steps."""
    schedule, warmup = side.train("lr_scheduler_type"), side.train("warmup_steps")
    is_share = 0 < warmup < 1 and schedule in ("constant_with_warmup", "inverse_sqrt")
    return is_share or schedule not in SCHEDULES_WITHOUT_END


def shown(value: Any) -> str:
    """Return a value as a recipe writes it, on one line.

    >>> shown(None), shown({"floor": 0.1}), shown(2e-05)
    ('none', '{floor: 0.1}', '2e-05')
    """
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {shown(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(shown, value)) + "]"
    if isinstance(value, float):
        return f"{value:g}"
    return "none" if value is None else str(value)


def _flat(side: Side) -> Iterator[tuple[str, Any]]:
    """Yield all keys of a recipe with their values; training arguments include defaults, rules the rates of the run."""
    rules = side.recipe.policy
    for number, rule in enumerate(Policy.parse(list(rules)).rules if rules else ()):
        in_force = {name: side.train(name) for name in ("learning_rate", "weight_decay")} | rule.in_force()
        yield from ((f"policy[{number}].{name}", value) for name, value in in_force.items())
    for name in type(side.recipe).model_fields:
        value = getattr(side.recipe, name)
        if isinstance(value, Strict):
            yield from ((f"{name}.{inner}", entry) for inner, entry in value.model_dump().items())
        elif name not in ("train", "policy"):
            yield name, side.dtype if name == "dtype" else value
    for name in hf_flags.flags():
        if name not in hf_flags.RENAMED and name not in hf_flags.REFUSED:
            yield f"train.{name}", side.train(name)
    if side.recipe.data.streaming:
        yield "processes", side.processes


def _in_words(side: Side) -> str:
    return f"{prod(side.batch)} ({' x '.join(map(str, side.batch))})"
