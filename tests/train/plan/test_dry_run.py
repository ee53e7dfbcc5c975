"""The plan of a run, without weights and network."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest

from milora_vl.common.errors import UserError
from milora_vl.train.__main__ import main
from support.problems import raises_code


def test_a_plan_is_made_for_devices_that_are_not_here(capsys: Any) -> None:
    words = ["--model", "llava-1.5-7b", "--bf16", "--deepspeed", "zero3", "--dry-run"]
    assert (
        main([*words, "--devices", "64", "--gpu-memory", "24", "--per_device_train_batch_size", "16"]) == 1
    )  # does not fit
    shown = capsys.readouterr().out
    assert "x 64 devices = 1024" in shown
    assert "does not fit 24 GiB" in shown
    assert "--gradient_checkpointing True --per_device_train_batch_size 8 --gradient_accumulation_steps 2: " in shown
    assert "a step on the CPU of this machine" not in shown
    with raises_code("flag-conflict", where="--devices", message="only with --dry-run"):
        main([*words[:-1], "--devices", "4"])


def test_the_first_batch_is_shown_with_its_targets(tiny_data: Path, tmp_path: Path, capsys: Any) -> None:
    train = tiny_data / "train.json"
    train.write_text(train.read_text().replace('"from"', '"mood": 1, "from"', 1))
    words = ["--recipe", "tiny-test", "--data_path", str(train), "--output_dir", str(tmp_path / "r")]
    assert main([*words, "--image_folder", str(tiny_data / "images"), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert '"mood" of 1 turn is not read' in shown
    assert "<image x 16>\\nWhat colour is it? ASSISTANT:\n  >  red</s>" in shown
    assert "236 tokens per record, 13 of them supervised" in shown  # counted: the tokenizer is at hand
    assert "steps  10 " in shown
    assert not (tmp_path / "r").exists()


def test_a_named_model_of_another_family_is_planned_without_its_processor(
    tiny_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Without a network: the plan says that the records were not checked, and a training stops before any weights."""
    monkeypatch.setattr("milora_vl.models.base.hub_is_known", lambda: False)
    words = ["--model", "smolvlm2-500m", "--data_path", str(tiny_data / "train.json"), "--dry-run"]
    assert main([*words, "--image_folder", str(tiny_data / "images")]) == 0
    shown = capsys.readouterr().out
    assert "not checked: the tokenizer of smolvlm2-500m is not here" in shown
    assert "counts below assume records" in shown
    assert "all params: " in shown
    with pytest.raises(UserError) as error:
        main([*words[:-1], "--image_folder", str(tiny_data / "images")])
    assert error.value.problems[0].code == "model-not-available"


def test_fsdp_is_planned_as_it_trains(capsys: Any) -> None:
    """Its weights train in float32, and `shard_grad_op` keeps all gathered weights until the backward."""
    memory = {}
    for words in (["--deepspeed", "zero3"], ["--fsdp"], ["--fsdp=shard_grad_op"]):
        assert main(["--model", "llava-1.5-7b", "--bf16", "--dry-run", "--devices", "4", *words]) == 0
        shown = capsys.readouterr().out
        kind, size = re.search(r"trained weights ([\d.]+)", shown), re.search(r"gathered layers ([\d.]+)", shown)
        assert kind is not None
        assert size is not None
        memory[words[0]] = shown, float(kind[1]), float(size[1])
    assert "(FSDP2, 4 devices)" in memory["--fsdp"][0]
    assert memory["--fsdp"][1] > memory["--deepspeed"][1]
    assert memory["--fsdp=shard_grad_op"][2] > 6 * memory["--fsdp"][2]


def write_numbers(folder: Path, count: int) -> Path:
    """Records of text that are all about equally long."""
    turns = [[{"from": "human", "value": f"What is {n}?"}, {"from": "gpt", "value": f"{n}."}] for n in range(count)]
    (folder / "numbers.jsonl").write_text("\n".join(json.dumps({"conversations": pair}) for pair in turns))
    return folder / "numbers.jsonl"


def test_a_stream_is_planned_by_its_steps_and_not_by_the_records_that_were_looked_at(
    tmp_path: Path, capsys: Any
) -> None:
    words = ["--model", "tiny-text", "--rank", "4", "--data_path", str(write_numbers(tmp_path, 240))]
    assert main([*words, "--streaming", "True", "--max_steps", "20", "--dry_run", "True"]) == 0
    shown = capsys.readouterr().out
    assert "data   a stream; the first 100 records were checked" in shown
    assert "steps  20 (160 records of a stream)" in shown


