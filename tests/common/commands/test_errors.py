"""Errors are data: problems with a code and a place, rendered once, and printed as JSON where a program asks for it."""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from milora_data.__main__ import main as data
from milora_data.pictures.load import ImageError
from milora_eval.__main__ import main as evaluate
from milora_vl.__main__ import main
from milora_vl.chat.__main__ import main as chat
from milora_vl.common.cli.console import run
from milora_vl.common.errors import DataError, Problem, UserError, render, with_context
from milora_vl.compose import main as compose
from milora_vl.forgetting.__main__ import main as forgetting
from milora_vl.report.__main__ import main as report
from milora_vl.train.__main__ import main as train
from support.problems import raises_code

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


Main = Callable[[Sequence[str]], int]

RUN = "--model tiny --device cpu --rank 4 --output_dir out"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: eight records, an empty folder `img` and recipes with a mistake."""
    turns = [{"from": "human", "value": "How much is 1 and 1?"}, {"from": "gpt", "value": "2"}]
    (tmp_path / "train.json").write_text(json.dumps([{"id": str(i), "conversations": turns} for i in range(8)]))
    picture = [{"id": "0", "question": "What is it?", "answer": "a cat", "image": "cat.png"}]
    (tmp_path / "questions.json").write_text(json.dumps(picture))
    (tmp_path / "img").mkdir()
    (tmp_path / "cut.json").write_text('[{"id": "0", "conversations": [')
    (tmp_path / "bad").mkdir()
    (tmp_path / "model.yaml").write_text("data: {path: train.json}\nmodel: tinny\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("main", "words", "code", "where", "hint"),
    [
        (train, RUN.replace("tiny", "tinny"), "model-unknown", "--model", "did you mean: tiny"),
        (train, "--recipe model.yaml --output_dir out", "model-unknown", "model in model.yaml", "tiny"),
        (train, f"{RUN} --recipe img", "recipe-unknown", "--recipe", "recipes:"),
        (train, "--print_recipe nope", "recipe-unknown", "--print_recipe", "recipes:"),
        (train, f"{RUN} --data_path train.json --image_folder igm", "path-missing", "--image_folder", "did you mean"),
        (chat, "--model tinny What", "model-unknown", "--model", "did you mean: tiny"),
        (chat, "--model tiny --template vicuna What", "template-unknown", "--template", "vicuna_v1"),
        (chat, "--model tiny --compare What", "flag-needs-another", "--compare", "--base MODEL"),
        (chat, "--model tiny --image img/a.png What", "", "img/a.png", "check the path"),
        (compose, "--vision img --language nope --output_dir out", "model-unknown", "--language", "known:"),
        (compose, "--vision nope --language tiny-text --output_dir out", "model-unknown", "--vision", "known:"),
        (evaluate, "run --model tiny --suite emoij --output_dir out", "eval-unknown-suite", "--suite", "emoji"),
        (evaluate, "run --model tiny --suite refcoco --output_dir out", "", "--suite", "other-suites"),
        (evaluate, "run --model tiny --benchmarks train.json --shard 3/2 --output_dir out", "", "--shard", "1/4"),
        (evaluate, "run --model tiny --benchmarks popee --output_dir out", "eval-unknown-benchmark", "--benchmarks",
         "did you mean pope"),
        (evaluate, "run --model tiny --benchmarks train.json --template vicuna --output_dir out", "template-unknown",
         "--template", "vicuna_v1"),
        (evaluate, "run --model tiny --benchmarks questions.json --output_dir out", "benchmark-missing-pictures",
         "--data", "--data FOLDER"),
        (evaluate, "ls --data nope", "path-missing", "--data", "check the path"),
        (evaluate, "ls --data train.json", "path-not-a-folder", "--data", "name a folder"),
        (evaluate, "view nope", "path-missing", "nope", "check the path"),
        (data, "check train.json --image_folder igm", "path-missing", "--image_folder", "did you mean img?"),
        (forgetting, "--model bad --base tiny --on text --text nope.txt", "data-missing-file", "--text", "check"),
    ],
)  # fmt: skip
def test_an_error_has_the_place_of_the_mistake(main: Main, words: str, code: str, where: str, hint: str) -> None:
    with raises_code(code, hint=hint) as error:
        main(words.split())
    assert error.value.first.where == where
    assert "' object " not in error.value.first.message  # no texts of Python's own errors


def test_a_damaged_run_is_named(folder: Path) -> None:
    (folder / "bad" / "trainer_state.json").write_text('{"log_history": 3}')
    with raises_code("run-folder-damaged", "bad", hint="move the damaged one away"):
        report(["bad"])


def test_a_base_that_cannot_be_loaded_is_named_by_its_own_flag(folder: Path) -> None:
    (folder / "text.json").write_text(json.dumps([{"id": "0", "question": "1 + 1?", "answer": "2"}]))
    with pytest.raises(UserError) as error:
        evaluate("run --model tiny --base nothere/x --benchmarks text.json --output_dir out --device cpu".split())
    assert error.value.first.code.startswith("model-")
    assert error.value.first.where.startswith("--base")


def test_the_hub_is_not_waited_for_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("milora_data.formats.stored.hub_is_known", lambda: False)
    monkeypatch.setattr("milora_vl.models.loading.hub_is_known", lambda: False)
    with raises_code("hub-unreadable", "hub:foo/bar", "the hub does not answer"):
        train([*RUN.split(), "--data_path", "hub:foo/bar"])
    pytest.importorskip("timm")
    with raises_code("model-not-available", "timm/vit_tiny_patch16_224", hint="--vision_weights"):
        compose("--vision timm/vit_tiny_patch16_224 --language tiny-text --output_dir out".split())


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [([], "", "no program given"), (["trian"], "", "did you mean train")],
)
def test_a_wrong_name_is_helped(words: list[str], code: str, said: str) -> None:
    with raises_code(code, says=said):
        main(words)


def test_the_console_script_is_installed() -> None:
    (script,) = [entry for entry in entry_points(group="console_scripts") if entry.name == "milora"]
    assert script.load() is import_module("milora_vl.__main__").console
