"""What the commands print: the next command, and `run`: errors without a traceback, exit codes.

`Menu` is several programs under one name: `--help` lists them, the first argument selects one.

Data goes to stdout, everything else to stderr. Exit codes: 0 done, 1 the run failed, 2 bad usage.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shlex
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import import_module, metadata
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

from milora_vl.common.errors import UserError, suggest
from milora_vl.common.secrets import without_secrets

PACKAGES = ("milora-vl", "torch", "transformers", "peft", "accelerate", "timm", "deepspeed", "bitsandbytes")
CODES = "exit codes: 0 done, 1 the run failed or errors were found, 2 bad usage, 130 interrupted\n"


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that results depend on."""
    found = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def amount(number: int, what: str) -> str:
    """Return a number with the thing that it counts.

    >>> amount(1, "record"), amount(1200, "record")
    ('1 record', '1,200 records')
    """
    return f"{number:,} {what}{'' if number == 1 else 's'}"


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


_PATH_ERRORS = (PermissionError, FileNotFoundError, NotADirectoryError, IsADirectoryError, FileExistsError)


def _path_error(error: Exception) -> UserError | None:
    """Return an error of a path or of a full disk as the user's; None for any other error."""
    text = str(error)
    if "No space left" in text or "Disk quota" in text:  # safetensors raises its own exception class
        message = f"a file cannot be written: {text}"
        return UserError(message, code="disk-full", hint="free some space, or use another disk", exit_code=1)
    other = (errno.EROFS, errno.ENAMETOOLONG)
    if isinstance(error, OSError) and (isinstance(error, _PATH_ERRORS) or error.errno in other):
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


@dataclass(frozen=True, slots=True)
class Menu:
    """`groups` maps heading and name to a module with a `main` and a description.

    A module is imported only when it is selected. Names in `menus` are menus themselves; their programs are listed.
    """

    prog: str
    about: str
    groups: Mapping[str, Mapping[str, tuple[str, str]]]
    examples: str
    word: str = "COMMAND"
    menus: tuple[str, ...] = ()

    @property
    def modules(self) -> dict[str, str]:
        return {name: module for programs in self.groups.values() for name, (module, _) in programs.items()}

    def usage(self) -> str:
        listed = {heading: dict(self._lines(programs)) for heading, programs in self.groups.items()}
        width = max(len(name) for lines in listed.values() for name in lines)
        groups = "\n\n".join(
            "\n".join([f"{heading}:", *(f"  {name:<{width}}  {about}" for name, about in lines.items())])
            for heading, lines in listed.items()
        )
        see = f"options of each: {self.prog} {self.word} --help"
        return f"usage: {self.prog} {self.word} ...\n\n{self.about}\n\n{groups}\n\n{see}\n\n{self.examples}\n{CODES}"

    def main(self, argv: Sequence[str] | None = None) -> int:
        arguments = list(sys.argv[1:] if argv is None else argv)
        kind = self.word.lower()
        if not arguments:
            sys.stderr.write(self.usage() + "\n")
            raise UserError(f"no {kind} given", hint=f"expected one of: {', '.join(self.modules)}")
        name = arguments[0]
        if name in ("-h", "--help"):
            sys.stdout.write(self.usage())
            return 0
        if name not in self.modules:
            inner = {words.split()[-1]: words for lines in self.groups.values() for words, _ in self._lines(lines)}
            near = [inner[name]] if name in inner else suggest(name, self.modules)
            suggestion = f"\ndid you mean {near[0]}?" if near else ""
            raise UserError(f"unknown {kind}: {name}", hint=f"expected one of: {', '.join(self.modules)}{suggestion}")
        return int(import_module(self.modules[name]).main(arguments[1:]))

    def _lines(self, programs: Mapping[str, tuple[str, str]]) -> Iterator[tuple[str, str]]:
        for name, (module, about) in programs.items():
            if name not in self.menus:
                yield name, about
                continue
            for inner in import_module(module).MENU.groups.values():
                yield from ((f"{name} {program}", text) for program, (_, text) in inner.items())


GIT_TIMEOUT = 10  # seconds


def git_state() -> dict[str, Any] | None:
    """Return the commit of our source, and whether it has changed since; None without git or a repository."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=GIT_TIMEOUT).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None


def duration_text(seconds: float) -> str:
    """Return a time as text; short times have two digits.

    >>> duration_text(7500), duration_text(41), duration_text(0.0123)
    ('2.1 h', '41 s', '0.012 s')
    """
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 9.5 else f"{seconds:.2g} s"
