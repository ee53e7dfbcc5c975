"""Errors that a user can fix. They are data (`Problem`), and one function, `render`, turns them into text.

The commands print them without a traceback (`command.run`); with `--format json` they print the data itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that a user can fix.

    `message` says what is wrong and what was found, `hint` what to do. `where` is a file with its line, a dotted key, a
    module path or a flag; it is empty where there is only one place. `code` names the cause; docs/troubleshooting.md
    has an entry for each.
    """

    message: str
    code: str = ""
    where: str = ""
    hint: str = ""

    def inside(self, place: str) -> Problem:
        """Return the same problem one level further out.

        >>> Problem("expected a number", where=".rank").inside("policy[1]").where
        'policy[1].rank'
        """
        return replace(self, where=place + self.where)

    def __str__(self) -> str:
        """The text for people: the place and the message, then what to do."""
        place = f"{self.where}: " if self.where else ""
        return place + self.message + (f"\n{self.hint}" if self.hint else "")


def render(problems: Sequence[Problem], source: str = "") -> str:
    """Return the text of one problem, or of several with their number; `source` is the file that all of them are in.

    >>> print(render([Problem("missing", where="policy[0].rank", hint="for example  rank: 64")]))
    policy[0].rank: missing
    for example  rank: 64
    >>> print(render([Problem("missing", where="a.yaml: model"), Problem("not 8", where="a.yaml:3: rank")], "a.yaml"))
    2 problems in a.yaml:
    model: missing
    a.yaml:3: rank: not 8
    """
    if len(problems) == 1:
        return str(problems[0])
    head = f"{len(problems)} problems{f' in {source}' if source else ''}:"
    texts = (str(problem).removeprefix(f"{source}: ").replace("\n", "\n  ") for problem in problems)
    return "\n".join([head, *texts])


class UserError(ValueError):
    """One or more problems that a user can fix. `exit_code` is that of the command: 2 bad usage, 1 the run failed."""

    def __init__(
        self,
        message: str = "",
        *,
        code: str = "",
        where: str = "",
        hint: str = "",
        problems: Sequence[Problem] = (),
        source: str = "",
        exit_code: int = 2,
    ) -> None:
        self.problems = tuple(problems) or (Problem(message, code, where, hint),)
        self.exit_code = exit_code
        super().__init__(render(self.problems, source))


class DataError(UserError):
    """A mistake in a data set; `where` is the file and, where it is known, the line."""
