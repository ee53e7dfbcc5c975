"""The recipe of a run: its keys with their flags, reading one by name or file, and merging it with flags.

The layers are plain mappings: an adapter or earlier run, the recipe file, LLaVA's flags, flags. Later ones win, and the
result is validated once. No model, data or device is looked at.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import yaml
from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

import llava_recipes
from milora_data.encode.templates import template_name
from milora_vl.common.cli.console import suggest
from milora_vl.common.cli.parser import RECORDS
from milora_vl.common.errors import Key, Problem, UserError
from milora_vl.common.strict_models import Strict, problems_of, unknown_key
from milora_vl.common.yaml_text import read_file, read_mapping
from milora_vl.core.policy import Policy, PolicyError
from milora_vl.models.processors import ProcessorSettings
from milora_vl.train import arguments

SAMPLES, PICTURES = 48, 32  # of a calibration
TRAIN_DEFAULTS: dict[str, Any] = {"logging_steps": 10, "logging_first_step": True, "report_to": ["none"]}


class Flag(NamedTuple):
    """The flag of a key: its help, and its spellings beside the name of the key; `name` replaces that."""

    help: str
    others: tuple[str, ...] = ()
    name: str = ""


class SourceConfig(Strict):
    path: str
    weight: NonNegativeFloat = 1.0  # how often an epoch repeats its records
    image_folder: str | None = None


class DataConfig(Strict):
    path: Annotated[
        str | Annotated[list[SourceConfig], Field(min_length=1)] | None,
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
        Literal["raise", "skip", "replace"],
        Flag("what to do about missing or broken images: raise, skip or replace"),
    ] = "raise"
    streaming: Annotated[bool, Flag("read records while training; needs --max_steps")] = False
    shuffle_buffer: Annotated[NonNegativeInt, Flag("number of streamed records in the shuffle buffer")] = 1000
    limit: Annotated[PositiveInt | None, Flag("use only the first N records")] = None

    @model_validator(mode="after")
    def _samples_in_one_way(self) -> DataConfig:
        if self.fps is not None and self.num_frames is not None:
            raise ValueError("expected fps or num_frames, got both")
        return self

    @property
    def processor(self) -> ProcessorSettings:
        return ProcessorSettings(**{key.name: getattr(self, key.name) for key in fields(ProcessorSettings)})


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
    ] = None  # 0 beside text or data
    pictures: Annotated[
        NonNegativeInt | None, Flag("pictures that the base describes for it [32]", name="calibration_pictures")
    ] = None  # 0 beside data
    text: Annotated[list[str], Field(min_length=1)] | None = None  # text files
    data: str | None = None  # records, as in data.path
    earlier: str | None = None  # records for earlier runs whose own are missing, with `after`
    image_folder: str | None = None  # of data and of earlier

    @model_validator(mode="after")
    def _has_a_source(self) -> CalibrationConfig:
        if self.image_folder is not None and self.data is None and self.earlier is None:
            raise ValueError("image_folder belongs to data or earlier, which are missing")
        if self.text is None and self.data is None and self.samples == 0 and not self.pictures:
            raise ValueError("expected samples, pictures, text or data, got none")
        return self

    @property
    def num_samples(self) -> int:
        alone = self.text is None and self.data is None
        return self.samples if self.samples is not None else SAMPLES if alone else 0

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
    quant_type: Annotated[Literal["nf4", "fp4"], Flag("4-bit data type of the base: nf4 or fp4")] = "nf4"
    double_quant: Annotated[bool, Flag("also quantise the constants of a 4-bit base")] = True
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

    def attention_of(self, tower: Literal["language", "vision"]) -> str:
        named = self.attn_implementation
        return named if isinstance(named, str) else named.get(tower, "sdpa")

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
        if name not in arguments.known():
            problems.append(unknown_key(path, arguments.known(), "recipe-unknown-key"))
            continue
        try:
            pair = arguments.canonical(name, arguments.coerce(name, value))
        except ValueError as error:
            problems.append(Problem(str(error), "recipe-value", path))
            continue
        if pair is None:
            continue
        if pair[0] in arguments.REFUSED:
            problems.append(Problem(str(arguments.REFUSED[pair[0]]), "recipe-refused", path))
        elif train.get(pair[0], pair[1]) != pair[1]:
            contradiction = f"contradicts {pair[0]}: {train[pair[0]]!r}, which is the same setting"
            problems.append(Problem(contradiction, "recipe-contradiction", path, "remove one of the two"))
        else:
            train[pair[0]] = pair[1]
    return train, problems


def conflicts(recipe: Recipe) -> list[Problem]:
    data, train, dtype = recipe.data, recipe.train, recipe.dtype
    found: list[tuple[str, str, str]] = []
    if recipe.adapter and recipe.after:
        hint = "--after keeps what the adapter has learned; --adapter trains the same adapter for more steps"
        found.append(("after", "an adapter trains further, or a new one trains after it, got both", hint))
    if recipe.calibration.earlier and not recipe.after:
        hint = "add --after FOLDER, or use calibration.data"
        found.append(("calibration.earlier", "no earlier run, so these records have no use", hint))
    if train.get("bf16", dtype == "bfloat16") and train.get("fp16", dtype == "float16"):
        key = "train.fp16" if train.get("fp16") else "train.bf16"
        hint = "remove one: bf16 needs no loss scaling, fp16 suits older GPUs"
        found.append((key, f"a run computes in bfloat16 or in float16, got both (dtype {dtype})", hint))
    if data.streaming and arguments.value_of(train, "max_steps") < 1:
        found.append(("data.streaming", "a stream has no known end", "set train.max_steps or --max_steps"))
    if data.streaming and data.packing:
        found.append(("data.packing", "needs the lengths of all records, which data.streaming does not read", ""))
    if data.streaming and train.get("train_sampling_strategy") == "group_by_length":
        message = "group_by_length needs all records, which data.streaming does not read"
        found.append(("train.train_sampling_strategy", message, ""))
    if data.streaming and data.limit is not None:
        found.append(("data.limit", "has no effect with data.streaming; train.max_steps ends the run", ""))
    return [Problem(message, "recipe-conflict", Key.of(key), hint) for key, message, hint in found]


def load(path: Path) -> Recipe:
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
