"""What `--method`, `--rank`, `--alpha`, `--dropout` and the learning-rate flags do to the rules of a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from typing import Any

from milora_data.errors import UserError
from milora_vl.policy.rules import PART_OF_METHOD

ADAPTERS = ("milora", "lora", "pissa", "random", "dora", "olora", "mica")
METHODS = (*ADAPTERS, "full", "projector")
ADAPTER_FIELDS = ("rank", "alpha", "rslora", "dropout", "sigma", "seed", "protect")
RuleDict = dict[str, Any]

# The paper's choice for LLaVA-1.5-7B (arXiv:2406.09044, Table 11); the projector as LLaVA's own LoRA script trains it.
DEFAULT_RULES: tuple[RuleDict, ...] = (
    {"modules": "language", "method": "milora", "rank": 128, "alpha": 128, "dropout": 0.05, "learning_rate": 2e-4},
    {"modules": "projector", "method": "full", "learning_rate": 2e-5},
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyEdits:
    """Flags that replace a field in the rules; None leaves it."""

    method: str | None = None
    rank: int | None = None
    alpha: float | None = None
    dropout: float | None = None
    learning_rate: float | None = None
    projector_learning_rate: float | None = None


def edited(rules: Sequence[RuleDict] | None, edits: PolicyEdits) -> list[RuleDict]:
    """The rules after the flags; the `full` and `frozen` rules keep their fields. UserError where a flag has no use.

    >>> edited(None, PolicyEdits(method="lora", rank=8))[0]["alpha"]  # the scale alpha/rank stays 1
    8.0
    """
    out = [deepcopy(dict(rule)) for rule in (DEFAULT_RULES if rules is None else rules)]
    adapters = [rule for rule in out if is_adapter(rule)]
    _refuse_useless(adapters, edits)
    for rule in adapters:
        _edit_adapter(rule, edits)
    if edits.method == "full":
        out = [_without_adapter(rule) if rule in adapters else rule for rule in out]
    # A rule that only refined what the old method has says nothing any more; one that never did is the user's mistake.
    said = DEFAULT_RULES if rules is None else rules
    out = [rule for rule, before in zip(out, said, strict=True) if len(rule) > 1 or rule == before]
    if edits.method == "projector":
        out = [rule for rule in out if _of_projector(rule)] or [{"modules": "projector", "method": "full"}]
        if edits.learning_rate is not None:
            out[0]["learning_rate"] = edits.learning_rate
    if edits.projector_learning_rate is not None:
        _set_projector_rate(out, edits.projector_learning_rate)
    return out


def is_adapter(rule: RuleDict) -> bool:
    """Whether a rule makes an adapter, or refines one (a later rule may name a rank alone)."""
    return rule.get("method") in ADAPTERS or ("method" not in rule and any(f in rule for f in ADAPTER_FIELDS))


def _refuse_useless(adapters: Sequence[RuleDict], edits: PolicyEdits) -> None:
    given = [f"--{name}" for name in ("rank", "alpha", "dropout") if asdict(edits)[name] is not None]
    if edits.method in ("full", "projector"):
        if given:
            raise UserError(f"{' '.join(given)}: no use with --method {edits.method}, which makes no adapter")
    elif not adapters and (given or edits.method):
        flag = f"--method {edits.method}" if edits.method else given[0]
        raise UserError(
            f"{flag}: no rule of the recipe makes an adapter\n"
            "add one with --policy, or take a recipe that has one: python -m milora_vl.train --list-recipes"
        )


def _edit_adapter(rule: RuleDict, edits: PolicyEdits) -> None:
    if edits.method in ADAPTERS:
        if "method" in rule:
            rule["method"] = edits.method
        if edits.method not in PART_OF_METHOD:
            rule.pop("sigma", None)  # the scale of singular factors; the others have none
        if edits.method != "random":
            rule.pop("seed", None)
    if edits.rank is not None:
        old, alpha = rule.get("rank"), rule.get("alpha")
        rule["rank"] = edits.rank
        if isinstance(alpha, int | float) and isinstance(old, int) and old > 0:
            rule["alpha"] = alpha * edits.rank / old
    for name in ("alpha", "dropout", "learning_rate"):
        value = asdict(edits)[name]
        if value is not None and (name in rule or "method" in rule):
            rule[name] = value


def _without_adapter(rule: RuleDict) -> RuleDict:
    kept = {name: value for name, value in rule.items() if name not in ADAPTER_FIELDS}
    return {**kept, "method": "full"} if "method" in kept else kept


def _of_projector(rule: RuleDict) -> bool:
    return str(rule.get("modules", "")).startswith("projector")


def _set_projector_rate(rules: Sequence[RuleDict], rate: float) -> None:
    chosen = [rule for rule in rules if _of_projector(rule)]
    if not chosen:
        raise UserError("--mm_projector_lr: no rule of the policy trains the projector")
    for rule in chosen:
        rule["learning_rate"] = rate
