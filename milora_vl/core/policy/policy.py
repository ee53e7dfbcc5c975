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

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from milora_vl.common.errors import Key, Problem
from milora_vl.common.yaml_text import YamlTextError, parse_yaml
from milora_vl.core.policy.rules import PolicyError, Rule, Target

if TYPE_CHECKING:  # torch takes a second, and reading rules needs none of it
    from torch import nn


@dataclass(frozen=True, slots=True)
class Policy:
    """An ordered list of rules. Modules that no rule matches are frozen."""

    rules: tuple[Rule, ...]

    @staticmethod
    def parse(source: str | Path | Sequence[Mapping[str, Any] | Rule] | Policy) -> Policy:
        """Return the policy in a YAML text, in a YAML file (*.yaml, *.yml) or in a list of mappings.

        Raises PolicyError with all problems: unknown keys, wrong types, values out of range.

        >>> Policy.parse("- {modules: language, method: milora, rank: 8}").rules[0].rank
        8
        """
        if isinstance(source, Policy):
            return source
        items = _load_yaml(_text_of(source)) if isinstance(source, str | Path) else source
        if isinstance(items, Mapping) or not isinstance(items, Sequence) or isinstance(items, str):
            raise PolicyError(
                f"expected a list of rules, got {type(items).__name__}",
                code="policy-value",
                where=Key.of("policy"),
                hint="for example  [{modules: language, method: milora, rank: 64}]",
            )
        if not items:
            raise PolicyError(
                "no rules, so nothing would train",
                code="policy-empty",
                where=Key.of("policy"),
                hint="for example  - {modules: language, method: milora, rank: 64}",
            )
        rules: list[Rule] = []
        problems: list[Problem] = []
        for number, item in enumerate(items):
            try:
                rules.append(item if isinstance(item, Rule) else _rule(item))
            except PolicyError as error:
                problems += [problem.inside("policy", number) for problem in error.problems]
        if problems:
            raise PolicyError(problems=problems)
        return Policy(tuple(rules))

    def resolve(self, model: nn.Module) -> list[Target]:
        """Return one Target per module that trains, in model order.

        Raises PolicyError with all problems: rules that match nothing, fields that the method does not use, ranks
        larger than a matrix.

        >>> from torch import nn
        >>> policy = Policy.parse("- {modules: language, method: milora, rank: 2}")
        >>> [(t.path, t.shape, t.rank, t.alpha) for t in policy.resolve(nn.Sequential(nn.Linear(4, 6)))]
        [('0', (6, 4), 2, 2.0)]
        """
        from milora_vl.core.policy.resolve import resolve  # imports PEFT, which parsing a recipe does not need

        return resolve(self.rules, model)

    def to_list(self) -> list[dict[str, Any]]:
        """Return the rules as mappings, as in YAML."""
        return [rule.model_dump(exclude_defaults=True) for rule in self.rules]


def _text_of(source: str | Path) -> str:
    """Return the text of a YAML file, or `source` if it is the text."""
    if isinstance(source, str) and not re.fullmatch(r".+\.ya?ml", source):
        return source
    try:
        return Path(source).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        hint = "expected rules as a YAML text, or the name of a YAML file"
        raise PolicyError(
            f"cannot read the file: {error}", code="file-unreadable", where=str(source), hint=hint
        ) from None


def _load_yaml(text: str) -> Any:
    try:
        return parse_yaml(text)
    except YamlTextError as error:
        raise PolicyError(
            f"not valid YAML: {error}",
            code="yaml-syntax",
            where=Key.of("policy"),
            hint="for example  [{modules: language, method: milora, rank: 64}]",
        ) from error


def _rule(item: object) -> Rule:
    if not isinstance(item, Mapping):
        message = f"a rule is a mapping such as {{modules: language, method: milora}}, got {item!r}"
        raise PolicyError(message, code="policy-value")
    return Rule(**{str(key): value for key, value in item.items()})
