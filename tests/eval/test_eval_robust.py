"""Every possible answer is scored by the rule, stored and read back; no answer stops an evaluation."""

from __future__ import annotations

from pathlib import Path

import pytest

from milora_eval.answers.store import Store, read_lines, to_answer, to_line
from milora_eval.benchmark import Item
from milora_eval.benchmarks import math_answers
from milora_eval.benchmarks.own_data import METRICS
from milora_eval.data_files import load_items
from milora_eval.registry import BENCHMARKS, find_benchmark, folder_of
from milora_vl.models.generate import Reply
from support import official_data
from support.problems import raises_code

pytestmark = pytest.mark.usefixtures("picture_cache")
OFFICIAL = [name for name in BENCHMARKS if name != "emoji"]
STRANGE = [
    "",
    " \n\t",
    "9" * 10_000,
    "1/" + "9" * 9_998,
    "The answer is: " + "7" * 10_000,
    "The answer is: 1/" + "0" * 10_000,
    "[0.1, " * 2_000,
    "-1e999999",
    "٣٤٫٥%",
    "🦊" * 5_000,
    "\u202eכן\u202c",
    "a\u2028b\u0085c\x0bd\re\x00f",
    "\ud83d half a pair",
    "A" * 10_000,
    "=1+1",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return official_data.write_all(tmp_path_factory.mktemp("official"))


def items_of(name: str, data: Path) -> list[Item]:
    return find_benchmark(name).load(folder_of(find_benchmark(name), data))


@pytest.mark.parametrize("name", OFFICIAL)
def test_strange_answers_are_scored_stored_and_read_back(name: str, data: Path, tmp_path: Path) -> None:
    benchmark, items = find_benchmark(name), items_of(name, data)
    for number, text in enumerate(STRANGE):
        lines = [to_line(benchmark, item, Reply(text), f"{number}", data) for item in items]
        assert all(line["correct"] is None or 0.0 <= line["correct"] <= 1.0 for line in lines)
        store = Store(tmp_path / str(number))
        store.append(lines)
        assert [line["prediction"] for line in read_lines(store.path)] == [text] * len(items)
        for metric in benchmark.summarise(to_answer(line) for line in lines):
            assert metric.value == metric.value  # NaN is not equal to itself
        answers = [to_answer(line) for line in lines]
        if "\ud83d" not in text:  # a server's file is UTF-8
            benchmark.submission(answers, tmp_path / str(number), folder_of(benchmark, data))


@pytest.mark.parametrize(
    ("metric", "text", "answers", "value"),
    [
        ("yes_no", "Yes.", ["Yes."], 1),
        ("yes_no", "YES!", ["yes"], 1),
        ("yes_no", "NO", ["no."], 1),
        ("yes_no", "no!", ["yes"], 0),
        ("yes_no", "There is none.", ["no"], 0),
        ("vqa", "Two.", ["2"], 1),
        ("vqa", "blue", ["Blue", "Blue"], 1),
        ("vqa", "navy", ["blue", "navy"], 1),
        ("vqa", "red", ["blue"], 0),
        ("vqa", "red", ["red"] * 2 + ["blue"] * 8, 0.6),
        ("exact", "A red fox.", ["Red fox"], 1),
        ("equal", "Red", ["red"], 0),
        ("contains", "It is RED.", ["red"], 1),
        ("m4c", "the dog's", ["dog 's"], 1),
        ("anls", "helo", ["x", "hello"], 0.8),
        ("relaxed", "104", ["100", "7"], 1),
        ("box", "[-2, 0, 10, 10], [0, 0, 2, 2]", ["[0, 0, 10, 5]"], 0),  # 50 / 120
        ("box", "no box", ["[0, 0, 10, 5]"], 0),
    ],
)
def test_a_metric_of_own_data_is_what_its_name_says(metric: str, text: str, answers: list[str], value: float) -> None:
    assert METRICS[metric](text, answers) == pytest.approx(value)


@pytest.mark.parametrize("text", ["(x+y+z)**99", "9**(99*99*99*99*99)", "(99!)!"])
def test_a_formula_that_would_take_forever_is_not_waited_for(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(math_answers, "_SECONDS", 0.2)
    assert not math_answers.math_correct(f"The answer is: {text}", "7")
    assert math_answers.math_correct("The answer is: 5!", "120")


def test_files_of_another_form_are_a_message(data: Path, tmp_path: Path) -> None:
    official_data.gqa(tmp_path)
    (tmp_path / "testdev_balanced_questions.json").write_text('{"1": {"text": "Why?"}}')
    with raises_code("benchmark-file-format", says=r"benchmark gqa: .* published format: no 'question'"):
        list(load_items(find_benchmark("gqa"), tmp_path))
    (tmp_path / "test.jsonl").write_text('{"question": "1 + 1?", "answer": "#### two"}\n')
    with raises_code("benchmark-file-format", says=r"benchmark gsm8k: .* published format: could not convert"):
        list(load_items(find_benchmark("gsm8k"), tmp_path))


def test_what_a_script_stumbles_over_is_what_comes_first() -> None:
    # util.py returns at a fraction with one sign, before it reaches the empty fraction after it.
    assert not math_answers.is_equivalent("2", "\\frac.\\frac")
    assert math_answers.is_equivalent("2", "\\frac")


def test_commonsense_answers_end_where_the_next_response_begins(data: Path) -> None:
    benchmark = find_benchmark("boolq")
    item = items_of("boolq", data)[0]
    assert benchmark.score(item, "the correct answer is true\n### Response: false") == 1.0
    assert benchmark.score(item, "hm ### Response: the correct answer is true") == 0.0
