"""What a user can ask for: the keys of a recipe with their flags, Hugging Face's arguments, and LLaVA's flags.

A new key is a field of a class below; its flag is beside it. Nothing here imports torch.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, reduce
from importlib.util import find_spec
from operator import or_
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import yaml
from pydantic import (
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

import llava_recipes
from milora_data.encode.templates import template_name
from milora_data.stream import Source
from milora_vl.common.cli.parser import RECORDS
from milora_vl.common.errors import Key, Problem, UserError, suggest
from milora_vl.common.strict_models import EXPECTED, Strict, problems_of, unknown_key
from milora_vl.common.yaml_text import read_file, read_mapping
from milora_vl.core.policy import Policy, PolicyError, Target
from milora_vl.core.policy.rules import DEFAULT_RULES
from milora_vl.core.policy.rules import METHODS as RULE_METHODS

PROG = "python -m milora_vl.train"
ADAPTERS = tuple(name for name, method in RULE_METHODS.items() if "rank" in method.fields)
METHODS = (*ADAPTERS, "full")
SAMPLES, PICTURES = 48, 32  # of a calibration
TRAIN_DEFAULTS: dict[str, Any] = {"logging_steps": 10, "logging_first_step": True, "report_to": ["none"]}


class Flag(NamedTuple):
    """The flag of a key: its help, and its spellings beside the name of the key; `name` replaces that."""

    help: str
    others: tuple[str, ...] = ()
    name: str = ""


class DataConfig(Strict):
    path: Annotated[
        str | Annotated[list[Source], Field(min_length=1)] | None,
        Flag(RECORDS, name="data_path"),
        Field(description="a file or a list of {path, weight, image_folder}"),
    ] = None
    image_folder: Annotated[str | None, Flag("folder that the image paths of the records are relative to")] = None
    eval_path: Annotated[str | None, Flag("held-out records for the evaluation loss", name="eval_data_path")] = None
    max_length: Annotated[
        PositiveInt, Flag("longest sequence in tokens, image tokens included", ("model_max_length",))
    ] = 2048
    image_aspect_ratio: Annotated[
        Literal["pad", "plain", "anyres"],
        Flag("pad, plain (LLaVA: square), or anyres (LLaVA-1.6)"),
    ] = "pad"
    min_pixels: Annotated[PositiveInt | None, Flag("least pixels of a resized picture (Qwen-VL, GLM-V)")] = None
    max_pixels: Annotated[PositiveInt | None, Flag("most pixels of a resized picture; limits its tokens")] = None
    video_min_pixels: Annotated[
        PositiveInt | None,
        Flag("least pixels of a resized video: per frame (Qwen2-VL), or of all frames (Qwen3-VL, GLM-4V)"),
    ] = None
    video_max_pixels: Annotated[PositiveInt | None, Flag("most pixels of a resized video; limits its tokens")] = None
    fps: Annotated[
        PositiveFloat | None,
        Flag("frames per second to read of video files (default: the processor's, or 2)"),
    ] = None
    num_frames: Annotated[PositiveInt | None, Flag("frames to read of each video file, in place of --fps")] = None
    packing: Annotated[bool, Flag("pack several records into one row of twice max_length to reduce padding")] = False
    bad_images: Annotated[
        Literal["raise", "skip"],
        Flag("what to do about missing or broken images: raise, or skip their records"),
    ] = "raise"
    streaming: Annotated[bool, Flag("read records while training; needs --max_steps")] = False
    shuffle_buffer: Annotated[NonNegativeInt, Flag("number of streamed records in the shuffle buffer")] = 1000
    limit: Annotated[PositiveInt | None, Flag("use only the first N records")] = None

    @model_validator(mode="after")
    def _samples_in_one_way(self) -> DataConfig:
        if self.fps is not None and self.num_frames is not None:
            raise ValueError("expected fps or num_frames, got both")
        return self


class PartsConfig(Strict):
    """The vision tower that turns a text-only `model` into a LLaVA, with LLaVA's names; see `projector_weights`."""

    vision_tower: str | None = None  # a folder, a hub id or timm/NAME
    vision_weights: str | None = None  # for timm/NAME: a file, or random
    select_layer: int = -2
    select_feature: Literal["patch", "cls_patch"] = "patch"