@pytest.mark.parametrize("first", [[], [("word " * 400, "end")]], ids=["equal", "one long record first"])
def test_packing_is_planned_in_the_rows_that_a_run_has(
    first: list[tuple[str, str]], tmp_path: Path, capsys: Any
) -> None:
    pairs = [*first, *[(f"What is {n}?", f"{n}.") for n in range(240)]]
    turns = [[{"from": "human", "value": asked}, {"from": "gpt", "value": said}] for asked, said in pairs]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"conversations": pair}) for pair in turns))
    words = ["--model", "tiny-text", "--method", "lora", "--rank", "2", "--max_length", "512", "--device", "cpu"]
    words += ["--data_path", str(data), "--packing", "True", "--num_train_epochs", "1", "--save_strategy", "no"]
    words += ["--per_device_train_batch_size", "4"]
    assert main([*words, "--dry-run", "--format", "json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert main([*words, "--output_dir", str(tmp_path / "run")]) == 0
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert planned["records"] == len(pairs)
    assert planned["steps"] == state["max_steps"] < len(pairs) / 4


def test_a_packaged_recipe_is_planned_without_data_and_without_what_only_the_run_needs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MILORA_CACHE", str(tmp_path))
    found = importlib.util.find_spec
    absent = ("deepspeed", "bitsandbytes", "gguf")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name in absent else found(name, *more))
    words = ["--recipe", "milora-llava-1.5-7b"]
    assert main([*words, "--optim", "paged_adamw_8bit", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    shown = [line.split()[:4] for line in lines]
    assert ["language", "224", "protected", "MiLoRA"] in shown
    assert ["projector", "2", "protected", "MiLoRA"] in shown
    for tower in ("language:", "projector:"):
        assert [tower, "new", "directions", "only;"] in shown
    needs = [line.split()[1:] for line in lines if line.startswith("needs ")]
    assert [need[2] if need[1] == "package" else need[0] for need in needs] == [
        "bitsandbytes,", "deepspeed,", "llava_v1_5_mix665k.json,",
    ]  # fmt: skip
    with raises_code("package-missing", where="train.deepspeed in recipe milora-llava-1.5-7b", hint="'.[deepspeed]'"):
        main(words)
    with raises_code("data-missing-file", where="mine.json"):
        main([*words, "--data_path", "mine.json", "--dry-run"])
    capsys.readouterr()
    small = ["--model", "smol-llava", "--rank", "4"]
    assert main([*small, "--dry-run", "--format", "json"]) == 0
    (need,) = json.loads(capsys.readouterr().out)["needs"]
    assert need == "the package gguf, which is not installed: pip install -e '.[demo]'"
    with raises_code("package-missing", where="--model", message="gguf"):
        main([*small, "--data_path", "mine.json"])


def test_a_plan_that_does_not_fit_the_memory_exits_with_1(capsys: Any) -> None:
    words = ["--model", "llava-1.5-7b", "--bf16", "--gradient_checkpointing", "--dry-run", "--format", "json"]
    for gib, fits in (("8", False), ("40", True)):
        assert main([*words, "--gpu-memory", gib]) == (0 if fits else 1)
        assert json.loads(capsys.readouterr().out)["fits"] is fits


def test_the_term_in_one_step_of_n_costs_an_nth_and_needs_the_memory_of_that_step(tmp_path: Path, capsys: Any) -> None:
    def plan(every: int) -> tuple[str, list[int]]:
        (tmp_path / "recipe.yaml").write_text(f"base_kl: {{weight: 1, every: {every}}}")
        words = ["--model", "llava-1.5-7b", "--recipe", str(tmp_path / "recipe.yaml"), "--dry-run", "--format", "json"]
        assert main([*words, "--per_device_train_batch_size", "1", "--devices", "1"]) == 0
        lines = json.loads(capsys.readouterr().out)["cost"]
        (price,) = (line for line in lines if line.startswith("base_kl"))
        return lines[0], [int(share) for share in re.findall(r"(\d+)%", price)]

    (memory, (in_step, in_all)), (same_memory, (in_fourth, in_all_steps)) = plan(1), plan(4)
    assert same_memory == memory
    assert in_step == in_all == in_fourth > 50
    assert in_all_steps == pytest.approx(in_all / 4, abs=1)


@pytest.mark.parametrize(
    ("words", "has_term"),
    [
        (("--model", "tiny"), True),
        (("--model", "tiny", "--base_kl_weight", "0"), False),
        (("--model", "tiny", "--protect", "0"), False),
        (("--model", "tiny", "--method", "lora", "--base_kl_weight", "1"), True),
        (("--model", "tiny-text", "--template", "chatml"), False),
    ],
)
def test_the_default_keeps_the_answers_of_the_base_on_pictures(
    words: tuple[str, ...], has_term: bool, capsys: Any
) -> None:
    assert main([*words, "--rank", "4", "--dry-run", "--format", "json"]) == 0
    lines = json.loads(capsys.readouterr().out)["cost"]
    assert any(line.startswith("base_kl") for line in lines) == has_term
