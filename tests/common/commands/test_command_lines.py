"""All programs alike: help with examples, grouped flags that mean the same, mistakes, JSON, the next command."""

from __future__ import annotations

import argparse
import errno
import json
import shlex
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from milora_vl.__main__ import MENU, main
from milora_vl.common.cli.console import run
from milora_vl.common.cli.parser import CommandParser
from milora_vl.common.errors import UserError
from support import fake_run
from support.command_parsers import parser_of
from support.problems import raises_code
from support.stored_answers import write_answers

INNER = {name: import_module(MENU.modules[name]).MENU for name in MENU.menus}
PROGRAMS = [(name,) for name in MENU.modules if name not in INNER]
PROGRAMS += [(name, inner) for name, menu in INNER.items() for inner in menu.modules]
# Their flags are many, and Hugging Face's and LLaVA's: they have names of kinds for values, and their own groups.
OF_OTHERS = [("train",)]
LAUNCHERS = [("llava",), ("replace",)]  # what they run reports
Json = dict[str, Any]


@pytest.fixture(scope="module")
def parsers() -> dict[tuple[str, ...], CommandParser]:
    return {words: parser_of(words) for words in PROGRAMS}


def flags_of(parser: CommandParser) -> dict[str, argparse.Action]:
    return {flag: action for action in parser._actions for flag in action.option_strings if flag.startswith("--")}


@pytest.mark.parametrize("words", PROGRAMS, ids=" ".join)
def test_every_program_explains_itself(
    words: tuple[str, ...], parsers: dict[tuple[str, ...], CommandParser], capsys: pytest.CaptureFixture[str]
) -> None:
    parser = parsers[words]
    with pytest.raises(SystemExit, match="0"):
        main([*words, "--help"])
    text = capsys.readouterr().out
    assert text.startswith(f"usage: {parser.prog}")
    assert parser.prog.startswith("python -m milora_")
    examples = text.partition("examples:")[2]
    assert f"  {parser.prog} " in examples
    assert [action.dest for action in parser._actions if not action.help] == []
    grouped = {group.title: group._group_actions for group in parser._action_groups if group._group_actions}
    assert [action.dest for action in grouped.pop("options")] == ["help"]
    if words not in OF_OTHERS:
        assert set(grouped) <= {"input", "settings", "output"}
    assert ("--format" in flags_of(parser)) == (words not in LAUNCHERS)


@pytest.mark.parametrize("words", [words for words in PROGRAMS if words not in LAUNCHERS], ids=" ".join)
def test_a_mistyped_flag_is_helped_and_is_bad_usage(
    words: tuple[str, ...], parsers: dict[tuple[str, ...], CommandParser]
) -> None:
    with pytest.raises(UserError) as error:
        main([*words, *needed_arguments(parsers[words]), "--formt", "json"])
    assert error.value.exit_code == 2
    assert (error.value.first.code, error.value.first.where) == ("command-line", "--formt")
    assert "did you mean --format" in error.value.first.hint


@pytest.mark.parametrize("words", [words for words in PROGRAMS if words not in OF_OTHERS], ids=" ".join)
def test_an_output_folder_that_cannot_be_is_refused_before_any_work(
    words: tuple[str, ...], parsers: dict[tuple[str, ...], CommandParser], tmp_path: Path
) -> None:
    if "--output_dir" not in parsers[words].flags():
        return
    (tmp_path / "file").touch()
    with raises_code("path-not-a-folder", where="--output_dir", hint="use another folder"):
        main([*words, *needed_arguments(parsers[words]), "--output_dir", str(tmp_path / "file" / "out")])


def needed_arguments(parser: CommandParser) -> list[str]:
    needed: list[str] = []
    for action in parser._actions:
        if action.required and action.option_strings:
            needed += [action.option_strings[0], str(next(iter(action.choices or ["1"])))]
        elif action.required:
            needed.append("x")
    for group in parser._mutually_exclusive_groups:
        needed += [group._group_actions[0].option_strings[0], "x"] if group.required else []
    return needed


