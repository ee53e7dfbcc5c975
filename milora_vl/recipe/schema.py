"""The recipe: everything that decides a run, as strict models of one YAML file. An unknown key is an error."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    field_validator,
)

from milora_data.command import suggest
from milora_data.errors import Problem, UserError
from milora_data.templates import template_name
from milora_vl.policy import Policy, PolicyError
from milora_vl.recipe import hf_arguments, yaml_file

TRAIN_DEFAULTS: dict[str, Any] = {"logging_steps": 10, "report_to": ["none"]}


class RecipeError(UserError):
    """All problems of a recipe together, each with file, line and dotted path.

    `problems` as given have their dotted paths alone; `source` and `lines` (by dotted path) complete them.
    """

    def __init__(self, source: str, problems: Iterable[Problem], lines: Mapping[str, int] | None = None) -> None:
        self.source, self.dotted = source, tuple(problems)
        super().__init__(problems=located(self.dotted, source, lines or {}), source=source)


class Strict(BaseModel):
    """A section of a YAML file: an unknown key, or a value of another type, is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class SourceConfig(Strict):
    """One of several sources."""

    path: str
    weight: NonNegativeFloat = 1.0  # how often its records come in an epoch
    image_folder: str | None = None


class DataConfig(Strict):
    """What is learnt from."""

    path: str | list[SourceConfig] | None = None  # LLaVA JSON or JSONL, parquet, shards, a mixture in YAML; or sources
    image_folder: str | None = None
    eval_path: str | None = None  # held-out records, for the evaluation loss
    max_length: PositiveInt = 2048
    image_aspect_ratio: Literal["pad", "plain", "anyres"] = "pad"  # a model of LLaVA-1.6 has anyres for pad
    jpeg_decoding: Literal["exact", "draft"] = "exact"  # draft: large photos at a part of their size, much sooner
    feature_cache: str | None = None  # a folder for what a frozen vision tower makes of pictures
    packing: bool = False  # several records in a row of twice max_length
    bad_images: Literal["raise", "skip", "replace"] = "raise"
    streaming: bool = False  # read what is due, and nothing before; weights are shares of the records that come
    shuffle_buffer: NonNegativeInt = 1000  # of a stream: so many records are mixed at a time
    limit: PositiveInt | None = None  # the first N records only

    @field_validator("path", mode="before")
    @classmethod
    def _sources(cls, value: Any) -> Any:
        if value is None or isinstance(value, str):
            return value
        if not isinstance(value, list) or not value:
            raise ValueError(f"expected a file, or a list of {{path, weight, image_folder}}, got {value!r}")
        return [_source(entry, f"source {number}") for number, entry in enumerate(value, start=1)]


def _source(entry: Any, place: str) -> SourceConfig:
    try:
        return entry if isinstance(entry, SourceConfig) else SourceConfig.model_validate(entry)
    except ValidationError as error:
        first = error.errors()[0]
        known = f"; known: {', '.join(SourceConfig.model_fields)}" if first["type"] == "extra_forbidden" else ""
        raise ValueError(f"{place}: {_dotted(first['loc'])}: {first['msg']}{known}") from None


class PartsConfig(Strict):
    """What turns a text-only `model` into a LLaVA: its tower, in LLaVA's words; `projector_weights` go with it."""

    vision_tower: str | None = None  # a folder, a hub id or timm/NAME
    vision_weights: str | None = None  # for timm/NAME: a file, or random
    select_layer: int = -2
    select_feature: Literal["patch", "cls_patch"] = "patch"


class EvalConfig(Strict):
    """What is evaluated: suites after training, in a process of their own; forgetting during it."""

    suites: list[str] = []
    data: str | None = None
    limit: PositiveInt | None = None
    forgetting_every: PositiveInt | None = None  # steps; None: not during training


class SweepConfig(Strict):
    """What `python -m milora_vl.sweep` does with this recipe beside its flags; a training reads none of it."""

    suite: str | None = None  # that every cell is evaluated on
    data: str | None = None  # folder of the suite's files
    limit: PositiveInt | None = None  # items of each benchmark
    train: dict[str, Any] = {}  # replaces keys of `train:` in every cell
    variants: dict[str, dict[str, Any]] = {}  # names for --methods: fields of a rule, and `train:`


class Recipe(Strict):
    """One run. `policy: null` is MiLoRA on the language tower and the projector in full.

    >>> Recipe.parse({"model": "tiny", "train": {"warmup_ratio": 0.03}}).train["warmup_steps"]
    0.03
    """

    model: str = ""
    quantization: Literal["none", "4bit", "8bit"] = "none"
    quant_type: Literal["nf4", "fp4"] = "nf4"  # of 4 bits
    double_quant: bool = True  # of 4 bits: their constants are quantised too
    dtype: Literal["auto", "float32", "bfloat16", "float16", "fastest"] = "auto"  # of the frozen weights
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    parts: PartsConfig = PartsConfig()
    projector_weights: str | None = None  # file or folder that the projector starts from
    template: str = "vicuna_v1"
    form: Literal["anchored", "residual"] = "anchored"
    factor_cache: str | None = None  # a folder for the initial factors, computed once for all runs on the same weights
    data: DataConfig = DataConfig()
    policy: list[dict[str, Any]] | None = None
    train: dict[str, Any] = {}
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
        """A recipe from nested mappings; RecipeError lists every mistake at once."""
        train, problems = train_section(content.get("train"))
        problems += policy_problems(content.get("policy"))
        try:
            recipe = cls.model_validate({**content, "train": {}})
        except ValidationError as error:
            problems += [_explain(e) for e in error.errors()]
            recipe = None
        if recipe is not None:
            problems += data_problems(recipe.data, train)
        if recipe is None or problems:
            raise RecipeError(source, problems, lines)
        return recipe.model_copy(update={"train": train})

    def to_yaml(self) -> str:
        """YAML that repeats this run when given back."""
        return yaml.safe_dump(
            self.model_dump(), sort_keys=False, allow_unicode=True, width=120, default_flow_style=None
        )


