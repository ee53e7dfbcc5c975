"""Studies: the trainings of a file are run, stored, shared, resumed and shown; the docs show the CSV's numbers."""

from __future__ import annotations

import multiprocessing
import shutil
from concurrent.futures import as_completed
from math import exp, log
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import llava_recipes
from milora_vl import apply_milora
from milora_vl.analyze.measures import decay_exponent
from milora_vl.base.errors import UserError
from milora_vl.sweep.cells import Cell
from milora_vl.sweep.curves import Ratio
from milora_vl.sweep.results import mean_of
from studies import __main__ as command
from studies import decay, page, runner
from studies.runner import Folder, all_cells, finished, run_study
from studies.study import Study, chosen, parse_study, read_study
from studies.update import Updates
from support.problems import raises_code

DOCS = Path(__file__).resolve().parents[2] / "docs" / "studies"
RULES = [{"modules": "convs.*", "method": "milora", "rank": 4}]
SMALL: dict[str, Any] = {
    "question": "Which?", "task": "digits-cnn", "steps": 3, "batch_size": 16, "policy": RULES,
    "arms": {"milora": {}, "lora": {"method": "lora"}}, "learning_rates": [1e-3, 3e-3], "seeds": 2,
}  # fmt: skip


def small(**changes: Any) -> Study:
    return parse_study(SMALL | changes, "test")


def run(folder: Folder, *, retry: bool = False) -> list[str]:
    done: list[str] = []
    run_study(folder, 1, retry=retry, on_done=lambda cell, ok, left: done.append(cell.name))
    return done


@pytest.mark.parametrize("name", llava_recipes.names("study"))
def test_a_study_that_ships_is_sound(name: str) -> None:
    study = read_study(name)
    assert name.partition(".")[2].removesuffix(f"-{study.steps}") == study.task, "QUESTION.TASK or QUESTION.TASK-STEPS"
    assert study.arms, "read_study has parsed the policy of each"
    assert study.seeds >= 3, "a claim needs three seeds"
    page_of = DOCS / f"{name.partition('.')[0]}.md"
    text = page_of.read_text(encoding="utf-8")
    assert any(f"<!-- results: {marked} -->" in text for marked in (name, page_of.stem))


@pytest.mark.parametrize("name", [n for n in llava_recipes.names("study") if (DOCS / f"{n}.csv").is_file()])
def test_docs_show_what_the_cells_say(name: str) -> None:
    text = (DOCS / f"{name.partition('.')[0]}.md").read_text(encoding="utf-8")
    assert page.documented(text, name, read_study(name), DOCS) == text


@pytest.mark.usefixtures("real_plots")
def test_a_study_runs_goes_on_and_is_shown(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "studies" / "which.digits-cnn", small(search_seeds=1))
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
    assert "<span>studies</span> <span>which</span>" in written.read_text(encoding="utf-8")
    assert [row[0] for row in table.rows] == ["milora", "lora"]


PAIR = small(arms={"a": {}, "b": {"method": "lora"}}, learning_rates=[1e-3], seeds=1)


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


def test_a_cell_that_another_study_has_is_not_trained_again(studies: Path) -> None:
    other = small(arms={"b": {}, "c": {"method": "lora", "rank": 2}}, learning_rates=[1e-3], seeds=1)
    first, second = Folder(studies / "one", PAIR), Folder(studies / "two", other)
    run(second)
    kept = first.result(Cell("a", 1e-3, None, 0)), second.result(Cell("b", 1e-3, None, 0))
    assert kept[0] is not None
    assert kept[1] is not None
    assert kept[1] == kept[0] | {"method": "b"}, "down to the seconds it took"
    assert len(list((studies / "shared").iterdir())) == 3


def test_every_seed_draws_random_components_of_its_own() -> None:
    study = small(arms={"random": {"method": "random"}, "milora": {}}, learning_rates=[1e-3])
    keys = {study.rules("random", 1e-3, seed)[0]["seed"] for seed in range(3)}
    assert keys == {0, 1, 2}
    assert study.rules("milora", 1e-3, 1) == study.rules("milora", 1e-3, 2)


