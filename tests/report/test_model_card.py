"""The model card: readable by hubs, with scores that an evaluation puts in and everything else left as it was."""

from __future__ import annotations

import json
from pathlib import Path

import yaml
from huggingface_hub import ModelCard

from milora_vl.report import model_card
from milora_vl.train.recipe import Recipe

RECIPE = Recipe.parse(
    {"model": "tiny", "policy": [{"modules": "language", "method": "milora", "protect": 0, "rank": 4}]}
)


def test_the_front_matter_names_base_and_method(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    front = yaml.safe_load(model_card.render(tmp_path, RECIPE.model_dump()).split("---")[1])
    assert front["base_model"] == "tiny"
    assert front["library_name"] == "peft"
    assert front["tags"] == ["milora", "milora-vl"]


def test_the_front_matter_has_the_schema_of_the_hub(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "environment.json").write_text(json.dumps({"base": "llava-hf/llava-1.5-7b-hf"}))
    data = {"path": [{"path": "train.json"}, {"path": "hub:owner/set:train"}]}
    card = tmp_path / "README.md"
    card.write_text(model_card.render(tmp_path, {**RECIPE.model_dump(), "data": data}))
    front = ModelCard.load(card).data
    assert (front.base_model, front.license, front.datasets) == ("llava-hf/llava-1.5-7b-hf", "other", ["owner/set"])
    assert front.license_link == "https://huggingface.co/llava-hf/llava-1.5-7b-hf"
    assert front.eval_results is None
    results = tmp_path / "eval" / "emoji" / "final" / "results.json"
    results.parent.mkdir(parents=True)
    for value in (0.5, 0.537):
        score = {"name": "mean F1", "value": value, "unit": "fraction"}
        results.write_text(json.dumps({"benchmarks": [{"name": "emoji", "metrics": [score]}]}))
        model_card.update_scores(tmp_path)
    (found,) = ModelCard.load(card).data.eval_results or []
    assert (found.dataset_name, found.metric_type, found.metric_value) == ("emoji", "mean F1", 53.7)
    assert card.read_text().count("model-index") == 1


def test_the_card_names_layers_that_protect_less_than_their_rule(tmp_path: Path) -> None:
    for energy, is_named in ((0.96, False), (0.9123, True)):
        policy = {"targets": [{"path": "q", "protect": 0.95}], "protection": {"q": {"energy": energy}}}
        (tmp_path / "policy.json").write_text(json.dumps({**policy, "trainable": 1, "total": 9}))
        assert ("91.2 %" in model_card.render(tmp_path, RECIPE.model_dump())) is is_named


def test_scores_come_in_and_an_edited_card_stays_edited(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    card.write_text(model_card.render(tmp_path, RECIPE.model_dump()) + "\nMy own words.\n")
    assert "## Scores" not in card.read_text()
    table = tmp_path / "eval" / "emoji" / "final" / "table.md"
    table.parent.mkdir(parents=True)
    for value in ("61.2", "63.4"):
        table.write_text(f"| mean | {value} |")
        model_card.update_scores(tmp_path)
        assert card.read_text().count("## Scores") == 1
        assert f"| mean | {value} |" in card.read_text()
    assert card.read_text().endswith("\nMy own words.\n")
    base = tmp_path / "eval" / "emoji" / "base" / "table.md"
    base.parent.mkdir()
    base.write_text("| mean | 1.0 |")
    model_card.update_scores(tmp_path)
    assert "1.0" not in card.read_text()  # the tuned model's table tells the base's numbers too
    table.unlink()
    model_card.update_scores(tmp_path)
    assert "1.0" in card.read_text()
