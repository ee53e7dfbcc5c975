"""docs/reproduce.md: every command works on small data, and trains the layers of the paper and of the page's table."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from milora_data.__main__ import main as data_main
from milora_data.stream.sources import load_records
from milora_eval.suites import find_benchmark, find_suite
from milora_vl.models import loading
from milora_vl.recipe import base_model, command_line, on_model
from milora_vl.recipe.merge import merge_recipe
from milora_vl.recipe.schema import Recipe

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "reproduce.md").read_text(encoding="utf-8")
COMMAND = re.compile(r"^(?:torchrun --nproc_per_node (\d+)|python) -m milora_vl\.train (.+)$", re.MULTILINE)


def run_of(flags: list[str]) -> str:
    """Return the name of the run of a command."""
    return Path(flags[flags.index("--output_dir") + 1]).name


# Run -> devices and flags of its training command, in the order of the page.
COMMANDS = {run_of(flags.split()): (int(devices or 1), flags.split()) for devices, flags in COMMAND.findall(PAGE)}
# The paper's tables of hyperparameters: r, alpha (of LoRA: twice r), dropout, rate, schedule, warm-up, records a step,
# epochs, the linear layers of a block that train.
PAPER = {
    "paper-visual": (128, 128, 0.05, 2e-4, "cosine", 0.03, 128, 1, 7),
    "paper-commonsense": (32, 32, 0.05, 3e-4, "linear", 100, 16, 3, 5),
    "paper-math": (64, 64, 0.05, 3e-4, "linear", 100, 16, 3, 5),
    "paper-instructions": (32, 32, 0.05, 3e-4, "linear", 100, 16, 3, 5),
    "paper-pissa-setup": (128, 128, 0.0, 2e-5, "cosine", 0.03, 128, 1, 7),
}


def recipe(flags: list[str]) -> Recipe:
    return merge_recipe(command_line.parse(flags)).recipe


@cache
def base(model: str, of: str) -> Any:
    """Return the meta model of a name, composed as in a recipe."""
    return loading.meta_model(base_model.config_for(recipe(["--recipe", of, "--model", model])))


def targets(flags: list[str]) -> tuple[list[Any], Any]:
    chosen = recipe(flags)
    whole = base(chosen.model, flags[flags.index("--recipe") + 1])
    return on_model.targets_of(chosen, whole), whole


def test_every_recipe_of_the_paper_has_its_rows() -> None:
    assert len(COMMANDS) == len(COMMAND.findall(PAGE))
    assert {flags[flags.index("--recipe") + 1] for _, flags in COMMANDS.values()} == set(PAPER)
    for name in ("commonsense", "commonsense-llama3", "math", "math-qwen", "instructions", "pissa-setup"):
        assert {f"{name}-milora", f"{name}-pissa", f"{name}-lora"} <= set(COMMANDS)


@pytest.mark.parametrize("name", PAPER)
def test_a_recipe_is_the_papers_table(name: str) -> None:
    rank, alpha, dropout, rate, schedule, warmup, records, epochs, layers = PAPER[name]
    run = next(run for run, (_, flags) in COMMANDS.items() if flags[1] == name)
    devices, flags = COMMANDS[run]
    train = recipe(flags).train
    found, _ = targets(flags)
    language = [target for target in found if target.tower == "language"]
    assert {(t.rank, t.alpha, t.dropout, t.part) for t in language} == {(rank, alpha, dropout, "minor")}
    assert len({target.path.split(".")[-1] for target in language}) == layers
    assert train["learning_rate"] == rate
    assert (train["lr_scheduler_type"], train["warmup_steps"], train["num_train_epochs"]) == (schedule, warmup, epochs)
    per_device = train["per_device_train_batch_size"] * train.get("gradient_accumulation_steps", 1)
    assert per_device * devices == records


@pytest.mark.parametrize("run", COMMANDS)
def test_a_row_trains_what_its_name_and_the_pages_table_say(run: str) -> None:
    _, flags = COMMANDS[run]
    found, _ = targets(flags)
    language = [target for target in found if target.tower == "language"]
    scale = {target.alpha / target.rank for target in language}
    part = {"pissa": "principal", "principal": "principal", "random": "random", "lora": None, "dora": None}
    method = run.split("-")[-1]
    assert {target.part for target in language} == {part.get(method, "minor")}
    assert scale == ({2.0} if method in ("lora", "dora") and not run.startswith("pissa-setup") else {1.0})


def test_one_training_of_the_page_dry_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from milora_vl.train.command import main

    (tmp_path / "data" / "metamath").mkdir(parents=True)
    turns = [{"from": "human", "value": "a " * 120}, {"from": "gpt", "value": "b " * 300}]
    for name in ("data.json", "eval.json"):
        (tmp_path / "data" / "metamath" / name).write_text(json.dumps([{"id": "0", "conversations": turns}] * 16))
    monkeypatch.chdir(tmp_path)
    _, flags = COMMANDS["math-milora"]
    assert main([*flags, "--dry-run", "--devices", "8"]) == 0
    plan = capsys.readouterr().out
    assert "trainable params: 112,197,632" in plan
    assert "= 16\n" in plan
    assert "> b b b" in plan  # only the answer is supervised


def test_the_pages_conversions_make_what_its_recipes_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = re.findall(r"^python -m milora_data (convert --from alpaca .*)$", PAGE, re.MULTILINE)
    assert len(lines) == 2
    for words in map(str.split, lines):
        rows = [{"instruction": str(n), "input": "", "output": "o", "answer": "a"} for n in range(130)]
        Path(words[3]).parent.mkdir(parents=True, exist_ok=True)
        Path(words[3]).write_text(json.dumps(rows))
        assert data_main(words) == 0
    read = {recipe(["--recipe", name]).data for name in ("paper-commonsense", "paper-math")}
    paths = [path for data in read for path in (data.path, data.eval_path) if path]
    assert sorted(len(list(load_records(path))) for path in paths) == [10, 120, 130]


def test_the_pages_suites_and_benchmarks_exist() -> None:
    assert {find_suite(name) for name in re.findall(r"--suite (\S+)", PAGE)}
    assert [find_benchmark(name) for names in re.findall(r"--benchmarks (\S+)", PAGE) for name in names.split(",")]
