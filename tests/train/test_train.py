"""`milora_vl.train` from the command line to the files it leaves, on the tiny model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from milora_vl import Policy, apply_milora, load_model, save_adapter
from milora_vl.common.errors import UserError
from milora_vl.train.__main__ import main
from support.drawn import write_tiny_data
from support.problems import raises_code
from support.train_runs import METHODS, WEIGHTS, losses, read_json, training


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory: pytest.TempPathFactory, tiny_records: list[dict[str, Any]]) -> Path:
    """A finished run of MiLoRA and nothing else, to look at: its data lies beside it."""
    folder = tmp_path_factory.mktemp("plain")
    assert main(training(write_tiny_data(folder / "data", tiny_records), folder / "run", "--rank", "4")) == 0
    return folder / "run"


def test_the_run_folder_is_complete(tiny_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    extra = ["--rank", "4", "--eval_data_path", str(tiny_data / "val.json"), "--eval_strategy", "steps"]
    assert main(training(tiny_data, run, *extra, "--eval_steps", "3", "--dropout", "0")) == 0
    names = {path.name for path in run.iterdir()}
    assert names >= {
        "recipe.yaml", "environment.json", "policy.json", "README.md", "trainer_state.json",
        "report.html", "milora.json", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json",
    }  # fmt: skip
    environment = read_json(run, "environment.json")
    assert environment["finished"]
    assert environment["data"] == {"train": 12, "eval": 4, "skipped": 0}
    assert environment["base"] == read_json(run, "adapter_config.json")["base_model_name_or_path"]
    policy = read_json(run, "policy.json")
    assert len(policy["targets"]) == 16
    assert len(policy["protection"]) == 16
    log = read_json(run, "trainer_state.json")["log_history"]
    assert [entry["step"] for entry in log if "eval_loss" in entry] == [3, 6]
    front = yaml.safe_load((run / "README.md").read_text().split("---")[1])
    assert "base_model" not in front  # a folder
    assert front["tags"] == ["milora-vl", "protected-milora"]


@pytest.mark.parametrize("name", ["tiny", "tiny-text"])
def test_stock_peft_finds_a_built_in_base_and_we_build_it_elsewhere(name: str, tmp_path: Path) -> None:
    import peft
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    model = apply_milora(load_model(name)[0], Policy.parse([{"modules": "language", "method": "lora", "rank": 2}]))
    for parameter in (p for key, p in model.named_parameters() if "lora_B" in key):
        torch.nn.init.normal_(parameter)
    save_adapter(model, tmp_path)
    config = peft.PeftConfig.from_pretrained(tmp_path)
    auto = AutoModelForImageTextToText if name == "tiny" else AutoModelForCausalLM
    stock = peft.PeftModel.from_pretrained(auto.from_pretrained(config.base_model_name_or_path), tmp_path).eval()
    config.base_model_name_or_path = f"/elsewhere/models/{Path(config.base_model_name_or_path).name}"
    config.save_pretrained(tmp_path)
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        expected = model.eval()(input_ids=ids)["logits"]
        for loaded in (stock, load_model(tmp_path)[0]):
            assert torch.equal(loaded(input_ids=ids)["logits"], expected)


def test_factors_are_computed_once_for_several_runs(tiny_data: Path, tmp_path: Path) -> None:
    cache = tmp_path / "factors"
    extra = ["--rank", "4", "--max_steps", "1", "--factor_cache", str(cache), "--method", "milora", "--protect", "0"]
    assert main(training(tiny_data, tmp_path / "a", *extra)) == 0
    made = {file: file.stat().st_mtime_ns for file in cache.iterdir()}
    assert len(made) == 16
    assert main(training(tiny_data, tmp_path / "b", *extra, "--learning_rate", "1e-2")) == 0
    assert {file: file.stat().st_mtime_ns for file in cache.iterdir()} == made
    first, second = (load_file(tmp_path / run / "adapter_model.safetensors") for run in "ab")
    # The lower half of each is the anchor.
    assert all(torch.equal(w[4:], second[name][4:]) for name, w in first.items() if "lora_A" in name)
    with raises_code("path-not-a-folder", where="--factor_cache"):
        main(training(tiny_data, tmp_path / "c", "--rank", "4", "--factor_cache", str(tiny_data / "train.json")))


@pytest.mark.filterwarnings("ignore:.*has no milora.json")
def test_a_checkpoint_that_lost_its_milora_json_is_not_resumed_as_a_plain_lora(plain_run: Path, tmp_path: Path) -> None:
    """All of it would train, the anchor too."""
    checkpoint = shutil.copytree(plain_run / "checkpoint-4", tmp_path / "checkpoint-4")
    (checkpoint / "milora.json").unlink()
    shutil.copy(plain_run / "recipe.yaml", tmp_path)
    shutil.copytree(plain_run / "_start", tmp_path / "_start")
    more = ["--rank", "4", "--resume_from_checkpoint", str(checkpoint)]
    with raises_code("adapter-other-settings", where=str(checkpoint), hint="restore the milora.json"):
        main(training(plain_run.parent / "data", tmp_path / "again", *more))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_with_the_same_command_and_resumes_with_the_same_losses(
    method: str, tiny_data: Path, tmp_path: Path, capfd: Any
) -> None:
    """An evaluation ends an epoch, where random states are lost, and losses are averaged over steps."""
    whole, part = tmp_path / "whole", tmp_path / "part"
    weights = WEIGHTS.get(method, "adapter_model.safetensors")
    extra = [*METHODS[method], "--eval_data_path", str(tiny_data / "val.json")]
    extra += ["--logging_steps", "2", "--save_steps", "3"]
    assert main(training(tiny_data, whole, *extra)) == 0
    shown = capfd.readouterr().err
    assert shown.count("trainable params: ") == 1
    assert "|| trainable%: " in shown
    history = losses(whole)
    assert [step for step, _ in history] == [1, 2, 3, 4, 6]  # a checkpoint is logged before it is saved
    assert history[-1][1] < history[0][1] or method == "projector"  # alone it learns little in six steps
    for folder in (whole, whole / "checkpoint-3"):
        assert (folder / "processor_config.json").is_file() or (folder / "preprocessor_config.json").is_file()
        assert any("multi_modal_projector" in name for name in load_file(folder / weights))
    shutil.copytree(whole, part)
    shutil.rmtree(part / "checkpoint-6")
    (part / weights).unlink()
    assert main(training(tiny_data, part, *extra, "--resume_from_checkpoint", "true")) == 0
    assert losses(part) == history
    before, after = load_file(whole / weights), load_file(part / weights)
    assert before.keys() == after.keys()
    assert all(tensor.equal(after[name]) for name, tensor in before.items())


def test_accumulation_equals_a_larger_batch(tiny_data: Path, tmp_path: Path) -> None:
    runs = []
    for per_device, accumulation in ((4, 1), (1, 4)):
        run = tmp_path / f"{per_device}"
        extra = ["--rank", "4", "--dropout", "0", "--gradient_accumulation_steps", str(accumulation)]
        assert main(training(tiny_data, run, *extra, "--per_device_train_batch_size", str(per_device))) == 0
        runs.append(losses(run))
    for (_, one), (_, other) in zip(*runs, strict=True):
        assert one == pytest.approx(other, rel=1e-5, abs=1.5e-4)  # some versions of transformers log four decimals


def test_checkpointing_and_bf16_train_too(plain_run: Path, tiny_data: Path, tmp_path: Path) -> None:
    frugal, half = tmp_path / "b", tmp_path / "c"
    assert main(training(tiny_data, frugal, "--rank", "4", "--gradient_checkpointing", "True")) == 0
    assert main(training(tiny_data, half, "--rank", "4", "--bf16")) == 0
    for (_, a), (_, b), (_, c) in zip(losses(plain_run), losses(frugal), losses(half), strict=True):
        assert b == pytest.approx(a, rel=1e-5, abs=1.5e-4)
        assert c == pytest.approx(a, rel=2e-2)


def test_text_only_models_take_the_same_road(tiny_data: Path, tmp_path: Path) -> None:
    records = json.loads((tiny_data / "train.json").read_text())
    (tiny_data / "text.json").write_text(json.dumps([r for r in records if "image" not in r]))
    run = tmp_path / "run"
    more = ["--model", "tiny-text", "--data_path", str(tiny_data / "text.json"), "--rank", "4"]
    assert main(training(tiny_data, run, *more)) == 0
    assert {t["tower"] for t in read_json(run, "policy.json")["targets"]} == {"language"}


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_broken_picture_ends_the_run_with_its_name(workers: str, tiny_data: Path, tmp_path: Path) -> None:
    """Nothing is left of a run that has made no step; another one says how far it came."""
    run = tmp_path / "run"
    one = ["--method", "lora", "--rank", "4", "--dataloader_num_workers", workers, "--per_device_train_batch_size", "1"]
    for broken, is_left in ((["2.png"], True), ([f"{number}.png" for number in range(8)], False)):
        for name in broken:
            (tiny_data / "images" / name).write_bytes(b"no picture")
        with pytest.raises(UserError) as error:
            main(training(tiny_data, run, *one, "--max_steps", "12"))
        assert error.value.exit_code == 1
        (problem,) = error.value.problems
        assert (problem.code, Path(problem.where).parent) == ("image-unreadable", tiny_data / "images")
        assert problem.message == "cannot read this picture: not a picture"
        assert "--bad_images skip" in problem.hint
        assert "Traceback" not in str(error.value)
        assert run.exists() == is_left
        if is_left:
            assert 0 < len(losses(run)) < 12
            assert "did not finish" in (run / "README.md").read_text()
            assert (run / "report.html").is_file()
            shutil.rmtree(run)


@pytest.mark.slow  # torch.compile
@pytest.mark.parametrize("more", [[], ["--gradient_checkpointing"]])
def test_a_training_may_be_compiled(more: list[str], tiny_data: Path, tmp_path: Path) -> None:
    flags = ["--rank", "4", "--lora_dropout", "0", *more]
    assert main(training(tiny_data, tmp_path / "plain", *flags)) == 0
    compiled = ["--torch_compile", "True", "--torch_compile_backend", "eager"]
    assert main(training(tiny_data, tmp_path / "compiled", *flags, *compiled)) == 0
    for (_, loss), (_, expected) in zip(losses(tmp_path / "compiled"), losses(tmp_path / "plain"), strict=True):
        assert loss == pytest.approx(expected, rel=1e-4)
