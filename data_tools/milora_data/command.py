"""What every command of this project shares: a parser that explains itself, and an outer edge without tracebacks.

Data goes to stdout, everything else to stderr; exit code 0 is fine, 1 the run failed, 2 bad usage.
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
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any, NoReturn

from milora_data.errors import UserError


def suggest(word: str, candidates: Iterable[str]) -> list[str]:
    """Return up to three of `candidates` that look like `word`, the nearest first.

    >>> suggest("vicuna", ["plain", "vicuna_v1"])
    ['vicuna_v1']
    """
    return difflib.get_close_matches(word, list(candidates), n=3, cutoff=0.6)


def count(text: str) -> int:
    """Parse a whole number from 0 up: the `type` of a flag that counts something."""
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from None
    if number < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, got {number}")
    return number


def positive(text: str) -> int:
    """Parse a whole number from 1 up."""
    if count(text) == 0:
        raise argparse.ArgumentTypeError("must be at least 1, got 0")
    return int(text)


def amount(number: int, what: str) -> str:
    """Return a number with what it counts.

    >>> amount(1, "record"), amount(1200, "record")
    ('1 record', '1,200 records')
    """
    return f"{number:,} {what}{'' if number == 1 else 's'}"


class CommandParser(argparse.ArgumentParser):
    """`argparse` with `-` and `_` alike in flags, no guessing from prefixes, and near names for unknown flags."""

    _given: Sequence[str] = ()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Spell every known flag as it was declared, then parse as usual."""
        arguments = list(sys.argv[1:] if args is None else args)
        self._given = arguments
        declared = {flag.replace("-", "_"): flag for flag in self.flags()}
        for position, argument in enumerate(arguments):
            if argument == "--":
                break
            name, equals, value = argument.partition("=")
            if name.startswith("--"):
                arguments[position] = declared.get(name.replace("-", "_"), name) + equals + value
        return super().parse_known_args(arguments, namespace)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, and raise `UserError` with near names for what is not known."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(f"unknown argument: {' '.join(unknown)}{self._near(unknown)}")
        return parsed

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Near names for a word that is none of an argument's choices."""
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            near = suggest(str(value), map(str, action.choices or ()))
            error.message += f"\ndid you mean {near[0]} ?" if near else ""
            raise

    def flags(self) -> list[str]:
        """Return the long flags that this parser declares."""
        return [flag for action in self._actions for flag in action.option_strings if flag.startswith("--")]

    def error(self, message: str) -> NoReturn:
        """Raise `UserError` (exit code 2) where argparse would leave the process."""
        if " required" in message:
            # A flag that is missing may be there, mistyped; argparse looks for what is missing first.
            words = takewhile(lambda word: word != "--", self._given)
            unknown = [word for word in words if word.startswith("--") and word.partition("=")[0] not in self.flags()]
            message += f"\nunknown argument: {' '.join(unknown)}{self._near(unknown)}" if unknown else ""
        raise UserError(f"{message}\nsee: {self.prog} --help")

    def _near(self, unknown: Sequence[str]) -> str:
        """A line with the flags that look like one of the words that are none; empty where nothing does."""
        names = {flag.lstrip("-").replace("-", "_"): flag for flag in self.flags()}
        words = [word.partition("=")[0].lstrip("-").replace("-", "_") for word in unknown if word.startswith("-")]
        near = [names[name] for word in words for name in suggest(word, names)]
        return f"\ndid you mean {' or '.join(dict.fromkeys(near))} ?" if near else ""


