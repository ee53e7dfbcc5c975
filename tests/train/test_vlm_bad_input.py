"""Bad input to `train`, `chat` and `milora_eval run` of vision-language models: a message before weights load.

The model folders have a config and a processor, and no weights: an error that needs weights would be another one.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from milora_eval.__main__ import main as evaluate
from milora_vl.chat.__main__ import main as chat
from milora_vl.common.errors import UserError
from milora_vl.train.__main__ import main as train
from support.problems import raises_code
from support.versions import needs_spans
from support.vlm_families import model_of, processor_of
from support.vlm_runs import record, write_pictures

pytestmark = [pytest.mark.filterwarnings("ignore"), needs_spans]
NAMES = ("qwen2_5_vl", "gemma3", "idefics3", "mllama")
PICTURE_TOKENS = {
    "qwen2_5_vl": "<|image_pad|>",
    "gemma3": "<start_of_image>",
    "idefics3": "<image>",
    "mllama": "<|image|>",
}
ASKED = [("human", "<image>\nWhat?"), ("gpt", "A cat.")]


@pytest.fixture(scope="module", params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return without_weights(name, tmp_path_factory.mktemp(name))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("data") / "images")


def without_weights(name: str, folder: Path, template: str | None = "") -> Path:
    """Write the config and the processor of a tiny model; `template` replaces its own, None removes it."""
    processor = processor_of(name)
    model_of(name, processor).config.save_pretrained(folder)
    if template != "":
        processor.chat_template = template
    processor.save_pretrained(folder)
    return folder


def trained(model: Path, images: Path, value: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "train.json"
    file.write_text(json.dumps([value]))
    words = ["--model", model, "--data_path", file, "--image_folder", images, "--rank", "2", "--device", "cpu"]
    train([*map(str, words), "--max_steps", "1", "--output_dir", str(tmp_path / "run")])


def asked(model: Path, images: Path, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    file = tmp_path / "own.json"
    file.write_text(json.dumps(rows))
    words = ["run", "--model", model, "--benchmarks", file, "--output_dir", tmp_path / "out", "--data", images]
    words += ["--device", "cpu"]
    evaluate(list(map(str, words)))


@pytest.mark.parametrize(
    ("turns", "pictures", "code"),
    [
        ([("human", "<image>\n<image>\nSame?"), ("gpt", "No.")], ["0.png"], "data-broken-records"),
        ([("human", "<image>\nWhat?"), ("gpt", "A cat.")], ["0.png", "1.png"], "data-broken-records"),
        (ASKED, ["data:image/png;base64,%%%"], "image-unreadable"),
        (ASKED, ["data:image/png;base64," + base64.b64encode(b"no picture").decode()], "image-unreadable"),
    ],
    ids=["more marks", "more pictures", "no base64", "no picture"],
)
def test_a_record_that_does_not_fit_is_named_with_its_file(
    turns: Any, pictures: list[str], code: str, model: Path, images: Path, tmp_path: Path
) -> None:
    with raises_code(code, says=r"train\.json.*\b1\b"):
        trained(model, images, record(turns, pictures), tmp_path)


def test_a_token_of_pictures_in_a_text_is_named(name: str, model: Path, images: Path, tmp_path: Path) -> None:
    token = PICTURE_TOKENS[name]
    if token == "<image>":
        return  # it is the mark of a picture
    value = record([("human", f"What is {token}?"), ("gpt", "A token.")], [])
    with raises_code("record-image-token-in-text", says=r"train\.json:record 1"):
        trained(model, images, value, tmp_path)
    rows = [{"question": "Hi?", "answer": "Yes."}, {"question": f"What is {token}?", "answer": "A token."}]
    with raises_code("record-image-token-in-text", where="own.json, question 2"):
        asked(model, images, rows, tmp_path)


def test_a_video_for_a_template_or_processor_without_videos_is_named(model: Path, images: Path, tmp_path: Path) -> None:
    value = {"videos": [["0.png", "0.png"]]} | record([("human", "<video>\nWhat?"), ("gpt", "A cat.")], [])
    with pytest.raises(UserError, match="train.json:record 1") as error:
        trained(model, images, value, tmp_path)
    assert error.value.first.code in ("record-videos", "chat-template-no-pictures")


def test_a_processor_without_a_template_is_refused(name: str, images: Path, tmp_path: Path) -> None:
    model = without_weights(name, tmp_path / "model", None)
    with raises_code("processor-no-chat-template", hint="chat_template.jinja"):
        trained(model, images, record(ASKED, ["0.png"]), tmp_path)
    with raises_code("processor-no-chat-template"):
        asked(model, images, [{"question": "Hi?", "answer": "Yes."}], tmp_path)
    with raises_code("processor-no-chat-template"):
        chat(["--model", str(model), "What?"])


def words_of(model: Path, images: Path, tmp_path: Path, values: list[dict[str, Any]]) -> list[str]:
    """Return the command of a run with these records."""
    file = tmp_path / "train.jsonl"
    file.write_text("\n".join(map(json.dumps, values)))
    words = ["--model", model, "--data_path", file, "--image_folder", images, "--rank", "2", "--device", "cpu"]
    return [*map(str, words), "--max_steps", "1", "--output_dir", str(tmp_path / "run")]


def test_what_a_template_rejects_is_found_in_every_record(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = without_weights("internvl", tmp_path / "internvl")
    value = record([("human", "What is <IMG_CONTEXT>?"), ("gpt", "A token.")], [])
    with raises_code("record-image-token-in-text", "train.jsonl:151"):
        train(words_of(model, images, tmp_path, [record(ASKED, ["0.png"])] * 150 + [value]))
    model = without_weights("paligemma", tmp_path / "model")  # it takes one question and one answer
    more = [*ASKED, ("human", "Sure?"), ("gpt", "Yes.")]
    words = words_of(model, images, tmp_path, [record(ASKED, ["0.png"])] * 150 + [record(more, ["0.png"])])
    for flags in ([], ["--dry-run"]):
        with raises_code("record-not-one-question", "train.jsonl:151"):
            train([*words, *flags])
    assert "loading" not in capsys.readouterr().err
