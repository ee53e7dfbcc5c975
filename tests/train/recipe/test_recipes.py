"""Every packaged recipe is read by the code it is for, says how it is run, and fits its model."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import llava_recipes
from milora_vl.common.errors import UserError
from milora_vl.models import base, names
from milora_vl.train.__main__ import main as train
from milora_vl.train.__main__ import parse
from milora_vl.train.counts import num_parameters
from milora_vl.train.settings import Recipe
from support.plans import fitted, settings

NAMES = llava_recipes.names()


def recipe(name: str) -> Recipe:
    return settings(["--recipe", name]).recipe


@pytest.mark.parametrize("name", NAMES)
def test_its_comment_is_a_command_that_parses(name: str) -> None:
    comment = [line[1:] for line in llava_recipes.read(name).splitlines() if line.startswith("#")]
    text = " ".join(comment).replace("\\", " ")
    command = re.search(r"-m milora_vl\.train ((?:--?\w\S* \S+\s*)+)", text)
    assert command, text
    request = parse(command[1].split())
    assert request.recipe == name
    assert request.output_dir


@pytest.mark.parametrize("name", NAMES)
def test_it_is_valid_and_known_by_name(name: str) -> None:
    assert recipe(name).model in {*names.NAMED_MODELS, *names.PART_OF}


@pytest.mark.parametrize("name", [name for name in NAMES if "smol" not in name])
def test_its_policy_fits_its_model(name: str) -> None:
    """On the meta device: no weights."""
    assert {target.tower for target in fitted(["--recipe", name]).targets} <= {"language", "projector"}


@pytest.mark.parametrize("name", NAMES)
def test_it_fits_devices_of_40_gib(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """On as many as its comment says, by the plan."""
    monkeypatch.chdir(tmp_path)
    devices = re.search(r"--nproc_per_node (\d+)", llava_recipes.read(name))
    words = ["--recipe", name, "--dry-run", "--gpu-memory", "40", "--devices", devices[1] if devices else "1"]
    with suppress(UserError):  # its data is not here
        train(words)
    assert "fits   40 GiB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("llama-2-7b", 6_738_415_616), ("llama-3-8b", 8_030_261_248), ("qwen2.5-7b", 7_615_616_512)],
)
def test_the_papers_text_models_have_their_sizes_without_a_network(name: str, parameters: int) -> None:
    """As their cards on the hub count them."""
    config = base.config_of(name)
    assert num_parameters(base.meta_model(config)) == parameters
    assert "vision_config" not in config.to_dict()


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("qwen2.5-vl-3b", 3_754_622_976), ("qwen2.5-vl-7b", 8_292_166_656), ("qwen3-vl-4b", 4_437_815_808),
        ("qwen3-vl-8b", 8_767_123_696), ("smolvlm2-500m", 507_482_304), ("smolvlm2-2.2b", 2_246_784_880),
        ("internvl3-2b", 2_088_957_440), ("gemma-3-4b", 4_300_079_472),
    ],
)  # fmt: skip
def test_vision_language_models_have_their_published_sizes_without_a_network(name: str, parameters: int) -> None:
    """As the weight files on the hub count them."""
    model = base.meta_model(base.config_of(name))
    assert num_parameters(model) == parameters
    assert {target.tower for target in fitted(["--model", name]).targets} == {"language", "projector"}


@pytest.mark.parametrize("name", ["milora-llava-1.5-7b", "milora-llava-1.5-13b", "milora-llava-v1.6-mistral-7b"])
def test_the_recipes_of_milora_train_what_the_default_trains(name: str) -> None:
    trained = fitted(["--recipe", name]).targets
    assert trained == fitted(["--model", str(recipe(name).model)]).targets
    settings_of = {(t.tower, t.method, t.rank, t.scaling, t.learning_rate, t.protect) for t in trained}
    rest = (1.0, 2e-4, 0.95)
    assert settings_of == {("language", "milora", 128, *rest), ("projector", "milora", 64, *rest)}


def test_the_recipe_of_lora_trains_as_many_numbers_on_the_same_data_at_the_same_rates() -> None:
    lora, ours = recipe("lora-llava-1.5-7b"), recipe("milora-llava-1.5-7b")
    assert (lora.data, lora.train) == (ours.data, ours.train)
    baseline, default = (fitted(["--recipe", f"{name}-llava-1.5-7b"]).targets for name in ("lora", "milora"))
    assert {(t.path, t.scaling, t.learning_rate, t.dropout) for t in baseline} == {
        (t.path, t.scaling, t.learning_rate, t.dropout) for t in default
    }
    for tower in ("language", "projector"):
        numbers = [sum(t.adapter_size for t in targets if t.tower == tower) for targets in (baseline, default)]
        assert numbers[0] == pytest.approx(numbers[1], rel=0.02)
