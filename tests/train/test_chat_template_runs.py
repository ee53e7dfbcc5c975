"""`--template chat_template` in every command: training, plan, chat, forgetting, export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer

from milora_data.encode.labels import encode
from milora_data.records.record import Turn
from milora_data.stream import load_records
from milora_vl import load_model
from milora_vl.chat.command import main as chat
from milora_vl.common.errors import DataError, UserError
from milora_vl.export.command import main as export
from milora_vl.forgetting import job
from milora_vl.forgetting.__main__ import main as forgetting
from milora_vl.models import loading
from milora_vl.models.generate import Prompt, generate, prompt_ids
from milora_vl.models.image_tokens import image_token_id, image_tokens
from milora_vl.train import data as run_data
from milora_vl.train.command import main
from support.chat_models import LLAVA_HF, TINY, record, write_picture_model, write_text_model
from support.plans import fitted
from support.problems import raises_code
from support.train_runs import losses, training


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_model(tmp_path_factory.mktemp("models") / "text")


@pytest.fixture(scope="module")
def picture_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_picture_model(tmp_path_factory.mktemp("models") / "pictures")


@pytest.fixture(scope="module")
def text_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records of text alone, of different lengths."""
    path = tmp_path_factory.mktemp("data") / "text.json"
    values = [record([("user", f"What is {n}?"), ("assistant", "One." + " And more." * (n % 5))]) for n in range(40)]
    path.write_text(json.dumps([value | {"id": str(number)} for number, value in enumerate(values)]))
    return path


def text_words(model: Path, data: Path, run: Path, *more: str) -> list[str]:
    text = ["--model", str(model), "--data_path", str(data), "--image_folder", str(data.parent)]
    return training(data.parent, run, *text, "--template", "chat_template", "--rank", "4", "--dropout", "0", *more)


@pytest.fixture(scope="module")
def text_run(text_model: Path, text_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "text"
    assert main(text_words(text_model, text_data, run)) == 0
    return run


def test_a_text_model_trains_and_resumes(text_run: Path, text_model: Path, text_data: Path, tmp_path: Path) -> None:
    assert AutoTokenizer.from_pretrained(text_run).chat_template == TINY
    half = shutil.copytree(text_run, tmp_path / "half")
    for step in (4, 6):
        shutil.rmtree(half / f"checkpoint-{step}")
    assert main(text_words(text_model, text_data, half, "--resume_from_checkpoint", "auto")) == 0
    assert losses(half) == losses(text_run)


@pytest.mark.parametrize("flags", [[], ["--packing"]])
def test_a_run_learns_and_counts_in_the_template_of_its_recipe(
    flags: list[str], text_model: Path, text_data: Path
) -> None:
    found = fitted(text_words(text_model, text_data, Path("run"), *flags))
    recipe, base, tokenizer = found.recipe, found.base, found.base.processor
    record = next(iter(load_records(text_data)))
    expected = encode(record, tokenizer, template="chat_template", image_token_id=-1)
    batch = run_data.collator(recipe, base, tokenizer)([record])
    assert batch["input_ids"][0].tolist() == expected.input_ids
    assert batch["labels"][0].tolist() == expected.labels
    assert run_data.lengths(recipe, run_data.collator(recipe, base, tokenizer), [record]) == (
        [len(expected.input_ids)] if flags else None
    )


@pytest.mark.parametrize(
    "how", [["--packing"], ["--train_sampling_strategy", "group_by_length"], ["--streaming"]], ids=lambda how: how[0]
)
def test_every_way_through_the_data_takes_it(how: list[str], text_model: Path, text_data: Path, tmp_path: Path) -> None:
    assert main(text_words(text_model, text_data, tmp_path / "run", *how, "--max_length", "256")) == 0


def test_the_trained_model_is_asked_with_the_same_prompts(
    text_run: Path, text_model: Path, tmp_path: Path, capsys: Any
) -> None:
    adapter = ["--model", str(text_model), "--adapter", str(text_run)]
    assert chat([*adapter, "--compare", "--max_new_tokens", "4", "What is 1?"]) == 0
    flags = ["--on", "samples", "--num_tokens", "300", "--output_dir", str(tmp_path / "forgotten")]
    assert forgetting([*adapter, *flags]) == 0
    assert export([str(text_run), "--to", "merged", "--output_dir", str(tmp_path / "merged")]) == 0
    assert "--template" not in capsys.readouterr().err  # the merged model has its template
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=True, return_dict=True, add_generation_prompt=True
    )["input_ids"]
    assert tokenizer.decode(ids) == "<s>[user] Hi</s>[assistant] "