def test_a_failed_cell_is_kept_and_tried_again_on_request(tmp_path: Path) -> None:
    study = small(arms={"milora": {}, "wrong": {"rank": 4000}}, learning_rates=[1e-3], seeds=1)
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
    after = small(arms={"a": {}, "b": {"method": "lora", "rank": 2}}, learning_rates=[1e-3], seeds=1)
    assert run(Folder(studies / "one", after)) == ["b-lr0.001-seed0"]


def test_an_unknown_start_of_an_arm_is_an_error() -> None:
    with pytest.raises(UserError) as raised:
        small(arms={"a": {"start": "cordaa"}})
    assert [problem.code for problem in raised.value.problems] == ["study-start"]
    with_start, plain = small(arms={"a": {"start": "corda"}}), small(arms={"a": {}})
    cell = Cell("a", 1e-3, None, 0)
    assert with_start.key(cell) != plain.key(cell), "they do not share results"


def test_arms_may_have_rates_training_and_policy_of_their_own() -> None:
    study = small(arms={
        "full": {"method": "full", "learning_rates": [1e-4]},
        "decay": {"method": "lora", "train": {"weight_decay": 0.1}},
        "head": {"policy": [{"modules": "head", "method": "full", "learning_rate": 1e-3}]},
    })  # fmt: skip
    assert [cell.learning_rate for cell in study.cells(range(1)) if cell.method == "full"] == [1e-4]
    assert study.training("decay").weight_decay == 0.1
    assert study.rules("head", 5e-3) == [{"modules": "head", "method": "full", "learning_rate": 1e-3}]
    assert study.rules("full", 1e-4)[0]["method"] == "full"


@pytest.mark.parametrize(
    ("changes", "code", "said"),
    [
        ({"stepz": 3}, "study-unknown-key", "stepz"),
        ({"arms": {"a": {"rnak": 3}}}, "policy-unknown-key", "arm a.*rnak"),
        ({"arms": {"a": {"train": {"lr": 1}}}}, "study-unknown-key", "lr"),
        ({"seeds": 0}, "study-value", "seeds"),
    ],
)
def test_a_wrong_study_is_refused(changes: dict[str, Any], code: str, said: str) -> None:
    with raises_code(code, says=said):
        small(**changes)


def test_a_question_means_all_its_tasks() -> None:
    assert chosen("components") == [n for n in llava_recipes.names("study") if n.startswith("components.")]
    with raises_code("study-unknown", hint="did you mean components"):
        chosen("componets")


def test_the_list_of_studies(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--list"]) == 0
    assert "components.minilm" in capsys.readouterr().out


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


def test_layers_are_joined_with_their_spectra() -> None:
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(6)))
    study = small(each={"modules": "*", "method": "milora", "rank": 2}, arms={"none": {}}).with_each(model)
    assert list(study.arms) == ["none", *map(str, range(6))]

    def result(loss: float) -> dict[str, Any]:
        return {"validation_loss": loss, "score": 0.0, "forgetting": 0.0}

    decays = [decay_exponent(torch.linalg.svdvals(model[place].weight.detach())) or 0.0 for place in range(6)]
    results = {Cell("none", 1e-3, None, 0): result(2.0)}
    results |= {Cell(str(place), 1e-3, None, 0): result(2.0 - decays[place]) for place in range(6)}
    found = decay.layers(model, results, 1, 2)
    assert [layer.help for layer in found] == pytest.approx(decays)
    correlation = decay.correlations(found)[0]
    assert (correlation.measure, correlation.kind, correlation.n) == ("decay", "all", 6)
    assert correlation.rho == pytest.approx(1.0)
    with pytest.raises(ValueError, match="none"):
        decay.layers(model, {}, 1, 2)