class CalibrationConfig(Strict):
    """What finds the protected inputs of rules with `protect`."""

    samples: Annotated[
        NonNegativeInt | None,
        Flag("texts that the base writes to find protected inputs [48]", name="calibration_samples"),
    ] = None  # 0 beside data
    pictures: Annotated[
        NonNegativeInt | None, Flag("pictures that the base describes for it [32]", name="calibration_pictures")
    ] = None  # 0 beside data
    data: str | None = None  # records, as in data.path
    image_folder: str | None = None  # of data

    @model_validator(mode="after")
    def _has_a_source(self) -> CalibrationConfig:
        if self.image_folder is not None and self.data is None:
            raise ValueError("image_folder belongs to data, which is missing")
        if self.data is None and self.samples == 0 and not self.pictures:
            raise ValueError("expected samples, pictures or data, got none")
        return self

    @property
    def num_samples(self) -> int:
        return self.samples if self.samples is not None else SAMPLES if self.data is None else 0

    @property
    def num_pictures(self) -> int:
        return self.pictures if self.pictures is not None else PICTURES if self.data is None else 0


class BaseKLConfig(Strict):
    """A term of the loss: KL from the base to the model on the texts of the calibration."""

    weight: Annotated[
        NonNegativeFloat | None,
        Flag(
            "weight of a loss that keeps the base's answers [1 if protected milora trains on pictures, else 0]",
            name="base_kl_weight",
        ),
    ] = None
    texts: PositiveInt = 2  # that a device reads in a step with the term
    every: PositiveInt = 4  # one step in `every` has the term, `every` times the weight


class EvalConfig(Strict):
    """Evaluation: suites after training, in a separate process; small suites and forgetting during training."""

    suites: list[str] = Field(default_factory=list)
    data: str | None = None
    limit: PositiveInt | None = None
    suite_every: Annotated[
        PositiveInt | None,
        Flag("score the suites of the recipe every N steps and at the last step", name="eval_suite_every"),
    ] = None
    suite_limit: Annotated[PositiveInt, Flag("questions per benchmark during training", name="eval_suite_limit")] = 64
    forgetting_every: Annotated[PositiveInt | None, Flag("measure forgetting every N steps and at the last step")] = (
        None
    )


class SweepConfig(Strict):
    """Settings of `python -m milora_vl.sweep` for this recipe; training ignores them."""

    suite: str | None = None  # evaluated in every cell
    data: str | None = None  # folder that contains the benchmark files
    limit: PositiveInt | None = None  # items per benchmark
    train: dict[str, Any] = Field(default_factory=dict)  # replaces keys of `train:` in every cell
    # names for --methods: fields of a rule, and `train:`
    variants: dict[str, dict[str, Any]] = Field(default_factory=dict)


class Recipe(Strict):
    """One run. `policy: null` is the default policy.

    >>> Recipe.parse({"model": "tiny", "train": {"warmup_ratio": 0.03}}).train["warmup_steps"]
    0.03
    """

    model: Annotated[str, Flag("a named model, a folder or a hub id; see --list-models", ("model_name_or_path",))] = ""
    adapter: Annotated[
        str | None,
        Flag(
            "adapter to train further, such as the output_dir of a run; it decides rules and base",
            ("lora_weight_path",),
        ),
    ] = None
    after: Annotated[
        str | None,
        Flag("run whose update stays: a new adapter learns other data beside it, off the inputs of its records"),
    ] = None
    quantization: Annotated[Literal["none", "4bit", "8bit"], Flag("none, 4bit or 8bit")] = "none"
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16", "fastest"],
        Flag("data type of the frozen weights: auto, float32, bfloat16, float16 or fastest"),
    ] = "auto"
    attn_implementation: Annotated[
        str | dict[Literal["language", "vision"], str],
        Flag("attention by its name in transformers: sdpa (default), eager, flash_attention_2, ...; or one per tower"),
    ] = "sdpa"
    parts: PartsConfig = PartsConfig()
    projector_weights: Annotated[
        str | None,
        Flag("file or folder with the initial weights of the projector", ("pretrain_mm_mlp_adapter",)),
    ] = None
    template: Annotated[
        str,
        Flag(
            "prompt format, e.g. vicuna_v1 (LLaVA: v1), plain or chat_template (the template of the model)",
            ("version",),
        ),
    ] = "vicuna_v1"
    factor_cache: Annotated[str | None, Flag("folder that caches the initial factors for later runs")] = None
    data: DataConfig = DataConfig()
    calibration: CalibrationConfig = CalibrationConfig()
    base_kl: BaseKLConfig = BaseKLConfig()
    policy: list[dict[str, Any]] | None = None
    train: dict[str, Any] = Field(default_factory=dict)
    eval: EvalConfig = EvalConfig()
    sweep: SweepConfig = SweepConfig()

    @field_validator("template")
    @classmethod
    def _known_template(cls, value: str) -> str:
        return template_name(value)

    @classmethod
    def parse(cls, content: Mapping[str, Any], source: str = "") -> Recipe:
        """Return a recipe from nested mappings. Raises UserError with all problems, located in `source` if given."""
        recipe, problems = checked(content)
        if problems:
            keys = [p.where if source and isinstance(p.where, Key) else None for p in problems]
            located = [replace(p, where=f"{k} in {source}") if k else p for p, k in zip(problems, keys, strict=True)]
            raise UserError(problems=located)
        return recipe

    def to_yaml(self) -> str:
        return yaml.safe_dump(
            self.model_dump(), sort_keys=False, allow_unicode=True, width=120, default_flow_style=None
        )


