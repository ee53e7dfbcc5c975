"""The sweep without its trainings: cells and their recipes, selection by validation loss, the page, and user errors."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from milora_eval.scores.results import headline_of
from milora_vl.common.errors import UserError
from milora_vl.common.evaluator_protocol import QuestionSet
from milora_vl.core.policy import Policy
from milora_vl.sweep import page
from milora_vl.sweep.__main__ import _require_same_sweep, main
from milora_vl.sweep.cells import Cell, make_cells, recipe_of
from milora_vl.sweep.results import arms, pairs
from milora_vl.sweep.runner import Sweep, run_sweep
from milora_vl.train.settings import Recipe
from support.drawn import NAMES, draw
from support.eval_questions import write_questions
from support.problems import raises_code
from support.sweep_cells import RECIPE, finish_cell


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    return Sweep(tmp_path, Recipe.parse(RECIPE), QuestionSet("emoji"))


def test_cells_are_every_combination_and_full_has_no_rank() -> None:
    cells = make_cells(Recipe.parse(RECIPE), ["milora", "full"], [1e-4, 1.00000001e-4], [2, 8], 2)
    assert len(cells) == len({cell.name for cell in cells}) == 2 * 2 * 2 + 2 * 2
    assert {cell.seed for cell in cells} == {7, 8}
    assert {cell.rank for cell in cells if cell.method == "full"} == {None}
    assert cells[0].name == "milora-r2-lr0.0001-seed7"
    assert [cell.seed for cell in cells] == sorted(cell.seed for cell in cells)


@pytest.mark.parametrize(
    ("method", "rule", "train"),
    [
        ("lora", {"method": "lora", "rank": 8, "alpha": 16.0}, {}),
        ("milora-paper", {"method": "milora", "protect": 0.0}, {}),
        ("strong", {"method": "lora", "alpha": 16}, {"weight_decay": 0.2}),
        ("full", {"method": "full"}, {}),
        ("random", {"method": "random", "seed": 9}, {}),  # each seed draws different components
    ],
)
def test_the_recipe_of_a_cell(method: str, rule: dict[str, Any], train: dict[str, Any]) -> None:
    rank = None if method in ("full", "strong") else 8
    made = recipe_of(Recipe.parse(RECIPE), Cell(method, 3e-4, rank, 9))
    first, projector = made.policy or ()
    assert {key: first[key] for key in rule} == rule
    assert first["learning_rate"] == 3e-4
    assert projector == RECIPE["policy"][1]
    assert {key: made.train[key] for key in train} == train
    assert (made.train["seed"], made.train["max_steps"], made.train["warmup_steps"]) == (9, 3, 0.1)
    assert Recipe.parse(yaml.safe_load(made.to_yaml())) == made


@pytest.mark.parametrize(
    ("inherited", "devices"),
    [("4,5", {"4", "5"}), ("GPU-8d1f, GPU-30c2,7", {"GPU-8d1f", "GPU-30c2"}), (None, {"0", "1"})],
)
def test_cells_share_the_gpus_and_cores_that_the_sweep_may_use(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch, inherited: str | None, devices: set[str]
) -> None:
    """CUDA counts two GPUs; the third name is invalid. Each cell waits for the other, so that both hold a GPU."""
    lines, stand_in = sweep.folder / "lines", sweep.folder / "python"
    stand_in.write_text(
        f'#!/bin/sh\necho "$CUDA_VISIBLE_DEVICES $OMP_NUM_THREADS" >> {lines}\n'
        f"until [ $(wc -l < {lines}) -ge 2 ]; do sleep 0.02; done; exit 1\n"
    )
    stand_in.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(stand_in))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8, 14)), raising=False)
    if inherited is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", inherited)
    run_sweep(sweep, [Cell("lora", rate, None, 7) for rate in (1e-4, 1e-3)], 2, retry=False)
    assert set(lines.read_text().splitlines()) == {f"{device} 3" for device in devices}


@pytest.mark.usefixtures("real_plots")
def test_validation_chooses_and_the_test_reports(sweep: Sweep) -> None:
    """The rate with the best test score has a worse validation loss and is not reported."""
    cells = make_cells(sweep.recipe, ["milora", "lora"], [1e-4, 1e-3, 1e-2], None, 2)
    losses = {1e-4: 0.9, 1e-3: 0.5, 1e-2: 0.7}
    for cell in cells:
        good = cell.learning_rate == 1e-2 or cell.method == "lora"
        right = [True] * (8 if good else 4) + [False] * (0 if good else 4)
        finish_cell(sweep, cell, loss=losses[cell.learning_rate], right=right, forgetting=cell.learning_rate)
    found = arms({cell: sweep.result(cell) or {} for cell in cells}, 2)
    assert [(arm.label, arm.best and arm.best.learning_rate, arm.at_edge) for arm in found] == [
        ("milora", 1e-3, False),
        ("lora", 1e-3, False),
    ]
    (pair,) = pairs(found, sweep.answers)
    assert (pair.a, pair.b, pair.seeds) == ("milora", "lora", 2)
    assert (pair.difference.value, pair.difference.n) == (0.5, 8)
    written, table = page.write(page.of_sweep(sweep, cells, 2, "python -m milora_vl.sweep ..."))
    assert table.rows[0][:3] == ("protected MiLoRA", "0.001", "0.500 ± 0.000")
    text = written.read_text()
    assert "12 of 12 cells are done" in text
    assert "LoRA − protected MiLoRA" in text
    assert (pair.difference.low, pair.difference.p_bootstrap) == (None, None)
    assert "no interval and no p-value from 4 items" in text
    for name in ("score.png", "cells.csv", "results.json"):
        assert (sweep.folder / name).stat().st_size > 50
    with (sweep.folder / "cells.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 12


def test_the_page_keeps_what_earlier_commands_asked_for(sweep: Sweep) -> None:
    first, later = (make_cells(sweep.recipe, [method], [1e-3], None, 2) for method in ("milora", "lora"))
    for cell in (*first, *later):
        finish_cell(sweep, cell, loss=0.5, right=[True, False], forgetting=0.1)
    finish_cell(
        sweep, Cell("dora", 1e-3, None, 99), loss=0.5, right=[True], forgetting=0.1
    )  # with a seed that was not requested
    _, table = page.write(page.of_sweep(sweep, later, 2, "..."))
    assert [row[0] for row in table.rows] == ["LoRA", "protected MiLoRA"]


def test_every_row_names_its_share_of_protected_inputs(sweep: Sweep) -> None:
    shares = {"milora-paper": "0", "milora": "0.95", "lora": "0"}
    cells = make_cells(sweep.recipe, list(shares), [1e-3], None, 1)
    for cell in cells:
        (rule, *_) = Policy.parse(recipe_of(sweep.recipe, cell).policy or []).rules
        assert f"{rule.in_force()['protect']:g}" == shares[cell.method]
        finish_cell(sweep, cell, loss=0.5, right=[True, False], forgetting=0.1, protect=shares[cell.method])
    _, table = page.write(page.of_sweep(sweep, cells, 1, "..."))
    assert [row[0] for row in table.rows] == ["MiLoRA, protect 0", "protected MiLoRA, protect 0.95", "LoRA, protect 0"]


def test_a_training_without_numbers_leaves_json_that_others_can_read(sweep: Sweep) -> None:
    (cell,) = make_cells(sweep.recipe, ["milora"], [1e-3], None, 1)
    finish_cell(sweep, cell, loss=float("nan"), right=[True], forgetting=0.1)
    page.write(page.of_sweep(sweep, [cell], 1, "..."))

    def refuse(word: str) -> None:
        raise AssertionError(word)

    found = json.loads((sweep.folder / "results.json").read_text(), parse_constant=refuse)
    assert found["arms"][0]["points"][0]["validation"]["value"] is None
    assert found["arms"][0]["best"] is None


@pytest.mark.parametrize(("keeps_best", "loss"), [(True, 0.3), (False, 0.9)])
def test_the_validation_loss_is_that_of_the_weights_that_are_evaluated(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch, keeps_best: bool, loss: float
) -> None:
    train = sweep.recipe.train | {"load_best_model_at_end": keeps_best, "save_steps": 1, "eval_steps": 1}
    swept = Sweep(sweep.folder, sweep.recipe.model_copy(update={"train": train}), sweep.questions)
    cell = Cell("milora", 1e-3, None, 7)
    finish_cell(swept, cell, loss=0.0, right=[True], forgetting=0.1)
    (swept.folder / "cells" / f"{cell.name}.json").unlink()
    run = swept.run_folder(cell)
    log = [{"step": 1, "eval_loss": 0.3}, {"step": 2, "loss": 0.1}, {"step": 2, "eval_loss": 0.9}]
    state = {"log_history": log, "best_model_checkpoint": str(run / "checkpoint-1")}
    (run / "trainer_state.json").write_text(json.dumps(state))
    (run / "policy.json").write_text("{}")
    scored = {"name": "emoji", "metrics": [{"name": "accuracy", "value": 1.0, "stderr": None, "n": 1}]}
    forgotten = {"kl": 0.1, "kl_stderr": None}
    (swept.results_folder(cell) / "results.json").write_text(
        json.dumps({"benchmarks": [scored], "forgetting": forgotten})
    )
    monkeypatch.setattr(sys, "executable", "true")
    run_sweep(swept, [cell], 1, retry=False)
    assert (swept.result(cell) or swept.failure(cell) or {}).get("validation_loss") == loss


def test_a_rate_that_lacks_a_seed_is_not_chosen(sweep: Sweep) -> None:
    cells = make_cells(sweep.recipe, ["milora"], [1e-4, 1e-3], None, 2)
    for cell in cells[:-1]:
        loss = 0.9 if cell.learning_rate == 1e-4 else 0.1
        finish_cell(sweep, cell, loss=loss, right=[True, False], forgetting=0.1)
    (arm,) = arms({cell: result for cell in cells if (result := sweep.result(cell))}, 2)
    assert arm.best is not None
    assert (arm.best.learning_rate, arm.at_edge) == (1e-4, True)


def data_of(folder: Path, rows: list[dict[str, Any]], name: str) -> Path:
    """Write records, held-out records and questions whose pictures are named `name`0, `name`1, ..."""
    for n in range(len(NAMES)):
        draw(folder / f"{name}{n}.png", NAMES[n])
    rows = [row | {"image": f"{name}{row['image']}.png"} for row in rows]
    records = [
        {"image": row["image"], "conversations": [
            {"from": "human", "value": f"<image>\n{row['question']}"}, {"from": "gpt", "value": row["answer"]}
        ]} for row in rows
    ]  # fmt: skip
    for file, content in (("train", records), ("val", records), ("mine", rows)):
        (folder / f"{file}.json").write_text(json.dumps(content))
    return folder


def test_a_sweep_holds_cells_of_one_content_whatever_its_files_are_called(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"image": n, "question": "Color?", "answer": name} for n, name in enumerate(NAMES)]

    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"weights")

    def known(folder: Path, calibration: Path | None = None, **more: Any) -> dict[str, Any]:
        own = {"data": str((calibration or folder) / "train.json"), "image_folder": str(calibration or folder)}
        data = {"path": str(folder / "train.json"), "eval_path": str(folder / "val.json"), "image_folder": str(folder)}
        recipe = Recipe.parse({**RECIPE, "model": str(model), "data": data | more, "calibration": own})
        return _require_same_sweep(Sweep(tmp_path, recipe, QuestionSet(benchmarks=str(folder / "mine.json"))))

    first = known(data_of(tmp_path / "a", rows, "picture"))
    (tmp_path / "sweep.json").write_text(json.dumps(first))
    model = model.rename(tmp_path / "renamed model")
    assert known(data_of(tmp_path / "renamed", rows[::-1], "other")) == first | {"model": str(model)}
    assert "known by content" not in capsys.readouterr().err
    with pytest.raises(UserError, match="another recipe|other recipe"):
        known(tmp_path / "renamed", streaming=True)
    assert f"the first {len(NAMES)} records are known by content" in capsys.readouterr().err
    draw(tmp_path / "a" / "picture0.png", NAMES[1])
    with pytest.raises(UserError, match="other records and other questions; nothing is overwritten"):
        known(tmp_path / "a")
    data_of(tmp_path / "edited", rows, "picture")
    (tmp_path / "edited" / "train.json").write_text((tmp_path / "edited" / "train.json").read_text().replace("?", "!"))
    (model / "model.safetensors").write_bytes(b"trained")
    with pytest.raises(UserError, match="holds a sweep of other weights and other records; nothing is overwritten"):
        known(tmp_path / "edited")
    with pytest.raises(UserError, match="other weights and other records"):
        known(tmp_path / "renamed", calibration=tmp_path / "edited")
    model, hub = Path("me/base"), tmp_path / "models--me--base"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("milora_vl.models.base.hub_is_known", lambda: False)
    for commit in ("a" * 40, "b" * 40):
        (hub / "snapshots" / commit).mkdir(parents=True)
        (hub / "snapshots" / commit / "config.json").write_text('{"model_type": "llama"}')
        (hub / "refs").mkdir(exist_ok=True)
        (hub / "refs" / "main").write_text(commit)
        if commit < "b":
            (tmp_path / "sweep.json").unlink()
            (tmp_path / "sweep.json").write_text(json.dumps(known(tmp_path / "renamed")))
    with pytest.raises(UserError, match="a sweep of other weights; nothing"):
        known(tmp_path / "renamed")


@pytest.mark.parametrize(
    ("mean", "units", "found"),
    [
        (["a", "b"], ("fraction", "fraction", "fraction"), (("a", "b"), "mean of 2", 0.4, 0.025)),
        (None, ("fraction", "points", "fraction"), (("a", "c"), "mean of 2", 0.5, None)),
        (None, ("points", "points", "points"), (("a",), "accuracy", 0.2, 0.03)),
    ],
)
def test_several_benchmarks_score_a_cell_by_their_mean(mean: Any, units: Any, found: Any) -> None:
    def metric(value: float, stderr: float | None, unit: str) -> dict[str, Any]:
        return {"name": "accuracy", "value": value, "stderr": stderr, "n": 9, "unit": unit}

    numbers = ((0.2, 0.03), (0.6, 0.04), (0.8, None))
    entries = [
        {"name": name, "metrics": [metric(*pair, unit)]} for name, pair, unit in zip("abc", numbers, units, strict=True)
    ]
    headline = headline_of({"benchmarks": entries, "mean": mean and {"of": mean}})
    assert headline == (found[0], found[1], pytest.approx(found[2]), found[3] and pytest.approx(found[3]))


def test_own_questions_score_the_cells(tmp_path: Path) -> None:
    """Their mistakes are found before a cell trains; the results are where the sweep reads them."""
    questions, recipe = tmp_path / "mine.json", tmp_path / "r.yaml"
    recipe.write_text(yaml.safe_dump({**RECIPE, "sweep": {}}))
    questions.write_text(json.dumps([{"image": "cat.png", "question": "What?", "answer": "cat"}]))
    with raises_code("benchmark-missing-pictures", where="--data"):
        main(["--recipe", str(recipe), "--methods", "lora", "--lrs", "1e-3", "--suite", str(questions), "--plan"])
    sweep = Sweep(tmp_path, Recipe.parse(RECIPE), QuestionSet(str(questions)))
    cell = Cell("lora", 1e-3, None, 7)
    assert sweep.results_folder(cell) == sweep.run_folder(cell) / "eval" / "mine" / "final"
    assert f"--suite {questions} --output_dir" in " ".join(sweep.evaluating(cell))


@pytest.mark.usefixtures("forked_programs")
def test_a_failed_cell_is_recorded_and_retried_on_request(sweep: Sweep, capsys: pytest.CaptureFixture[str]) -> None:
    """Its data is missing: the training ends with exit code 2, and the cell runs again only with --retry."""
    (cell,) = make_cells(sweep.recipe, ["milora"], [1e-3], None, 1)
    (sweep.folder / "failed").mkdir()
    (sweep.folder / "failed" / f"{cell.name}.json").write_text('{"said": "out of memory"}')
    assert run_sweep(sweep, [cell], 1, retry=False) == [cell]
    assert "FAILED" not in capsys.readouterr().err, "it did not run again"
    assert run_sweep(sweep, [cell], 1, retry=True) == [cell]
    assert f"FAILED  {cell.name}   0 left" in capsys.readouterr().err
    failure = sweep.failure(cell)
    assert failure is not None
    assert (failure["code"], "val.json" in failure["said"]) == (2, True)
    ran = yaml.safe_load((sweep.folder / "recipes" / f"{cell.name}.yaml").read_text())
    assert ran["factor_cache"] == str(sweep.folder / "factors")  # shared by all cells
    assert "val.json" in page.write(page.of_sweep(sweep, [cell], 1, "again"))[0].read_text()


@pytest.mark.usefixtures("forked_programs")
@pytest.mark.parametrize(
    ("change", "flags", "code", "value"),
    [
        ({}, ["--methods", "mlora"], "", "did you mean milora"),
        ({}, ["--lrs", "0"], "command-line", "--lrs: "),
        ({}, ["--lrs", "fast"], "command-line", "--lrs: "),
        ({"data": {"path": "train.json"}, "sweep": {}}, [], "", "data.eval_path"),
        ({"sweep": {"suite": "emoji", "train": {"max_step": 3}}}, [], "recipe-unknown-key", "max_step"),
        ({}, ["--plan"], "data-missing-file", "val.json"),
        ({}, ["--suite", "emojis"], "eval-unknown-suite", "emoji"),
        ({}, ["--data", "nowhere"], "eval-missing-files", "not in nowhere"),
    ],
)
def test_mistakes_are_told_before_anything_runs(
    change: dict[str, Any], flags: list[str], code: str, value: str, tmp_path: Path
) -> None:
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({**RECIPE, **change}))
    write_questions(tmp_path)
    given = ["--recipe", str(tmp_path / "r.yaml"), "--methods", "milora", "--lrs", "1e-3", "--data", str(tmp_path)]
    given += flags
    with pytest.raises(UserError) as error:
        main([*given, "--output_dir", str(tmp_path / "out")])
    assert error.value.first.code == code
    assert value in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_cell_whose_folder_was_removed_is_to_be_run_again(sweep: Sweep) -> None:
    """The page of the other cells is still written."""
    cells = make_cells(sweep.recipe, ["milora", "lora"], [1e-3], None, 1)
    (sweep.folder / "cells").mkdir()
    for cell in cells:
        finish_cell(sweep, cell, loss=1.0, right=[True, False], forgetting=0.1)
    shutil.rmtree(sweep.run_folder(cells[0]))
    assert [sweep.result(cell) is not None for cell in cells] == [False, True]
    _, table = page.write(page.of_sweep(sweep, cells, 1, "again"))
    assert [row[0] for row in table.rows] == ["LoRA"]
