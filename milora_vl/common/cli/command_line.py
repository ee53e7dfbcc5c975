"""The parser of all commands (`did you mean`), and `run`, which prints errors without a traceback; exit codes.

Data goes to stdout, everything else to stderr. Exit codes: 0 done, 1 the run failed, 2 bad usage.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import json
import logging
import os
import re
import shlex
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any, NoReturn

from milora_vl.common.cli.web import url_problem
from milora_vl.common.errors import Key, Problem, UserError
from milora_vl.common.secrets import without_secrets


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
        raise UserError(
            f"{within}{existing}{', which' if within else ''} is a file, not a folder",
            code="path-not-a-folder",
            where=flag,
            hint="use another folder",
        )
    if is_written and not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(
            f"{existing} is not writable",
            code="path-not-writable",
            where=flag,
            hint="use another folder, or change its permissions",
        )


def count(text: str) -> int:
    """Parse an integer >= 0: the `type` of a flag that counts something."""
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from None
    if number < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, got {number}")
    return number


def positive(text: str) -> int:
    """Parse an integer >= 1."""
    if count(text) == 0:
        raise argparse.ArgumentTypeError("must be at least 1, got 0")
    return int(text)


def from_zero(text: str) -> float:
    """Parse a finite number from 0: the `type` of a flag for a factor."""
    try:
        number = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number from 0, got {text}")
    return number


def above_zero(text: str) -> float:
    """Parse a finite number above 0."""
    if from_zero(text) == 0:
        raise argparse.ArgumentTypeError("must be above 0, got 0")
    return float(text)


def amount(number: int, what: str) -> str:
    """Return a number with the thing that it counts.

    >>> amount(1, "record"), amount(1200, "record")
    ('1 record', '1,200 records')
    """
    return f"{number:,} {what}{'' if number == 1 else 's'}"


_EXPONENT = re.compile(r"-[0-9.]+[eE][-+]?[0-9]+")


class CommandParser(argparse.ArgumentParser):
    """`argparse` that accepts `-` for `_` in flags, allows no abbreviations, and suggests names for unknown flags."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Replace each known flag by its declared spelling, then parse as usual."""
        arguments = list(sys.argv[1:] if args is None else args)
        declared = {flag.replace("-", "_"): flag for flag in self.flags()}
        for position, argument in enumerate(arguments):
            if argument == "--":
                break
            name, equals, value = argument.partition("=")
            if name.startswith("--"):
                arguments[position] = declared.get(name.replace("-", "_"), name) + equals + value
        for position in range(len(arguments) - 1, 0, -1):  # argparse takes -1 for a number, but -1e-3 for a flag
            if _EXPONENT.fullmatch(arguments[position]) and arguments[position - 1].startswith("--"):
                arguments[position - 1 : position + 1] = [f"{arguments[position - 1]}={arguments[position]}"]
        try:
            return super().parse_known_args(arguments, namespace)
        except argparse.ArgumentError as error:
            names = (error.argument_name or "").split("/")  # argparse joins the spellings of a flag
            typed = [name for name in names if name in {argument.partition("=")[0] for argument in arguments}]
            raise self._mistake(error.message, (typed or names)[0]) from None

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, and raise `UserError` with similar names for unknown flags."""
        arguments = list(sys.argv[1:] if args is None else args)
        if not {"-h", "--help"} & set(arguments):
            self._refuse_unknown_flags(arguments)
        parsed, unknown = self.parse_known_args(arguments, namespace)
        if unknown:
            self.error(f"unexpected arguments: {' '.join(unknown)}")
        return parsed

    def _refuse_unknown_flags(self, arguments: Sequence[str]) -> None:
        """Raise `UserError` with a problem for each unknown flag.

        argparse reports missing flags first, which hides that a required flag is misspelled.
        """
        names = {flag.lstrip("-").replace("-", "_"): flag for flag in self.flags()}
        words = takewhile(lambda word: word != "--", arguments)
        typed = dict.fromkeys(word.partition("=")[0] for word in words if word.startswith("--") and " " not in word)
        problems = []
        for flag in typed:
            name = flag.lstrip("-").replace("-", "_")
            if name not in names:
                near = did_you_mean([names[similar] for similar in suggest(name, names)])
                problems.append(Problem("unknown argument", "command-line", flag, near))
        if problems:
            *others, last = problems
            raise UserError(problems=[*others, replace(last, hint="\n".join(filter(None, (last.hint, self._see()))))])

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Raise `UserError` with a similar name for a value that is not among the choices."""
        if action.choices is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            flag = "/".join(action.option_strings[:1]) or str(action.metavar or action.dest)
            hint = did_you_mean(suggest(str(value), choices)[:1])
            raise self._mistake(f"expected one of {', '.join(choices)}, got {value!r}", flag, hint)

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        """Convert the value of an argument; refuse a URL if a path is expected."""
        flag = "/".join(action.option_strings) or str(action.metavar or action.dest)
        problem = url_problem(arg_string) if action.type is Path else None
        if problem is not None:
            raise UserError(problems=[replace(problem, where=flag)])
        try:
            return super()._get_value(action, arg_string)
        except argparse.ArgumentError as error:
            if isinstance(error.__context__, UserError):  # argparse would lose its hint
                raise self._mistake(error.__context__.first.message, flag, error.__context__.first.hint) from None
            raise

    def flags(self) -> list[str]:
        """Return the long flags that this parser declares."""
        return [flag for action in self._actions for flag in action.option_strings if flag.startswith("--")]

    def error(self, message: str) -> NoReturn:
        """Raise `UserError` (exit code 2); argparse itself would exit the process."""
        raise self._mistake(message)

    def _mistake(self, message: str, where: str = "", hint: str = "") -> UserError:
        return UserError(message, code="command-line", where=where, hint="\n".join(filter(None, (hint, self._see()))))

    def _see(self) -> str:
        return f"see: {self.prog} --help"