def flags_of(model: type[Strict] = Recipe, above: str = "") -> Iterator[tuple[str, Flag, Any]]:
    """Yield the dotted key, the flag and the type of every key of a recipe that has a flag."""
    for name, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, Strict):
            yield from flags_of(info.annotation, f"{above}{name}.")
        for flag in info.metadata:
            if isinstance(flag, Flag):
                yield f"{above}{name}", flag._replace(name=flag.name or name), info.annotation


def checked(content: Mapping[str, Any]) -> tuple[Recipe, list[Problem]]:
    """Return a recipe and all its problems: of values, of rules, and of settings that do not work together.

    A recipe with problems has the defaults.
    """
    train, problems = train_section(content.get("train"))
    recipe = Recipe()
    try:
        recipe = Recipe.model_validate({name: value for name, value in content.items() if name != "train"})
    except ValidationError as error:
        problems += problems_of(error, Recipe, "recipe")
    rules = content.get("policy")
    if isinstance(rules, list):
        try:
            Policy.parse(rules)
        except PolicyError as error:
            problems += error.problems
    recipe = recipe.model_copy(update={"train": {**TRAIN_DEFAULTS, **train}})
    return recipe, problems or conflicts(recipe)


def train_section(section: Any) -> tuple[dict[str, Any], list[Problem]]:
    """Return the `train:` mapping with the newest names and the right types, and its problems."""
    train, problems = dict[str, Any](), list[Problem]()
    if section is not None and not isinstance(section, Mapping):
        message = f"expected a mapping of TrainingArguments, got {section!r}"
        hint = "for example  train: {learning_rate: 2.0e-4, num_train_epochs: 1}"
        return train, [Problem(message, "recipe-value", Key.of("train"), hint)]
    for name, value in (section or {}).items():
        path = Key(("train", str(name)))
        if name not in known_arguments():
            problems.append(unknown_key(path, known_arguments(), "recipe-unknown-key"))
            continue
        try:
            typed = coerced(name, value)
        except ValueError as error:
            problems.append(Problem(str(error), "recipe-value", path))
            continue
        newest = RENAMED.get(str(name), str(name))
        if name in REFUSED:
            if typed and REFUSED[name]:
                problems.append(Problem(str(REFUSED[name]), "recipe-refused", path))
        elif train.get(newest, typed) != typed:
            contradiction = f"contradicts {newest}: {train[newest]!r}, which is the same setting"
            problems.append(Problem(contradiction, "recipe-contradiction", path, "remove one of the two"))
        else:
            train[newest] = typed
    return train, problems


def conflicts(recipe: Recipe) -> list[Problem]:
    data, train = recipe.data, recipe.train
    found: list[tuple[str, str, str]] = []
    if recipe.adapter and recipe.after:
        hint = "--after keeps what the adapter has learned; --adapter trains the same adapter for more steps"
        found.append(("after", "an adapter trains further, or a new one trains after it, got both", hint))
    if data.streaming and value_of(train, "max_steps") < 1:
        found.append(("data.streaming", "a stream has no known end", "set train.max_steps or --max_steps"))
    if data.streaming and data.packing:
        found.append(("data.packing", "needs the lengths of all records, which data.streaming does not read", ""))
    if data.streaming and train.get("train_sampling_strategy") == "group_by_length":
        message = "group_by_length needs all records, which data.streaming does not read"
        found.append(("train.train_sampling_strategy", message, ""))
    if data.streaming and data.limit is not None:
        found.append(("data.limit", "has no effect with data.streaming; train.max_steps ends the run", ""))
    return [Problem(message, "recipe-conflict", Key.of(key), hint) for key, message, hint in found]


