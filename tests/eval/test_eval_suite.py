"""Suites: the paper's seven columns and their mean, tables in every format, comparison of two evaluations."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from milora_eval import stats
from milora_eval.__main__ import main
from milora_eval.answers.store import Store, to_line
from milora_eval.benchmark import MissingData
from milora_eval.registry import SUITES, find_benchmark, folder_of
from milora_eval.scores.compare import compare
from milora_eval.scores.results import numbers, read_results, require_lines, write_results
from milora_vl.models.generate import Reply
from support import official_data

pytestmark = pytest.mark.usefixtures("picture_cache")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return official_data.write_all(tmp_path_factory.mktemp("official"))


def stored(suite: str, data: Path, folder: Path, right_every: int) -> Path:
    """Return a results folder in which every n-th answer is right."""
    lines = []
    for name in SUITES[suite].benchmarks:
        benchmark = find_benchmark(name)
        items = benchmark.load(folder_of(benchmark, data))
        for number, item in enumerate(items):
            text = item.answers[0] if item.answers and number % right_every == 0 else "Not this one"
            lines.append(to_line(benchmark, item, Reply(text), f"{name}/{item.id}", data))
    Store(folder).finish(lines)
    about = {"suite": suite, "which": folder.name, "data": str(data), "limit": None, "model": "m"}
    write_results(folder, about | numbers(folder, suite))
    return folder


def test_the_papers_suite_runs_whole_and_prints_its_mean_unrounded(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in SUITES["llava-paper"].benchmarks:
        monkeypatch.setattr(type(find_benchmark(name)), "max_new_tokens", 4)
    flags = ["--suite", "llava-paper", "--data", str(data), "--limit", "2", "--output_dir", str(tmp_path)]
    assert main(["run", "--model", "tiny", *flags]) == 0
    shown = capsys.readouterr().out
    results = read_results(tmp_path / "eval" / "llava-paper" / "base")
    headlines = [entry["metrics"][0]["value"] for entry in results["benchmarks"]]
    assert results["mean"]["of"] == ["vqav2", "gqa", "vizwiz", "scienceqa", "textvqa", "pope", "mmbench"]
    assert results["mean"]["value"] == pytest.approx(100 * sum(headlines) / 7)
    assert re.search(rf"mean of 7 +{re.escape(repr(results['mean']['value']))}", shown)
    for word in ("pope: mean F1", "protocol", "version", "llava", "20230712"):
        assert word in shown


def test_a_suite_says_of_all_benchmarks_whose_files_are_missing(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "data" / "gqa" / "testdev_balanced_questions.json").unlink()
    (tmp_path / "data" / "vizwiz" / "val.json").unlink()
    flags = ["--suite", "llava-paper", "--data", str(tmp_path / "data"), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(MissingData) as caught:
        main(["run", "--model", "tiny", *flags])
    assert [problem.where for problem in caught.value.problems] == ["benchmark gqa", "benchmark vizwiz"]


@pytest.fixture
def few_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allow intervals from the few questions of the tests."""
    monkeypatch.setattr(stats, "MIN_GROUPS", 2)
    monkeypatch.setattr(stats, "MIN_UNLIKE", 1)


@pytest.mark.usefixtures("few_are_enough")
def test_two_evaluations_are_compared_with_intervals_and_tests(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = stored("llava-paper", data, tmp_path / "a", 3), stored("llava-paper", data, tmp_path / "b", 1)
    assert main(["compare", str(a), str(b)]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"gqa accuracy: B - A = \+\d.*95 % interval .*McNemar p = .*bootstrap p = ", shown)
    assert re.search(r"pope mean F1: B - A = \+\d.*95 % interval .*bootstrap p = ", shown)
    pairs = {
        (pair.benchmark, pair.b.name): pair for each in compare(*map(require_lines, (a, b))) for pair in each.pairs
    }
    f1 = pairs["pope", "mean F1"].difference
    assert f1 is not None
    assert (f1.p_value, f1.n) == (None, 18)
    assert f1.value == pytest.approx(pairs["pope", "mean F1"].b.value - pairs["pope", "mean F1"].a.value)
    assert f1.low is not None
    assert f1.high is not None
    assert f1.low <= f1.value <= f1.high
    assert pairs["pope", "random accuracy"].difference is None
    circular = pairs["mmbench", "circular accuracy"].difference  # over questions, not over rotations
    assert circular is not None
    assert circular.n == 3
