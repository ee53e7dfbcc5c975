"""Chat in the terminal and on the page: answers, pictures, what is compared, and what is refused."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from milora_data.records.record import Turn
from milora_vl import apply_milora
from milora_vl.chat import __main__ as chat
from milora_vl.interop.load_model import load_model
from milora_vl.models.generate import Prompt, generate
from support.adapter_cases import move
from support.problems import raises_code

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def picture(tiny_data: Path) -> Path:
    return tiny_data / "images" / "0.png"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A trained-looking adapter for the tiny model: its answers differ from the base's."""
    from milora_vl import Policy, save_adapter

    model = apply_milora(
        load_model("tiny")[0], Policy.parse("[{modules: language, method: milora, protect: 0, rank: 8}]")
    )
    move(model, 1.0)
    save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter"


def ask(*words: str | Path) -> int:
    return chat.main(["--model", "tiny", "--max_new_tokens", "8", *map(str, words)])


def answer(question: str, *images: Path, folder: Path | None = None) -> str:
    model, processor = load_model("tiny", adapter=folder)
    turns = (Turn("user", "<image>\n" * len(images) + question),)
    return generate(model, processor, [Prompt(turns, images)], max_new_tokens=8)[0].text


def test_the_answer_alone_is_on_stdout_and_is_what_an_evaluation_gets(picture: Path, capsys: Captured) -> None:
    assert ask("--image", picture, "What colour is it?") == 0
    assert capsys.readouterr().out == answer("What colour is it?", picture) + "\n"


def test_pictures_and_videos_that_a_model_does_not_take_are_refused_before_its_weights_load(
    picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("milora_vl.chat.session.Chat.load", lambda _: pytest.fail("the weights load"))
    with raises_code("model-reads-only-text", where="--image", message="tiny-text"):
        chat.main(["--model", "tiny-text", "--image", str(picture)])
    Image.new("RGB", (20, 20)).save(tmp_path / "0.png")
    for model in ("tiny-text", "tiny"):
        with raises_code("record-videos", where="--video"):
            chat.main(["--model", model, "--video", str(tmp_path)])


def test_the_base_of_an_adapter_is_the_default_model(adapter: Path, tmp_path: Path, capsys: Captured) -> None:
    ask("--adapter", adapter, "What?")
    expected = capsys.readouterr().out
    assert chat.main(["--adapter", str(adapter), "--max_new_tokens", "8", "What?"]) == 0
    assert capsys.readouterr().out == expected
    with raises_code("flag-required", where="--model"):
        chat.main(["What?"])
    with raises_code("adapter-no-folder", where="--adapter"):
        chat.main(["--adapter", str(tmp_path / "none"), "What?"])
    (tmp_path / "stage1").mkdir()
    (tmp_path / "stage1" / "mm_projector.bin").touch()
    with raises_code("flag-required", where="--model", message="names no base"):
        chat.main(["--adapter", str(tmp_path / "stage1"), "What?"])


def test_a_truncated_answer_is_marked(picture: Path, capsys: Captured) -> None:
    ask("--image", picture, "What?")
    assert "(truncated at 8 tokens" in capsys.readouterr().err
    ask("--image", picture, "--format", "json", "What?")
    assert json.loads(capsys.readouterr().out) == {
        "question": "What?", "answer": answer("What?", picture), "truncated": True
    }  # fmt: skip


def test_compare_shows_both_answers(adapter: Path, picture: Path, capsys: Captured) -> None:
    ask("--adapter", adapter, "--image", picture, "--compare", "What is it?")
    base, tuned = answer("What is it?", picture), answer("What is it?", picture, folder=adapter)
    assert base != tuned
    assert capsys.readouterr().out == f"base   {base}\ntuned  {tuned}\n"


def test_a_conversation_remembers_until_it_is_reset(
    picture: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [f"/image {picture.parent}/9.png", f"/image {picture.parent}", f"/image {picture}"]
    typed = ["What?", "Why?", "/reset", "What?", "/imag", "/help", *images, "What?", "/quit", "never asked"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(typed)))
    assert ask() == 0
    out, err = capsys.readouterr()
    first, second, again, seen = out.splitlines()
    assert first == again == answer("What?")
    assert seen == answer("What?", picture)
    model, processor = load_model("tiny")
    turns = (Turn("user", "What?"), Turn("assistant", first), Turn("user", "Why?"))
    assert second == generate(model, processor, [Prompt(turns)], max_new_tokens=8)[0].text
    assert "unknown command /imag" in err
    assert err.count("/add FILE    show one more") == 2
    assert "9.png: no such picture" in err
    assert f"{picture.parent}: no such picture" in err


def test_prompt_and_pictures_are_those_of_the_training_also_with_a_checkpoint_of_it(
    adapter: Path, tmp_path: Path, capsys: Captured
) -> None:
    wide = tmp_path / "wide.png"
    Image.linear_gradient("L").rotate(90).resize((96, 32)).convert("RGB").save(wide)
    checkpoint = (tmp_path / "run" / "checkpoint-5").absolute()
    checkpoint.parent.mkdir()
    adapter.rename(checkpoint)
    said = {}
    for recipe in ("", "template: plain\n", "data: {image_aspect_ratio: plain}\n"):
        (checkpoint.parent / "recipe.yaml").write_text(recipe)
        ask("--adapter", checkpoint, "--image", wide, "What is it?")
        said[recipe] = capsys.readouterr().out
    model, processor = load_model("tiny", adapter=checkpoint)
    prompt = Prompt((Turn("user", "<image>\nWhat is it?"),), (wide,))
    for recipe, options in zip(said, ({}, {"template": "plain"}, {"image_aspect_ratio": "plain"}), strict=True):
        assert said[recipe].strip() == generate(model, processor, [prompt], max_new_tokens=8, **options)[0].text
    assert len(set(said.values())) == 3


@pytest.fixture(scope="module")
def trained_in_full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with other weights, as a full training saves it."""
    folder = tmp_path_factory.mktemp("full")
    model, processor = load_model("tiny")
    with torch.no_grad():
        for weight in model.model.language_model.parameters():
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)), alpha=0.3)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_a_model_trained_in_full_is_compared_with_its_base(
    trained_in_full: Path, picture: Path, capsys: Captured
) -> None:
    words = ["--model", str(trained_in_full), "--base", "tiny", "--image", str(picture), "--max_new_tokens", "8"]
    assert chat.main([*words, "--compare", "What is it?"]) == 0
    base = answer("What is it?", picture)
    model, processor = load_model(trained_in_full)
    prompt = Prompt((Turn("user", "<image>\nWhat is it?"),), (picture,))
    tuned = generate(model, processor, [prompt], max_new_tokens=8)[0].text
    assert base != tuned
    assert capsys.readouterr().out == f"base   {base}\ntuned  {tuned}\n"
    chat.main([*words, "--scale", "0", "What is it?"])
    assert capsys.readouterr().out == f"{base}\n"
    half, _ = load_model(trained_in_full, base="tiny", scale=0.5)
    (expected,) = generate(half, processor, [prompt], max_new_tokens=8)
    chat.main([*words, "--scale", "0.5", "What is it?"])
    assert capsys.readouterr().out == f"{expected}\n"


def test_an_adapter_that_cannot_be_switched_off_is_not_compared(tmp_path: Path) -> None:
    """PEFT trains the biases of the base itself: they stay."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules=["q_proj"], bias="lora_only")
    get_peft_model(load_model("tiny")[0], config).save_pretrained(str(tmp_path))
    with raises_code("", where="--compare", message="cannot be switched off"):
        ask("--adapter", tmp_path, "--compare", "What?")
