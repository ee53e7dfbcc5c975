"""LLaVA's own scripts give our scores for the files that we write."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from milora_eval.benchmark import Answer
from milora_eval.registry import find_benchmark, folder_of
from milora_eval.scores.exports import write_llava_files
from support import official_data

pytestmark = pytest.mark.usefixtures("picture_cache")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return official_data.write_all(tmp_path_factory.mktemp("official"))


def answered(name: str, data: Path) -> list[Answer]:
    """Return an answer to every item: the right one, the one of another item, or a sentence."""
    benchmark, rng = find_benchmark(name), random.Random(7)
    items = benchmark.load(folder_of(benchmark, data))
    choices = [item.answers[0] for item in items if item.answers]
    texts = [rng.choice([*item.answers[:1], rng.choice(choices), "No, it is not."]) for item in items]
    return [Answer(item, text, benchmark.score(item, text)) for item, text in zip(items, texts, strict=True)]


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


def script(name: str) -> Path:
    """Run a script of LLaVA as a file, because its package would import all of LLaVA."""
    import llava

    return Path(str(llava.__file__)).parent / "eval" / f"{name}.py"
