"""What the page of `chat --web` shows, with real answers of a tiny model; the page itself where gradio is installed."""

from __future__ import annotations

from argparse import Namespace
from html import escape
from pathlib import Path
from typing import Any

import pytest

from milora_data.pictures.load import load_image
from milora_data.records.record import Turn
from milora_vl import apply_milora
from milora_vl.chat.__main__ import COMMAND, main
from milora_vl.chat.session import Chat, page, page_answers
from milora_vl.interop.load_model import load_model
from milora_vl.models.generate import Prompt, generate
from support.adapter_cases import move
from support.problems import raises_code

CUT = " (truncated at 6 tokens)"
Message = dict[str, Any]


@pytest.fixture
def options() -> Namespace:
    options = COMMAND.parse(["--model", "tiny", "--max_new_tokens", "6", "--device", "cpu", "--dtype", "float32"])
    assert isinstance(options, Namespace)
    return options


def expected(*texts: str, images: tuple[Path, ...] = ()) -> str:
    model, processor = load_model("tiny")
    turns = tuple(Turn(("user", "assistant")[number % 2], text) for number, text in enumerate(texts))
    return str(generate(model, processor, [Prompt(turns, tuple(map(load_image, images)))], max_new_tokens=6)[0])


def shown(message: str, files: list[str], answers: list[Message]) -> list[Message]:
    """The messages of one question as the page keeps them."""
    parts = [{"type": "file", "file": {"path": file}} for file in files]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": message}]}, *answers]


def test_an_answer_grows_and_ends_as_an_evaluation_gets_it(options: Namespace, tiny_data: Path) -> None:
    picture = tiny_data / "images" / "0.png"
    states = list(page_answers(Chat.load(options), "What is it?", [str(picture)], []))
    wanted = expected("<image>\nWhat is it?", images=(picture,))
    assert states[-1] == [{"role": "assistant", "content": escape(wanted) + CUT}]
    assert len(states) > 2


def test_a_second_question_goes_on_from_the_first_and_is_about_all_pictures(
    options: Namespace, tiny_data: Path
) -> None:
    files = [tiny_data / "images" / f"{number}.png" for number in range(3)]
    names, chat = [str(file) for file in files], Chat.load(options)
    first = list(page_answers(chat, "Is <image> like <image>?", names[:2], []))[-1]
    second = list(page_answers(chat, "Sure?", names[2:], shown("Is <image> like <image>?", names[:2], first)))[-1]
    answer = expected("Is <image> like <image>?", images=(files[0], files[1]))
    wanted = expected("Is <image> like <image>?", answer, "<image>\nSure?", images=tuple(files))
    assert second == [{"role": "assistant", "content": escape(wanted) + CUT}]
    plain = [{"role": "user", "content": [{"path": name} for name in names[:2]] + ["Is <image> like <image>?"]}]
    assert list(page_answers(chat, "Sure?", names[2:], [*plain, *first]))[-1] == second  # as the API has it
    with raises_code("", message="2 <image> in the conversation, but 1 picture shown", hint="page"):
        list(page_answers(chat, "Is <image> like <image>?", names[:1], []))


def test_base_and_tuned_answer_the_conversation_with_the_tuned_model(options: Namespace) -> None:
    chat = Chat.load(options)
    chat.compare = True
    chat.model = apply_milora(chat.model, "[{modules: language, method: milora, protect: 0, rank: 8}]")
    move(chat.model, 1.0)
    base, tuned = (message["content"] for message in list(page_answers(chat, "What?", [], []))[-1])
    assert base == f"base model: {escape(expected('What?'))}{CUT}"
    chat.compare = False
    (alone,) = list(page_answers(chat, "What?", [], []))[-1]
    assert tuned == f"fine-tuned: {alone['content']}"
    (second,) = list(page_answers(chat, "Why?", [], shown("What?", [], [alone])))[-1]
    chat.compare = True
    both = [{"role": "assistant", "content": text} for text in (base, tuned)]
    again = list(page_answers(chat, "Why?", [], shown("What?", [], both)))[-1]
    assert again[1]["content"] == f"fine-tuned: {second['content']}"


def test_an_error_of_the_model_reaches_the_page(options: Namespace) -> None:
    chat = Chat.load(options)
    chat.template = "nonsense"
    with raises_code("template-unknown", message="template"):
        list(page_answers(chat, "What?", [], []))


def test_the_page_is_built(options: Namespace, tiny_data: Path) -> None:
    pytest.importorskip("gradio")
    picture = tiny_data / "images" / "0.png"
    site = str(page(Chat.load(options), [picture], "<b>tiny").get_config_file())
    assert "&lt;b&gt;tiny" in site
    assert "0.png" in site


def test_mistakes_are_found_before_the_model_loads() -> None:
    with raises_code("flag-conflict", where="--web", message="takes no question"):
        main(["--model", "tiny", "--web", "What?"])