class Help(argparse.RawDescriptionHelpFormatter):
    """Lines as they were written in texts; a flag's value is called by its kind (N, X, PATH), not by the flag again."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        if action.choices is not None:
            return super()._get_default_metavar_for_optional(action)
        kinds: dict[Any, str] = {int: "N", count: "N", positive: "N", float: "X", Path: "PATH"}
        return kinds.get(action.type, "TEXT")


def parser(prog: str, description: str, epilog: str = "") -> CommandParser:
    """Return a parser whose mistakes raise `UserError`; `epilog` keeps its line breaks (use it for examples)."""
    return CommandParser(
        prog=as_typed(prog),
        description=description,
        epilog=as_typed(epilog),
        allow_abbrev=False,
        formatter_class=Help,
    )


def command_line(module: str, *words: object) -> str:
    """Return the call of `module` with these arguments as a user would type it, quoted where a shell needs that.

    >>> command_line("milora_data", "check", "my data.json")
    "python -m milora_data check 'my data.json'"
    """
    return f"python -m {module} {shlex.join(map(str, words))}"


def as_typed(text: str) -> str:
    """Return `text` with our programs called in the way this one was: as subcommands, where `milora` was typed."""
    if Path(sys.argv[0]).stem != "milora":
        return text
    return re.sub(r"python -m milora_(vl|data|eval)((?:\.\w+)*)\b", _as_subcommand, text)


def _as_subcommand(called: re.Match[str]) -> str:
    package, program = called[1], called[2].rpartition(".")[2]
    return f"milora {program or package}".removesuffix(" vl")


def next_step(module: str, *words: object) -> None:
    """Say what is sensible to type after a command that has ended well: on stderr, ready to be copied.

    A word in capitals stands for what the reader knows.
    """
    sys.stderr.write(as_typed(f"next: {command_line(module, *words)}\n"))


def report(error: UserError) -> None:
    """Write `error` to stderr: its first line after `error: `, the others aligned below.

    With `--format json` on the command line its problems go to stdout too, as data.
    """
    if _asked_for_json():
        problems = [asdict(problem) for problem in error.problems]
        sys.stdout.write(json.dumps({"problems": problems, "exit_code": error.exit_code}, ensure_ascii=False) + "\n")
    text = str(error)
    if text.startswith("Caught ") and "DataLoader worker" in text:
        # What a loader process raises arrives with its traceback put in front of the message.
        text = re.split(r"^[\w.]+Error: ", text, flags=re.MULTILINE)[-1].rstrip()
    sys.stderr.write(as_typed("error: " + text.replace("\n", "\n       ") + "\n"))


def _asked_for_json() -> bool:
    words = sys.argv[1:]
    return "--format=json" in words or ("--format", "json") in pairwise(words)


def _let_first_rank_speak() -> None:
    # A mistake that all processes of a launch find is told by the first: its launcher ends the others while they wait.
    # What only one of the others finds is told all the same.
    if os.environ.get("RANK", "0") != "0":
        time.sleep(5)


def hide_warnings_of_others() -> None:
    """Show no warnings of other packages, which are for those who write code, unless Python is told to (-W default)."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
        warnings.filterwarnings("default", module=r"(milora_vl|milora_data|milora_eval|llava_recipes)\b")
        # PEFT imports bitsandbytes wherever it is installed, which then misses a kernel that nobody has asked for.
        logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


# What is wrong with a place that was named, or with the disk below it; no mistake of ours.
_OF_PLACES = frozenset(
    (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOSPC, errno.EDQUOT)
)


def _is_on_the_way_to_what_was_named(error: OSError) -> bool:
    """A path of the command line, or a folder above it, is not there or cannot be made (below /proc)."""
    if error.errno != errno.ENOENT or not isinstance(error.filename, str | Path):
        return False
    place = Path(error.filename).resolve()
    named = [Path(word.partition("=")[2] or word).resolve() for word in sys.argv[1:]]
    return any(path.is_relative_to(place) for path in named)


def run(main: Callable[[Sequence[str] | None], int]) -> NoReturn:
    """Run `main` on the command line's arguments and leave the process with its exit code."""
    hide_warnings_of_others()
    try:
        code = main(None)
        sys.stdout.flush()
    except UserError as error:
        _let_first_rank_speak()
        report(error)
        code = error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        code = 130
    except BrokenPipeError:
        # The reader (head, less) went away; Python would complain once more when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except OSError as error:
        if error.errno not in _OF_PLACES and not _is_on_the_way_to_what_was_named(error):
            raise
        report(UserError(f"{error.filename or 'a file cannot be written'}: {error.strerror}"))
        code = 1 if error.errno in (errno.ENOSPC, errno.EDQUOT) else 2
    except Exception as error:  # safetensors tells of a full disk in a class of its own
        if "No space left" not in str(error):
            raise
        report(UserError(f"a file cannot be written: {str(error).splitlines()[0]}"))
        code = 1
    sys.exit(code)
