"""Studies: the trainings of a file are run, stored, shared, resumed and shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from milora_vl.common.errors import UserError
from milora_vl.sweep.cells import Cell
from studies import __main__ as command
from studies import page, runner, sequence
from studies.runner import Folder, run_study
from studies.study import Study, read_study, study_names

SMALL: dict[str, Any] = {
    "question": "Which?", "task": "smollm2", "steps": 1, "batch_size": 4, "seeds": 2, "reference": "lora",
    "policy": [{"modules": "language", "method": "lora", "rank": 4}], "learning_rates": [1e-3],
    "arms": {"lora": {}, "pissa": {"method": "pissa"}},
}  # fmt: skip


def small(**changes: Any) -> Study:
    return Study.model_validate(SMALL | changes)


def run(folder: Folder, *, retry: bool = False) -> list[str]:
    todo = [cell.name for cell in folder.to_run(folder.study.cells(), retry=retry)]
    run_study(folder, 1, retry=retry)
    return todo


@pytest.fixture(autouse=True)
def tiny_task(topics: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Studies of SmolLM2 that run in this process do so on a tiny text model."""
    monkeypatch.setattr(runner, "load_task", lambda name: topics)


@pytest.mark.parametrize("name", study_names())
def test_a_study_that_ships_is_sound(name: str) -> None:
    study = read_study(name)
    assert name.partition(".")[2].removesuffix(f"-{study.steps}") == study.task, "QUESTION.TASK or QUESTION.TASK-STEPS"
    assert study.seeds >= 3, "a claim needs three seeds"


@pytest.mark.usefixtures("real_plots")
def test_a_study_runs_goes_on_and_is_shown(tmp_path: Path) -> None:
    study = small(figure={"title": "Both learn", "arms": ["lora", "pissa"]}, learning_rates=[1e-3, 3e-3])
    folder = Folder(tmp_path / "studies" / "which.smollm2", study)
    assert len(run(folder)) == 2 * 2 * 2
    results = folder.finished()
    lost = next(iter(results))
    (folder.folder / "cells" / f"{lost.name}.json").unlink()
    folder.shared(lost).unlink()
    assert run(folder) == [lost.name], "only what is missing is run again"
    again = folder.finished()[lost]
    same = ("validation_loss", "score", "forgetting")
    assert [again[key] for key in same] == [results[lost][key] for key in same], "and it comes out the same"
    written, table = page.write(folder, "python -m studies which")
    (tmp_path / "which.smollm2.csv").write_text(
        "method,learning_rate,seed,validation_loss,score,forgetting,trainable\n"
        "removed,0.001,0,0.5,0.25,0.125,7\nlora,0.03,0,9,9,9,9\n"
    )
    rows = page.read_cells(page.document("which.smollm2", folder, tmp_path))
    elsewhere = {Cell("removed", 1e-3, None, 0), Cell("lora", 0.03, None, 0)}
    assert rows.keys() == {*results, *elsewhere}, "rows of cells that did not run here stay"
    assert rows[Cell("removed", 1e-3, None, 0)]["forgetting"] == "0.125"
    assert (tmp_path / "which.smollm2.score.png").is_file()
    assert "<span>studies</span> <span>which</span>" in written.read_text(encoding="utf-8")
    assert [row[0] for row in table.rows] == ["lora", "pissa"]


def test_cells_are_shared_kept_if_they_fail_and_made_anew_if_their_arm_changes(tmp_path: Path) -> None:
    arms = {"a": {}, "lora": {"rank": 2}, "wrong": {"method": "pissa", "rank": 4000}}
    first = Folder(tmp_path / "one", small(arms=arms, seeds=1))
    assert len(run(first)) == 3
    failure = first.failure(Cell("wrong", 1e-3, None, 0))
    assert failure is not None
    assert "rank" in failure["said"]
    assert run(first) == []
    assert run(first, retry=True) == ["wrong-lr0.001-seed0"]
    second = Folder(tmp_path / "two", small(arms={"b": {}, "lora": {"rank": 2}}, seeds=1))
    run(second)
    assert len(list((tmp_path / "shared").iterdir())) == 2, "no cell is trained twice"
    ours, theirs = first.finished()[Cell("a", 1e-3, None, 0)], second.finished()[Cell("b", 1e-3, None, 0)]
    assert theirs == ours | {"method": "b"}, "down to the seconds it took"
    changed = small(arms={"a": {}, "lora": {"rank": 1}}, seeds=1)
    assert run(Folder(tmp_path / "one", changed)) == ["lora-lr0.001-seed0"]


def test_chains_share_the_trainings_that_they_begin_with_and_no_half_written_one(
    topics: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(content: object, file: Path) -> None:
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(sequence, "load_task", lambda name: topics)
    trained: list[str] = []
    monkeypatch.setattr(sequence, "train", lambda task, model, study, cell: trained.append(cell.method))
    arms = {"a": {}, "b": {"chain": {"replay": 0.5}}}
    study = small(arms=arms, reference="a", then=["smollm2"], seeds=1)
    folder = Folder(tmp_path / "chains", study)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", broken)
        run(folder)
    assert "disk full" in (folder.failure(Cell("a", 1e-3, None, 0)) or {})["said"]
    trained.clear()
    run(folder, retry=True)
    assert len(folder.finished()) == 2
    assert trained == ["a", "a", "b"], "b trains its second task alone"


def test_missing_data_is_told_before_any_worker_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="train.json"):
        command.main(["equal.smol-llava"])