def load_recipe(path: Path) -> Recipe:
    return Recipe.parse(read_file(path), str(path))


def read_recipe(name: str, flag: str = "--recipe") -> tuple[dict[str, Any], str]:
    """Return the content of a recipe by name, file or run folder, and how errors name it. `flag` names the recipe."""
    if name in llava_recipes.names():
        return read_mapping(llava_recipes.read(name), f"recipe {name}"), f"recipe {name}"
    path = Path(name) / "recipe.yaml" if Path(name).is_dir() else Path(name)
    if path.is_file():
        return read_file(path), str(path)
    near = suggest(name, llava_recipes.names())
    hint = f"did you mean {' or '.join(near)}?" if near else f"recipes: {', '.join(llava_recipes.names())}"
    found = "a folder without a recipe.yaml" if Path(name).is_dir() else "no packaged recipe and no file has this name"
    hint += "\nsee: python -m milora_vl.train --list-recipes"
    raise UserError(f"unknown recipe {name!r}: {found}", code="recipe-unknown", where=flag, hint=hint)


# Older name -> newest name, as LLaVA's scripts and transformers' documentation write them.
RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
    "warmup_ratio": "warmup_steps",
}
REFUSED: dict[str, str | None] = {
    "local_rank": None,  # old launchers pass it; torch reads the environment
    "resume_from_checkpoint": "is a flag of the command, not of the recipe",
    "output_dir": "is a flag of the command, not of the recipe",
    "do_eval": "has no effect: a run with held-out records evaluates",
    **dict.fromkeys(("do_predict", "batch_eval_metrics", "include_for_metrics"), "has no effect here"),
    "liger_kernel_config": "is not supported: all kernels but the loss are on",
    "fsdp_config": "is not supported: --fsdp full_shard or shard_grad_op says all",
    "label_smoothing_factor": "is not supported: the loss is the plain cross-entropy of the supervised tokens",
}
# Where Hugging Face's help does not describe what this command does.
HELP = {
    **{name: f"refused: {why}" for name, why in REFUSED.items() if why},
    "learning_rate": "learning rate of adapter rules and of rules without one [2e-4; 2e-5 for modules in full]",
    "gradient_checkpointing": "save memory for about half more time [False]",
    "deepspeed": "zero2, zero3, zero3_offload, or a JSON file",
    "fsdp": "shard the model with FSDP2: full_shard [default of the bare flag] or shard_grad_op",
    "logging_steps": "log the loss every N steps [10]",
    "report_to": "tensorboard, wandb, trackio, ... [none]",
}
# The Trainer accepts other values, then fails during training or ignores them.
LIMITS: dict[str, Any] = {
    **dict.fromkeys(
        ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"), Field(ge=1)
    ),
    **dict.fromkeys(
        (
            "dataloader_num_workers", "warmup_steps", "eval_steps", "weight_decay", "max_grad_norm", "adam_epsilon",
            "seed", "data_seed",
        ),
        Field(ge=0),
    ),
    **dict.fromkeys(("num_train_epochs", "logging_steps", "save_steps"), Field(gt=0)),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), Field(ge=0, lt=1)),
}  # fmt: skip
KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a word", list: "a list", dict: "JSON"}


@dataclass(frozen=True, slots=True)
class Argument:
    kinds: tuple[type, ...]
    default: Any
    help: str

    @property
    def flag_kind(self) -> type:
        """Return what a flag makes of its text; `coerced` does the rest."""
        return bool if self.kinds == (bool,) else list if list in self.kinds else str


