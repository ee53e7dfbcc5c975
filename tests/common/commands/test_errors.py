"""Errors are data: problems with a code and a place, rendered once, and printed as JSON where a program asks for it."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path

import pytest

from milora_data.pictures.load import ImageError
from milora_vl.common.cli.console import run
from milora_vl.common.errors import DataError, Problem, UserError, render, with_context
from milora_vl.train import main as train

RULES = "[{modules: langauge, method: milora, protect: 0, rank: 4}, {modules: projector, method: full, rank: 3}]"


def test_a_problem_reads_place_message_and_hint() -> None:
    assert str(Problem("missing", "x", "policy[0].rank", "for example 8")) == "policy[0].rank: missing\nfor example 8"
    assert str(UserError("no such file", hint="name another")) == "no such file\nname another"


def test_several_problems_are_counted_and_hints_stand_below_their_own() -> None:
    text = render([Problem("a", hint="do b"), Problem("c", where="my.yaml: x")], "my.yaml")
    assert text.splitlines() == ["2 problems in my.yaml:", "a", "  do b", "x: c"]


@pytest.mark.parametrize(
    "error",
    [
        DataError("broken", code="record-broken", where="a.json:7"),
        ImageError("cannot read it: empty", "empty", code="image-unreadable", where="a.png"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_crosses_a_process_border_with_its_problems(error: UserError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))


@pytest.mark.parametrize("words", [["--format", "json"], ["--format=json"]])
def test_problems_are_data_on_stdout_with_format_json(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = ["--model", "tiny", "--policy", RULES, "--dry-run", *words, "--output_dir", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", ["train", *arguments])
    with pytest.raises(SystemExit) as ended:
        run(train)
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert ended.value.code == found["exit_code"] == 2
    places = {problem["where"]: problem["code"] for problem in found["problems"]}
    assert places == {
        "policy[0].modules in --policy": "policy-no-match",
        "policy[1].rank in --policy": "policy-unused-field",
    }
    assert err.startswith("error: 2 problems:")


def test_context_keeps_the_class_and_its_attributes() -> None:
    error = ImageError("cannot read this picture: empty", "empty", code="image-unreadable", where="a.png", hint="copy")
    placed = with_context(error, "train.json:3", hint="or skip it")
    assert (type(placed), placed.reason, placed.exit_code) == (ImageError, "empty", 2)
    assert placed.problems == (
        Problem("cannot read this picture: empty", "image-unreadable", "train.json:3: a.png", "copy\nor skip it"),
    )
    assert str(placed) == "train.json:3: a.png: cannot read this picture: empty\ncopy\nor skip it"
    assert error.first.where == "a.png"
