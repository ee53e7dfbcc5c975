"""`Policy`, an ordered list of rules, read from YAML. A later rule overrides the fields that it sets.

    - {modules: language, method: milora, rank: 64}
    - {modules: "language.layers[0-3].mlp", rank: 128}      # the first four MLPs: milora, rank 128
    - {modules: projector, method: full, learning_rate: 2.0e-5}

`Policy.parse` reads the rules, `Policy.resolve` applies them to a model. Both collect all problems before they raise.

>>> from torch import nn
>>> policy = Policy.parse("[{modules: language, method: milora, rank: 2}, {modules: '0', rank: 4}]")
>>> [(t.path, t.method, t.rank) for t in policy.resolve(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4)))]
[('0', 'milora', 4), ('1', 'milora', 2)]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from milora_vl.base.errors import Problem
from milora_vl.base.yaml_text import YamlTextError, parse_yaml
from milora_vl.policy.rules import PolicyError, Rule, Target

if TYPE_CHECKING:  # torch takes a second, and reading rules needs none of it
    from torch import nn


@dataclass(frozen=True, slots=True)
class Policy:
    """An ordered list of rules. Modules that no rule matches are frozen."""

    rules: tuple[Rule, ...]

    @staticmethod
    def parse(source: str | Sequence[Mapping[str, Any] | Rule] | Policy) -> Policy:
        """Return the policy in a YAML text or in a list of mappings.

        Raises PolicyError with all problems: unknown keys, wrong types, values out of range.

        >>> Policy.parse("- {modules: language, method: milora, rank: 8}").rules[0].rank
        8
        """
        if isinstance(source, Policy):
            return source
        rules, problems = _read(source)
        if problems:
            raise PolicyError(problems=problems)
        return Policy(tuple(rule for rule in rules if rule is not None))

    @staticmethod
    def parse_and_resolve(
        source: str | Sequence[Mapping[str, Any] | Rule] | Policy,
        model: nn.Module,
        *,
        cache_dir: str | Path | None = None,
    ) -> list[Target]:
        """Return the targets of a policy. Problems of parsing and of resolving come in one PolicyError."""
        from milora_vl.policy.resolve import resolve  # imports PEFT, which parsing a recipe does not need

        rules, problems = (source.rules, []) if isinstance(source, Policy) else _read(source)
        try:
            targets = resolve(rules, model, is_complete=not problems, cache_dir=cache_dir)
        except PolicyError as error:
            problems += error.problems
        if problems:
            raise PolicyError(problems=problems)
        return targets

    def resolve(self, model: nn.Module, *, cache_dir: str | Path | None = None) -> list[Target]:
        """Return one Target per module that trains, in model order.

        Ranks such as `{energy: 0.01}` need singular values, which are cached in `cache_dir`.

        Raises PolicyError with all problems: rules that match nothing, fields that the method does not use, ranks
        larger than a matrix.

        >>> from torch import nn
        >>> policy = Policy.parse("- {modules: language, method: milora, rank: 2}")
        >>> [(t.path, t.shape, t.rank, t.alpha) for t in policy.resolve(nn.Sequential(nn.Linear(4, 6)))]
        [('0', (6, 4), 2, 2.0)]
        """
        return Policy.parse_and_resolve(self, model, cache_dir=cache_dir)

    def to_list(self) -> list[dict[str, Any]]:
        """Return the rules as mappings, as in YAML."""
        return [rule.model_dump(exclude_defaults=True) for rule in self.rules]


def _read(source: str | Sequence[Mapping[str, Any] | Rule]) -> tuple[list[Rule | None], list[Problem]]:
    """Return the rules and all problems.

    A rule with problems keeps its valid fields, so that resolving can find more. A rule without `modules` becomes None.
    """
    items = _load_yaml(source) if isinstance(source, str) else source
    if isinstance(items, Mapping) or not isinstance(items, Sequence) or isinstance(items, str):
        raise PolicyError(
            f"expected a list of rules, got {type(items).__name__}",
            code="policy-value",
            where="policy",
            hint="for example  [{modules: language, method: milora, rank: 64}]",
        )
    rules: list[Rule | None] = []
    problems = []
    if not items:
        hint = "for example  - {modules: language, method: milora, rank: 64}"
        problems = [Problem("no rules, so nothing would train", "policy-empty", "policy", hint)]
    for number, item in enumerate(items):
        rule, rule_problems = (item, []) if isinstance(item, Rule) else _parse_rule(item)
        rules.append(rule)
        problems += [problem.inside(f"policy[{number}]") for problem in rule_problems]
    return rules, problems


def _load_yaml(text: str) -> Any:
    try:
        return parse_yaml(text)
    except YamlTextError as error:
        raise PolicyError(
            f"not valid YAML: {error}",
            code="yaml-syntax",
            where="policy",
            hint="for example  [{modules: language, method: milora, rank: 64}]",
        ) from error


def _parse_rule(item: object) -> tuple[Rule | None, list[Problem]]:
    if not isinstance(item, Mapping):
        message = f"a rule is a mapping such as {{modules: language, method: milora}}, got {item!r}"
        return None, [Problem(message, "policy-value")]
    fields = {str(key): value for key, value in item.items()}
    try:
        return Rule(**fields), []
    except PolicyError as error:
        wrong = {problem.where.partition(".")[2].partition(".")[0] for problem in error.problems}
        if "" in wrong:  # a key that is no text of Unicode
            return None, list(error.problems)
        sound = {name: value for name, value in fields.items() if name not in wrong}
        return (Rule(**sound) if "modules" in sound else None), list(error.problems)
