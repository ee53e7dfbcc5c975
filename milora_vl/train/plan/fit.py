"""`fit`: a recipe on its base model, without weights. Rules, template, pictures and precision fit, or are refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from milora_data.batches.processor_pack import require_packable
from milora_data.encode.templates import OWN, TEMPLATES, no_videos
from milora_data.encode.tokens import own_template
from milora_vl.common.cli.command_line import amount, beside
from milora_vl.common.errors import Key, Problem, UserError, at_flag, collected
from milora_vl.core.policy import Policy, PolicyError, Target
from milora_vl.core.policy.resolve import RankTooLarge
from milora_vl.core.policy.rules import FULL_PROJECTOR, UNALIGNED_PROJECTOR, RuleDict, without_projector
from milora_vl.core.policy.towers import find_towers
from milora_vl.core.weights.matrices import is_linear
from milora_vl.models.base import Base
from milora_vl.models.loading import split_processor
from milora_vl.models.quantized import quantized_layers
from milora_vl.train.plan import base as bases
from milora_vl.train.recipe.merge import Settings
from milora_vl.train.recipe.schema import BaseKLConfig, CalibrationConfig, Recipe, RecipeError


def fit(settings: Settings) -> tuple[Recipe, Base, list[Target], list[str]]:
    """Return the recipe as it fits its base model, the base, the targets of the policy on it, and warnings.

    Raises RecipeError with all problems of both.
    """
    problems, recipe, targets, notes = list(settings.problems), settings.recipe, list[Target](), list[str]()
    base = _base_of(settings, problems)
    if base is not None and recipe.policy is not None:
        with collected(problems):
            if not settings.is_set("policy"):
                rules, notes = _default_rules(settings, base)
                recipe = recipe.model_copy(update={"policy": rules})
            targets = Policy.parse(recipe.policy or []).resolve(base.meta)
    if base is not None and not settings.problems:
        if base.own_pictures and not settings.is_set("template"):
            recipe = recipe.model_copy(update={"template": OWN})
        checks = _require_prepared, _require_base, _require_calibration_files, _require_trained_parts
        for check in checks:
            with collected(problems):
                check(recipe, base, targets)
    if base is None or problems:
        raise RecipeError(problems=problems, source=settings.source)
    return recipe, base, targets, [*settings.warnings, *notes, *_warnings(recipe, base, targets)]


def _default_rules(settings: Settings, base: Base) -> tuple[list[RuleDict], list[str]]:
    """Return the default rules as they fit a base, after the flags, and notes about what is not as usual."""
    recipe, edits, notes = settings.recipe, settings.request.edits, list[str]()
    rules = list(recipe.policy or [])
    projector = find_towers(base.meta).projector
    rate = {} if edits.projector_learning_rate is None else {"learning_rate": edits.projector_learning_rate}
    if projector is None:
        rules = without_projector(rules)
    elif base.parts is not None and not recipe.projector_weights:
        rules = [*without_projector(rules), UNALIGNED_PROJECTOR | rate]
        notes.append(
            "the projector has never been aligned, so it trains in full and unprotected; align it first with  "
            "--recipe pretrain-projector-llava, then pass  --projector_weights"
        )
    elif not any(map(is_linear, base.meta.get_submodule(projector).modules())):
        rules = [*without_projector(rules), FULL_PROJECTOR | rate]
        notes.append("the projector has no linear layers, so it trains in full and unprotected")
    if edits.rank is None:
        try:
            Policy.parse(rules).resolve(base.meta)
        except PolicyError as error:
            largest = [problem.largest for problem in error.problems if isinstance(problem, RankTooLarge)]
            if largest:
                rank = max(1, min(largest) // 2)
                rules = [{**rule, "rank": rank, "alpha": rank} if "rank" in rule else rule for rule in rules]
                notes.append(f"the smallest matrix of this model has rank {min(largest)}: the ranks are {rank}")
    return rules, notes


def _base_of(settings: Settings, problems: list[Problem]) -> Base | None:
    """Return the base model, None if it is not known: its problem is in the list then."""
    recipe = settings.recipe
    if not recipe.model:
        return None
    with collected(problems), at_flag(settings.file.where(Key.of("model"))):
        return bases.base_of_run(recipe.model, recipe.parts, recipe.projector_weights)
    return None


def base_kl_of(recipe: Recipe, base: Base, targets: Sequence[Target]) -> BaseKLConfig:
    """Return `base_kl` with its weight; if none is set, the default keeps what the base says about pictures, too.

    A term of the loss reaches the five percent of the inputs that protection does not (docs/results.md).
    """
    if recipe.base_kl.weight is not None:
        return recipe.base_kl
    is_default = any(target.method == "milora" and target.protect for target in targets)
    return recipe.base_kl.model_copy(update={"weight": 1.0 if is_default and base.reads_pictures else 0.0})


def _require_prepared(recipe: Recipe, base: Base, targets: Sequence[Target]) -> None:
    """Raise UserError if the model does not take pictures, or packed records, as the recipe prepares them."""
    if recipe.data.packing:
        with at_flag(Key.of("data.packing")):
            require_packable(base.config)
    if base.own_pictures:
        _require_for_processor(recipe, base)
        return
    data, tiling = recipe.data, base.tiling
    if data.min_pixels is not None or data.max_pixels is not None:
        raise UserError(
            f"{base.name} resizes pictures to fixed sizes" if base.reads_pictures else f"{base.name} reads only text",
            code="pixels-unsupported",
            where=Key.of("data.min_pixels" if data.max_pixels is None else "data.max_pixels"),
            hint="remove the limit",
        )
    for key in data.processor.of_videos:
        with at_flag(Key.of(f"data.{key}")):
            raise no_videos(base.name)
    ratio = data.image_aspect_ratio
    if (ratio == "anyres" and tiling is None) or (ratio == "plain" and tiling is not None):
        raise UserError(
            f"{ratio}, but {base.name} {'sees a picture once' if tiling is None else 'tiles its pictures'}",
            code="image-aspect-ratio",
            where=Key.of("data.image_aspect_ratio"),
            hint="use pad or plain" if tiling is None else "use anyres",
        )


def _require_for_processor(recipe: Recipe, base: Base) -> None:
    """Raise UserError for a setting that changes how pictures are prepared, where the model's processor does that."""
    data, name, kind = recipe.data, base.name, base.config.model_type
    if recipe.template != OWN:
        raise UserError(
            f"{name} ({kind}) is trained with its own prompt format, not with {recipe.template}",
            code="template-not-for-model",
            where=Key.of("template"),
            hint=f"use --template {OWN}, or remove the setting",
        )
    if data.image_aspect_ratio != "pad":
        raise UserError(
            f"{data.image_aspect_ratio} is for LLaVA; the processor of {name} decides the shape of pictures",
            code="image-aspect-ratio",
            where=Key.of("data.image_aspect_ratio"),
            hint="remove the setting",
        )


