"""Run a documented command: in this process, as its launcher starts it, or as a plan where it is make."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
import traceback
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
from documented import words
from documented_tables import LEFT_OPEN, PLANS, SUBSTITUTIONS
from test_command_lines import parser_of

from milora_data.errors import UserError
from milora_vl.__main__ import MENU

LAUNCHER = re.compile(r"^(?:torchrun|deepspeed|accelerate launch) .*?(?:-m|--module) (?=milora_)")
MENUS = ("milora_data", "milora_eval")
BIN = Path(sys.executable).parent


def launch_of(text: str) -> str | None:
    """How a launcher starts the command in several processes, and by which recipe; None without a launcher."""
    launcher, recipe = LAUNCHER.match(text), re.search(r"--recipe \S+", text)
    return launcher and launcher[0] + (recipe[0] if recipe else "")


def substituted(text: str) -> str:
    """The command with small things in the places of large ones."""
    for pattern, filled in LEFT_OPEN:
        text = re.sub(pattern, filled, text)
    for pattern, small in () if any(flag in text for flag in PLANS) else SUBSTITUTIONS:
        text = re.sub(pattern, small, text)
    return text


def in_one(text: str) -> str:
    """A launched command as one of one process, without DeepSpeed."""
    text = LAUNCHER.sub("python -m ", text)
    return re.sub(r" --deepspeed \S+", "", text) + " --deepspeed="


def in_two(text: str) -> str:
    """A launched command with two processes on this machine's CPU."""
    text = re.sub(r"(?<=--nproc_per_node )8|(?<=--num_gpus )8", "2", text)
    return text if "--use_cpu" in text else f"{text} --use_cpu True"


def module_and_arguments(text: str) -> tuple[str, list[str]]:
    """The module of ours that a command runs, and what it gets. A program that is only named is asked for its help."""
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
    """Run a program of ours in this process; AssertionError, with what it printed, where it does not end well."""
    module, arguments = module_and_arguments(text)
    target = None
    if ">" in arguments:
        at = arguments.index(">")
        target, arguments = arguments[at + 1], arguments[:at]
    found = import_module(module)
    main = found.main if hasattr(found, "main") else import_module(f"{module}.__main__").main
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), typing(typed):
        code = exit_code(main, arguments)
    assert code == 0, f"exit code {code}\n{out.getvalue()[-2000:]}{err.getvalue()[-4000:]}"
    if target:
        Path(target).write_text(out.getvalue())


def exit_code(main, arguments: list[str]) -> int:
    """The code that a program ends with."""
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
def typing(text: str) -> Iterator[None]:
    """Lines that a user types."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.StringIO(text))
        yield


def run_outside(text: str, folder: Path) -> None:
    """Run any command in a process of its own."""
    finish(start(text, folder))


def run_together(text: str, folder: Path) -> None:
    """Run a launcher; where its processes are on several machines, once for each, all here."""
    nodes = re.search(r"--nnodes (\d+)", text)
    for process in [start(text, folder) for _ in range(int(nodes[1]) if nodes else 1)]:
        finish(process)


def start(text: str, folder: Path) -> subprocess.Popen[str]:
    """A process that has started, with this environment's programs first."""
    env = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        words(text), cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen[str]) -> None:
    """AssertionError, with what was printed, where it does not end well."""
    printed, _ = process.communicate(timeout=900)
    assert process.returncode == 0, f"exit code {process.returncode}\n{printed[-6000:]}"


def flags_of(text: str) -> set[str]:
    """The flags that a program of ours declares."""
    module, arguments = module_and_arguments(text)
    name = next(name for name, its in MENU.modules.items() if its.removesuffix(".__main__") == module)
    return set(parser_of((name, arguments[0]) if name in MENU.menus else (name,)).flags())