def train_section(section: Any) -> tuple[dict[str, Any], list[Problem]]:
    """The `train:` mapping with the newest names and the right types, and its problems."""
    if section is not None and not isinstance(section, Mapping):
        return {}, [Problem(f"expected a mapping of TrainingArguments, got {section!r}", "recipe-value", "train")]
    train: dict[str, Any] = {**TRAIN_DEFAULTS}
    problems: list[Problem] = []
    said: dict[str, Any] = {}
    for name, value in (section or {}).items():
        path = f"train.{name}"
        if name not in hf_arguments.flags():
            problems.append(_unknown_key(path, str(name), hf_arguments.flags()))
            continue
        try:
            pair = hf_arguments.canonical(name, hf_arguments.coerce(name, value))
        except ValueError as error:
            problems.append(Problem(str(error), "recipe-value", path))
            continue
        if pair is None:
            continue
        if pair[0] in hf_arguments.REFUSED:
            problems.append(Problem(str(hf_arguments.REFUSED[pair[0]]), "recipe-refused", path))
        elif said.get(pair[0], pair[1]) != pair[1]:
            contradiction = f"contradicts {pair[0]}: {said[pair[0]]!r}; they are the same setting"
            problems.append(Problem(contradiction, "recipe-contradiction", path))
        else:
            train[pair[0]] = said[pair[0]] = pair[1]
    return train, problems


def data_problems(data: DataConfig, train: Mapping[str, Any]) -> list[Problem]:
    """Settings that do not work with streamed records."""
    if not data.streaming:
        return []
    found = []
    if train.get("max_steps", -1) < 1:
        found.append(_streaming("data.streaming", "a stream has no known end", "set train.max_steps, or --max_steps N"))
    if data.packing:
        found.append(_streaming("data.packing", "needs the lengths of all records, which data.streaming does not read"))
    if train.get("train_sampling_strategy") == "group_by_length":
        message = "group_by_length needs all records, which data.streaming does not read"
        found.append(_streaming("train.train_sampling_strategy", message))
    if data.feature_cache is not None:
        message = "needs all pictures beforehand, which data.streaming does not read"
        found.append(_streaming("data.feature_cache", message))
    if data.limit is not None:
        found.append(_streaming("data.limit", "has no meaning with data.streaming; train.max_steps ends the run"))
    return found


def _streaming(path: str, message: str, hint: str = "") -> Problem:
    return Problem(message, "recipe-streaming", path, hint)


def policy_problems(rules: Any) -> list[Problem]:
    """Problems of a recipe's rules that show without a model."""
    if rules is None or not isinstance(rules, list):  # the latter is reported with the other types
        return []
    try:
        Policy.parse(rules)
    except PolicyError as error:
        return list(error.problems)
    return []


def load(path: Path) -> Recipe:
    """The recipe in a YAML file."""
    content, lines = yaml_file.read_file(path)
    return Recipe.parse(content, str(path), lines)


def _dotted(loc: tuple[int | str, ...]) -> str:
    path = ""
    for part in loc:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path


def _explain(error: Any) -> Problem:
    """A finding of pydantic in our words."""
    path = _dotted(error["loc"])
    if error["type"] == "extra_forbidden":
        model: Any = Recipe
        for part in error["loc"][:-1]:
            model = model.model_fields[part].annotation
        return _unknown_key(path, str(error["loc"][-1]), model.model_fields)
    if error["type"] == "literal_error":
        words = re.findall(r"'([^']*)'", error["ctx"]["expected"])
        near = suggest(str(error["input"]), words)
        message = f"expected one of {', '.join(words)}, got {error['input']!r}"
        return Problem(message, "recipe-value", path, f"did you mean {near[0]} ?" if near else "")
    if error["type"] == "value_error":  # raised by a validator of ours
        return Problem(str(error["ctx"]["error"]), "recipe-value", path)
    return Problem(f"{error['msg']}, got {error['input']!r}", "recipe-value", path)


def _unknown_key(path: str, word: str, known: Iterable[str]) -> Problem:
    known = list(known)
    near = difflib.get_close_matches(word, known, n=3, cutoff=0.6)
    if near:
        hint = f"did you mean {' or '.join(near)}?"
    else:
        few = len(known) < 15
        hint = f"known keys: {', '.join(known)}" if few else "known keys: the TrainingArguments of transformers"
    return Problem("unknown key", "recipe-unknown-key", path, hint)


def located(problems: Iterable[Problem], source: str, lines: Mapping[str, int]) -> list[Problem]:
    """Return the problems with file and line in front of their dotted paths."""
    found = []
    for problem in problems:
        line = f":{lines[problem.where]}" if problem.where in lines else ""
        found.append(problem.inside(f"{source}{line}: ") if problem.where else problem)
    return found