def _require_base(recipe: Recipe, base: Base, targets: Sequence[Target]) -> None:
    """Raise UserError if `base_kl` has no base to compare with: the training changes it, or its tower is gone."""
    only_full = bool(targets) and all(target.rank is None for target in targets)
    if recipe.base_kl.weight and only_full:
        raise UserError(
            "compares with the base, which this training changes",
            code="base-kl-needs-base",
            where=Key.of("base_kl.weight"),
            hint="train an adapter, or set the weight to 0",
        )


def _reads_texts(recipe: Recipe, base: Base, targets: Sequence[Target]) -> bool:
    return bool(base_kl_of(recipe, base, targets).weight) or any(target.protect for target in targets)


def _require_calibration_files(recipe: Recipe, base: Base, targets: Sequence[Target]) -> None:
    calibration = recipe.calibration
    files = {"text": calibration.text or []}
    files |= {key: [name] for key in ("data", "earlier") if (name := getattr(calibration, key))}
    for key, names in files.items():
        for name in names:
            if not Path(name).exists() and not name.startswith("hub:"):
                raise UserError(
                    f"{name}: no such file",
                    code="path-missing",
                    where=Key(("calibration", key)),
                    hint=beside(Path(name)),
                )


def _require_trained_parts(recipe: Recipe, base: Base, targets: Sequence[Target]) -> None:
    """Raise UserError for a quantised weight that would train in full."""
    if recipe.quantization == "none":
        return
    quantized = set(quantized_layers(base.meta))
    packed = [target.path for target in targets if target.rank is None and target.path in quantized]
    if packed:  # integers have no gradient
        raise UserError(
            f"{amount(len(packed), 'quantised module')} would train in full, first {packed[0]}",
            code="quantization-full-training",
            where=Key.of("quantization"),
            hint="train an adapter on quantised weights: --lora_enable True, or --method milora",
        )


def _warnings(recipe: Recipe, base: Base, targets: Sequence[Target]) -> list[str]:
    """Return warnings about settings without effect, and about pictures that fit this model badly."""
    messages = bases.warnings(recipe.parts, base)
    if base.parts is not None and recipe.template == OWN:
        messages.append(f"--template {OWN}: a composed base uses vicuna_v1, not the template of {base.name}")
    if recipe.calibration != CalibrationConfig() and not _reads_texts(recipe, base, targets):
        messages.append("the calibration has no effect: no rule has protect, and base_kl has no weight")
    is_set = recipe.base_kl.model_copy(update={"weight": None}) != BaseKLConfig()
    if is_set and not base_kl_of(recipe, base, targets).weight:
        messages.append("base_kl has no effect: its weight is 0")
    tiling, longest = base.tiling, recipe.data.max_length
    if tiling is not None and recipe.data.image_aspect_ratio == "pad":
        messages.append(f"this model splits images into tiles of {tiling.tile} pixels: use image_aspect_ratio anyres")
    if tiling is not None and tiling.most_tokens >= longest:
        messages.append(
            f"an image takes up to {tiling.most_tokens:,} tokens: max_length {longest:,} cuts large images "
            "and the text after them (use --max_length 4096)"
        )
    return messages


def template_warnings(recipe: Recipe, processor: Any) -> list[str]:
    """Return a warning about a text-only model whose own chat template is not used."""
    tokenizer, pictures = split_processor(processor)
    if pictures is None and recipe.template == "vicuna_v1" and tokenizer.chat_template:
        return ["the template is vicuna_v1, but this model has a chat template: use --template chat_template"]
    return []


def require_template(recipe: Recipe, tokenizer: Any) -> None:
    """Raise UserError if the recipe asks for the tokenizer's chat template and it has none."""
    if recipe.template != OWN:
        return
    try:
        own_template(tokenizer)
    except UserError:
        raise UserError(
            f"{OWN} does not work: {recipe.model} has no chat template",
            code="template-missing",
            where=Key.of("template"),
            hint=f"use another template, one of: {', '.join(TEMPLATES)}",
        ) from None
