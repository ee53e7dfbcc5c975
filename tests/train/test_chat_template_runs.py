"""`--template chat_template` in every command: training, plan, chat, forgetting, export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from milora_data.encode.labels import encode
from milora_data.stream import load_records
from milora_vl.chat.__main__ import main as chat
from milora_vl.common.errors import UserError
from milora_vl.export.__main__ import main as export
from milora_vl.forgetting.__main__ import main as forgetting
from milora_vl.train import data as run_data
from milora_vl.train import launch
from milora_vl.train.__main__ import main
from support.chat_models import TINY, record, write_text_model
from support.plans import fitted
from support.problems import raises_code
from support.train_runs import losses, training


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_model(tmp_path_factory.mktemp("models") / "text")


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


def test_the_trained_model_is_asked_with_the_same_prompts(
    text_run: Path, text_model: Path, tmp_path: Path, capsys: Any
) -> None:
    adapter = ["--model", str(text_model), "--adapter", str(text_run)]
    assert chat([*adapter, "--compare", "--max_new_tokens", "4", "What is 1?"]) == 0
    flags = ["--on", "text", "--num_tokens", "300", "--output_dir", str(tmp_path / "forgotten")]
    assert forgetting([*adapter, *flags]) == 0
    assert export([str(text_run), "--to", "merged", "--output_dir", str(tmp_path / "merged")]) == 0
    assert "--template" not in capsys.readouterr().err  # the merged model has its template
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=True, return_dict=True, add_generation_prompt=True
    )["input_ids"]
    assert tokenizer.decode(ids) == "<s>[user] Hi</s>[assistant] "


@pytest.mark.parametrize("model", ["tiny", "tiny-text"])
def test_a_tokenizer_without_one_is_refused_before_weights_load(
    model: str, tiny_data: Path, text_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_weights(*_: Any, **__: Any) -> Any:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(launch, "load_weights", load_weights)
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
