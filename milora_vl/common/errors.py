"""`Problem` (code, place, message, hint) and the error classes with problems; `render` turns them into text.

The commands print them without a traceback (`cli.command_line.run`); with `--format json` they print the data itself.
"""

from __future__ import annotations

import difflib
import os
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from milora_vl.common.secrets import without_secrets

ErrorT = TypeVar("ErrorT", bound="UserError")
SHOWN = 20  # problems of one error


@dataclass(frozen=True, slots=True)
class Key:
    """A place in nested settings, such as `policy[1].rank`: the names and the numbers that lead to a value.

    Code that checks a value knows only its key; the command that read it adds the file and line, or the flag.
    """

    parts: tuple[str | int, ...]

    @classmethod
    def of(cls, dotted: str) -> Key:
        """Return the key of names that dots separate.

        >>> str(Key.of("data.path").below(0, "weight"))
        'data.path[0].weight'
        """
        return cls(tuple(dotted.split(".")))

    def below(self, *parts: str | int) -> Key:
        return Key((*self.parts, *parts))

    def __str__(self) -> str:
        return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in self.parts).removeprefix(".")


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake that a user can fix.

    `message` describes the mistake and the value found, `hint` the fix. `where` is the key of a setting, or the place
    as people read it: a file with its line, a module path, a flag; it is empty if there is only one place. `code` names
    the cause.
    """

    message: str
    code: str = ""
    where: str | Key = ""
    hint: str = ""

    def inside(self, *parts: str | int) -> Problem:
        """Return the problem of a value inside another one, whose key has these parts.

        >>> str(Problem("expected a number", where=Key.of("rank")).inside("policy", 1).where)
        'policy[1].rank'
        """
        return replace(self, where=Key((*parts, *(self.where.parts if isinstance(self.where, Key) else ()))))

    def __str__(self) -> str:
        start = f"{self.where}: " if self.where else ""
        return start + self.message + (f"\n{self.hint}" if self.hint else "")


def render(problems: Sequence[Problem], source: str = "") -> str:
    """Return the text of one problem, or of several with their number, at most SHOWN; `source` contains all of them.

    >>> print(render([Problem("missing", where=Key(("policy", 0, "rank")), hint="for example  rank: 64")]))
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
    texts = [str(problem).removeprefix(f"{source}: ").replace("\n", "\n  ") for problem in problems[:SHOWN]]
    return "\n".join([head, *texts, *([f"... and {len(problems) - SHOWN:,} more"] if len(problems) > SHOWN else [])])


class UserError(ValueError):
    """One or more problems that a user can fix. The command exits with `exit_code`: 2 bad usage, 1 the run failed.

    Secrets in their texts are hidden, because people share error messages.
    """

    is_shared = False  # True if all processes have raised it

    def __init__(
        self,
        message: str = "",
        *,
        code: str = "",
        where: str | Key = "",
        hint: str = "",
        problems: Sequence[Problem] = (),
        source: str = "",
        exit_code: int = 2,
    ) -> None:
        self.problems = tuple(map(_without_secrets, problems or [Problem(message, code, where, hint)]))
        self.source, self.exit_code = source, exit_code
        super().__init__(render(self.problems, source))

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (type(self), self.args, self.__dict__)  # subclasses have other arguments

    @property
    def first(self) -> Problem:
        return self.problems[0]


def _without_secrets(problem: Problem) -> Problem:
    message, hint = map(without_secrets, (problem.message, problem.hint))
    where = without_secrets(problem.where) if isinstance(problem.where, str) else problem.where
    return replace(problem, message=message, where=where, hint=hint)


def _restored(kind: type[ErrorT], args: tuple[Any, ...], fields: dict[str, Any]) -> ErrorT:
    error = kind.__new__(kind, *args)
    error.__dict__.update(fields)
    return error


def with_context(error: ErrorT, where: str = "", hint: str = "") -> ErrorT:
    """Return a copy of `error` whose problems are at `where` and end with the line `hint`.

    >>> str(with_context(DataError("turn 2 is empty", hint="remove it"), where="a.json:3"))
    'a.json:3: turn 2 is empty\\nremove it'
    """
    return with_problems(
        error,
        [
            replace(
                problem,
                where=": ".join(filter(None, (where, str(problem.where)))) if where else problem.where,
                hint="\n".join(filter(None, (problem.hint, hint))),
            )
            for problem in error.problems
        ],
    )


