"""The keys of a recipe with types, defaults and checks (data, parts, calibration, eval). Unknown keys are errors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

import llava_recipes
from milora_data.encode.templates import template_name
from milora_vl.base.errors import Problem, UserError
from milora_vl.base.strict_models import Strict, problems_of, unknown_key
from milora_vl.policy import Policy, PolicyError
from milora_vl.recipe import hf_flags, yaml_file

SAMPLES, PICTURES = 48, 64  # of a calibration
TRAIN_DEFAULTS: dict[str, Any] = {"logging_steps": 10, "report_to": ["none"]}


class RecipeError(UserError):
    """All problems of a recipe, each with file, line and dotted path.

    The `problems` passed in have only dotted paths; `source` and `lines` (by dotted path) complete them.
    """

    def __init__(self, source: str, problems: Iterable[Problem], lines: Mapping[str, int] | None = None) -> None:
        self.dotted = tuple(problems)
        super().__init__(problems=located(self.dotted, source, lines or {}), source=source)


class SourceConfig(Strict):
    """One of several data sources."""

    path: str
    weight: NonNegativeFloat = 1.0  # how often an epoch repeats its records
    image_folder: str | None = None


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
    jpeg_decoding: Literal["exact", "draft"] = "exact"  # draft: decode large photos at reduced size, much faster
    feature_cache: str | None = None  # folder for the features of a frozen vision tower
    packing: bool = False  # pack several records into a row of 2 * max_length
    bad_images: Literal["raise", "skip", "replace"] = "raise"
    web_pictures: Literal["refuse", "download"] = "refuse"  # pictures that records name by http(s) addresses
    streaming: bool = False  # read records while training; weights are shares of the records
    shuffle_buffer: NonNegativeInt = 1000  # number of streamed records that are shuffled at a time
    limit: PositiveInt | None = None  # the first N records only


class PartsConfig(Strict):
    """The vision tower that turns a text-only `model` into a LLaVA, with LLaVA's names; see `projector_weights`."""

    vision_tower: str | None = None  # a folder, a hub id or timm/NAME
    vision_weights: str | None = None  # for timm/NAME: a file, or random
    select_layer: int = -2
    select_feature: Literal["patch", "cls_patch"] = "patch"


class CalibrationConfig(Strict):
    """What finds the protected inputs of rules with `protect: {inputs: p}`."""

    samples: NonNegativeInt | None = None  # texts that the base model writes; default 48, or 0 beside text or data
    pictures: NonNegativeInt | None = None  # training pictures with the base's captions; default 64, or 0 beside data
    text: Annotated[list[str], Field(min_length=1)] | None = None  # text files
    data: str | None = None  # records, as in data.path
    image_folder: str | None = None  # of data

    @model_validator(mode="after")
    def _has_a_source(self) -> CalibrationConfig:
        if self.image_folder is not None and self.data is None:
            raise ValueError("image_folder belongs to data, which is missing")
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
    """One run. `policy: null` is MiLoRA on the language tower and the projector in full.

    >>> Recipe.parse({"model": "tiny", "train": {"warmup_ratio": 0.03}}).train["warmup_steps"]
    0.03
    """

    model: str = ""
    quantization: Literal["none", "4bit", "8bit"] = "none"
    quant_type: Literal["nf4", "fp4"] = "nf4"  # data type with 4bit
    double_quant: bool = True  # with 4bit: also quantise the quantisation constants
    dtype: Literal["auto", "float32", "bfloat16", "float16", "fastest"] = "auto"  # data type of the frozen weights
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    parts: PartsConfig = PartsConfig()
    projector_weights: str | None = None  # file or folder with initial weights of the projector
    template: str = "vicuna_v1"
    form: Literal["anchored", "residual"] = "anchored"
    factor_cache: str | None = None  # folder that caches initial factors for all runs on the same weights
    data: DataConfig = DataConfig()
    calibration: CalibrationConfig = CalibrationConfig()
    policy: list[dict[str, Any]] | None = None
    train: dict[str, Any] = Field(default_factory=dict)
    eval: EvalConfig = EvalConfig()
    sweep: SweepConfig = SweepConfig()

    @field_validator("template")
    @classmethod
    def _known_template(cls, value: str) -> str:
        return template_name(value)

    @classmethod
    def parse(
        cls, content: Mapping[str, Any], source: str = "recipe", lines: Mapping[str, int] | None = None
    ) -> Recipe:
        """Return a recipe from nested mappings. Raises RecipeError with all problems."""
        train, problems = train_section(content.get("train"))
        problems += policy_problems(content.get("policy"))
        try:
            recipe = cls.model_validate({**content, "train": {}})
        except ValidationError as error:
            problems += [replace(p, where=p.where.removeprefix(".")) for p in problems_of(error, cls, "recipe")]
            recipe = None
        if recipe is not None:
            problems += [*data_problems(recipe.data, train), *precision_problems(recipe.dtype, train)]
        if recipe is None or problems:
            raise RecipeError(source, problems, lines)
        return recipe.model_copy(update={"train": train})

    def to_yaml(self) -> str:
        """Return the recipe as YAML; reading it gives the same recipe."""
        return yaml.safe_dump(
            self.model_dump(), sort_keys=False, allow_unicode=True, width=120, default_flow_style=None
        )


