"""Studies of task after task: the scores of a chain, and a small chain of each kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from milora_vl.sweep.cells import Cell
from studies import page, sequence
from studies.sequence import average, backward_transfer, run_chain
from studies.study import Study
from studies.tasks.smollm2 import NamedTopics

ARMS: dict[str, Any] = {
    "further": {"method": "lora", "protect": 0, "chain": {"start": "further"}},
    "joint": {"method": "lora", "protect": 0, "chain": {"start": "joint"}},
    "replay": {"method": "lora", "protect": 0, "chain": {"start": "further", "replay": 0.1}},
    "new": {},
    "after": {"chain": {"earlier": 8}},
}
pytestmark = pytest.mark.filterwarnings("ignore:too little calibration data")  # tiny tasks

STUDY = Study.model_validate({
        "question": "How much?", "task": "smollm2", "then": ["smollm2-groups"], "steps": 2, "batch_size": 4,
        "policy": [{"modules": "language", "method": "milora", "protect": 0.5, "rank": 4}], "arms": ARMS,
        "learning_rates": [1e-2], "seeds": 1, "reference": "further",
})  # fmt: skip


def test_scores_of_three_tasks() -> None:
    scores = [[0.6], [0.4, 0.8], [0.3, 0.5, 0.7]]
    assert average(scores) == pytest.approx((0.6 + 0.6 + 0.5) / 3)
    assert backward_transfer(scores) == pytest.approx(((0.3 - 0.6) + (0.5 - 0.8)) / 2)


@pytest.fixture(scope="module")
def chains(topics: NamedTopics, groups: NamedTopics, tmp_path_factory: pytest.TempPathFactory) -> dict[Cell, Any]:
    """Return the numbers of a short chain of each arm."""
    folder = tmp_path_factory.mktemp("factors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sequence, "load_task", lambda name: groups)
        cells = STUDY.cells()
        return {cell: run_chain(topics, STUDY, cell, folder)[0] for cell in cells}


def test_arms_that_begin_alike_are_equal_after_the_first_task(chains: dict[Cell, Any]) -> None:
    of = {cell.method: row for cell, row in chains.items()}
    for one, other in (("further", "replay"), ("new", "after")):
        assert of[one]["forgetting_1"] == pytest.approx(of[other]["forgetting_1"], rel=1e-3)
        assert of[one]["forgetting_2"] != pytest.approx(of[other]["forgetting_2"], rel=1e-3)
    assert "score_1_1" not in of["joint"]
    assert of["joint"]["score"] == (of["joint"]["score_2_1"] + of["joint"]["score_2_2"]) / 2


def test_a_finished_task_is_not_trained_again(
    chains: dict[Cell, Any], topics: NamedTopics, groups: NamedTopics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sequence, "load_task", lambda name: groups)
    cell = Cell("after", 1e-2, None, 0)
    first, _ = run_chain(topics, STUDY, cell, tmp_path)
    monkeypatch.setattr(sequence, "train", lambda *_: pytest.fail("trained again"))
    again, _ = run_chain(topics, STUDY, cell, tmp_path)
    of_both = [{key: value for key, value in numbers.items() if key != "seconds"} for numbers in (first, again)]
    assert of_both[0] == of_both[1]
    assert chains[cell]["forgetting_2"] == pytest.approx(first["forgetting_2"], rel=1e-3)


def test_the_table_has_the_scores_of_each_task(chains: dict[Cell, Any]) -> None:
    table = page.chains_table(STUDY, chains)
    assert table.header[2:5] == ("1 after 1", "1 after 2", "2 after 2")
    joint = next(row for row in table.rows if row[0] == "joint")
    assert joint[2] == joint[5] == "–"
