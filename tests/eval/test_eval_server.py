"""`milora_eval run --server`: a real HTTP server answers, fails and dies; answers and tables are as of a local run.

Its equality with the local run is tested with the server of transformers, in tests/export/test_serving.py.
"""

from __future__ import annotations

import base64
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from milora_data.pictures.load import ImageError, load_image
from milora_eval.__main__ import main
from milora_eval.answers.served import PROBES, picture_url
from milora_eval.answers.store import read_lines
from milora_vl.common.errors import UserError
from support import chat_server, official_data
from support.chat_server import Answers, answer, answering
from support.eval_questions import write_questions
from support.problems import raises_code

NUM = 22  # questions of the fixture


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.02)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_questions(tmp_path_factory.mktemp("emoji"))


def run(address: str, data: Path, output: Path, *more: str, model: str = "mine") -> int:
    flags = ["--server", address, "--served_model", model, "--suite", "emoji", "--data", str(data)]
    return main(["run", *flags, "--output_dir", str(output), *more])


def folder(output: Path, model: str = "mine") -> Path:
    return output / "eval" / "emoji" / f"served-{model}"


def results(output: Path, model: str = "mine") -> dict[str, Any]:
    return dict(json.loads((folder(output, model) / "results.json").read_text()))


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an evaluation without faults; read it."""
    output = tmp_path_factory.mktemp("whole")
    with answering(Answers()) as address:
        assert run(address, data, output) == 0
    return output


def predictions(output: Path) -> bytes:
    return (folder(output) / "predictions.jsonl").read_bytes()


def test_answers_scores_and_table_are_stored_as_for_a_loaded_model(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = Answers()
    with answering(answers) as address:
        assert run(address, data, tmp_path, "--concurrency", "4") == 0
    shown = capsys.readouterr()
    found, lines = results(tmp_path), read_lines(folder(tmp_path) / "predictions.jsonl")
    assert (found["model"], found["asked"]) == ("mine", NUM)
    said = {json.dumps(body["messages"]): answer(body) for _, body in answers.asked[PROBES:]}
    assert sorted(line["prediction"] for line in lines) == sorted(text for text, _ in said.values())
    truncated = sum(reason == "length" for _, reason in said.values())
    assert found["benchmarks"][0]["truncated"] == truncated > 0
    assert f"truncated: {truncated} of {NUM} answers of served-mine to emoji, at 12 tokens" in shown.err
    assert "mean over types" in shown.out
    assert 1 < answers.most_at_once <= 4
    assert (folder(tmp_path) / "table.md").is_file()


def test_a_request_has_the_turns_the_picture_and_greedy_settings(data: Path, tmp_path: Path) -> None:
    answers = Answers()
    with answering(answers) as address:
        run(address, data, tmp_path)
    bodies = [body for _, body in answers.asked]
    settings = {"model": "mine", "temperature": 0, "frequency_penalty": 0, "max_tokens": 12}
    assert all({name: body[name] for name in settings} == settings for body in bodies)
    assert {"role": "user", "content": "Is red a color?"} in [body["messages"][0] for body in bodies]
    [turns] = [body["messages"] for body in bodies if _pixels(body) == (240, 240, 240) and len(body["messages"]) == 3]
    assert [turn["role"] for turn in turns] == ["user", "assistant", "user"]
    assert turns[0]["content"][1] == {"type": "text", "text": "What kind?"}
    assert [turn["content"] for turn in turns[1:]] == ["square", "And its color?"]


def _pixels(body: dict[str, Any]) -> Any:
    """Return the first pixel of the picture of a question."""
    content = body["messages"][0]["content"]
    if isinstance(content, str):
        return None
    file = base64.b64decode(content[0]["image_url"]["url"].partition(",")[2])
    return Image.open(io.BytesIO(file)).getpixel((0, 0))


def test_a_question_is_asked_again_after_503_429_and_a_dropped_connection(
    data: Path, tmp_path: Path, whole: Path
) -> None:
    answers = Answers(faults=(503, None, 429))
    with answering(answers) as address:
        assert run(address, data, tmp_path) == 0
    assert len(answers.asked) == PROBES + 4 * NUM
    assert predictions(tmp_path) == predictions(whole)


def test_a_server_that_dies_ends_the_run_and_the_same_command_continues(
    data: Path, tmp_path: Path, whole: Path
) -> None:
    with (
        answering(Answers(dies=PROBES + 9)) as address,
        raises_code("server-no-answer", where=address, hint="run the same command again") as error,
    ):
        run(address, data, tmp_path, "--concurrency", "3")
    assert error.value.exit_code == 1
    stored = read_lines(folder(tmp_path) / "predictions.jsonl")
    assert len(stored) == 9
    again = Answers()
    with answering(again) as address:
        assert run(address, data, tmp_path) == 0
    assert len(again.asked) == PROBES + NUM - 9
    assert predictions(tmp_path) == predictions(whole)


def test_a_model_that_was_exported_again_under_its_name_is_asked_again(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked() -> int:
        answers = Answers()
        with answering(answers) as address:
            assert run(address, data, tmp_path) == 0
        return len(answers.asked)

    assert (asked(), asked()) == (PROBES + NUM, PROBES)
    assert "nothing was asked: all 22 answers are stored already" in capsys.readouterr().err
    monkeypatch.setattr(chat_server, "WORDS", chat_server.WORDS[::-1])
    assert asked() == PROBES + NUM


def test_a_refused_question_is_named_with_the_servers_words_and_without_the_key(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "word-of-mine")
    answers = Answers(refuses="Is red a color?")
    with (
        answering(answers) as address,
        raises_code("server-refuses", where="benchmark emoji, question text_only-red", message="too long for") as error,
    ):
        run(address, data, tmp_path, "--concurrency", "1")
    assert error.value.exit_code == 1
    assert "word-of-mine" not in str(error.value)
    assert answers.headers[0]["authorization"] == "Bearer word-of-mine"
    assert len([body for _, body in answers.asked if "Is red a color?" in json.dumps(body)]) == 1
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"word-of-mine" in path.read_bytes()]


def test_pictures_travel_as_their_own_bytes_or_else_as_the_pixels_of_the_local_run(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (6, 8, 4), dtype=np.uint8)
    upright, turned = Image.Exif(), Image.Exif()
    upright[0x0112], turned[0x0112] = 1, 6
    for name, mode, more in (
        ("rgb.png", "RGB", {}),
        ("grey.jpg", "L", {}),
        ("upright.jpg", "RGB", {"exif": upright}),
        ("turned.jpg", "RGB", {"exif": turned}),
        ("alpha.png", "RGBA", {}),
        ("few.gif", "P", {}),
        ("plain.webp", "RGB", {"lossless": True}),
        ("print.jpg", "CMYK", {}),
    ):
        path = tmp_path / name
        Image.fromarray(noise).convert(mode).save(path, **more)
        kind, _, text = picture_url(str(path)).partition(";base64,")
        content = base64.b64decode(text)
        is_own = name in ("rgb.png", "grey.jpg", "upright.jpg")
        assert (content == path.read_bytes()) is is_own, name
        assert kind == ("data:image/jpeg" if is_own and name.endswith("jpg") else "data:image/png")
        read = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
        assert np.array_equal(read, np.asarray(load_image(path))), name
    (tmp_path / "cut.png").write_bytes((tmp_path / "rgb.png").read_bytes()[:60])
    with pytest.raises(ImageError, match=r"cut\.png"):
        picture_url(str(tmp_path / "cut.png"))


def test_a_prompt_without_a_template_goes_to_completions(tmp_path: Path) -> None:
    data = tmp_path / "data"
    official_data.mathematics(data)
    answers = Answers()
    flags = ["--served_model", "mine", "--benchmarks", "gsm8k", "--data", str(data), "--output_dir", str(tmp_path)]
    with answering(answers) as address:
        assert main(["run", "--server", address, *flags]) == 0
    assert {path for path, _ in answers.asked} == {"/v1/completions"}
    assert all(body["prompt"].endswith("Let's think step by step.") for _, body in answers.asked)


SERVED = "--server ADDRESS --served_model mine"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--server ADDRESS", ["--served_model: required", "it lists: mine"]),
        ("--server ADDRESS/v2 --served_model mine", ["/v1/v2/models: ", "404", "ends with /v1"]),
        ("--server http://127.0.0.1:9/v1 --served_model mine", ["127.0.0.1:9/v1/models: no server answers: "]),
        (f"{SERVED} --adapter a --dtype float32", ["2 problems", "--adapter", "--dtype"]),
        ("--model tiny --served_model mine --concurrency 2", ["2 problems", "--served_model", "--concurrency"]),
    ],
)
def test_a_mistake_is_a_few_lines_with_the_way_out(flags: str, words: list[str], data: Path, tmp_path: Path) -> None:
    asked = ["--suite", "emoji", "--data", str(data), "--output_dir", str(tmp_path / "out")]
    with answering(Answers()) as address, pytest.raises(UserError) as caught:
        main(["run", *flags.replace("ADDRESS", address).split(), *asked])
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert len(message.splitlines()) <= 7
    assert caught.value.exit_code == 2
    assert not (tmp_path / "out").exists()


def test_boxes_are_refused_before_a_question_because_their_numbers_depend_on_the_family(tmp_path: Path) -> None:
    Image.new("RGB", (48, 32)).save(tmp_path / "a.png")
    rows = [{"image": "a.png", "question": "Where is it?", "answer": "[1, 2, 3, 4]", "metric": "box"}]
    (tmp_path / "val.json").write_text(json.dumps(rows))
    flags = ["--benchmarks", str(tmp_path / "val.json"), "--output_dir", str(tmp_path / "out")]
    answers = Answers()
    with answering(answers) as address, raises_code("", message="asks for boxes"):
        main(["run", "--server", address, "--served_model", "mine", *flags])
    assert not [body for _, body in answers.asked if "Where" in json.dumps(body)]


def test_what_is_no_answer_is_said(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with answering(Answers(wrong="<html>busy</html>")) as address, raises_code("server-format", where=address):
        run(address, data, tmp_path)
    monkeypatch.setitem(sys.modules, "openai", None)
    with raises_code("package-missing", hint="'.[eval]'"):
        run("http://127.0.0.1:9/v1", data, tmp_path)
