"""docs/contributing/add-a-*.md: applied to a copy of the packages, block by block, in the order of the page."""

from __future__ import annotations

import os
import re
import shutil
from itertools import groupby
from pathlib import Path

import pytest

from support import programs
from support.documented import ROOT, WORKED, blocks_of, name_of

COPIED = ("milora_vl", "llava_recipes", "data_tools", "eval", "tests", "docs/train.md", "pyproject.toml")
# Runs the lines of a shell block, in a fork that has the libraries but not our packages: it imports those of the copy.
# Python's modules run in this process: to import torch takes longer than all the rest.
RUNNER = """
import os, runpy, shlex, subprocess, sys
sys.path[:0] = os.environ["PYTHONPATH"].split(os.pathsep)
commands = sys.argv[1]
for line in commands.splitlines():
    words = shlex.split(line)
    print("$", line, flush=True)
    if words[0] == "milora":
        words = ["python", "-m", "milora_vl", *words[1:]]
    if words[:2] != ["python", "-m"]:
        subprocess.run(line.replace("python ", shlex.quote(sys.executable) + " "), shell=True, check=True)
        continue
    sys.argv = words[2:]
    try:
        runpy.run_module(words[2], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code:
            sys.exit(f"exit code {end.code}: {line}")
"""


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """What a reader who cloned the repository has, without git."""
    for name in COPIED:
        target = tmp_path / name
        target.parent.mkdir(exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, target)
    return tmp_path


def applied(page: str, folder: Path) -> str:
    """Write the files, apply the changes and run the commands of a page; return what the commands print."""
    printed = ""
    for is_shell, blocks in groupby(blocks_of(ROOT / page), key=lambda block: block.language == "bash"):
        if is_shell:  # one process for blocks between which no file changes
            printed += run("".join(block.text for block in blocks), folder)
            continue
        for block in blocks:
            first, _, rest = block.text.partition("\n")
            if block.language == "diff":
                change(folder, block.text)
            else:
                assert block.language == "python", f"{block} is neither a file, nor a change, nor commands"
                file = folder / first.removeprefix("# ")
                assert not file.exists(), f"{block} would replace {file.name}"
                file.write_text(rest, encoding="utf-8")
    return printed


def change(folder: Path, diff: str) -> None:
    """Apply the hunks of a change to one file; what a hunk expects must occur there once."""
    old, new, *lines = diff.splitlines()
    file = folder / new.removeprefix("+++ b/")
    assert old == new.replace("+++ b/", "--- a/")
    text = file.read_text(encoding="utf-8")
    for hunk in "\n".join(lines).split("@@\n")[1:]:
        rows = [(row[:1], row[1:] + "\n") for row in hunk.splitlines()]
        before, after = ("".join(row for mark, row in rows if mark != other) for other in ("+", "-"))
        assert text.count(before) == 1, f"{file.name} has {text.count(before)} times:\n{before}"
        text = text.replace(before, after)
    file.write_text(text, encoding="utf-8")


def run(commands: str, folder: Path) -> str:
    paths = (folder, folder / "data_tools", folder / "eval")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1", "COLUMNS": "160"}
    done = programs.run(["-c", RUNNER, commands], cwd=folder, env=env, timeout=900)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


def test_a_benchmark(copy: Path) -> None:
    printed = applied("docs/contributing/add-a-benchmark.md", copy)
    assert "**shades 1, official**" in printed  # the table
    assert "B - A = " in printed
    assert re.findall(r"^(\d+) passed, ", printed, re.MULTILINE) == ["6"]
    assert (copy / "runs" / "ocr" / "eval" / "ocrbench" / "base" / "table.md").is_file()


def test_every_page_has_a_test() -> None:
    assert tuple(name_of(page) for page in sorted((ROOT / "docs" / "contributing").glob("add-a-*.md"))) == WORKED