class Help(argparse.RawDescriptionHelpFormatter):
    """Keep line breaks in texts, and show the type of a flag's value (N, X, PATH) as its name."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        if action.choices is not None:
            return super()._get_default_metavar_for_optional(action)
        kinds: dict[Any, str] = {int: "N", count: "N", positive: "N", float: "X", from_zero: "X", Path: "PATH"}
        return kinds.get(action.type, "TEXT")


def parser(prog: str, description: str, epilog: str = "") -> CommandParser:
    """Return a parser that raises `UserError`; `epilog` keeps its line breaks (use it for examples)."""
    return CommandParser(
        prog=prog,
        description=description,
        epilog=epilog,
        allow_abbrev=False,
        exit_on_error=False,
        formatter_class=Help,
    )


def command_line(module: str, *words: object) -> str:
    """Return the command that runs `module` with these arguments, quoted for a shell.

    >>> command_line("milora_data", "check", "my data.json")
    "python -m milora_data check 'my data.json'"
    """
    return f"python -m {module} {shlex.join(map(str, words))}"


def next_step(module: str, *words: object) -> None:
    """Print a useful next command to stderr, ready to be copied. A word in capitals is a placeholder."""
    sys.stderr.write(f"next: {command_line(module, *words)}\n")


def report(error: UserError) -> None:
    """Write `error` to stderr: `error: `, then its first line, with the other lines aligned below.

    With `--format json` on the command line, also write its problems to stdout as JSON.
    """
    if _asked_for_json():
        problems = [asdict(problem) | {"where": str(problem.where)} for problem in error.problems]
        sys.stdout.write(json.dumps({"problems": problems, "exit_code": error.exit_code}, ensure_ascii=False) + "\n")
    sys.stderr.write("error: " + str(error).replace("\n", "\n       ") + "\n")


def _asked_for_json() -> bool:
    words = sys.argv[1:]
    return "--format=json" in words or ("--format", "json") in pairwise(words)


def _wait_for_rank_zero() -> None:
    # If all ranks fail with the same error, rank 0 prints it and the launcher stops the other ranks while they wait. An
    # error on a single other rank is printed after the delay.
    if os.environ.get("RANK", "0") != "0":
        time.sleep(15)  # rank 0 needs some seconds to exit on a busy machine


def show_warnings_in_one_line() -> None:
    """Print warnings as `warning: TEXT`, without the place in the code, unless Python's option -W asks for more."""
    if not sys.warnoptions:
        warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
        shown = logging.StreamHandler(sys.stderr)  # logging would print the text alone
        shown.setFormatter(logging.Formatter("warning: %(message)s"))
        for package in ("milora_vl", "milora_data", "milora_eval"):
            logging.getLogger(package).addHandler(shown)


# Errors of a path that the user named, or of its disk; a bug of ours does not raise them.
_PATH_ERRORS = frozenset(
    (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG)
)


def _path_error(error: Exception) -> UserError | None:
    """Return an error of a path or of a full disk as the user's; None for any other error."""
    text = str(error)
    if "No space left" in text or "Disk quota" in text:  # safetensors raises its own exception class
        message = f"a file cannot be written: {text}"
        return UserError(message, code="disk-full", hint="free some space, or use another disk", exit_code=1)
    if isinstance(error, OSError) and error.errno in _PATH_ERRORS:
        message = f"{error.filename or 'a file'}: {error.strerror}"
        return UserError(message, code="path-unusable", hint="use another path, or change its permissions")
    return None


def run(main: Callable[[Sequence[str] | None], int]) -> NoReturn:
    """Run `main` with the arguments of the command line and exit the process with its exit code.

    A mistake of the user is a few lines; any other error is a traceback. Both have no secrets.
    """
    show_warnings_in_one_line()
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # a terminal may not be UTF-8
    try:
        code = main(None)
        sys.stdout.flush()
    except UserError as error:
        _wait_for_rank_zero()
        report(error)
        code = error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        code = 130
    except BrokenPipeError:
        # The reader of the pipe (head, less) has exited; otherwise Python would fail again when it flushes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except Exception as error:
        problem = _path_error(error)
        if problem is None:
            sys.stderr.write(without_secrets(traceback.format_exc()))
            sys.exit(1)
        report(problem)
        code = problem.exit_code
    sys.exit(code)