@cache
def known_arguments() -> Mapping[str, Argument]:
    """Return all arguments of the installed TrainingArguments by name, also by the names of RENAMED.

    They are read from its source, which takes no seconds, as its import does. An Enum counts as text.
    """
    package = find_spec("transformers")
    assert package is not None
    assert package.origin is not None
    tree = ast.parse((Path(package.origin).parent / "training_args.py").read_text(encoding="utf-8"))
    nodes, found = list(ast.walk(tree)), dict[str, Argument]()
    constants = {
        name.id: node.value
        for node in nodes
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for name in node.targets
        if isinstance(name, ast.Name)
    }
    (arguments,) = (node for node in nodes if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments")
    for node in arguments.body:
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id[0] != "_"):
            continue
        values = {word.arg: word.value for word in node.value.keywords} if isinstance(node.value, ast.Call) else {}
        default = values.get("default", ast.Constant(None))
        default = constants[default.id] if isinstance(default, ast.Name) else default
        name, value = node.target.id, ast.literal_eval(default)
        words = {each.id for each in ast.walk(node.annotation) if isinstance(each, ast.Name)}
        kinds = tuple(kind for kind in KINDS if kind.__name__ in words) or (str,)
        metadata = values["metadata"]
        assert isinstance(metadata, ast.Dict)
        texts = zip(metadata.keys, metadata.values, strict=True)
        about = next(text for key, text in texts if isinstance(key, ast.Constant) and key.value == "help")
        text = " ".join(str(ast.literal_eval(about)).replace("%%", "%").split())
        text = text if len(text) <= 160 else text[:160].rsplit(" ", 1)[0] + " ..."
        found[name] = Argument(kinds, value, HELP.get(name, f"{text} [{value}]"))
    del found["parallelism_config"]  # a Python object
    for old, new in RENAMED.items():
        other = found.get(new) or found[old]
        found.setdefault(old, replace(other, help=f"older name of {new}"))
        found.setdefault(new, other)
    return found


def value_of(train: Mapping[str, Any], name: str) -> Any:
    """Return a training argument, or Hugging Face's default.

    >>> value_of({"seed": 7}, "seed"), value_of({}, "per_device_train_batch_size")
    (7, 8)
    """
    value = train.get(name)
    return known_arguments()[name].default if value is None else value


def boolean(text: str) -> bool:
    return TypeAdapter(bool).validate_python(text)


def coerced(name: str, value: Any) -> Any:
    """Return the value of an argument, from YAML or the command line, in its type.

    Raises ValueError with what is expected. Hugging Face checks the rest.
    """
    kinds = known_arguments()[name].kinds
    if value is None or value == "None":
        return None
    if isinstance(value, bool) and bool not in kinds and str in kinds:  # YAML 1.1 reads a bare `no` as false
        value = "yes" if value else "no"
    if dict in kinds and isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            value = json.loads(value)
        except ValueError:
            raise ValueError(f"expected JSON text, got {value!r}") from None
    expected = " or ".join(KINDS[kind] for kind in kinds)
    if isinstance(value, bool | list | dict) and type(value) not in kinds:
        raise ValueError(f"expected {expected}, got {value!r}")
    hint: Any = reduce(or_, kinds)
    hint = Annotated[hint, LIMITS[name]] if name in LIMITS else hint
    try:
        valid = TypeAdapter(hint, config=ConfigDict(allow_inf_nan=False)).validate_python(value)
    except ValidationError as error:
        fault = error.errors()[0]
        limit = EXPECTED[fault["type"]] if fault["type"].startswith(("greater", "less")) else expected
        raise ValueError(f"expected {limit.format(**fault.get('ctx', {}))}, got {value!r}") from None
    value = value if isinstance(value, int) and kinds == (float,) else valid  # a recipe keeps its 500
    if name == "max_steps" and value < 1 and value != -1:
        raise ValueError(f"expected a number of at least 1, or -1 to train by epochs, got {value!r}")
    return value


Changes = dict[str, tuple[Any, Any]]


def differences(before: Recipe, now: Recipe) -> Changes:
    """Return the keys whose values differ, with both values, in the order of a recipe."""
    old, new = dict(_flat(before)), dict(_flat(now))
    return {key: (old.get(key), new.get(key)) for key in {**old, **new} if old.get(key) != new.get(key)}


def _flat(recipe: Recipe) -> Iterator[tuple[str, Any]]:
    """Yield all keys of a recipe with their values; training arguments include defaults, rules the rates of the run."""
    autocast = AUTOCAST.get(recipe.dtype)
    train = {name: True for name in (autocast,) if name} | {k: v for k, v in recipe.train.items() if v is not None}
    for number, rule in enumerate(Policy.parse(list(recipe.policy)).rules if recipe.policy else ()):
        in_force = {"weight_decay": value_of(train, "weight_decay")} | rule.in_force()
        in_force.setdefault("learning_rate", default_rate(train, rule.method))
        yield from ((f"policy[{number}].{name}", value) for name, value in in_force.items())
    for name in type(recipe).model_fields:
        value = getattr(recipe, name)
        if isinstance(value, Strict):
            yield from ((f"{name}.{inner}", entry) for inner, entry in value.model_dump().items())
        elif name not in ("train", "policy", "dtype"):  # the dtype that `auto` means is compared
            yield name, value
    for name in known_arguments():
        if name not in RENAMED and name not in REFUSED:
            yield f"train.{name}", value_of(train, name)