def train_section(section: Any) -> tuple[dict[str, Any], list[Problem]]:
    """Return the `train:` mapping with the newest names and the right types, and its problems."""
    if section is not None and not isinstance(section, Mapping):
        return {}, [
            Problem(
                f"expected a mapping of TrainingArguments, got {section!r}",
                "recipe-value",
                "train",
                hint="for example  train: {learning_rate: 2.0e-4, num_train_epochs: 1}",
            )
        ]
    train: dict[str, Any] = {**TRAIN_DEFAULTS}
    problems: list[Problem] = []
    seen: dict[str, Any] = {}
    for name, value in (section or {}).items():
        path = f"train.{name}"
        if name not in hf_flags.flags():
            problems.append(unknown_key(path, hf_flags.flags(), "recipe-unknown-key"))
            continue
        try:
            pair = hf_flags.canonical(name, hf_flags.coerce(name, value))
        except hf_flags.WrongValue as error:
            problems.append(Problem(str(error), "recipe-value", path, error.hint))
            continue
        if pair is None:
            continue
        if pair[0] in hf_flags.REFUSED:
            problems.append(Problem(str(hf_flags.REFUSED[pair[0]]), "recipe-refused", path))
        elif seen.get(pair[0], pair[1]) != pair[1]:
            contradiction = f"contradicts {pair[0]}: {seen[pair[0]]!r}, which is the same setting"
            problems.append(Problem(contradiction, "recipe-contradiction", path, "remove one of the two"))
        else:
            train[pair[0]] = seen[pair[0]] = pair[1]
    return train, problems


def data_problems(data: DataConfig, train: Mapping[str, Any]) -> list[Problem]:
    """Return problems of settings that do not work with streamed records."""
    if not data.streaming:
        return []
    problems = []
    if train.get("max_steps", -1) < 1:
        problems.append(_streaming("data.streaming", "a stream has no known end", "set train.max_steps or --max_steps"))
    if data.packing:
        problems.append(
            _streaming("data.packing", "needs the lengths of all records, which data.streaming does not read")
        )
    if train.get("train_sampling_strategy") == "group_by_length":
        message = "group_by_length needs all records, which data.streaming does not read"
        problems.append(_streaming("train.train_sampling_strategy", message))
    if data.feature_cache is not None:
        message = "needs all images before training, which data.streaming does not read"
        problems.append(_streaming("data.feature_cache", message))
    if data.limit is not None:
        problems.append(_streaming("data.limit", "has no effect with data.streaming; train.max_steps ends the run"))
    return problems


def precision_problems(dtype: str, train: Mapping[str, Any]) -> list[Problem]:
    """Return the problem of a run that would compute in bfloat16 and in float16."""
    bf16 = train.get("bf16", dtype == "bfloat16")
    fp16 = train.get("fp16", dtype == "float16")
    if not (bf16 and fp16):
        return []
    message = f"a run computes in bfloat16 or in float16, got both (dtype {dtype})"
    where = "train.fp16" if train.get("fp16") else "train.bf16"
    return [
        Problem(message, "recipe-precision", where, "remove one: bf16 needs no loss scaling, fp16 suits older GPUs")
    ]


def _streaming(path: str, message: str, hint: str = "") -> Problem:
    return Problem(message, "recipe-streaming", path, hint)


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
    content, lines = yaml_file.read_file(path)
    return Recipe.parse(content, str(path), lines)


def is_key(place: str) -> bool:
    """Return whether the place of a problem is a key of recipes, and not a file, a flag or a module.

    A single word is a key only if it is no section and not `model`: folders often have these names.

    >>> [is_key(place) for place in ("data.packing", "policy[0].rank", "template", "train.bf16", "train.json", "data")]
    [True, True, True, True, False, False]
    """
    name, _, key = place.partition(".")
    if name.partition("[")[0] == "policy":
        return place == "policy" or name.endswith("]")
    if name == "train":
        return key in hf_flags.flags()
    field = Recipe.model_fields.get(name)
    if field is None:
        return False
    section = field.annotation
    if isinstance(section, type) and issubclass(section, Strict):
        return key.partition("[")[0].partition(".")[0] in section.model_fields
    return not key and name != "model"


def located(problems: Iterable[Problem], source: str, lines: Mapping[str, int]) -> list[Problem]:
    """Return the problems with file and line before their dotted paths; flags stay as they are.

    The last problem in a packaged recipe has a hint how to make a copy, which a user can edit.
    """
    placed = []
    for problem in problems:
        if problem.where.startswith("--"):
            placed.append(problem)
            continue
        line = f":{lines[problem.where]}" if problem.where in lines else ""
        placed.append(problem.inside(f"{source}{line}: ") if problem.where else problem)
    name = source.removeprefix("recipe ")
    if placed and placed[-1].where.startswith(source) and name in llava_recipes.names() and name != source:
        copy = f"make a copy to edit:  python -m milora_vl.train --print-recipe {name} > mine.yaml"
        placed[-1] = replace(placed[-1], hint="\n".join(filter(None, (placed[-1].hint, copy))))
    return placed
