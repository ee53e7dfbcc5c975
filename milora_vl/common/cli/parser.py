"""The flags of all commands: types of their values, the parser and its message for a wrong flag, `Command`, `SHARED`.

`CommandParser` raises that message, with similar names, as a `UserError`; `Command` declares the flags of a program.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any, NoReturn

from milora_vl.common.cli.web import url_problem
from milora_vl.common.errors import Problem, UserError, did_you_mean, require_folder, suggest

NEGATIVE = re.compile(r"-[\d.]+e[-+]?\d+|-inf|-nan", re.IGNORECASE)


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
    if from_zero(text) == 0:
        raise argparse.ArgumentTypeError("must be above 0, got 0")
    return float(text)


def share(text: str) -> float:
    if above_zero(text) > 1:
        raise argparse.ArgumentTypeError(f"must be at most 1, got {text}")
    return float(text)


def device(text: str) -> str:
    import torch

    try:
        kind = torch.device(text).type
    except RuntimeError:
        kind = ""
    if kind not in ("cpu", "cuda", "mps", "xpu"):
        hint = did_you_mean(suggest(text, ("cpu", "cuda"))[:1])
        raise UserError(f"expected cpu, cuda, cuda:1, ..., got {text!r}", code="flag-value", hint=hint)
    backend = {"cuda": torch.cuda, "xpu": torch.xpu}.get(kind)
    available = backend.device_count() if backend else int(kind == "cpu" or torch.backends.mps.is_available())
    if (torch.device(text).index or 0) >= available:
        message = f"no device {text}: PyTorch finds {available or 'no'} {kind} devices"
        raise UserError(message, code="flag-value", hint="to run on the CPU:  --device cpu")
    return text


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
        for position in range(len(arguments) - 1, 0, -1):  # argparse takes -1e-3 for a flag
            flag, number = arguments[position - 1 : position + 1]
            if flag in declared.values() and NEGATIVE.fullmatch(number):
                arguments[position - 1 : position + 1] = [f"{flag}={number}"]
        try:
            return super().parse_known_args(arguments, namespace)
        except argparse.ArgumentError as error:
            names = (error.argument_name or "").split("/")  # argparse joins the spellings of a flag
            typed = [name for name in names if name in {argument.partition("=")[0] for argument in arguments}]
            raise self._mistake(error.message, (typed or names)[0]) from None

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
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
        return [flag for action in self._actions for flag in action.option_strings if flag.startswith("--")]

    def error(self, message: str) -> NoReturn:
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
        prog=prog, description=description, epilog=epilog, allow_abbrev=False, exit_on_error=False, formatter_class=Help
    )


RECORDS = "JSON, JSONL, .parquet, .tar, a folder of save_to_disk, or hub:OWNER/NAME"
OR_ADAPTER = "named model, hub id or folder (default: the base of --adapter)"
SHARED: dict[str, dict[str, Any]] = {
    "model": {"metavar": "MODEL", "help": "named model, hub id or folder"},
    "adapter": {"type": Path, "metavar": "FOLDER", "help": "adapter folder, for example the output_dir of a run"},
    "base": {"metavar": "MODEL", "help": "base model to compare with, if --model was trained in full"},
    "scale": {
        "type": from_zero,
        "default": 1.0,
        "help": "size of the finished update: 1 as trained, 0.5 half of it, 0 none (default: 1)",
    },
    "image_folder": {"type": Path, "metavar": "FOLDER", "help": "folder that picture names are relative to"},
    "suite": {"metavar": "NAME", "help": "list of benchmarks, or FILE.json with own questions"},
    "data": {"type": Path, "metavar": "FOLDER", "help": "folder that contains the benchmark files"},
    "template": {"metavar": "NAME", "help": "prompt format (default: the format of the run, else vicuna_v1)"},
    "limit": {"type": positive, "help": "use only the first N items"},
    "batch_size": {"type": positive, "help": "items per batch (default: %(default)s)"},
    "seed": {"type": int, "default": 0, "help": "random seed (default: %(default)s)"},
    "device": {"type": device, "metavar": "DEVICE", "help": "cpu, cuda, cuda:1, ... (default: cuda if available)"},
    "dtype": {
        "choices": ("float32", "bfloat16", "float16", "fastest"),
        "help": "data type of the weights (default: float32 on a CPU); fastest: bfloat16 if the device supports it",
    },
    "output_dir": {"type": Path, "metavar": "FOLDER", "help": "output folder"},
    "image_tokens": {"type": count, "default": 576, "help": "tokens per picture (default: %(default)s)"},
    "allow_base_mismatch": {"action": "store_true", "help": "continue with another base model"},
    "retry": {"action": "store_true", "help": "run failed cells again"},
    "format": {"choices": ("human", "json"), "default": "human", "help": "output format (default: %(default)s)"},
}


@dataclass(frozen=True, slots=True)
class Option:
    names: tuple[str, ...]
    keywords: Mapping[str, Any]


Choice = tuple[Option, ...]
"""Exactly one of these options is required."""


def option(*names: str, **keywords: Any) -> Option:
    return Option(names, keywords)


def flag(name: str, about: str) -> Option:
    return option(name, action="store_true", help=about)


DATA = option("data", type=Path, metavar="DATA", help=RECORDS)


def shared(
    name: str,
    *,
    about: str | None = None,
    required: bool = False,
    default: Any = None,
    choices: tuple[str, ...] | None = None,
) -> Option:
    """Return a flag of `SHARED`; `about`, `default` and `choices` override the shared values."""
    overrides = {"help": about, "default": default, "choices": choices}
    keywords = SHARED[name] | {key: value for key, value in overrides.items() if value is not None}
    return option(f"--{name}", **keywords, **({"required": True} if required else {}))


@dataclass(frozen=True, slots=True)
class Command:
    """The declaration of a program or a subcommand: its name after `python -m`, one sentence, examples, and its flags.

    `--help` shows the flags in three groups. Exactly one of the flags in a `Choice` is required.
    """

    name: str
    about: str
    examples: str
    inputs: Sequence[Option | Choice] = ()
    settings: Sequence[Option] = ()
    outputs: Sequence[Option] = ()

    def parse(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """Parse the arguments (default: the command line of the process).

        Raises UserError for a mistake in them, also if nothing can be written to --output_dir.
        """
        options = parser(f"python -m {self.name}", self.about, self.examples)
        for title, members in (("input", self.inputs), ("settings", self.settings), ("output", self.outputs)):
            group = options.add_argument_group(title)
            for member in members:
                if isinstance(member, Option):
                    group.add_argument(*member.names, **member.keywords)
                    continue
                choice = group.add_mutually_exclusive_group(required=True)
                for each in member:
                    choice.add_argument(*each.names, **each.keywords)
        parsed: argparse.Namespace = options.parse_args(argv)
        if "output_dir" in parsed and parsed.output_dir is not None:
            require_folder(parsed.output_dir)
        return parsed
