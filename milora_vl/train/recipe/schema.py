"""The keys of a recipe with types, defaults and checks (data, parts, calibration, eval). Unknown keys are errors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

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

from milora_data.encode.templates import template_name
from milora_vl.common.errors import Key, Problem, UserError
from milora_vl.common.strict_models import Strict, problems_of, unknown_key
from milora_vl.common.yaml_text import read_file
from milora_vl.core.policy import Policy, PolicyError
from milora_vl.models.processor_settings import ProcessorSettings
from milora_vl.train.recipe import hf_flags
from milora_vl.train.recipe.layers import RecipeFile, Section, plain

SAMPLES, PICTURES = 48, 32  # of a calibration
TRAIN_DEFAULTS: dict[str, Any] = {"logging_steps": 10, "logging_first_step": True, "report_to": ["none"]}


class RecipeError(UserError):
    """All problems of a recipe."""


class SourceConfig(Strict):
    """One of several data sources."""

    path: str
    weight: NonNegativeFloat = 1.0  # how often an epoch repeats its records
    image_folder: str | None = None


# The keys of `data` that the processor of a model follows.


class DataConfig(Strict):
    """The training and evaluation data."""

    # LLaVA JSON or JSONL, parquet, shards, a YAML mixture; or a list
    path: str | Annotated[list[SourceConfig], Field(min_length=1)] | None = Field(
        default=None, description="a file or a list of {path, weight, image_folder}"
    )
    image_folder: str | None = None
    eval_path: str | None = None  # held-out records, for the evaluation loss
    max_length: PositiveInt = 2048
    image_aspect_ratio: Literal["pad", "plain", "anyres"] = "pad"  # LLaVA-1.6 models use anyres
    min_pixels: PositiveInt | None = None  # of a picture after resizing, for models with pictures of any size
    max_pixels: PositiveInt | None = None
    video_min_pixels: PositiveInt | None = None  # as the video processor counts: per frame, or of all frames
    video_max_pixels: PositiveInt | None = None
    fps: PositiveFloat | None = None  # frames per second that are read of video files; default: the processor's, or 2
    num_frames: PositiveInt | None = None  # frames that are read of each video file, in place of fps
    packing: bool = False  # pack several records into a row of 2 * max_length
    bad_images: Literal["raise", "skip", "replace"] = "raise"
    web_pictures: Literal["refuse", "download"] = "refuse"  # pictures that records name by http(s) addresses
    streaming: bool = False  # read records while training; weights are shares of the records
    shuffle_buffer: NonNegativeInt = 1000  # number of streamed records that are shuffled at a time
    limit: PositiveInt | None = None  # the first N records only

    @model_validator(mode="after")
    def _samples_in_one_way(self) -> DataConfig:
        if self.fps is not None and self.num_frames is not None:
            raise ValueError("expected fps or num_frames, got both")
        return self

    @property
    def processor(self) -> ProcessorSettings:
        """The keys that the processor of a model follows."""
        return ProcessorSettings(**{key.name: getattr(self, key.name) for key in fields(ProcessorSettings)})


class PartsConfig(Strict):
    """The vision tower that turns a text-only `model` into a LLaVA, with LLaVA's names; see `projector_weights`."""

    vision_tower: str | None = None  # a folder, a hub id or timm/NAME
    vision_weights: str | None = None  # for timm/NAME: a file, or random
    select_layer: int = -2
    select_feature: Literal["patch", "cls_patch"] = "patch"


class CalibrationConfig(Strict):
    """What finds the protected inputs of rules with `protect`."""

    samples: NonNegativeInt | None = None  # texts that the base model writes; default 48, or 0 beside text or data
    pictures: NonNegativeInt | None = None  # training pictures with the base's captions; default 32, or 0 beside data
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
        """Return the number of texts that the base model writes."""
        alone = self.text is None and self.data is None
        return self.samples if self.samples is not None else SAMPLES if alone else 0

    @property
    def num_pictures(self) -> int:
        """Return the largest number of training pictures that the base model describes."""
        return self.pictures if self.pictures is not None else PICTURES if self.data is None else 0


