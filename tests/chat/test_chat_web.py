"""What the page of `chat --web` shows, with real answers of a tiny model; the page itself where gradio is installed."""

from __future__ import annotations

import socket
from html import escape
from pathlib import Path

import pytest

from milora_data.pictures.files import load_image
from milora_data.records.record import Turn
from milora_vl.chat.command import main
from milora_vl.chat.session import Chat, ChatSettings
from milora_vl.chat.web import answers, free_port, page
from milora_vl.interop.adapters.load_model import load_model
from milora_vl.models.generate import Prompt, generate
from support.adapter_cases import move
from support.problems import raises_code

CUT = " (truncated at 6 tokens)"


@pytest.fixture
def settings() -> ChatSettings:
    return ChatSettings(model="tiny", max_new_tokens=6, device="cpu", dtype="float32")


def test_an_answer_grows_and_ends_as_an_evaluation_gets_it(settings: ChatSettings, tiny_data: Path) -> None:
    picture = load_image(tiny_data / "images" / "0.png")
    states = list(answers(Chat.load(settings), "What is it?", [picture], [], [[]]))
    model, processor = load_model("tiny")
    (expected,) = generate(
        model, processor, [Prompt((Turn("user", "<image>\nWhat is it?"),), (picture,))], max_new_tokens=6
    )
    turns, (log,) = states[-1]
    assert [turn.text for turn in turns] == ["<image>\nWhat is it?", expected]
    assert log == [
        {"role": "user", "content": "What is it?"},
        {"role": "assistant", "content": escape(expected) + CUT},
    ]
    assert len(states) > 2


def test_a_question_is_about_all_pictures_on_the_page(settings: ChatSettings, tiny_data: Path) -> None:
    pictures = [load_image(tiny_data / "images" / f"{number}.png") for number in range(2)]
    chat = Chat.load(settings)
    turns, logs = list(answers(chat, "Same?", pictures, [], [[]]))[-1]
    model, processor = load_model("tiny")
    asked = Turn("user", "<image>\n<image>\nSame?")
    (expected,) = generate(model, processor, [Prompt((asked,), tuple(pictures))], max_new_tokens=6)
    assert turns == [asked, Turn("assistant", expected)]
    turns, logs = list(answers(chat, "Sure?", pictures, turns, logs))[-1]
    assert turns[2].text == "Sure?"


def test_marks_in_a_question_are_places_of_the_pictures_on_the_page(settings: ChatSettings, tiny_data: Path) -> None:
    pictures = [load_image(tiny_data / "images" / f"{number}.png") for number in range(2)]
    chat = Chat.load(settings)
    turns, _ = list(answers(chat, "Is <image> like <image>?", pictures, [], [[]]))[-1]
    assert turns[0].text == "Is <image> like <image>?"
    with raises_code("prompt-image-count", message="2 <image> in the conversation, but 1 picture shown", hint="page"):
        list(answers(chat, "Is <image> like <image>?", pictures[:1], [], [[]]))


def test_a_second_question_goes_on_from_the_first(settings: ChatSettings) -> None:
    chat = Chat.load(settings)
    turns, logs = list(answers(chat, "What?", [], [], [[]]))[-1]
    turns, logs = list(answers(chat, "Why?", [], turns, logs))[-1]
    assert [turn.role for turn in turns] == ["user", "assistant"] * 2
    assert [message["content"].removesuffix(CUT) for message in logs[0]] == [escape(turn.text) for turn in turns]


def test_base_and_tuned_answer_the_same_conversation(settings: ChatSettings) -> None:
    from milora_vl import apply_milora

    chat = Chat.load(settings)
    chat.compare = True
    chat.model = apply_milora(chat.model, "[{modules: language, method: milora, protect: 0, rank: 8}]")
    move(chat.model, 1.0)
    turns, (base, tuned) = list(answers(chat, "What?", [], [], [[], []]))[-1]
    assert base[0] == tuned[0]
    assert base[1] != tuned[1]
    assert escape(turns[-1].text) + CUT == tuned[1]["content"]


def test_what_is_typed_is_no_html_on_the_page(settings: ChatSettings) -> None:
    question = "1 < 2 <img src=http://example.com/track.png>"
    turns, (log,) = list(answers(Chat.load(settings), question, [], [], [[]]))[-1]
    assert log[0]["content"] == escape(question)
    assert turns[0].text == question


def test_a_port_is_found_or_refused() -> None:
    assert free_port(0) > 0
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for port in (taken.getsockname()[1], 99999):
            with raises_code("port-taken", where="--port"):
                free_port(port)


def test_an_error_of_the_model_reaches_the_page(settings: ChatSettings) -> None:
    chat = Chat.load(settings)
    chat.template = "nonsense"
    with raises_code("template-unknown", message="template"):
        list(answers(chat, "What?", [], [], [[]]))


def test_the_page_is_built(settings: ChatSettings) -> None:
    pytest.importorskip("gradio")
    shown = str(page(Chat.load(settings), [], "<b>tiny").get_config_file())
    assert "&lt;b&gt;tiny" in shown
    assert "answers" in shown
    assert "picture" in shown


def test_mistakes_are_found_before_the_model_loads() -> None:
    with raises_code("flag-conflict", where="--web", message="takes no question"):
        main(["--model", "tiny", "--web", "What?"])
