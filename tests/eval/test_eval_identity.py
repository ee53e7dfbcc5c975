"""An answer is reused only if everything that determines it is the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model

from milora_data.records.record import Turn
from milora_eval import run
from milora_eval import run_suite as evaluation
from milora_eval.answers.questions import answer_key
from milora_eval.benchmark import Item, content_of
from milora_eval.benchmarks.emoji import EmojiBenchmark
from milora_eval.run_suite import settings
from support.eval_questions import write_questions

Made = tuple[Any, Any]


def test_a_model_that_trained_on_is_asked_again(tiny_llava: Callable[..., Made], tmp_path: Path) -> None:
    (tmp_path / "own.json").write_text(json.dumps([{"question": "Color?", "answer": "x"}]))
    model, processor = tiny_llava()
    model = get_peft_model(model, LoraConfig(r=4, target_modules=r".*language_model.*q_proj"))

    def asked() -> int:
        results = run(model, processor, [str(tmp_path / "own.json")], data_dir=tmp_path, output_dir=tmp_path / "out")
        return int(results["asked"])

    factor = next(weight for name, weight in model.named_parameters() if "lora_B" in name)
    for change in (
        lambda: None,
        lambda: factor.data[-1, -1].add_(0.1),
        lambda: setattr(model.config, "vision_feature_layer", -1),
        lambda: setattr(model.generation_config, "repetition_penalty", 2.0),
    ):
        change()
        assert (asked(), asked()) == (1, 0)


@pytest.mark.parametrize("package", ["milora-vl", "transformers"])
def test_another_version_asks_again(
    package: str, tiny_llava: Callable[..., Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, known = settings(*tiny_llava(), "vicuna_v1", "pad"), version
    monkeypatch.setattr(evaluation, "version", lambda name: "0" if name == package else known(name))
    assert settings(*tiny_llava(), "vicuna_v1", "pad") != made


def test_the_key_covers_prompt_picture_and_every_setting(tiny_llava: Callable[..., Made], tmp_path: Path) -> None:
    benchmark = EmojiBenchmark()
    item = benchmark.load(write_questions(tmp_path))[0]
    made = settings(*tiny_llava(), "vicuna_v1", "pad")

    def key_of(settings: dict[str, Any], asked: Item) -> str:
        return answer_key(settings, benchmark, asked, content_of(asked))

    key = key_of(made, item)
    assert key_of(dict(made), item) == key
    others = [key_of(made | {name: "other"}, item) for name in made]
    others.append(key_of(made, replace(item, turns=(Turn("user", "<image>\nOther?"),))))
    Path(item.images[0]).write_bytes(b"another picture")
    others.append(key_of(made, item))
    assert len({key, *others}) == len(made) + 3


@pytest.mark.parametrize("change", ["template", "dtype", "aspect", "mean"])
def test_settings_tell_apart_what_changes_answers(tiny_llava: Callable[..., Made], change: str) -> None:
    def made(change: str) -> dict[str, Any]:
        model, processor = tiny_llava()
        if change == "dtype":
            model.bfloat16()
        if change == "mean":
            processor.image_processor.image_mean = [0.5, 0.5, 0.5]
        template = "plain" if change == "template" else "vicuna_v1"
        return settings(model, processor, template, "plain" if change == "aspect" else "pad")

    assert made("") == made("")
    assert made(change) != made("")
