"""Studies: the trainings of a file are run, stored, shared, resumed and shown; the docs show the CSV's numbers."""

from __future__ import annotations

import multiprocessing
import shutil
from concurrent.futures import as_completed
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from milora_vl import apply_milora
from milora_vl.sweep.cells import Cell
from studies import __main__ as command
from studies import page, runner
from studies.runner import Folder, all_cells, finished, run_study
from studies.study import Study, chosen, parse_study, read_study, study_names
from studies.update import Updates
from support.problems import raises_code

DOCS = Path(__file__).resolve().parents[2] / "docs" / "studies"
RULES = [{"modules": "convs.*", "method": "milora", "rank": 4}]
SMALL: dict[str, Any] = {
    "question": "Which?", "task": "digits-cnn", "steps": 3, "batch_size": 16, "policy": RULES,
    "arms": {"milora": {}, "lora": {"method": "lora"}}, "learning_rates": [1e-3, 3e-3], "seeds": 2, "reference": "lora",
}  # fmt: skip


def small(**changes: Any) -> Study:
    return parse_study(SMALL | changes, "test")


def run(folder: Folder, *, retry: bool = False) -> list[str]:
    done: list[str] = []
    run_study(folder, 1, retry=retry, on_done=lambda cell, ok, left: done.append(cell.name))
    return done


@pytest.mark.parametrize("name", study_names())
def test_a_study_that_ships_is_sound(name: str) -> None:
    study = read_study(name)
    assert name.partition(".")[2].removesuffix(f"-{study.steps}") == study.task, "QUESTION.TASK or QUESTION.TASK-STEPS"
    assert study.arms, "read_study has parsed the policy of each"
    assert study.seeds >= 3, "a claim needs three seeds"
    page_of = DOCS / f"{name.partition('.')[0]}.md"
    text = page_of.read_text(encoding="utf-8")
    assert any(f"<!-- results: {marked} -->" in text for marked in (name, page_of.stem))


@pytest.mark.parametrize("name", [n for n in study_names() if (DOCS / f"{n}.csv").is_file()])
def test_docs_show_what_the_cells_say(name: str) -> None:
    text = (DOCS / f"{name.partition('.')[0]}.md").read_text(encoding="utf-8")
    assert page.documented(text, name, read_study(name), DOCS) == text


@pytest.mark.usefixtures("real_plots")
def test_a_study_runs_goes_on_and_is_shown(tmp_path: Path) -> None:
    figure = {"title": "Both learn", "arms": ["milora", "lora"]}
    folder = Folder(tmp_path / "studies" / "which.digits-cnn", small(search_seeds=1, figure=figure))
    first = run(folder)
    assert len(first) == 2 * 2 + 2, "each arm and rate with one seed, then the better rate of each with the other"
    cells = all_cells(folder)
    results = finished(cells, folder)
    assert len(results) == len(cells) == 6
    assert {cell.seed for cell in cells} == {0, 1}
    lost = next(iter(results))
    (folder.path / "cells" / f"{lost.name}.json").unlink()
    folder.shared(lost).unlink()
    assert run(folder) == [lost.name], "only what is missing is run again"
    again = folder.result(lost)
    assert again is not None
    same = ("validation_loss", "score", "forgetting", "update")
    assert [again[key] for key in same] == [results[lost][key] for key in same], "and it comes out the same"
    written, table = page.write(folder, "python -m studies which")
    (tmp_path / "which.md").write_text("<!-- results: which.digits-cnn -->\n<!-- end -->\n")
    text = page.document("which.digits-cnn", folder, tmp_path).read_text(encoding="utf-8")
    assert "forgetting, equal loss" in text
    assert {file.name for file in tmp_path.glob("*.png")} == {"which.digits-cnn.score.png"}, "two arms fit in a table"
    assert page.documented(text, "which.digits-cnn", folder.study, tmp_path) == text
    assert "<span>studies</span> <span>which</span>" in written.read_text(encoding="utf-8")
    assert [row[0] for row in table.rows] == ["milora", "lora"]


