"""`milora_eval compare`: paired by question, over the common ones; gain on targets, change elsewhere."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from milora_eval.__main__ import main
from milora_eval.answers.store import Store, to_line
from milora_eval.benchmark import Answer, Item
from milora_eval.benchmarks.emoji import EmojiBenchmark
from milora_eval.benchmarks.pope import POPE
from milora_eval.registry import find_benchmark
from milora_eval.scores.compare import Pair, compare
from milora_eval.scores.results import numbers, read_results, write_results
from milora_eval.scores.table import write_tables
from milora_eval.stats import (
    MIN_GROUPS,
    clustered_stderr,
    mean_stderr,
    paired_difference,
    resampled_difference,
    stratified_mean,
    stratified_stderr,
)
from milora_vl.common.errors import UserError
from milora_vl.models.generate import Reply
from milora_vl.report.model_card import update_scores
from milora_vl.report.page import write_report
from milora_vl.report.read_run import read_run
from milora_vl.report.tables import change
from support.drawn import encoded
from support.eval_questions import write_questions
from support.problems import raises_code

SETTINGS = {"weights": "w", "template": "vicuna_v1", "decoding": "greedy", "dtype": "float32", "key": "k"}


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of 60 questions each, which are benchmarks."""
    folder = tmp_path_factory.mktemp("questions")
    for name in ("birds", "cells", "signs", "charts", "maps", "tiny"):
        rows = [{"id": f"{i}", "question": f"{name} {i}?", "answer": "yes"} for i in range(8 if name == "tiny" else 60)]
        (folder / f"{name}.json").write_text(json.dumps(rows))
    return folder


def evaluated(folder: Path, questions: Path, right: dict[str, int], *, skip: int = 0, **settings: Any) -> Path:
    """Return a results folder in which the first N answers to each benchmark are right."""
    lines = []
    for name, num_right in right.items():
        benchmark = find_benchmark(str(questions / f"{name}.json"))
        items = benchmark.load(questions)[skip:]
        replies = [Reply("yes" if index < num_right else "no") for index in range(len(items))]
        pairs = zip(items, replies, strict=True)
        lines += [to_line(benchmark, item, reply, item.id, questions) for item, reply in pairs]
    Store(folder).finish(lines)
    limits = {"max_new_tokens": dict.fromkeys(right, 128)}
    about = {"suite": "s", "which": folder.name, "generation": SETTINGS | limits | settings}
    write_results(folder, about | numbers(folder, "s"))
    return folder


def read(arguments: list[Any], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["compare", *map(str, arguments), "--format", "json"]) == 0
    return dict(json.loads(capsys.readouterr().out))


def test_gain_and_change_are_means_of_paired_differences(
    questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = evaluated(tmp_path / "base", questions, {"birds": 12, "charts": 30, "maps": 48})
    a = evaluated(tmp_path / "a", questions, {"birds": 42, "charts": 24, "maps": 48})
    b = evaluated(tmp_path / "b", questions, {"birds": 30, "charts": 36, "maps": 42})
    found = read([base, a, b, "--targets", "birds"], capsys)
    assert (found["targets"], found["held_out"], found["notes"]) == (["birds"], ["charts", "maps"], [])
    assert [stage["name"] for stage in found["runs"]] == ["a", "b"]
    assert [stage["gain"]["value"] for stage in found["runs"]] == pytest.approx([50, 30])
    kept = [stage["held_out"] for stage in found["runs"]]
    assert [each["value"] for each in kept] == pytest.approx([-5, 0])
    # charts: 6 of 60 lost by a; 6 won by b, which lost 6 of maps
    lost = clustered_stderr([-1.0] * 6 + [0.0] * 54, range(60))
    assert lost is not None
    assert [each["stderr"] for each in kept] == pytest.approx([100 * lost / 2, 100 * math.hypot(lost, lost) / 2])
    assert kept[0]["high"] - kept[0]["low"] == pytest.approx(2 * 1.96 * 100 * lost / 2)
    pair = found["runs"][0]["pairs"]["charts"]
    assert (pair["a"]["value"], pair["b"]["value"], pair["difference"]["only_a"]) == (0.5, 0.4, 6)

    assert main(["compare", *map(str, (base, a, b)), "--targets", "birds"]) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("target: birds", "+50.0 ± ", "held out: charts", "mean of 2 held out"))
    assert main(["compare", *map(str, (base, a, b))]) == 0
    shown = capsys.readouterr().out
    assert "mean of 3" in shown
    assert "target" not in shown


