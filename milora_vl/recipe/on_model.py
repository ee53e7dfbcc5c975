"""Check a recipe on its model, without weights: rules and modules, templates, pictures, feature cache, rank limits.

This loads no weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, cast

from torch import nn

from milora_data.encode.labels import NoSupervisedTokens, encode
from milora_data.encode.templates import OWN, TEMPLATES
from milora_data.encode.tokens import own_template
from milora_data.records.record import Record
from milora_vl.base.errors import Problem, UserError
from milora_vl.cli.command_line import amount
from milora_vl.models.image_tokens import tiling_of, uses_processor
from milora_vl.models.loading import meta_model, split_processor
from milora_vl.models.quantized import quantized_layers
from milora_vl.policy import Policy, PolicyError, Target
from milora_vl.policy.resolve import RankTooLarge
from milora_vl.policy.towers import find_towers
from milora_vl.recipe.policy_edits import without_projector
from milora_vl.recipe.schema import Recipe


def rules_for(recipe: Recipe, base: nn.Module, *, implicit: bool) -> Recipe:
    """Return the recipe; its default policy has no projector rule if the model has no projector."""
    if not implicit or find_towers(base).projector is not None:
        return recipe
    return recipe.model_copy(update={"policy": without_projector(recipe.policy or [])})


def targets_of(recipe: Recipe, base: nn.Module) -> list[Target]:
    """Return the policy resolved on a model.

    Raises UserError with every problem of the rules, and for rules that train a tower whose features are cached.
    """
    try:
        targets = Policy.parse(recipe.policy or []).resolve(base, cache_dir=recipe.factor_cache)
    except PolicyError as error:
        *others, last = error.problems
        see = f"see: python -m milora_vl.train --model {recipe.model} --dry-run"
        hint = "\n".join(filter(None, (last.hint, see)))
        raise UserError(problems=[*others, replace(last, hint=hint)]) from None
    trained = next((target for target in targets if target.tower == "vision"), None)
    if recipe.data.feature_cache and trained is not None:
        raise UserError(
            f"the vision tower trains ({trained.path}), so its features change with each step",
            code="feature-cache-trained-tower",
            where="data.feature_cache",
            hint="remove the rule for vision, or the cache",
        )
    return targets


def require_pictures(recipe: Recipe, config: Any) -> None:
    """Raise UserError if the model of this config does not take pictures as the recipe prepares them."""
    if uses_processor(config):
        _require_for_processor(recipe, config)
        return
    if recipe.data.min_pixels is not None or recipe.data.max_pixels is not None:
        raise UserError(
            f"{recipe.model} resizes pictures to fixed sizes"
            if "vision_config" in config.to_dict()
            else f"{recipe.model} reads only text",
            code="pixels-unsupported",
            where="data.min_pixels" if recipe.data.max_pixels is None else "data.max_pixels",
            hint="remove the limit",
        )
    tiling, ratio = tiling_of(config), recipe.data.image_aspect_ratio
    if (ratio == "anyres" and tiling is None) or (ratio == "plain" and tiling is not None):
        raise UserError(
            f"{ratio}, but {recipe.model} {'sees a picture once' if tiling is None else 'tiles its pictures'}",
            code="image-aspect-ratio",
            where="data.image_aspect_ratio",
            hint="use pad or plain" if tiling is None else "use anyres",
        )
    if tiling is not None and recipe.data.jpeg_decoding == "draft":
        raise UserError(
            "draft decoding shrinks pictures, but tiles need them in full size",
            code="image-draft-tiles",
            where="data.jpeg_decoding",
            hint="use exact",
        )
    if recipe.data.feature_cache and config.model_type not in ("llava", "llava_next"):
        raise _no_feature_cache(config)


def _require_for_processor(recipe: Recipe, config: Any) -> None:
    """Raise UserError for a setting that changes how pictures are prepared, where the model's processor does that."""
    data, name = recipe.data, recipe.model
    if recipe.template != OWN:
        raise UserError(
            f"{name} ({config.model_type}) is trained with its own prompt format, not with {recipe.template}",
            code="template-not-for-model",
            where="template",
            hint=f"use --template {OWN}, or remove the setting",
        )
    if data.image_aspect_ratio != "pad":
        raise UserError(
            f"{data.image_aspect_ratio} is for LLaVA; the processor of {name} decides the shape of pictures",
            code="image-aspect-ratio",
            where="data.image_aspect_ratio",
            hint="remove the setting",
        )
    if data.jpeg_decoding == "draft":
        raise UserError(
            f"draft decoding shrinks pictures, and the size of a picture decides how many tokens {name} uses for it",
            code="image-draft-tiles",
            where="data.jpeg_decoding",
            hint="use exact; --max_pixels limits the tokens of the Qwen-VL and GLM-V families",
        )
    if data.packing:
        raise UserError(
            f"positions of packed records are not computed for {config.model_type}, which counts them by pictures",
            code="packing-unsupported-model",
            where="data.packing",
            hint="use --group_by_length True to reduce padding",
        )
    if data.feature_cache:
        raise _no_feature_cache(config)


