"""`--adapter`: a finished adapter trains further, from where it stopped, with its own schedule."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from milora_vl import apply_milora, load_adapter, load_model, save_adapter
from milora_vl.forgetting.measure import Probe
from milora_vl.train.__main__ import main
from support.drawn import write_tiny_data
from support.plans import plan
from support.problems import raises_code
from support.train_runs import losses, read_json, training

MIXED = (
    "[{modules: language, method: milora, rank: 4, protect: 0.5, learning_rate: 0.002, dropout: 0.1}, "
    "{modules: vision.q_proj, method: lora, rank: 2}, {modules: projector, method: full, learning_rate: 0.003}]"
)
POLICIES = {
    "milora": ["--rank", "4", "--protect", "0"],
    "protected": ["--rank", "4"],
    "lora": ["--rank", "4", "--method", "lora"],
    "mixed": ["--policy", MIXED],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, tiny_records: list[dict[str, Any]]) -> Path:
    return write_tiny_data(tmp_path_factory.mktemp("continued") / "data", tiny_records)


def evaluated(data: Path, run: Path, *more: str) -> list[str]:
    """A command line that evaluates before the first step and after the last one."""
    held_out = ["--eval_data_path", str(data / "train.json"), "--eval_strategy", "steps", "--eval_steps", "6"]
    return [*training(data, run, *held_out, "--eval_on_start", "True", "--save_strategy", "no", *more)]


def held_out_losses(run: Path) -> list[float]:
    return [entry["eval_loss"] for entry in read_json(run, "trainer_state.json")["log_history"] if "eval_loss" in entry]


@pytest.fixture(scope="module")
def first(data: Path) -> Path:
    """A finished run, to be read alone."""
    run = data.parent / "first"
    assert main(evaluated(data, run, *POLICIES["milora"])) == 0
    return run


@pytest.mark.filterwarnings("ignore:too little calibration")
@pytest.mark.parametrize("name", POLICIES)
def test_the_second_training_starts_where_the_first_one_ended(name: str, data: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert main(evaluated(data, one, *POLICIES[name])) == 0
    assert main(evaluated(data, two, "--adapter", str(one))) == 0
    before, after = held_out_losses(one), held_out_losses(two)
    assert before[0] > before[-1] == after[0] > after[-1]
    rates = [e["learning_rate"] for e in read_json(two, "trainer_state.json")["log_history"] if "learning_rate" in e]
    assert rates[0] == max(rates) > rates[-1]  # a new schedule
    policies = [yaml.safe_load((run / "recipe.yaml").read_text())["policy"] for run in (one, two)]
    assert policies[0] == policies[1]


def test_forgetting_is_measured_against_the_untouched_base(data: Path, first: Path, tmp_path: Path) -> None:
    """A rate of next to nothing leaves the forgetting of the first training."""
    still = ["--learning_rate", "1e-12", "--mm_projector_lr", "1e-12", "--max_steps", "1", "--forgetting_every", "1"]
    assert main(training(data, tmp_path / "still", "--adapter", str(first), *still)) == 0
    log = read_json(tmp_path / "still", "trainer_state.json")["log_history"]
    [forgotten] = [entry["forgetting"] for entry in log if "forgetting" in entry]
    tuned = load_adapter(load_model("tiny")[0], first)
    base, processor = load_model("tiny")
    assert forgotten == pytest.approx(Probe(base, processor).measure(tuned, nullcontext)["forgetting"], rel=1e-3)
    assert forgotten > 0


def test_a_killed_second_training_resumes_to_the_same_weights(data: Path, first: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main(training(data, whole, "--adapter", str(first))) == 0
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoint-6")
    for name in ("adapter_model.safetensors", "trainer_state.json"):
        (cut / name).unlink()
    assert main(["--recipe", str(cut), "--output_dir", str(cut), "--resume_from_checkpoint", "true"]) == 0
    assert losses(cut) == losses(whole)
    weights = [load_file(run / "adapter_model.safetensors") for run in (whole, cut)]
    assert all(tensor.equal(weights[1][name]) for name, tensor in weights[0].items())
    assert yaml.safe_load((cut / "recipe.yaml").read_text())["adapter"] == str(first)
    with raises_code("", message="adapter"):
        main(training(data, cut, "--adapter", str(cut / "checkpoint-4"), "--resume_from_checkpoint", "true"))


def test_the_adapter_decides_rules_template_and_base(first: Path, data: Path) -> None:
    words = ["--data_path", str(data / "train.json"), "--output_dir", "new"]
    found = plan(["--adapter", str(first), *words]).recipe
    before = plan(["--recipe", str(first), *words]).recipe
    for key in ("model", "policy", "template", "dtype", "quantization"):
        assert getattr(found, key) == getattr(before, key)
    assert found.train != before.train
    assert plan(["--lora_weight_path", str(first), "--lora_enable", "True", "--lora_r", "4", *words]).recipe == found
    both = plan(["--adapter", str(first), "--recipe", str(first), *words]).recipe
    assert both == before.model_copy(update={"adapter": str(first)})  # with --recipe the run's other settings too
    faster = plan(["--adapter", str(first), "--learning_rate", "5e-4", "--mm_projector_lr", "1e-5", *words]).recipe
    assert [rule["learning_rate"] for rule in faster.policy or ()] == [5e-4, 1e-5]


@pytest.mark.parametrize(
    ("flags", "where"),
    [
        (["--rank", "8"], "--rank"),
        (["--alpha", "3"], "--alpha"),
        (["--method", "lora"], "--method"),
        (["--policy", "[{modules: language, method: lora, rank: 4}]"], "--policy"),
        (["--template", "plain"], "--template"),
    ],
)
def test_a_flag_that_contradicts_the_adapter_is_named(flags: list[str], where: str, first: Path, data: Path) -> None:
    hint = f"milora_vl.export {first} --to merged"
    with raises_code("adapter-other-settings", where=where, hint=hint):
        plan(["--adapter", str(first), "--data_path", str(data / "train.json"), "--output_dir", "new", *flags])


def test_what_is_no_adapter_of_ours_and_an_output_folder_in_use_are_refused(
    first: Path, data: Path, tmp_path: Path
) -> None:
    words = ["--data_path", str(data / "train.json"), "--output_dir"]
    with raises_code("run-exists", where=str(first)):
        plan(["--adapter", str(first), *words, str(first)])
    with raises_code("adapter-no-folder", where="--adapter"):
        plan(["--adapter", str(tmp_path / "none"), *words, "new"])
    with raises_code("flag-conflict", where="--tune_mm_mlp_adapter"):
        plan(["--adapter", str(first), "--tune_mm_mlp_adapter", "True", *words, "new"])
    stock = tmp_path / "stock"
    shutil.copytree(first, stock, ignore=shutil.ignore_patterns("milora*", "checkpoint-*"))
    for _ in range(2):  # without milora.json, and with it in a folder of LLaVA
        with raises_code("", where="--adapter", hint="--to merged"):
            plan(["--adapter", str(stock), "--model", "tiny", *words, "new"])
        (stock / "milora.json").write_text((first / "milora.json").read_text())
        (stock / "non_lora_trainables.bin").touch()
    edited = tmp_path / "edited"
    shutil.copytree(first, edited, ignore=shutil.ignore_patterns("checkpoint-*"))
    recipe = (edited / "recipe.yaml").read_text()
    (edited / "recipe.yaml").write_text(recipe.replace("dropout: 0.05", "dropout: 0.5"))
    with raises_code("adapter-other-settings", where=str(edited)):
        main(training(data, tmp_path / "new", "--adapter", str(edited)))


def test_an_adapter_that_python_saved_trains_further(data: Path, tmp_path: Path) -> None:
    """Its folder has no recipe: the rules are one for each module."""
    model = apply_milora(
        load_model("tiny")[0], "[{modules: language.q_proj, method: milora, protect: 0, rank: 4, dropout: 0.1}]"
    )
    save_adapter(model, tmp_path / "saved")
    assert main(training(data, tmp_path / "run", "--adapter", str(tmp_path / "saved"))) == 0
    again = load_adapter(load_model("tiny")[0], tmp_path / "run", is_trainable=True)
    assert [(t.path, t.rank, t.dropout) for t in again.milora_targets] == [
        (t.path, t.rank, t.dropout) for t in model.milora_targets
    ]