def with_problems(error: ErrorT, problems: Sequence[Problem]) -> ErrorT:
    """Return a copy of `error`, of the same class, with these problems in place of the old ones."""
    copied = copy(error)
    copied.problems = tuple(map(_without_secrets, problems))
    copied.args = (render(copied.problems, copied.source),)
    return copied


@contextmanager
def at_flag(flag: str | Key) -> Iterator[None]:
    """Name the flag or key whose value the block rejects: in problems without a place, and before a model's name."""
    try:
        yield
    except UserError as error:
        raise with_problems(error, [_at_flag(problem, flag) for problem in error.problems]) from error


def _at_flag(problem: Problem, flag: str | Key) -> Problem:
    if not problem.where:
        return replace(problem, where=flag)
    is_named = str(problem.where).startswith("--") or not problem.code.startswith("model-")
    return problem if is_named else replace(problem, where=f"{flag}: {problem.where}")


@contextmanager
def collected(problems: list[Problem]) -> Iterator[None]:
    """Add the problems of a UserError in the block to the list, so that the next check runs too."""
    try:
        yield
    except UserError as error:
        problems += error.problems


class DataError(UserError):
    """A mistake in a data set; `where` is the file and, if known, the line."""


MALFORMED = (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, AssertionError, RecursionError)
"""The errors of code that reads a value of another structure than it expects."""


@contextmanager
def expected_format(
    message: str, *, code: str, where: str, hint: str = "", kind: type[UserError] | None = None
) -> Iterator[None]:
    """Raise the errors MALFORMED of the block as a `kind` (UserError), which names the line of code.

    The line helps where the input is right and the fault is ours.
    """
    try:
        yield
    except UserError:
        raise
    except MALFORMED as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        line = f"{frame.filename.rpartition('/')[2]}:{frame.lineno}"
        reason = f"{type(error).__name__}: {first_line(error)[:120]}, {line}"
        reason = "too many lists and objects in each other" if isinstance(error, RecursionError) else reason
        raise (kind or UserError)(f"{message} ({reason})", code=code, where=where, hint=hint) from error


def no_records(path: object) -> Problem:
    hint = "expected a JSON list, JSON lines or a parquet file with at least one record"
    return Problem("the file has no records", "data-no-records", str(path), hint)


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def suggest(word: str, candidates: Iterable[str]) -> list[str]:
    """Return up to three of `candidates` that are similar to `word`, the most similar first.

    >>> suggest("vicuna", ["plain", "vicuna_v1"])
    ['vicuna_v1']
    """
    return difflib.get_close_matches(word, list(candidates), n=3, cutoff=0.6)


def did_you_mean(names: Sequence[str]) -> str:
    """Return a hint that names similar words, or an empty string without such words.

    >>> did_you_mean(["--model", "--modules"]), did_you_mean([])
    ('did you mean --model or --modules?', '')
    """
    return f"did you mean {' or '.join(names)}?" if names else ""


def beside(missing: Path) -> str:
    """Return a hint for a path that does not exist: similar names in its folder, or where paths start."""
    if missing.parent.is_dir():
        near = suggest(missing.name, (path.name for path in missing.parent.iterdir()))
        if near:
            return did_you_mean([str(missing.parent / name) for name in near])
    return "check the path" if missing.is_absolute() else f"check the path; it starts at {Path.cwd()}"


def no_folder(path: Path, flag: str, what: str = "folder") -> Problem:
    """Return the problem of a path that should be an existing folder, at the flag or argument that names it."""
    if path.exists():
        return Problem(f"{path} is a file, not a folder", "path-not-a-folder", flag, "name a folder")
    return Problem(f"no such {what}: {path}", "path-missing", flag, beside(path))


def require_folder(path: Path, flag: str | Key = "--output_dir", *, is_written: bool = True) -> None:
    """Raise UserError, at `flag`, if `path` is not a folder that can be written to, or created. Writes nothing.

    With `is_written` False, a folder that can only be read is accepted.
    """
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not existing.is_dir():
        within = "" if existing == path else f"{path} is inside "
        message, hint = f"{within}{existing}{', which' if within else ''} is a file, not a folder", "use another folder"
        raise UserError(message, code="path-not-a-folder", where=flag, hint=hint)
    if is_written and not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{existing} is not writable", where=flag, hint="use another folder, or change its permissions")


@contextmanager
def out_of_memory(hint: str) -> Iterator[None]:
    """Turn torch's error for a device that is out of memory into a UserError; `hint` names flags that need less."""
    import torch  # an error about a flag does not wait for it

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(f"out of memory: {first_line(error)}", hint=hint, exit_code=1) from None
