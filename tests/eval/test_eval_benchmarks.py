"""Every benchmark from its official files to its submission: LLaVA's prompts, answers by `tiny`, scores, files."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pandas
import pytest

from milora_eval import run
from milora_eval.answers.questions import select
from milora_eval.answers.store import read_lines
from milora_eval.benchmark import Answer
from milora_eval.benchmarks.math_answers import is_equivalent
from milora_eval.data_files import load_items
from milora_eval.registry import BENCHMARKS, find_benchmark, folder_of, has_files
from milora_vl.common.errors import DataError
from milora_vl.models.generate import Prompt, prompt_ids
from support import official_data
from support.llava_oracle import llama_tokenizer, llava_train
from support.problems import raises_code

pytestmark = pytest.mark.usefixtures("picture_cache")
Made = tuple[Any, Any]
Evaluated = Callable[[str], tuple[dict[str, Any], Path]]
SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
MEDICAL = (
    "\nFor questions that can be answered with a yes or no, just answer yes or no."
    " Otherwise, provide an answer in the medical domain."
)

# The text that LLaVA's scripts append to "<image>\n", for the last item unless another one is named.
PROMPTS: dict[str, tuple[int, str]] = {
    "vqav2": (1, " Is it  red? " + SHORT),
    "vqav2-testdev": (0, "What is it?" + SHORT),
    "gqa": (0, "What color is it?" + SHORT),
    "vizwiz": (0, "What is this? can i eat it? " + UNANSWERABLE + SHORT),
    "vizwiz-test": (0, "Which one?" + UNANSWERABLE + SHORT),
    "scienceqa": (1, "Context: Look at it.\nQuestion: Which color?\nOptions: (A) red (B) green (C) blue" + LETTER),
    "scienceqa-all": (0, "Context: N/A\nQuestion: Which color?\nOptions: (A) red (B) green (C) blue" + LETTER),
    "textvqa": (2, "what is written?\nReference OCR token: STOP, GREEN" + SHORT),
    "textvqa-no-ocr": (2, "what is written?" + SHORT),
    "pope": (0, "Is there a disc in the image?" + SHORT),
    "mmbench": (0, "Look.\nWhich\tcolor?\nA. red\nB. green\nC. blue\nD. yellow, or = none" + LETTER),
    "mmbench-cn": (1, "Look.\n哪种颜色?\nA. green\nB. blue\nC. yellow, or = none\nD. red\n请直接回答选项字母。"),
    "mmbench-test": (-1, "Which\tcolor?\nA. blue\nB. red\nC. green" + LETTER),  # an option "None" counts as missing
    "mme": (1, "Is it a dog?" + SHORT),
    "seed-bench": (2, "Which color?\nA. red\nB. green\nC. blue\nD. none" + LETTER),
    "mm-vet": (0, "What is it? "),
    "llava-bench": (0, "Describe it."),
    "mmmu": (0, "Which color is <image 1>?\n(A) red\n(B) green\n(C) blue\n" + LETTER),
    "chartqa": (0, "How many?" + SHORT),
    "cub200": (0, f"What species is the bird in this photo?{LETTER}\nA. Bird A\nB. Bird B\nC. Bird C"),
    "docvqa": (0, "What title?" + SHORT),
    "infovqa": (0, "What title?" + SHORT),
    "okvqa": (0, "What color is the disc?" + SHORT),
    "ai2d": (1, "Which color?\nA. red\nB. green\nC. blue" + LETTER),
    "realworldqa": (0, f"Which color?\n\nA. red\nB. green\n{official_data.ASKED}"),
    "mmstar": (0, "Which color?\nOptions: A: red, B: green, C: blue, D: none" + LETTER.removesuffix(".")),
    "pathvqa": (1, f"Look at the medical image and answer the following question: is it red?{MEDICAL}"),
}
SUBMISSIONS = {
    "vqav2-testdev": ("vqav2_test-dev2015_results.json", [{"question_id": 5000}, {"question_id": 6000, "answer": ""}]),
    "vizwiz-test": ("vizwiz_test.json", [{"image": "VizWiz_test_00000000.jpg"}]),
    "gqa": ("testdev_balanced_predictions.json", [{"questionId": f"0{i}{j}"} for i in range(3) for j in range(2)]),
    "docvqa": ("docvqa_val.json", [{"questionId": i} for i in range(3)]),
    "textvqa": ("textvqa_val.json", [{"question_id": 100 * i + j} for i in range(3) for j in range(2)]),
    "seed-bench": ("seed_bench_predictions.jsonl", [{"question_id": f"{i}"} for i in range(3)]),
}
FREE_FORM = ("mm-vet", "llava-bench")
OFFICIAL = [name for name in BENCHMARKS if name != "emoji"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return official_data.write_all(tmp_path_factory.mktemp("official"))


@pytest.fixture(scope="module")
def evaluated(tiny_llava: Callable[..., Made], data: Path, tmp_path_factory: pytest.TempPathFactory) -> Evaluated:
    """Return results and their folder per benchmark; each benchmark runs once for all tests."""
    model = tiny_llava()

    @cache
    def evaluate(name: str) -> tuple[dict[str, Any], Path]:
        benchmark, output = find_benchmark(name), tmp_path_factory.mktemp("run")
        benchmark.max_new_tokens = 3
        results = run(*model, [benchmark], data_dir=data, output_dir=output)
        assert results is not None
        return results, output / "eval" / name / "final"

    return evaluate


@pytest.mark.parametrize("name", OFFICIAL)
def test_from_official_files_to_numbers(name: str, evaluated: Evaluated, data: Path) -> None:
    benchmark = find_benchmark(name)
    assert has_files(benchmark, data)
    results, folder = evaluated(name)
    entry = results["benchmarks"][0]
    lines = read_lines(folder / "predictions.jsonl")
    assert entry["n"] == len(lines) > 0
    assert entry["protocol"] == benchmark.protocol
    assert bool(entry["metrics"]) == (not name.endswith(("-test", "-testdev")) and name not in FREE_FORM)


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_are_llavas_byte_for_byte(name: str, data: Path) -> None:
    benchmark = find_benchmark(name)
    number, expected = PROMPTS[name]
    turns = benchmark.prompt(benchmark.load(folder_of(benchmark, data))[number])
    assert [turn.text for turn in turns] == ["<image>\n" + expected]
    assert benchmark.form == "exact"


@pytest.mark.parametrize(
    ("name", "form"), [(name, form) for name, forms in official_data.OTHER_FORMS.items() for form in range(len(forms))]
)
def test_the_same_questions_are_read_from_every_form_of_the_files(
    name: str, form: int, data: Path, tmp_path: Path
) -> None:
    official_data.OTHER_FORMS[name][form](tmp_path / name)
    benchmark = find_benchmark(name)
    expected = benchmark.load(folder_of(benchmark, data))
    assert has_files(benchmark, tmp_path)
    items = load_items(benchmark, folder_of(benchmark, tmp_path))[: len(expected)]
    assert [(item.question, item.answers, item.kind) for item in items] == [
        (item.question, item.answers, item.kind) for item in expected
    ]
    right = [benchmark.score(item, item.answers[0]) for item in items]
    assert right == [benchmark.score(item, item.answers[0]) for item in expected]
    assert all(Path(item.images[0]).is_file() for item in items)


def test_tables_with_the_same_names_are_told_apart_by_their_content(tmp_path: Path) -> None:
    for name in ("ai2d", "realworldqa", "pathvqa", "chartqa"):
        folder = tmp_path / name
        (official_data.OTHER_FORMS[name][0] if name == "chartqa" else official_data.WRITERS[name])(folder)
        found = [
            other for other in ("ai2d", "realworldqa", "pathvqa", "chartqa") if has_files(find_benchmark(other), folder)
        ]
        assert found == [name]
    with raises_code("benchmark-file-format", says="has other questions"):
        load_items(find_benchmark("pathvqa"), tmp_path / "ai2d")


def test_every_row_without_a_readable_picture_is_named(tmp_path: Path) -> None:
    official_data.ai2d_table(tmp_path)
    path = tmp_path / "AI2D_TEST.tsv"
    head, *rows = path.read_text().splitlines()
    broken = [
        rows[0].rsplit("\t", 1)[0] + "\tbm90IGEgcGljdHVyZQ" + "=" * 2 + "A" * 60,
        rows[1],
        rows[2].rsplit("\t", 1)[0] + "\t77",
    ]
    path.write_text("\n".join([head, *broken]))
    with pytest.raises(DataError) as caught:
        load_items(find_benchmark("ai2d"), tmp_path)
    assert [str(problem.where) for problem in caught.value.problems] == [f"{path}, row 1", f"{path}, row 3"]
    (tmp_path / "test-0.parquet").write_bytes(b"PAR1 cut")
    with raises_code("table-syntax", where=str(tmp_path / "test-0.parquet")):
        load_items(find_benchmark("ai2d"), tmp_path)


def test_mmstar_has_its_capabilities_and_axes(data: Path) -> None:
    benchmark = find_benchmark("mmstar")
    items = benchmark.load(folder_of(benchmark, data))
    answers = [Answer(item, "a", benchmark.score(item, "a")) for item in items]
    found = {metric.name: (metric.value, metric.detail) for metric in benchmark.summarise(answers)}
    assert found["accuracy"] == (pytest.approx(1 / 3), False)
    assert found["axis: geometry"] == (0.5, True)


def test_pathvqa_reports_both_types_and_f1(data: Path) -> None:
    benchmark = find_benchmark("pathvqa")
    items = benchmark.load(folder_of(benchmark, data))
    texts = ("liver", "No.", "a kidney")
    answers = [Answer(item, text, benchmark.score(item, text)) for item, text in zip(items, texts, strict=True)]
    found = {metric.name: metric.value for metric in benchmark.summarise(answers)}
    assert found == {"exact match": pytest.approx(2 / 3), "open": 0.5, "yes/no": 1.0, "F1": pytest.approx(5 / 9)}


@pytest.mark.parametrize("name", ["boolq", "obqa"])
def test_text_prompts_have_the_indentation_of_the_script(name: str, data: Path) -> None:
    benchmark = find_benchmark(name)
    (turn,) = benchmark.prompt(benchmark.load(data)[0])
    indent = "\n" + 16 * " "
    question = f"{indent}### Instruction:{indent}Which?\n\nAnswer format: x\n{indent}### Response:{indent}"
    assert turn.text == f"{ALPACA} \n{question}"
    assert (benchmark.num_beams, benchmark.max_new_tokens, benchmark.form) == (4, 32, "raw")


def test_mathematics_is_asked_step_by_step(data: Path) -> None:
    (item,) = find_benchmark("gsm8k").load(folder_of(find_benchmark("gsm8k"), data))
    assert item.question == f"{ALPACA}\n\n### Instruction:\n1 + 1?\n\n### Response: Let's think step by step."
    assert find_benchmark("gsm8k").score(item, "The answer is: 1,002. Instruction: The answer is: 3") == 1.0
    assert find_benchmark("gsm8k").score(item, "The answer is: 1,002. Question: The answer is: 3") == 0.0
    assert find_benchmark("gsm8k").score(item, "The answer is: 100,200") == 1.0  # the grader accepts a factor of 100
    (item,) = find_benchmark("math").load(folder_of(find_benchmark("math"), data))
    assert find_benchmark("math").score(item, "so. The answer is: 0.5") == 1.0
    assert find_benchmark("math").score(item, "Question of halves. The answer is: 0.5") == 1.0
    assert not is_equivalent("nan", "x/2")
    assert is_equivalent("7", "x/2")
    assert is_equivalent("2*y", "y*2")
    assert not is_equivalent("2*beta", "beta*2")  # sympy's function


@pytest.mark.parametrize("kind", ["legacy", "prepend"])
def test_the_ids_are_those_of_llavas_evaluation(kind: str, data: Path) -> None:
    llava_train()
    from llava.constants import IMAGE_TOKEN_INDEX
    from llava.conversation import conv_templates
    from llava.mm_utils import tokenizer_image_token

    tokenizer = llama_tokenizer(kind)
    for name in PROMPTS:
        benchmark = find_benchmark(name)
        for item in benchmark.load(folder_of(benchmark, data)):
            conversation = conv_templates["vicuna_v1"].copy()
            conversation.append_message(conversation.roles[0], item.question)
            conversation.append_message(conversation.roles[1], None)
            theirs = tokenizer_image_token(conversation.get_prompt(), tokenizer, IMAGE_TOKEN_INDEX)
            prompt = Prompt(benchmark.prompt(item), item.images, benchmark.form)
            assert prompt_ids(prompt, tokenizer, "vicuna_v1", image_token_id=-200, image_tokens=1) == theirs


def test_a_question_that_several_sets_ask_is_asked_once(evaluated: Evaluated) -> None:
    results, folder = evaluated("pope")
    lines = read_lines(folder / "predictions.jsonl")
    assert (results["asked"], len(lines)) == (12, 18)  # random and adversarial are alike here
    texts = {(line["image"], line["question"]): line["prediction"] for line in lines}
    assert all(line["prediction"] == texts[line["image"], line["question"]] for line in lines)


@pytest.mark.parametrize("name", SUBMISSIONS)
def test_submissions_have_the_exact_form(name: str, evaluated: Evaluated) -> None:
    _, folder = evaluated(name)
    file, expected = SUBMISSIONS[name]
    path = folder / "submission" / name / file
    rows = read_lines_of(path) if path.suffix == ".jsonl" else json.loads(path.read_text(encoding="utf-8"))
    keys = {key for row in rows for key in row}
    assert len(keys) == 2
    assert [{key: row[key] for key in own} for row, own in zip(rows, expected, strict=True)] == expected


def test_the_upload_of_mmbench_has_llavas_columns(evaluated: Evaluated) -> None:
    _, folder = evaluated("mmbench")
    path = folder / "submission" / "mmbench" / "mmbench_dev.xlsx"
    table = pandas.read_excel(path, dtype=object, keep_default_na=False)
    assert list(table) == ["index", "question", "A", "B", "C", "D", "prediction", "answer", "split"]
    answers = {line["meta"]["index"]: line["prediction"] for line in read_lines(folder / "predictions.jsonl")}
    assert list(table["prediction"]) == [answers[index] for index in range(3)]
    assert list(table["D"]) == ["yellow, or = none", "", ""]


def test_free_form_answers_are_written_for_the_official_judges(evaluated: Evaluated) -> None:
    _, folder = evaluated("mm-vet")
    assert set(json.loads((folder / "submission" / "mm-vet" / "mm-vet_results.json").read_text())) == {
        "v1_0",
        "v1_1",
        "v1_2",
    }
    _, folder = evaluated("llava-bench")
    rows = read_lines_of(folder / "submission" / "llava-bench" / "answers.jsonl")
    assert [(row["question_id"], row["prompt"]) for row in rows] == [(i, "Describe it.") for i in range(3)]


def read_lines_of(path: Path) -> list[dict[str, Any]]:
    return list(map(json.loads, path.read_text().splitlines()))


def test_mme_pairs_stand_together_for_its_script(evaluated: Evaluated) -> None:
    _, folder = evaluated("mme")
    rows = [line.split("\t") for line in (folder / "submission" / "mme" / "artwork.txt").read_text().splitlines()]
    assert [row[0] for row in rows] == ["0000.png", "0000.png", "0001.png", "0001.png"]
    assert [row[2] for row in rows] == ["Yes", "No", "Yes", "No"]
    assert rows[1][1] == "Is it a dog?  Please answer yes or no."
    assert all(len(row) == 4 for row in rows)


def test_a_question_of_mmbench_that_the_limit_cut_is_left_out(data: Path) -> None:
    benchmark = find_benchmark("mmbench")
    items = benchmark.load(folder_of(benchmark, data))
    right = [Answer(item, item.answers[0], 1.0) for item in items[:5]]  # four rotations of one, one of another
    circular = benchmark.summarise(right)[0]
    assert (circular.name, circular.value, circular.n) == ("circular accuracy", 1.0, 1)
    assert benchmark.summarise(right[:3])[0].note == "no question has all of its rotations: --limit is too small"


@pytest.mark.parametrize("name", ["pope", "gqa"])
def test_a_limit_and_the_clusters_follow_the_published_names_wherever_the_files_are(name: str, tmp_path: Path) -> None:
    benchmark, chosen = find_benchmark(name), []
    for folder in ("here", "there"):
        data = official_data.write(tmp_path / folder, name)
        items = benchmark.load(folder_of(benchmark, data))[:: 1 if folder == "here" else -1]
        chosen.append(sorted((item.id, item.group) for item in select(items, 3)))
    assert chosen[0] == chosen[1]
