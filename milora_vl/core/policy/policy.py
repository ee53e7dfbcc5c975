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


_EXAMPLE = "for example  [{modules: language, method: milora, rank: 64}]"


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
        if isinstance(items, str | Mapping) or not isinstance(items, Sequence) or not items:
            found = "an empty list" if items == [] else type(items).__name__
            raise PolicyError(
                f"expected a list of rules, got {found}", code="policy-value", where=Key.of("policy"), hint=_EXAMPLE
            )
        rules: list[Rule] = []
        problems: list[Problem] = []
        for number, item in enumerate(items):
            try:
                if not isinstance(item, Rule | Mapping):
                    message = f"a rule is a mapping such as {{modules: language, method: milora}}, got {item!r}"
                    raise PolicyError(message, code="policy-value")
                rules.append(item if isinstance(item, Rule) else Rule(**{str(key): v for key, v in item.items()}))
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


def _text_of(source: str | Path) -> str:
    if isinstance(source, str) and not re.fullmatch(r".+\.ya?ml", source):
        return source
    try:
        return Path(source).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        hint = "expected rules as a YAML text, or the name of a YAML file"
        message = f"cannot read the file: {error}"
        raise PolicyError(message, code="file-unreadable", where=str(source), hint=hint) from None


def _load_yaml(text: str) -> Any:
    try:
        return parse_yaml(text)
    except YamlTextError as error:
        message = f"not valid YAML: {error}"
        raise PolicyError(message, code="yaml-syntax", where=Key.of("policy"), hint=_EXAMPLE) from error
