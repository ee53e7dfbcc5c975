"""`fit`: a recipe on its base model, without weights. Rules, template, pictures and precision fit, or are refused."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from milora_data.batches.processor_pack import require_packable
from milora_data.encode.labels import NoSupervisedTokens, encode
from milora_data.encode.templates import OWN, TEMPLATES, no_videos
from milora_data.encode.tokens import own_template
from milora_data.records.record import Record
from milora_vl.common.cli.command_line import amount, beside
from milora_vl.common.errors import Key, Problem, UserError, at_flag, collected
from milora_vl.core.policy import Policy, PolicyError, Target
from milora_vl.core.policy.default import without_projector
from milora_vl.core.policy.resolve import RankTooLarge
from milora_vl.core.policy.towers import find_towers
from milora_vl.models.base import Base, find_base
from milora_vl.models.loading import split_processor
from milora_vl.models.quantized import quantized_layers
from milora_vl.train.plan import base as bases
from milora_vl.train.recipe.merge import Merged
from milora_vl.train.recipe.schema import CalibrationConfig, KeepConfig, Recipe, RecipeError, policy_problems


@dataclass(frozen=True, slots=True)
class Fitted:
    """A recipe whose rules and settings fit its base model, and the targets of its policy on the meta model."""

    recipe: Recipe
    base: Base
    policy: Policy
    targets: tuple[Target, ...]  # a rank that depends on singular values is an upper bound here
    warnings: tuple[str, ...]


def fit(merged: Merged) -> Fitted:
    """Look up the base model, and return the recipe as it fits. Raises RecipeError with all problems of both."""
    problems, recipe = list(merged.problems), merged.recipe
    base, rules, policy, targets = _base_of(merged, problems), merged.rules, Policy(()), list[Target]()
    if base is not None and rules is not None and not policy_problems(rules):  # the merged recipe has these problems
        with collected(problems):
            if "policy" in merged.defaults and find_towers(base.meta).projector is None:
                rules = without_projector(rules)
            policy = Policy.parse(rules)
            targets = _targets(merged, policy, base)
    if recipe is not None and base is not None:
        template = OWN if "template" in merged.defaults and base.own_pictures else recipe.template
        recipe = recipe.model_copy(update={"policy": rules, "template": template})
        checks = _require_prepared, _require_base, _require_calibration_files, _require_trained_parts
        for check in checks:
            with collected(problems):
                check(recipe, base, targets)
    if recipe is None or base is None or problems:
        raise RecipeError(problems=problems, source=merged.source)
    return Fitted(recipe, base, policy, tuple(targets), (*merged.warnings, *_warnings(recipe, base)))


def _base_of(merged: Merged, problems: list[Problem]) -> Base | None:
    """Return the base model, None if it is not known: its problem is in the list then."""
    recipe = merged.recipe
    if merged.model is None:
        return None
    with collected(problems), at_flag(merged.model_at):
        if recipe is None:
            base = find_base(merged.model)
            return base if base.reads_pictures or not merged.names_tower else None  # with other problems: composed
        return bases.base_of_run(merged.model, recipe.parts, recipe.projector_weights)
    return None


def _targets(merged: Merged, policy: Policy, base: Base) -> list[Target]:
    """Return the targets of the policy. Raises PolicyError with its problems on this model."""
    cache = None if merged.recipe is None else merged.recipe.factor_cache
    try:
        return policy.resolve(base.meta, cache_dir=cache)
    except PolicyError as error:
        if "rank" in merged.defaults:
            raise PolicyError(problems=_of_default_rank(error.problems)) from None
        raise


def _of_default_rank(problems: Sequence[Problem]) -> list[Problem]:
    """Return the problems; problems of a too large default rank become one, with the flag that fixes it."""
    large = [problem for problem in problems if isinstance(problem, RankTooLarge)]
    if not large:
        return list(problems)
    most = min(problem.largest for problem in large)
    message = f"the default rank {large[0].rank} is too large: the smallest matrix of this model has rank {most}"
    fix = Problem(message, large[0].code, hint=f"use --rank {most}, or less")
    return [*(problem for problem in problems if problem not in large), fix]


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
    if tiling is not None and data.jpeg_decoding == "draft":
        raise UserError(
            "draft decoding shrinks pictures, but tiles need them in full size",
            code="image-draft-tiles",
            where=Key.of("data.jpeg_decoding"),
            hint="use exact",
        )
    if data.feature_cache and not base.reads_pictures:
        raise _no_feature_cache(base)


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
    if data.jpeg_decoding == "draft":
        raise UserError(
            f"draft decoding shrinks pictures, and the size of a picture decides how many tokens {name} uses for it",
            code="image-draft-tiles",
            where=Key.of("data.jpeg_decoding"),
            hint="use exact; --max_pixels limits the tokens of the Qwen-VL and GLM-V families",
        )
    if data.feature_cache:
        raise _no_feature_cache(base)


def _no_feature_cache(base: Base) -> UserError:
    return UserError(
        f"supports LLaVA 1.5 and 1.6 only, not {base.config.model_type}: they use the tower's tokens unchanged",
        code="feature-cache-unsupported-model",
        where=Key.of("data.feature_cache"),
        hint="remove data.feature_cache",
    )


def _require_base(recipe: Recipe, base: Base, targets: Sequence[Target]) -> None:
    """Raise UserError if `keep` cannot compare with the base, because the training changes it or its tower is gone."""
    only_full = bool(targets) and all(target.rank is None for target in targets)
    if recipe.keep.weight and only_full:
        raise UserError(
            "compares with the base, which this training changes",
            code="keep-needs-base",
            where=Key.of("keep.weight"),
            hint="train an adapter, or set the weight to 0",
        )
    if recipe.keep.weight and recipe.data.feature_cache:
        raise UserError(
            "reads other pictures than those whose features are cached",
            code="keep-feature-cache",
            where=Key.of("keep.weight"),
            hint="remove data.feature_cache, or set the weight to 0",
        )


def _reads_texts(recipe: Recipe) -> bool:
    return bool(recipe.keep.weight) or any(rule.get("protect") for rule in recipe.policy or ())


def _require_calibration_files(recipe: Recipe, base: Base, targets: Sequence[Target]) -> None:
    calibration = recipe.calibration
    files = {"text": calibration.text or [], "data": [calibration.data] if calibration.data else []}
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
    """Raise UserError for a trained tower whose features are cached, and for a quantised weight trained in full."""
    trained = next((target for target in targets if target.tower == "vision"), None)
    if recipe.data.feature_cache and trained is not None:
        raise UserError(
            f"the vision tower trains ({trained.path}), so its features change with each step",
            code="feature-cache-trained-tower",
            where=Key.of("data.feature_cache"),
            hint="remove the rule for vision, or the cache",
        )
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


def _warnings(recipe: Recipe, base: Base) -> list[str]:
    """Return warnings about settings without effect, and about pictures that fit this model badly."""
    messages = bases.warnings(recipe.parts, base)
    if base.parts is not None and recipe.template == OWN:
        messages.append(f"--template {OWN}: a composed base uses vicuna_v1, not the template of {base.name}")
    if recipe.calibration != CalibrationConfig() and not _reads_texts(recipe):
        messages.append("the calibration has no effect: no rule has  protect,  and keep has no weight")
    if recipe.keep != KeepConfig() and not recipe.keep.weight:
        messages.append("keep.texts has no effect: keep.weight is 0")
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


def require_template(recipe: Recipe, tokenizer: Any, records: Iterable[Record] = ()) -> None:
    """Raise UserError if the recipe asks for the model's chat template and it is missing or rejects a record."""
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
    for record in records:
        with suppress(NoSupervisedTokens):
            encode(record, tokenizer, template=OWN, image_token_id=-1, image_tokens=0)
