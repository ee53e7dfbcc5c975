"""Apply the flags of the policy (`--method`, `--protect`, `--rank`, ...) to the rules of a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from milora_vl.common.errors import UserError
from milora_vl.core.policy.rules import DEFAULT_RULES, RuleDict
from milora_vl.core.policy.rules import METHODS as RULE_METHODS
from milora_vl.train.recipe.layers import Section

ADAPTERS = tuple(name for name, method in RULE_METHODS.items() if "rank" in method.fields)
METHODS = (*ADAPTERS, "full", "projector")
ADAPTER_FIELDS = ("rank", "alpha", "rslora", "dropout", "sigma", "seed", "protect")


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyEdits:
    """Flags that replace a field in the rules; None keeps the field."""

    method: str | None = None
    protect: float | None = None
    rank: int | None = None
    alpha: float | None = None
    dropout: float | None = None
    learning_rate: float | None = None
    projector_learning_rate: float | None = None


def edited(rules: Sequence[RuleDict] | None, edits: PolicyEdits) -> list[Section]:
    """Return the rules after the flags; `full` and `frozen` rules keep their fields. A changed field is at its flag.

    A method drops `protect` and `sigma` of the rules, and milora has the scale 1, so that a method is its authors'.

    Raises UserError for a flag without effect.

    >>> edited(None, PolicyEdits(method="lora", rank=8))[0]["alpha"]  # the scale alpha/rank stays 1
    8.0
    """
    original = DEFAULT_RULES if rules is None else rules
    out = [Section.of(rule) for rule in original]
    adapters = [is_adapter(rule) for rule in out]
    _refuse_useless(any(adapters), edits)
    for rule, adapts in zip(out, adapters, strict=True):
        if adapts:
            _edit_adapter(rule, edits)
    if edits.method == "full":
        out = [_without_adapter(rule) if adapts else rule for rule, adapts in zip(out, adapters, strict=True)]
    # Drop a rule that only refined the old method. A rule that was empty before stays: its error is reported later.
    out = [rule for rule, before in zip(out, original, strict=True) if len(rule) > 1 or rule == before]
    if edits.method == "projector":
        out = [rule for rule in out if _of_projector(rule)] or [Section({"modules": "projector", "method": "full"})]
        if edits.learning_rate is not None:
            out[0].put("learning_rate", edits.learning_rate, "--learning_rate")
    if edits.projector_learning_rate is not None:
        _set_projector_rate(out, edits.projector_learning_rate)
    return out


def is_adapter(rule: RuleDict) -> bool:
    """Return whether a rule makes an adapter, or refines one (a later rule may set only a rank)."""
    return rule.get("method") in ADAPTERS or ("method" not in rule and any(f in rule for f in ADAPTER_FIELDS))


def _refuse_useless(has_adapters: bool, edits: PolicyEdits) -> None:
    flags = [f"--{name}" for name in ("protect", "rank", "alpha", "dropout") if asdict(edits)[name] is not None]
    if edits.method in ("full", "projector"):
        if flags:
            raise UserError(
                f"no effect with --method {edits.method}, which makes no adapter",
                code="flag-no-effect",
                where=" ".join(flags),
                hint="leave these flags out, or use a method with adapters, such as milora",
            )
    elif not has_adapters and (flags or edits.method):
        raise UserError(
            "no rule of the recipe makes an adapter",
            code="policy-no-adapter-rule",
            where="--method" if edits.method else flags[0],
            hint="add one with --policy, or use a recipe that has one: python -m milora_vl.train --list-recipes",
        )


def _edit_adapter(rule: Section, edits: PolicyEdits) -> None:
    if edits.method in ADAPTERS:
        if "method" in rule:
            rule.put("method", edits.method, "--method")
        dropped = {"sigma"} | ({"seed"} - RULE_METHODS[edits.method].fields)  # of the initial factors of the recipe
        for name in dropped | {"protect"}:
            rule.pop(name, None)
        if edits.method == "milora":  # the paper's scale is 1
            rule.pop("rslora", None)
            if rule.pop("alpha", None) is not None and "rank" in rule:
                rule.put("alpha", rule["rank"], "--method")
    is_exception = "method" not in rule and rule.get("protect") == 0  # such as {modules: language.mlp, protect: 0}
    if edits.protect is not None and not is_exception:
        rule.pop("protect", None)
        if "method" in rule and (edits.protect or RULE_METHODS[rule["method"]].protect):
            rule.put("protect", edits.protect, "--protect")
    if edits.rank is not None:
        old, alpha = rule.get("rank"), rule.get("alpha")
        rule.put("rank", edits.rank, "--rank")
        if isinstance(alpha, int | float) and isinstance(old, int) and old > 0 and edits.rank > 0:
            rule.put("alpha", alpha * edits.rank / old, "--rank")
    for name in ("alpha", "dropout", "learning_rate"):
        value = asdict(edits)[name]
        if value is not None and (name in rule or "method" in rule):
            rule.put(name, value, f"--{name}")


def _without_adapter(rule: Section) -> Section:
    kept = rule.without(ADAPTER_FIELDS)
    if "method" in kept:
        kept.put("method", "full", "--method")
    return kept


def _of_projector(rule: RuleDict) -> bool:
    return str(rule.get("modules", "")).startswith("projector")


def _set_projector_rate(rules: Sequence[Section], rate: float) -> None:
    chosen = [rule for rule in rules if _of_projector(rule)]
    if not chosen:
        raise UserError(
            "no rule of the policy trains the projector",
            code="flag-no-effect",
            where="--mm_projector_lr",
            hint="remove the flag, or add a rule for modules: projector",
        )
    for rule in chosen:
        rule.put("learning_rate", rate, "--mm_projector_lr")