def _no_feature_cache(config: Any) -> UserError:
    return UserError(
        f"supports LLaVA 1.5 and 1.6 only, not {config.model_type}: they use the tower's tokens unchanged",
        code="feature-cache-unsupported-model",
        where="data.feature_cache",
        hint="remove data.feature_cache",
    )


def model_warnings(recipe: Recipe, base: nn.Module, processor: Any) -> list[str]:
    """Return warnings about settings that fit this model badly: another chat template, untiled or too large images."""
    tokenizer, pictures = split_processor(processor)
    if pictures is None and recipe.template == "vicuna_v1" and tokenizer.chat_template:
        return ["the template is vicuna_v1, but this model has a chat template: use --template chat_template"]

    tiling = tiling_of(cast("Any", base).config)
    if tiling is None:
        return []
    messages = []
    if recipe.data.image_aspect_ratio == "pad":
        messages.append(f"this model splits images into tiles of {tiling.tile} pixels: use image_aspect_ratio anyres")
    if tiling.most_tokens < recipe.data.max_length:
        return messages
    return [
        *messages,
        f"an image takes up to {tiling.most_tokens:,} tokens: max_length {recipe.data.max_length:,} cuts large images "
        "and the text after them (use --max_length 4096)",
    ]


def require_template(recipe: Recipe, tokenizer: Any, records: Iterable[Record] = ()) -> None:
    """Raise UserError if the recipe asks for the model's chat template and it is missing or rejects a record."""
    if recipe.template != OWN:
        return
    try:
        own_template(tokenizer)
    except UserError:
        known = ", ".join(TEMPLATES)
        raise UserError(
            f"{OWN} does not work: {recipe.model} has no chat template",
            code="template-missing",
            where="template",
            hint=f"use another template, one of: {known}",
        ) from None
    for record in records:
        with suppress(NoSupervisedTokens):
            encode(record, tokenizer, template=OWN, image_token_id=-1, image_tokens=0)


def problems_on(rules: Sequence[Mapping[str, Any]], config: Any, *, implicit: bool = False) -> list[Problem]:
    """Return the problems of `rules` on the model of that config, each with a place such as `policy[1].rank`.

    Returns none if no model can be built from the config.
    `implicit`: the rules are our default, whose projector rule applies only to a model with a projector.
    """
    try:
        base = meta_model(config)
        if implicit and find_towers(base).projector is None:
            rules = without_projector(rules)
        Policy.parse(rules).resolve(base)
    except PolicyError as error:
        return list(error.problems)
    except (UserError, ValueError):
        return []
    return []


def of_default_rank(problems: Sequence[Problem]) -> list[Problem]:
    """Return the problems; problems of a too large default rank become one, with the flag that fixes it."""
    large = [problem for problem in problems if isinstance(problem, RankTooLarge)]
    if not large:
        return list(problems)
    most = min(problem.largest for problem in large)
    message = f"the default rank {large[0].rank} is too large: the smallest matrix of this model has rank {most}"
    fix = Problem(message, large[0].code, hint=f"use --rank {most}, or less")
    return [*(problem for problem in problems if problem not in large), fix]


def require_float_weights(recipe: Recipe, config: Any) -> None:
    """Raise UserError for a rule that trains a quantised weight in full: integers have no gradient."""
    base = meta_model(config)
    targets = Policy.parse(rules_for(recipe, base, implicit=True).policy or []).resolve(base)
    quantized = set(quantized_layers(base))
    packed = [t.path for t in targets if t.rank is None and t.path in quantized]
    if packed:
        raise UserError(
            f"{amount(len(packed), 'quantised module')} would train in full, first {packed[0]}",
            code="quantization-full-training",
            where="quantization",
            hint="train an adapter on quantised weights: --lora_enable True, or --method milora",
        )
