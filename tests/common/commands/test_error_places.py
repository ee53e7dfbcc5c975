"""Errors of all commands say where the mistake is: the flag that has the value, or the file."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from milora_data.__main__ import main as data
from milora_eval.__main__ import main as evaluate
from milora_vl.chat.command import main as chat
from milora_vl.common.errors import UserError
from milora_vl.compose.__main__ import main as compose
from milora_vl.forgetting.__main__ import main as forgetting
from milora_vl.report.__main__ import main as report
from milora_vl.train import main as train
from support.problems import raises_code

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
        (compose, "--vision img --language nope --output_dir out", "model-unknown", "--language", "known:"),
        (compose, "--vision nope --language tiny-text --output_dir out", "model-unknown", "--vision", "known:"),
        (evaluate, "run --model tiny --suite emoij --output_dir out", "eval-unknown-suite", "--suite", "emoji"),
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
    monkeypatch.setattr("milora_vl.models.vision.hub_is_known", lambda: False)
    with raises_code("hub-unreadable", "hub:foo/bar", "the hub does not answer"):
        train([*RUN.split(), "--data_path", "hub:foo/bar"])
    pytest.importorskip("timm")
    with raises_code("model-not-available", "timm/vit_tiny_patch16_224", hint="--vision_weights"):
        compose("--vision timm/vit_tiny_patch16_224 --language tiny-text --output_dir out".split())
