"""Predictions of LLaVA's scripts scored by our code and vice versa: joined by id, in any order."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from milora_eval.__main__ import main
from milora_eval.benchmark import Answer, Item
from milora_eval.benchmarks.llava_prompts import SHORT
from milora_eval.registry import find_benchmark, folder_of
from milora_eval.scores.exports import join, write_llava_files
from support import official_data
from support.problems import raises_code

pytestmark = pytest.mark.usefixtures("picture_cache")
NAMES = ["vqav2", "gqa", "vizwiz", "scienceqa", "scienceqa-all", "textvqa", "textvqa-no-ocr", "mmbench", "mmbench-cn"]
NAMES += ["mme", "seed-bench", "mm-vet", "pope", "docvqa", "mmmu"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = official_data.write_all(tmp_path_factory.mktemp("official"))
    write_pope_questions(folder / "pope")
    return folder


def write_pope_questions(folder: Path) -> None:
    """Write LLaVA's question file: one file for the three sets, with other ids, in another order."""
    rows = [
        {"image": row["image"], "text": row["text"] + SHORT, "category": name}
        for name in ("adversarial", "popular", "random")
        for row in map(json.loads, (folder / f"coco_pope_{name}.json").read_text().splitlines())
    ]
    official_data.dump_lines(folder / "llava_pope_test.jsonl", [{"question_id": i} | row for i, row in enumerate(rows)])


def answered(name: str, data: Path) -> list[Answer]:
    """Return an answer to every item: the right one, the one of another item, or a sentence."""
    benchmark, rng = find_benchmark(name), random.Random(7)
    items = benchmark.load(folder_of(benchmark, data))
    choices = [item.answers[0] for item in items if item.answers]
    texts = [rng.choice([*item.answers[:1], rng.choice(choices), "No, it is not."]) for item in items]
    return [Answer(item, text, benchmark.score(item, text)) for item, text in zip(items, texts, strict=True)]


def written(name: str, data: Path, folder: Path) -> Path:
    answers = answered(name, data)
    rows = write_llava_files(find_benchmark(name), answers, folder, "model")[1]
    lines = rows.read_text(encoding="utf-8").splitlines()
    random.Random(3).shuffle(lines)
    rows.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return rows


@pytest.mark.parametrize("name", NAMES)
def test_an_answers_file_in_any_order_gives_the_same_numbers(
    name: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, benchmark = written(name, data, tmp_path), find_benchmark(name)
    assert main(["score", str(path), "--benchmark", name, "--data", str(data), "--format", "json"]) == 0
    results = json.loads(capsys.readouterr().out)
    expected = {metric.name: metric.value for metric in benchmark.summarise(answered(name, data))}
    assert {metric["name"]: metric["value"] for metric in results["benchmarks"][0]["metrics"]} == expected


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_and_a_doubled_id_are_named(name: str, data: Path, tmp_path: Path) -> None:
    path, benchmark = written(name, data, tmp_path), find_benchmark(name)
    items = benchmark.load(folder_of(benchmark, data))
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    gone = next(item for item in items if benchmark.llava_key(rows[0]) in benchmark.llava_keys(item))
    with raises_code("predictions-missing-ids", says=re.escape(f'missing ids: "{gone.id}"')) as raised:
        join(benchmark, items, rows[1:], path)
    assert raised.value.problems[0].code == "predictions-missing-ids"
    with raises_code("predictions-duplicate-id", says=re.escape(f'two answers for the id "{gone.id}"')) as raised:
        join(benchmark, items, [*rows, rows[0]], path)
    assert raised.value.problems[0].code == "predictions-duplicate-id"
    stranger = rows[0] | {"question_id": "987654321", "prompt": f"Who?{SHORT}"}
    with raises_code("predictions-unknown-id", message="987654321"):
        join(benchmark, items, [*rows, stranger], path)


def test_llavas_pope_script_gets_our_f1_from_our_files(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("llava")
    answers = answered("pope", data)
    questions, rows = write_llava_files(find_benchmark("pope"), answers, tmp_path, "model")
    (tmp_path / "annotations").mkdir()
    for name in ("random", "popular", "adversarial"):
        file = f"coco_pope_{name}.json"
        (tmp_path / "annotations" / file).write_bytes((data / "pope" / file).read_bytes())
    flags = ["--annotation-dir", tmp_path / "annotations", "--question-file", questions, "--result-file", rows]
    done = subprocess.run([sys.executable, script("eval_pope"), *flags], capture_output=True, text=True)
    theirs = dict(re.findall(r"Category: (\w+), .*?F1 score: ([\d.]+)", done.stdout, re.DOTALL))
    ours = {m.name: m.value for m in find_benchmark("pope").summarise(answers)}
    assert {name: float(f1) for name, f1 in theirs.items()} == {
        name: pytest.approx(ours[f"{name} F1"]) for name in ("random", "popular", "adversarial")
    }, done.stderr


def test_llavas_scienceqa_script_agrees(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("llava")
    answers = answered("scienceqa-all", data)
    _, rows = write_llava_files(find_benchmark("scienceqa-all"), answers, tmp_path, "model")
    flags = ["--base-dir", data / "scienceqa", "--result-file", rows]
    flags += ["--output-file", tmp_path / "o.json", "--output-result", tmp_path / "result.json"]
    done = subprocess.run([sys.executable, script("eval_science_qa"), *flags], capture_output=True, text=True)
    (ours,) = find_benchmark("scienceqa-all").submission(answers, tmp_path / "ours", data / "scienceqa")
    assert json.loads(ours.read_text()) == json.loads((tmp_path / "result.json").read_text()), done.stderr
    by_name = {m.name: m.value for m in find_benchmark("scienceqa-all").summarise(answers)}
    assert f"IMG-Accuracy: {100 * by_name['with picture']:.2f}%" in done.stdout


def test_scored_files_are_kept_where_asked(data: Path, tmp_path: Path) -> None:
    path = written("gqa", data, tmp_path)
    command = ["score", str(path), "--benchmark", "gqa", "--data", str(data), "--output_dir", str(tmp_path / "out")]
    assert main(command) == 0
    folder = tmp_path / "out" / "eval" / "gqa" / "answers"
    assert (folder / "submission" / "gqa" / "testdev_balanced_predictions.json").is_file()
    assert main(["score", str(folder)]) == 0
    with raises_code("output-exists"):
        main(command)


@pytest.mark.parametrize("protocol", ["llava", "official"])
def test_the_protocol_decides_and_is_stamped(
    protocol: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark = find_benchmark("gqa")
    answers = [Answer(item, capitalised(item), 0.0) for item in benchmark.load(folder_of(benchmark, data))]
    _, path = write_llava_files(benchmark, answers, tmp_path, "model")
    flags = ["--benchmark", "gqa", "--data", str(data), "--protocol", protocol, "--format", "json"]
    main(["score", str(path), *flags])
    entry = json.loads(capsys.readouterr().out)["benchmarks"][0]
    assert (entry["protocol"], entry["metrics"][0]["value"]) == (protocol, 1.0 if protocol == "llava" else 0.0)


def capitalised(item: Item) -> str:
    return item.answers[0].capitalize() + "."


def script(name: str) -> Path:
    """Run a script of LLaVA as a file, because its package would import all of LLaVA."""
    import llava

    return Path(str(llava.__file__)).parent / "eval" / f"{name}.py"
