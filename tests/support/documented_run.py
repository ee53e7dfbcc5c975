"""Run a documented command: in this process, in another one, or by its launcher."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

import pytest

from milora_vl.__main__ import MENU
from milora_vl.common.errors import UserError
from support.command_parsers import parser_of
from support.documented import words
from support.documented_tables import LEFT_OPEN, PLANS, SUBSTITUTIONS

LAUNCHER = re.compile(r"^(?:torchrun|deepspeed|accelerate launch) .*?(?:-m|--module) (?=milora_)")
MENUS = ("milora_data", "milora_eval")
BIN = Path(sys.executable).parent


def launch_of(text: str) -> str | None:
    """Return the launcher with its flags, and the recipe; None for a command without a launcher."""
    launcher, recipe = LAUNCHER.match(text), re.search(r"--recipe \S+", text)
    return launcher and launcher[0] + (recipe[0] if recipe else "")


def substituted(text: str) -> str:
    """Return the command as a test runs it, with small models and few steps."""
    for pattern, filled in LEFT_OPEN:
        text = re.sub(pattern, filled, text)
    for pattern, small in () if any(flag in text for flag in PLANS) else SUBSTITUTIONS:
        text = re.sub(pattern, small, text)
    return text


def in_one(text: str) -> str:
    """Return a launched command without its launcher and without DeepSpeed."""
    text = LAUNCHER.sub("python -m ", text)
    return re.sub(r" --deepspeed \S+", "", text) + " --deepspeed="


def in_two(text: str) -> str:
    """Return a launched command with two processes on the CPU."""
    text = re.sub(r"(?<=--nproc_per_node )8|(?<=--num_gpus )8", "2", text)
    return text if "--use_cpu" in text else f"{text} --use_cpu True"


def module_and_arguments(text: str) -> tuple[str, list[str]]:
    """Return the module that a command runs, and its arguments: `--help` where the docs only name the program."""
    first, *rest = words(text)
    if first.startswith("python") and rest[0] == "-m":
        first, rest = rest[1], rest[2:]
    elif first == "milora":
        first = "milora_vl"
    elif not first.startswith("milora_"):
        raise AssertionError(f"no program of ours: {text}")
    bare = not rest or (first == "milora_vl" and " ".join(rest) in PROGRAMS) or (first in MENUS and len(rest) == 1)
    return first, [*rest, "--help"] if bare else rest


PROGRAMS = set(MENU.modules) | {
    f"{name} {own}" for name in MENU.menus for own in import_module(MENU.modules[name]).MENU.modules
}


def run_here(text: str, typed: str = "") -> None:
    """Run one of our programs in this process, with `typed` as its input.

    Raises AssertionError, with the output, if its exit code is not 0.
    """
    module, arguments = module_and_arguments(text)
    target = None
    if ">" in arguments:
        at = arguments.index(">")
        target, arguments = arguments[at + 1], arguments[:at]
    found = import_module(module)
    main = found.main if hasattr(found, "main") else import_module(f"{module}.__main__").main
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), user_types(typed):
        code = exit_code(main, arguments)
    assert code == 0, f"exit code {code}\n{out.getvalue()[-2000:]}{err.getvalue()[-4000:]}"
    if target:
        Path(target).write_text(out.getvalue())


def exit_code(main: Callable[[list[str]], int], arguments: list[str]) -> int:
    """Call a program and return its exit code; messages and tracebacks go to stderr."""
    try:
        return main(arguments)
    except SystemExit as end:
        return int(end.code or 0)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    except Exception:
        sys.stderr.write(traceback.format_exc())
        return 1


@contextlib.contextmanager
def user_types(text: str) -> Iterator[None]:
    """Give programs `text` on stdin; restores argv, which the launchers for scripts replace."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", sys.argv)
        patch.setattr(sys, "stdin", io.StringIO(text))
        yield


def run_outside(text: str, folder: Path) -> None:
    """Run any command in another process; AssertionError, with the output, if its exit code is not 0."""
    finish(start(text, folder))


def run_together(text: str, folder: Path) -> None:
    """Run a launcher, once for each machine that it names, all of them on this one."""
    nodes = re.search(r"--nnodes (\d+)", text)
    for process in [start(text, folder) for _ in range(int(nodes[1]) if nodes else 1)]:
        finish(process)


def start(text: str, folder: Path) -> subprocess.Popen[str]:
    """Start a command with the programs of this environment first on the path."""
    env = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        words(text), cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen[str]) -> None:
    """Wait for a process; AssertionError, with the output, if its exit code is not 0."""
    printed, _ = process.communicate(timeout=900)
    assert process.returncode == 0, f"exit code {process.returncode}\n{printed[-6000:]}"


def flags_of(text: str) -> set[str]:
    """Return the flags that the program of a command declares; none for a bare menu."""
    module, arguments = module_and_arguments(text)
    if module == "milora_vl":  # the menu of all programs
        name, *arguments = arguments
    else:
        name = next(name for name, its in MENU.modules.items() if its.removesuffix(".__main__") == module)
    if name.startswith("-") or (name in MENU.menus and arguments[0].startswith("-")):
        return set()
    has_second = name in MENU.menus or (name, *arguments[:1]) == ("analyze", "ranks")
    return set(parser_of((name, arguments[0]) if has_second else (name,)).flags())