def test_a_run_folder_stands_for_all_its_suites(
    questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for which, birds, maps in (("base", 0, 60), ("final", 60, 30), ("checkpoint-5", 30, 45)):
        evaluated(tmp_path / "run" / "eval" / "birds" / which, questions, {"birds": birds})
        evaluated(tmp_path / "run" / "eval" / "rest" / which, questions, {"maps": maps, "charts": 30})
    run = tmp_path / "run"
    found = read([run, run / "checkpoint-5", run, "--targets", "birds"], capsys)
    assert [stage["gain"]["value"] for stage in found["runs"]] == pytest.approx([50, 100])
    assert [stage["held_out"]["value"] for stage in found["runs"]] == pytest.approx([-12.5, -25])
    evaluated(run / "eval" / "again" / "final", questions, {"maps": 29})
    with raises_code("compare-two-evaluations", says="two evaluations of data:maps"):
        main(["compare", str(run), str(run), "--targets", "birds"])
    with raises_code("eval-no-answers"):
        main(["compare", str(tmp_path / "run" / "checkpoint-6"), str(run), "--targets", "birds"])


def test_what_cannot_be_compared_is_refused_or_said(
    questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = evaluated(tmp_path / "base", questions, {"birds": 12, "charts": 30})
    run = evaluated(tmp_path / "a", questions, {"birds": 42, "charts": 24})
    with pytest.raises(UserError, match="--targets: (.|\n)*did you mean birds"):
        main(["compare", str(base), str(run), "--targets", "bird"])
    sampled = evaluated(tmp_path / "sampled", questions, {"birds": 42}, decoding="sampled")
    found = read([base, sampled, "--targets", "birds"], capsys)
    assert "sampled was evaluated with another decoding than the base" in found["notes"]
    path = run / "predictions.jsonl"
    (questions / "other").mkdir()
    rows = (questions / "charts.json").read_text()

    def answer_other(old: str, new: str) -> None:
        """Answer a file of the same name with other questions."""
        (questions / "other" / "charts.json").write_text(rows.replace(old, new))
        answered_birds = [line for line in path.read_text().splitlines(keepends=True) if '"data:birds"' in line]
        limits = {"birds": 128, "charts": 128}
        evaluated(run, questions / "other", {"charts": 24}, max_new_tokens=limits)
        path.write_text("".join([*answered_birds, path.read_text()]))

    answer_other("charts 7?", "charts seven?")
    found = read([base, run, "--targets", "birds"], capsys)
    assert found["notes"] == ["charts: compared on the 59 questions that all have (the base 60, a 60)"]
    answer_other("charts ", "chart ")
    with raises_code("eval-nothing-in-common", hint="left out: charts is not in B"):
        main(["compare", str(base), str(evaluated(tmp_path / "other", questions, {"signs": 4}))])
    assert read([base, run, "--targets", "birds"], capsys)["notes"] == [
        "left out: charts has no question in common (the base 60, a 60)"
    ]


def test_other_rules_are_refused(data_of_gqa: list[Path]) -> None:
    with raises_code("compare-other-rules", says="gqa in A, gqa@official in B"):
        main(["compare", *map(str, data_of_gqa)])


@pytest.fixture
def data_of_gqa(tmp_path: Path) -> list[Path]:
    from support import official_data

    official_data.gqa(tmp_path / "gqa")
    folders = []
    for name in ("gqa", "gqa@official"):
        benchmark = find_benchmark(name)
        lines = [to_line(benchmark, item, Reply("red"), item.id, tmp_path) for item in benchmark.load(tmp_path / "gqa")]
        Store(tmp_path / name).finish(lines)
        write_results(tmp_path / name, {"suite": "gqa", "which": name} | numbers(tmp_path / name, "gqa"))
        folders.append(tmp_path / name)
    return folders


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_questions(tmp_path / "emoji")


def answered(data: Path, right: set[str]) -> list[dict[str, Any]]:
    """Return an answer to every item, right if its id is in `right`."""
    benchmark = EmojiBenchmark()
    return [
        to_line(benchmark, item, Reply(item.answers[0] if item.id in right else "nonsense"), item.id, data)
        for item in benchmark.load(data)
    ]


def pairs_of(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> dict[str, Pair]:
    return {pair.b.name: pair for each in compare(a, b) for pair in each.pairs}


def test_differences_are_paired_by_question_whatever_order_and_ids(data: Path) -> None:
    a = answered(data, {"colour-red", "colour-green"})
    b = answered(data, {"colour-red", "colour-blue", "colour-white", "yes_no-red"})
    pairs = pairs_of(a, [line | {"id": f"{n}", "image_file": "moved.png"} for n, line in enumerate(b[::-1])])
    colour = pairs["colour"].difference
    assert colour is not None
    assert (colour.value, colour.only_a, colour.only_b, colour.n) == (0.25, 1, 2, 4)
    assert pairs["colour"].a.value == 0.5
    overall = pairs["mean over types"].difference
    assert overall is not None
    assert overall.value == pytest.approx(pairs["mean over types"].b.value - pairs["mean over types"].a.value)
    assert overall.n == 22
    assert pairs == pairs_of(a, b)


def test_only_equal_questions_are_compared(data: Path, tmp_path: Path) -> None:
    """An id may belong to another question, and a picture may be another one under the same name."""
    a, b = answered(data, set()), answered(data, {"colour-red"})
    assert pairs_of(a, b[:10])["mean over types"].b.n == 10
    shutil.copytree(data, tmp_path / "copy")
    for picture in (tmp_path / "copy" / "images").iterdir():
        picture.write_bytes(encoded("red"))
    (text_only,) = compare(a, answered(tmp_path / "copy", set()))
    assert text_only.n == sum(line["image_file"] is None for line in a)
    assert text_only.asked == (22, 22)


def test_a_renamed_file_of_own_questions_is_compared(
    questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "moved").mkdir()
    shutil.copy(questions / "birds.json", tmp_path / "moved" / "parrots.json")
    base = evaluated(tmp_path / "base", questions, {"birds": 0, "cells": 0})
    run = evaluated(tmp_path / "run", tmp_path / "moved", {"parrots": 60})
    found = read([base, run, "--targets", "birds"], capsys)
    assert found["runs"][0]["gain"]["value"] == 100
    assert found["notes"] == ["left out: cells is not in run"]


def test_every_place_shows_the_one_comparison_over_equal_questions(tmp_path: Path) -> None:
    """The base has answered 40 questions, the tuned model all 200 of a shuffled copy, and both answer alike."""
    rows = [{"question": f"{n}?", "answer": "yes" if n < 80 else "no"} for n in range(200)]
    (tmp_path / "all.json").write_text(json.dumps(rows))
    (tmp_path / "moved").mkdir()
    (tmp_path / "moved" / "all.json").write_text(json.dumps(rows[::-1]))
    run = tmp_path / "run"
    for which, folder, count in (("final", tmp_path / "moved", 200), ("base", tmp_path, 40)):
        evaluated(run / "eval" / "all" / which, folder, {"all": 200}, skip=0 if count == 200 else -count)
    lines = (run / "eval" / "all" / "base" / "predictions.jsonl").read_text()
    assert lines.count('"correct": 0.0') == 40
    folder = run / "eval" / "all" / "final"
    write_tables(run / "eval" / "all" / "base")  # the base's own evaluation comes last
    (entry,) = read_results(folder)["comparison"]["benchmarks"]
    assert (entry["n"], entry["asked"], entry["outcomes"]["never"]) == (40, [40, 200], 40)
    (run / "recipe.yaml").write_text("model: tiny\n")
    (_, score), table = read_run(run).headline() or (), (folder / "table.md").read_text()
    assert (score.before["value"], score.after["value"], change(score)) == (0.0, 0.0, "+0.0")
    assert "40 questions that all have" in write_report(run).read_text(encoding="utf-8")
    assert re.search(r"\| 0\.0 +\| 0\.0 +\| \+0\.0", table)
    assert "40 questions that all have" in table
    (run / "README.md").write_text("---\nlicense: other\n---\n<!-- scores -->\n<!-- end of scores -->")
    update_scores(run)
    (stored,) = ModelCard.load(run / "README.md").data.eval_results
    assert (stored.dataset_name, stored.metric_value) == ("all", 0.0)


ROOT = Path(__file__).resolve().parents[2]


def test_the_error_of_a_mean_over_types_is_that_of_repeated_experiments() -> None:
    """All questions about a picture share its difficulty; 300 experiments give the true spread."""

    def experiment(rng: random.Random) -> tuple[list[float], list[str], list[int]]:
        values, types, pictures = [], [], []
        for picture in range(60):
            shared = rng.gauss(0, 0.25)
            for kind, chance in (("a", 0.3), ("a", 0.3), ("b", 0.6)):
                values.append(float(rng.random() < chance + shared))
                types.append(kind)
                pictures.append(picture)
        return values, types, pictures

    rng = random.Random(1)
    runs = [experiment(rng) for _ in range(300)]
    spread = statistics.stdev(stratified_mean(values, types) for values, types, _ in runs)
    told = statistics.mean(stratified_stderr(*run) or 0.0 for run in runs)
    assert told == pytest.approx(spread, rel=0.1)


def test_a_paired_difference_is_sharper_than_two_errors_apart() -> None:
    rng = random.Random(2)
    a = [float(rng.random() < 0.5) for _ in range(500)]
    b = [1.0 if value or rng.random() < 0.1 else 0.0 for value in a]
    found = paired_difference(a, b)
    apart = math.hypot(mean_stderr(a) or 0, mean_stderr(b) or 0)
    assert found.value == pytest.approx(statistics.mean(b) - statistics.mean(a))
    assert found.stderr is not None
    assert found.stderr < apart / 2
    assert found.low is not None
    assert found.high is not None
    assert found.low < found.value < found.high
    assert found.high - found.low == pytest.approx(2 * 1.96 * found.stderr, rel=0.15)
    assert (found.only_a, found.only_b) == (0, sum(b) - sum(a))


def test_questions_about_one_picture_count_once() -> None:
    rng = random.Random(0)
    a, b = ([float(rng.random() < 0.5) for _ in range(58)] for _ in range(2))
    assert paired_difference(a, b).p_bootstrap is not None
    found = paired_difference(a, b, clusters=[index // 2 for index in range(58)])
    assert (found.low, found.p_value, found.p_bootstrap) == (None,) * 3
    assert "from 29 items" in found.note


@pytest.mark.parametrize(("only_a", "only_b"), [(0.25, 0.25), (0.15, 0.05), (0.02, 0.5), (0.0, 0.9), (0.02, 0.0)])
def test_an_interval_that_misses_the_truth_is_rarely_shown(only_a: float, only_b: float) -> None:
    """Of all comparisons of the fewest questions that are allowed."""
    rng, missed, times = random.Random(0), 0, 200
    for _ in range(times):
        drawn = [rng.random() for _ in range(MIN_GROUPS)]
        a = [float(x < only_a) for x in drawn]
        b = [float(x > 1 - only_b) for x in drawn]
        found = paired_difference(a, b, resamples=300)
        if found.low is not None and found.high is not None:
            missed += not found.low - 1e-9 <= only_b - only_a <= found.high + 1e-9
    assert missed / times <= 0.12  # 0.09, plus the sampling error of 200 draws


@pytest.mark.parametrize(("items", "unlike", "has_interval"), [(30, 5, True), (30, 4, False), (29, 5, False)])
def test_an_interval_needs_thirty_items_of_which_five_differ(items: int, unlike: int, has_interval: bool) -> None:
    found = paired_difference([0.0] * items, [1.0] * unlike + [0.0] * (items - unlike))
    assert (found.low is not None) == (found.high is not None) == has_interval
    assert (found.note == "") == has_interval


def test_the_error_of_an_f1_is_that_of_drawing_pictures_again() -> None:
    rng = random.Random(0)
    answers = []
    for picture in range(80):
        skill = rng.random()  # the questions about a picture are equal
        for name in ("random", "popular"):
            for label in ("yes", "no", "yes"):
                said = label if rng.random() < skill else {"yes": "no", "no": "yes"}[label]
                item = Item("x", (), answers=(label,), kind=name, group=f"p{picture}")
                answers.append(Answer(item, said, float(said == label)))
    headline = POPE().summarise(answers)[0]
    stderr, *_ = resampled_difference(
        lambda drawn: POPE().summarise([answers[index] for index, _ in drawn])[0].value,
        [answer.item.group for answer in answers],
        400,
    )
    assert headline.stderr == pytest.approx(stderr, rel=0.15)