def test_one_list_names_every_program(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    listed = [line.split("  ")[1] for line in text.splitlines() if line.startswith("  ") and line[2:3].strip()]
    assert set(map(" ".join, PROGRAMS)) <= set(listed)
    assert len(listed) == len(set(listed))
    assert "exit codes: 0 done, 1 the run failed" in text


def said(capsys: pytest.CaptureFixture[str], *words: str) -> Json:
    """What a program prints with --format json; the command for the next step must parse."""
    assert main([*words, "--format", "json"]) in (0, 1)
    out, err = capsys.readouterr()
    line = next(line for line in err.splitlines() if line.startswith("next: "))
    module, *given = shlex.split(line.removeprefix("next: python -m "))
    name = next(own for own, its in MENU.modules.items() if its.removesuffix(".__main__") == module)
    target = (name, given.pop(0)) if name in INNER else (name,)
    parser_of(target).parse_args(given)
    return json.loads(out.splitlines()[-1] if words[0] == "train" else out)


@pytest.fixture
def answers(tmp_path: Path) -> tuple[str, str]:
    base = write_answers(tmp_path, "base", ["red", "no", "x", "y", "z", ""])
    return str(base), str(write_answers(tmp_path, "final", ["red", "yes", "green", "no", "blue", "no"]))


def test_looking_at_data_reports_json_and_the_next_command(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = [str(tiny_data / "train.json"), "--image_folder", str(tiny_data / "images")]
    assert said(capsys, "data", "check", *data)["records"] == 12
    assert said(capsys, "data", "show", *data)["id"] == "p0"
    assert said(capsys, "data", "show", *data, "--html", str(tmp_path / "page.html"))["records"] == 12
    assert said(capsys, "data", "show", *data, "--limit", "2", "--html", str(tmp_path / "two.html"))["records"] == 2
    assert "2 records, not all of the file, as training sees them" in (tmp_path / "two.html").read_text()
    made = said(capsys, "data", "convert", data[0], "--output_dir", str(tmp_path / "new"))
    assert made == {"file": str(tmp_path / "new" / "data.json"), "records": 12}


def test_looking_at_answers_reports_json_and_the_next_command(
    answers: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "quick" in said(capsys, "eval", "ls")["suites"]
    assert said(capsys, "eval", "score", answers[0])["which"] == "base"
    assert said(capsys, "eval", "compare", *answers)
    assert said(capsys, "eval", "view", *answers)["questions"] == 6
    run = fake_run.make_run(tmp_path / "trained")
    shutil.rmtree(run / "eval")
    assert said(capsys, "report", str(run)) == {
        "page": str(run / "report.html"),
        "summary": "Trained for 100 steps on 1,600 records; not evaluated yet.",
    }


def test_plans_and_lists_are_json_too(capsys: pytest.CaptureFixture[str]) -> None:
    for flag, key in (("--list-models", "llava-1.5-7b"), ("--list-recipes", "tiny-test")):
        assert main(["train", flag, "--format", "json"]) == 0
        assert key in json.loads(capsys.readouterr().out)
    assert main(["train", "--print-recipe", "tiny-test", "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == "tiny"
    assert main(["train", "--model", "tiny", "--rank", "4", "--dry-run", "--format", "json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["policy"][0]["modules"] == "language"


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "a.json/out"), 2, "error: a.json/out: Not a directory\n"),
        (PermissionError(errno.EACCES, "Permission denied", "/out"), 2, "error: /out: Permission denied\n"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "No space left on device\n"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), 1, "device (os error 28)\n"),
    ],
)
def test_a_place_that_cannot_be_written_is_a_line(
    error: Exception, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(argv: object) -> int:
        raise error

    with pytest.raises(SystemExit) as caught:
        run(broken)
    assert caught.value.code == code
    assert message in capsys.readouterr().err


def test_versions_are_listed(capsys: Any) -> None:
    assert main(["--version"]) == 0
    assert {"python", "milora-vl", "torch"} <= {line.split()[0] for line in capsys.readouterr().out.splitlines()}