LLAVA_FULL_RATE = 2e-5
# Autocast that belongs to the dtype of the frozen weights.
AUTOCAST = {"bfloat16": "bf16", "float16": "fp16"}


def default_rate(train: Mapping[str, Any], method: str | None) -> float:
    """Return the learning rate of a rule that sets none: the run's, else the default policy's or LLaVA's."""
    rate = train.get("learning_rate")
    default = LLAVA_FULL_RATE if method == "full" else DEFAULT_RULES[0]["learning_rate"]
    return float(default if rate is None else rate)


def with_rates(targets: Sequence[Target], train: Mapping[str, Any]) -> list[Target]:
    """Return the targets with the rates of the run where their rules set none."""
    decay = value_of(train, "weight_decay")
    return [
        replace(
            target,
            learning_rate=target.learning_rate or default_rate(train, target.method),
            weight_decay=decay if target.weight_decay is None else target.weight_decay,
        )
        for target in targets
    ]


def without_unseen_projector(
    targets: Sequence[Target], recipe: Recipe, *, has_pictures: bool
) -> tuple[tuple[Target, ...], str]:
    """Return the targets on records with or without pictures, and a note.

    Where no picture calibrates a protected projector, it stays frozen.
    """
    has_pictures = has_pictures and recipe.calibration.num_pictures > 0
    kept = tuple(target for target in targets if target.tower != "projector" or not target.protect)
    is_needed = recipe.adapter is None and recipe.calibration.data is None
    if has_pictures or not is_needed or len(kept) in (0, len(targets)):
        return tuple(targets), ""
    return kept, "note: no picture calibrates the projector, so it stays frozen"


# Flag of LLaVA's scripts -> (type, help). Other names of our flags (--lora_r, --version, ...) are with these flags.
LLAVA_FLAGS: dict[str, tuple[type, str]] = {
    "lora_enable": (bool, "an adapter on the language tower (milora, or --method), the projector in full"),
    "tune_mm_mlp_adapter": (bool, "train the projector alone (stage 1, pretrain.sh)"),
    "bits": (int, "16, or 8 or 4 to quantise the base"),
    "vision_tower": (str, "vision tower to add to a text-only model: a folder, a hub id or timm/NAME"),
    "mm_projector_type": (str, "only mlp2x_gelu is supported, as in LLaVA-1.5"),
    "mm_vision_select_layer": (int, "layer of the tower that supplies the features [-2]"),
    "mm_use_im_start_end": (bool, "only False is supported, as in LLaVA-1.5"),
    "mm_use_im_patch_token": (bool, "only False is supported, as in LLaVA-1.5"),
    "lazy_preprocess": (bool, "no effect: records are always encoded during training"),
    "group_by_modality_length": (bool, "build batches of one modality and similar length"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyEdits:
    """Flags that replace a field in the rules; None keeps the field."""

    train: str | None = None
    method: str | None = None
    protect: float | None = None
    rank: int | None = None
    alpha: float | None = None
    dropout: float | None = None
    learning_rate: float | None = None
    mm_projector_lr: float | None = None


@dataclass(frozen=True)
class Request:
    recipe: str | None = None
    overrides: dict[str, Any] = field(default_factory=dict)  # nested as the recipe is
    flags: dict[str, str] = field(default_factory=dict)  # dotted keys of `overrides` -> their flags
    edits: PolicyEdits = field(default_factory=PolicyEdits)
    policy: str | None = None
    llava: dict[str, Any] = field(default_factory=dict)
    output_dir: str | None = None
    resume: str | None = None
    format: str = "human"
    action: str = "train"  # train | dry_run | print_recipe | list_models | list_recipes
    argument: str = ""  # argument of the action
    devices: int | None = None  # for a plan
    gpu_memory: float | None = None  # GiB per device, for a plan
    words: tuple[str, ...] = field(default=(), compare=False)  # the command line as typed