class BaseKLConfig(Strict):
    """A term of the loss: KL from the base to the model on the texts of the calibration."""

    weight: NonNegativeFloat | None = (
        None  # beside the task's loss; None: 1 for protected `milora` on a model with pictures
    )
    texts: PositiveInt = 2  # that a device reads in a step with the term
    every: PositiveInt = 4  # one step in `every` has the term, `every` times the weight


class EvalConfig(Strict):
    """Evaluation: suites after training, in a separate process; small suites and forgetting during training."""

    suites: list[str] = Field(default_factory=list)
    data: str | None = None
    limit: PositiveInt | None = None
    suite_every: PositiveInt | None = None  # steps; None: not during training
    suite_limit: PositiveInt = 64  # questions per benchmark during training
    forgetting_every: PositiveInt | None = None  # steps; None: not during training


class SweepConfig(Strict):
    """Settings of `python -m milora_vl.sweep` for this recipe; training ignores them."""

    suite: str | None = None  # evaluated in every cell
    data: str | None = None  # folder that contains the benchmark files
    limit: PositiveInt | None = None  # items per benchmark
    train: dict[str, Any] = Field(default_factory=dict)  # replaces keys of `train:` in every cell
    variants: dict[str, dict[str, Any]] = Field(
        default_factory=dict
    )  # names for --methods: fields of a rule, and `train:`


class Recipe(Strict):
    """One run. `policy: null` is protected MiLoRA on the language tower and the projector.

    >>> Recipe.parse({"model": "tiny", "train": {"warmup_ratio": 0.03}}).train["warmup_steps"]
    0.03
    """

    model: str = ""
    adapter: str | None = None  # folder of an adapter that trains further; it decides the rules
    after: str | None = None  # folder of a run whose update stays: a new adapter trains another task beside it
    quantization: Literal["none", "4bit", "8bit"] = "none"
    quant_type: Literal["nf4", "fp4"] = "nf4"  # data type with 4bit
    double_quant: bool = True  # with 4bit: also quantise the quantisation constants
    dtype: Literal["auto", "float32", "bfloat16", "float16", "fastest"] = "auto"  # data type of the frozen weights
    attn_implementation: str | dict[Literal["language", "vision"], str] = "sdpa"  # a name, or one per tower
    parts: PartsConfig = PartsConfig()
    projector_weights: str | None = None  # file or folder with initial weights of the projector
    template: str = "vicuna_v1"
    factor_cache: str | None = None  # folder that caches initial factors for all runs on the same weights
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

    @field_validator("attn_implementation", mode="before")
    @classmethod
    def _by_tower(cls, value: Any) -> Any:
        """Read a mapping from the text of a flag."""
        return yaml.safe_load(value) if isinstance(value, str) and value.startswith("{") else value

    def attention_of(self, tower: Literal["language", "vision"]) -> str:
        """Return the name of the attention implementation of a tower, as transformers knows it."""
        named = self.attn_implementation
        return named if isinstance(named, str) else named.get(tower, "sdpa")

    @classmethod
    def parse(cls, content: Mapping[str, Any], file: RecipeFile | None = None) -> Recipe:
        """Return a recipe from nested mappings. Raises RecipeError with all problems, located in `file` if given."""
        recipe, problems = checked(content)
        if problems:
            located = problems if file is None else file.located(problems)
            raise RecipeError(problems=located, source="" if file is None else file.source)
        return recipe

    def to_yaml(self) -> str:
        """Return the recipe as YAML; reading it gives the same recipe."""
        return yaml.safe_dump(
            self.model_dump(), sort_keys=False, allow_unicode=True, width=120, default_flow_style=None
        )


def checked(content: Mapping[str, Any], *, is_whole: bool = True) -> tuple[Recipe, list[Problem]]:
    """Return a recipe and all its problems: of values, of rules, and of settings that do not work together.

    A key with a wrong value has its default; `policy` is None if a rule is wrong.
    `is_whole`: not one of several layers.
    """
    train, problems = train_section(content.get("train"))
    values = {name: plain(value) for name, value in content.items() if name != "train"}
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        wrong = problems_of(error, Recipe, "recipe")
        problems += wrong
        names = {problem.where.parts[0] for problem in wrong if isinstance(problem.where, Key)}
        recipe = Recipe.model_validate({name: value for name, value in values.items() if name not in names})
    if of_rules := policy_problems(plain(content.get("policy"))):
        problems += of_rules
        recipe = recipe.model_copy(update={"policy": None})
    recipe = recipe.model_copy(update={"train": {**TRAIN_DEFAULTS, **train}})
    return recipe, problems + (conflicts(recipe) if is_whole and not problems else [])