def test_a_model_with_pictures_trains_and_is_asked(
    picture_model: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    more = ["--model", str(picture_model), "--template", "chat_template", "--rank", "4"]
    assert main(training(tiny_data, run, *more)) == 0
    assert AutoProcessor.from_pretrained(run).chat_template == LLAVA_HF
    adapter = ["--model", str(picture_model), "--adapter", str(run)]
    templates, answer_batches = [], job.answer_batches

    def recorded(*arguments: Any, **settings: Any) -> Any:
        templates.append(settings["template"])
        return answer_batches(*arguments, **settings)

    monkeypatch.setattr(job, "answer_batches", recorded)
    assert forgetting([*adapter, "--on", "pictures", "--limit", "4"]) == 0
    assert templates == ["chat_template"]
    picture = str(tiny_data / "images" / "0.png")
    assert chat([*adapter, "--image", picture, "--max_new_tokens", "4", "What is it?"]) == 0


@pytest.mark.parametrize("model", ["tiny", "tiny-text"])
def test_a_tokenizer_without_one_is_refused_before_weights_load(
    model: str, tiny_data: Path, text_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_weights(*_: Any, **__: Any) -> Any:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(loading, "load_weights", load_weights)
    data = ["--data_path", str(text_data)] if model == "tiny-text" else []
    flags = training(tiny_data, tmp_path / "run", "--model", model, "--template", "chat_template", "--rank", "4", *data)
    for more in ([], ["--dry-run"]):
        with pytest.raises(UserError) as error:
            main([*flags, *more])
        first = error.value.first
        assert (first.code, first.where) == ("template-missing", "--template")
        assert model in first.message
        assert "vicuna_v1" in first.hint
    with raises_code("template-missing", where="--template", message=model):
        main(["--model", model, "--template", "chat_template", "--rank", "4", "--dry-run"])
    assert not (tmp_path / "run").exists()


def test_a_template_that_refuses_the_records_is_found_before_weights_load(
    text_model: Path, text_data: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(text_model, tmp_path / "model")
    (model / "chat_template.jinja").write_text("{{ raise_exception('only cats may speak') }}")
    with raises_code("chat-template-refuses", where="text.json:record 1", kind=DataError):
        main(text_words(model, text_data, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_smol_llava_sees_pictures_in_its_own_template(tiny_data: Path, tmp_path: Path) -> None:
    more = ["--model", "smol-llava", "--template", "chat_template", "--rank", "4", "--max_steps", "1"]
    assert main(training(tiny_data, tmp_path / "run", *more)) == 0
    model, processor = load_model("smol-llava", adapter=tmp_path / "run")
    prompt = Prompt((Turn("user", "<image>\nWhat is it?"),), (Image.new("RGB", (32, 32), "red"),))
    image = image_token_id(model.config)
    ids = [
        prompt_ids(prompt, processor.tokenizer, name, image_token_id=image, image_tokens=image_tokens(model.config))
        for name in ("vicuna_v1", "chat_template")
    ]
    assert ids[0] == ids[1]
    with torch.inference_mode():
        assert generate(model, processor, [prompt], template="chat_template", max_new_tokens=4)
