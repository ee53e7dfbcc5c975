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
from milora_eval.answers.questions import answer_key, plan_of
from milora_eval.benchmark import Item, content_of
from milora_eval.benchmarks.emoji import EmojiBenchmark
from milora_eval.registry import choose
from milora_eval.run_suite import settings
from support.drawn import draw
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


def test_renamed_pictures_and_a_shuffled_file_change_no_answer_comparison_or_selection(
    tiny_llava: Callable[..., Made], tmp_path: Path
) -> None:
    """Both models answer the questions as they are, then renamed, moved, shuffled and without ids."""
    output, colors = tmp_path / "run", ("red", "green", "blue")
    rows = [
        {"id": f"{n}", "image": f"{n}.png", "question": f"{color}?", "answer": "yes", "type": f"type {n % 2}"}
        for n, color in enumerate([*colors, *colors])
    ]
    moved = [{**row, "image": f"other/x{row['image']}", "id": None} for row in rows[::-1]]
    for folder, content in (("here", rows), ("there", moved)):
        for row, color in zip(rows, [*colors, *colors], strict=True):
            draw(tmp_path / folder / (str(row["image"]) if folder == "here" else f"other/x{row['image']}"), color)
        (tmp_path / folder / "own.json").write_text(json.dumps(content))
    base, tuned = tiny_llava(), tiny_llava(seed=1)

    def evaluate(made: Made, which: str, folder: str, limit: int | None = None) -> dict[str, Any]:
        chosen = choose(str(tmp_path / folder / "own.json"), data_dir=tmp_path / folder, run=output)
        plan, items = plan_of(chosen, tmp_path / folder, limit)
        return dict(evaluation.evaluate(*made, replace(plan, which=which), items, output) or {})

    numbers = ("benchmarks", "comparison", "predictions")
    results = []
    for folder in ("here", "there"):
        asked = [evaluate(base, "base", folder)["asked"], evaluate(tuned, "final", folder)["asked"]]
        results.append(evaluate(tuned, "final", folder))
        assert asked == ([3, 3] if folder == "here" else [0, 0])
    assert [path.name for path in (output / "eval").iterdir()] == ["own"]
    assert {name: results[0][name] for name in numbers} == {name: results[1][name] for name in numbers}
    assert results[0]["comparison"]["benchmarks"][0]["n"] == 6
    few = [evaluate(tuned, "final", folder, limit=2)["predictions"] for folder in ("here", "there")]
    assert few[0] == few[1]
    draw(tmp_path / "there" / "other" / "x0.png", "blue")
    assert evaluate(base, "base", "there")["asked"] == 1