def train_section(section: Any) -> tuple[Section, list[Problem]]:
    """Return the `train:` mapping with the newest names and the right types, and its problems."""
    train, problems = Section(), list[Problem]()
    if section is not None and not isinstance(section, Mapping):
        message = f"expected a mapping of TrainingArguments, got {section!r}"
        hint = "for example  train: {learning_rate: 2.0e-4, num_train_epochs: 1}"
        return train, [Problem(message, "recipe-value", Key.of("train"), hint)]
    section = Section.of(section or {})
    for name, value in section.items():
        path = Key(("train", str(name)))
        if name not in hf_flags.flags():
            problems.append(unknown_key(path, hf_flags.flags(), "recipe-unknown-key"))
            continue
        try:
            pair = hf_flags.canonical(name, hf_flags.coerce(name, plain(value)))
        except hf_flags.WrongValue as error:
            problems.append(Problem(str(error), "recipe-value", path, error.hint))
            continue
        if pair is None:
            continue
        if pair[0] in hf_flags.REFUSED:
            problems.append(Problem(str(hf_flags.REFUSED[pair[0]]), "recipe-refused", path))
        elif train.get(pair[0], pair[1]) != pair[1]:
            contradiction = f"contradicts {pair[0]}: {train[pair[0]]!r}, which is the same setting"
            problems.append(Problem(contradiction, "recipe-contradiction", path, "remove one of the two"))
        else:
            train.put(*pair, section.places.get(name, ""))
    return train, problems


def conflicts(recipe: Recipe) -> list[Problem]:
    """Return the problems of settings that do not work together."""
    problems = _with_streaming(recipe.data, recipe.train) if recipe.data.streaming else []
    if recipe.adapter and recipe.after:
        message = "an adapter trains further, or a new one trains after it, got both"
        hint = "--after keeps what the adapter has learned; --adapter trains the same adapter for more steps"
        problems.append(Problem(message, "flag-conflict", Key.of("after"), hint))
    if recipe.calibration.earlier and not recipe.after:
        message, hint = "no earlier run, so these records have no use", "add --after FOLDER, or use calibration.data"
        problems.append(Problem(message, "flag-needs-another", Key.of("calibration.earlier"), hint))
    train, dtype = recipe.train, recipe.dtype
    if train.get("bf16", dtype == "bfloat16") and train.get("fp16", dtype == "float16"):
        message = f"a run computes in bfloat16 or in float16, got both (dtype {dtype})"
        hint = "remove one: bf16 needs no loss scaling, fp16 suits older GPUs"
        key = "train.fp16" if train.get("fp16") else "train.bf16"
        problems.append(Problem(message, "recipe-precision", Key.of(key), hint))
    return problems


def _with_streaming(data: DataConfig, train: Mapping[str, Any]) -> list[Problem]:
    unread = "which data.streaming does not read"
    found: list[tuple[str, str, str]] = []
    if hf_flags.value_of(train, "max_steps") < 1:
        found.append(("data.streaming", "a stream has no known end", "set train.max_steps or --max_steps"))
    if data.packing:
        found.append(("data.packing", f"needs the lengths of all records, {unread}", ""))
    if train.get("train_sampling_strategy") == "group_by_length":
        found.append(("train.train_sampling_strategy", f"group_by_length needs all records, {unread}", ""))
    if data.limit is not None:
        found.append(("data.limit", "has no effect with data.streaming; train.max_steps ends the run", ""))
    return [Problem(message, "recipe-streaming", Key.of(key), hint) for key, message, hint in found]


def policy_problems(rules: Any) -> list[Problem]:
    """Return problems of the rules that do not depend on the model."""
    if rules is None or not isinstance(rules, list):  # the latter is reported with the other types
        return []
    try:
        Policy.parse(rules)
    except PolicyError as error:
        return list(error.problems)
    return []


def load(path: Path) -> Recipe:
    """Return the recipe in a YAML file."""
    file = RecipeFile.read(*read_file(path), str(path))
    return Recipe.parse(file.content, file)
