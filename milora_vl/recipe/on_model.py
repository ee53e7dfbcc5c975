"""A recipe on its model: the rules that fit it, the modules they mean, and faults that only show there.

No weights are loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import nn

from milora_data.errors import Problem, UserError
from milora_vl.models.image_tokens import tiling_of
from milora_vl.models.loading import meta_model, split_processor
from milora_vl.models.quantized import is_quantized
from milora_vl.policy import Policy, PolicyError, Target
from milora_vl.policy.resolve import RankTooLarge
from milora_vl.recipe.schema import Recipe
from milora_vl.towers import find_towers


def rules_for(recipe: Recipe, base: nn.Module, *, implicit: bool) -> Recipe:
    """The recipe whose default policy fits this model: no projector rule where there is no projector."""
    if not implicit or find_towers(base).projector is not None:
        return recipe
    rules = [rule for rule in recipe.policy or () if rule["modules"] != "projector"]
    return recipe.model_copy(update={"policy": rules})


def targets_of(recipe: Recipe, base: nn.Module) -> list[Target]:
    """The resolved policy on a model. UserError with every fault of the rules."""
    try:
        return Policy.parse(recipe.policy or []).resolve(base, cache_dir=recipe.factor_cache)
    except PolicyError as error:
        see = Problem(f"see: python -m milora_vl.train --model {recipe.model} --dry-run", "policy-see")
        raise UserError(problems=[*error.problems, see]) from None


def model_warnings(recipe: Recipe, base: nn.Module, processor: Any) -> list[str]:
    """What of the recipe fits this model badly: prompts other than its own, and how it sees pictures."""
    tokenizer, pictures = split_processor(processor)
    if pictures is None and recipe.template == "vicuna_v1" and tokenizer.chat_template:
        return ["prompts are vicuna_v1's; this model brings a chat template of its own: --template chat_template"]

    tiling = tiling_of(cast("Any", base).config)
    if tiling is None:
        return []
    said = []
    if recipe.data.image_aspect_ratio == "pad":
        said.append(f"this model sees pictures in tiles of {tiling.tile} pixels (image_aspect_ratio anyres, not pad)")
    if tiling.most_tokens < recipe.data.max_length:
        return said
    return [
        *said,
        f"a picture takes up to {tiling.most_tokens:,} tokens: at max_length {recipe.data.max_length:,} large ones are "
        "left out, with all that follows them (--max_length 4096)",
    ]


def problems_on(rules: Sequence[Mapping[str, Any]], config: Any, *, implicit: bool = False) -> list[Problem]:
    """Return what is wrong with `rules` on the model of that config, each at `policy[1].rank` or the like.

    Problems of the rules themselves are among them; none where the config makes no model.
    `implicit`: the rules are our default, whose projector rule applies where there is a projector.
    """
    try:
        base = meta_model(config)
        if implicit and find_towers(base).projector is None:
            rules = [rule for rule in rules if rule["modules"] != "projector"]
        Policy.parse_and_resolve(rules, base)
    except PolicyError as error:
        return list(error.problems)
    except (UserError, ValueError):
        return []
    return []


def of_default_rank(problems: Sequence[Problem]) -> list[Problem]:
    """Return the same problems; those of a rank that nobody gave become one, with the flag that fixes it."""
    large = [problem for problem in problems if isinstance(problem, RankTooLarge)]
    if not large:
        return list(problems)
    most = min(problem.largest for problem in large)
    message = f"the default rank {large[0].rank} is too large for this model, which has matrices of rank {most}"
    fix = Problem(message, large[0].code, hint=f"say:  --rank {most}, or less")
    return [*(problem for problem in problems if problem not in large), fix]


def require_float_weights(recipe: Recipe, config: Any) -> None:
    """UserError for a rule that trains a quantised weight itself: integers have no gradient."""
    base = meta_model(config)
    targets = Policy.parse_and_resolve(rules_for(recipe, base, implicit=True).policy or [], base)
    packed = [t.path for t in targets if t.rank is None and is_quantized(t.path, base.get_submodule(t.path))]
    if packed:
        raise UserError(
            f"quantization {recipe.quantization}: {len(packed):,} modules are to train in full, first {packed[0]}\n"
            "a quantised weight cannot train; an adapter on it can: --lora_enable True, or --method milora"
        )