ONE_CELL: dict[str, Any] = {"learning_rates": [1e-3], "seeds": 1}
PAIR = small(arms={"a": {}, "lora": {"method": "lora"}}, **ONE_CELL)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder in which the study PAIR has run as `one`; starting a worker takes longer than its cells."""
    folder = tmp_path_factory.mktemp("studies")
    assert len(run(Folder(folder / "one", PAIR))) == 2
    return folder


@pytest.fixture
def studies(trained: Path, tmp_path: Path) -> Path:
    """Return a copy of it to continue."""
    return shutil.copytree(trained, tmp_path / "studies")


def test_rows_of_an_arm_that_no_longer_runs_stay_in_the_docs(studies: Path, tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "one.md").write_text("<!-- results: one.digits-cnn -->\n<!-- end -->\n")
    row = "method,learning_rate,seed,validation_loss,score,forgetting,trainable\n"
    (docs / "one.digits-cnn.csv").write_text(f"{row}removed,0.001,0,0.5,0.25,0.125,7\na,0.003,0,9,9,9,9\n")
    page.document("one.digits-cnn", Folder(studies / "one", PAIR), docs)
    rows = page.read_cells(docs / "one.digits-cnn.csv")
    assert {(cell.method, cell.learning_rate) for cell in rows} == {("removed", 1e-3), ("a", 1e-3), ("lora", 1e-3)}
    assert rows[Cell("removed", 1e-3, None, 0)]["forgetting"] == "0.125"


def test_a_cell_that_another_study_has_is_not_trained_again(studies: Path) -> None:
    other = small(arms={"b": {}, "lora": {"method": "lora", "rank": 2}}, **ONE_CELL)
    first, second = Folder(studies / "one", PAIR), Folder(studies / "two", other)
    run(second)
    kept = first.result(Cell("a", 1e-3, None, 0)), second.result(Cell("b", 1e-3, None, 0))
    assert kept[0] is not None
    assert kept[1] is not None
    assert kept[1] == kept[0] | {"method": "b"}, "down to the seconds it took"
    assert len(list((studies / "shared").iterdir())) == 3


def test_a_failed_cell_is_kept_and_tried_again_on_request(tmp_path: Path) -> None:
    study = small(arms={"milora": {}, "wrong": {"rank": 4000}}, reference="milora", **ONE_CELL)
    folder = Folder(tmp_path / "x", study)
    assert len(run(folder)) == 2
    failure = folder.failure(Cell("wrong", 1e-3, None, 0))
    assert failure is not None
    assert "rank" in failure["said"]
    assert run(folder) == []
    assert run(folder, retry=True) == ["wrong-lr0.001-seed0"]


def test_a_killed_worker_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For example the system kills it if memory runs out; its finished cells are kept."""

    def killed(futures: Any) -> Any:
        for worker in multiprocessing.active_children():
            worker.kill()
        return as_completed(futures)

    monkeypatch.setattr(runner, "as_completed", killed)
    folder = Folder(tmp_path, read_study("elsewhere.digits-rnn"))
    with raises_code("study-worker-killed", message="memory ran out", hint="--jobs 1"):
        run_study(folder, 2, retry=False, on_done=lambda *_: None)


def test_an_arm_that_has_changed_is_trained_anew(studies: Path) -> None:
    after = small(arms={"a": {}, "lora": {"method": "lora", "rank": 2}}, **ONE_CELL)
    assert run(Folder(studies / "one", after)) == ["lora-lr0.001-seed0"]


def test_arms_may_have_rates_training_and_policy_of_their_own() -> None:
    study = small(arms={
        "full": {"method": "full", "learning_rates": [1e-4]},
        "decay": {"method": "lora", "train": {"weight_decay": 0.1}},
        "head": {"policy": [{"modules": "head", "method": "full", "learning_rate": 1e-3}]},
    }, reference="full")  # fmt: skip
    assert [cell.learning_rate for cell in study.cells(range(1)) if cell.method == "full"] == [1e-4]
    assert study.training("decay").weight_decay == 0.1
    assert study.rules("head", 5e-3) == [{"modules": "head", "method": "full", "learning_rate": 1e-3}]
    assert study.rules("full", 1e-4)[0]["method"] == "full"


@pytest.mark.parametrize(
    ("changes", "code", "said"),
    [
        ({"stepz": 3}, "study-unknown-key", "stepz"),
        ({"arms": {"lora": {"rnak": 3}}}, "policy-unknown-key", "arm lora.*rnak"),
        ({"arms": {"lora": {"train": {"lr": 1}}}}, "study-unknown-key", "lr"),
        ({"seeds": 0}, "study-value", "seeds"),
        ({"reference": "lorra"}, "study-reference", "lorra"),
    ],
)
def test_a_wrong_study_is_refused(changes: dict[str, Any], code: str, said: str) -> None:
    with raises_code(code, says=said):
        small(**changes)


def test_a_question_means_all_its_tasks() -> None:
    assert chosen("components") == [n for n in study_names() if n.startswith("components.")]
    with raises_code("study-unknown", hint="did you mean components"):
        chosen("componets")


def test_missing_data_is_told_before_any_worker_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with raises_code("data-missing-file", hint="python -m milora_data emoji"):
        command.main(["components.smol-llava"])


def test_size_and_overlap_of_an_update() -> None:
    layer = nn.Linear(12, 8, bias=False)
    U, S, Vh = torch.linalg.svd(layer.weight.detach())
    base = nn.Sequential(layer)
    updates = Updates.of(base, 2)
    model = apply_milora(base, [{"modules": "*", "method": "lora", "rank": 1}])
    assert updates.measure(model) == {"update": 0.0, "overlap": 0.0}
    pair = model.base_model.model[0]
    for column, row, overlap in ((U[:, 0], Vh[5], 1.0), (U[:, 5], Vh[5], 0.0)):
        with torch.no_grad():
            pair.lora_B["default"].weight.copy_(column[:, None])
            pair.lora_A["default"].weight.copy_(row[None])
        found = updates.measure(model)
        assert found["update"] == pytest.approx(1 / float(S.norm()), rel=1e-4)
        assert found["overlap"] == pytest.approx(overlap, abs=1e-4)