def test_a_study_of_layers_whose_cells_failed_is_shown_without_them(tmp_path: Path) -> None:
    arms = {"none": {}, "convs.0": {"policy": [{"modules": "convs.0", "method": "milora", "rank": 2}]}}
    folder = Folder(tmp_path / "decay.digits-cnn", small(arms=arms, seeds=1, learning_rates=[1e-3]))
    for cell in all_cells(folder):
        folder.keep_failure(cell, "out of memory")
    written, _ = page.write(folder, "python -m studies decay")
    assert "out of memory" in written.read_text(encoding="utf-8")
    (tmp_path / "decay.md").write_text("<!-- results: decay.digits-cnn -->\n<!-- end -->\n", encoding="utf-8")
    with raises_code("study-incomplete", message="has no layers.csv: cells have failed"):
        page.document("decay.digits-cnn", folder, tmp_path)


def test_ranks_with_ties() -> None:
    x, y = torch.tensor([1.0, 2.0, 2.0, 3.0]), torch.tensor([1.0, 3.0, 2.0, 4.0])
    assert decay.spearman(x, y) == pytest.approx(0.9486832980505139)  # scipy.stats.spearmanr
    assert decay.spearman(x, torch.ones(4)) == 0.0


def test_the_score_is_the_mean_over_the_items(trained: Path) -> None:
    folder, cell = Folder(trained / "one", PAIR), Cell("a", 1e-3, None, 0)
    result, items = folder.result(cell), folder.items(cell)
    assert result is not None
    assert result["score"] == pytest.approx(sum(items.values()) / len(items))


@pytest.mark.parametrize(
    ("study", "arm", "lora", "what", "said"),
    [
        ("curves.smol-llava", 1e-3, 1e-3, "forgetting", "0.12 times (0.11 to 0.13)"),
        ("curves.smol-llava", 1e-3, 1e-3, "forgetting_pictures", "0.30 times (0.17 to 0.55)"),
        ("curves.smol-llava-60", 1e-3, 3e-4, "forgetting", "0.43 times (0.29 to 0.62"),
        ("curves.smol-llava-60", 1e-3, 3e-4, "forgetting_pictures", "0.82 times (0.52 to 1.3)"),
        ("curves.smol-llava-60", 1e-3, 1e-3, "forgetting", "0.19 times (0.18 to 0.20)"),
        ("curves.smol-llava-60", 1e-3, 1e-3, "forgetting_pictures", "0.61 times (0.36 to 1.0)"),
    ],
)
def test_the_page_quotes_ratios_at_given_rates_as_its_cells_give_them(
    study: str, arm: float, lora: float, what: str, said: str
) -> None:
    """These ratios are in sentences, which no command writes: p = 0.9 against LoRA, paired by seed."""
    cells = page.read_cells(DOCS / f"{study}.csv")
    found = {(cell.label, cell.learning_rate, cell.seed): float(numbers[what]) for cell, numbers in cells.items()}
    logs = mean_of([log(found["milora-inputs", arm, seed] / found["lora", lora, seed]) for seed in range(3)])
    assert logs.half is not None
    ratio = Ratio(exp(logs.value), exp(logs.value - logs.half), exp(logs.value + logs.half), logs.n)
    assert ratio.text.replace(" (", " times (").startswith(said)
    assert said in " ".join((DOCS / "curves.md").read_text(encoding="utf-8").split())


def test_the_page_quotes_means_of_smol_llava_as_its_cells_give_them() -> None:
    cells = page.read_cells(DOCS / "curves.smol-llava.csv")
    rows = {"milora-inputs": (1e-3, "p = 0.9"), "lora": (3e-4, "LoRA"), "milora-inputs-0.95": (3e-3, "p = 0.95")}
    text = (DOCS / "curves.md").read_text(encoding="utf-8")
    for label, (rate, name) in rows.items():
        runs = [numbers for cell, numbers in cells.items() if (cell.label, cell.learning_rate) == (label, rate)]
        score, forgetting = (mean_of([float(run[what]) for run in runs]) for what in ("score", "forgetting"))
        assert score.half is not None
        assert forgetting.half is not None
        row = next(line for line in text.splitlines() if line.startswith(f"| {name} | {rate:.0e}".replace("e-0", "e-")))
        assert f"| {score.value:.3f} ± {score.half:.3f} | {forgetting.value:.3f} ± {forgetting.half:.3f} |" in row
