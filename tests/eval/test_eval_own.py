"""A user's own benchmark: the LLaVA JSON of a training, rows with question and answer, or one short file of code."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationMixin

from milora_eval.__main__ import main
from milora_eval.benchmark import Answer
from milora_eval.benchmarks.own_data import OwnData
from milora_eval.run_suite import TrainingSuites
from milora_vl import load_model
from milora_vl.common.errors import UserError
from support.drawn import draw, picture
from support.problems import raises_code

DOCS = Path(__file__).resolve().parents[2] / "docs" / "contributing" / "add-a-benchmark.md"


def code_of_the_docs() -> str:
    """Return the file that the documentation shows."""
    found = re.search(r"```python\n(# shades.py.*?class Shades.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    return found.group(1)


def llava_json(folder: Path, *, repeated: bool = False) -> Path:
    draw(folder / "images" / "a.png", "red")
    turns = [("human", "What is it?\n<image>"), ("gpt", "A disc."), ("human", "Its color?"), ("gpt", "Red.")]
    record = {"id": "x", "image": "a.png", "conversations": [{"from": who, "value": text} for who, text in turns]}
    text_only = {"id": "x" if repeated else "y", "conversations": record["conversations"][2:]}
    (folder / "val.json").write_text(json.dumps([record, text_only]))
    return folder / "val.json"


def evaluate(name: str, output: Path, *more: str) -> dict[str, Any]:
    assert main(["run", "--model", "tiny", "--benchmarks", name, "--output_dir", str(output), *more]) == 0
    (folder,) = (output / "eval").iterdir()
    assert main(["score", str(folder / "base")]) == 0
    return dict(json.loads((folder / "base" / "results.json").read_text()))


def test_the_json_of_a_training_is_accepted_as_it_is(tmp_path: Path) -> None:
    path = llava_json(tmp_path)
    results = evaluate(str(path), tmp_path / "out")
    assert (results["suite"], results["benchmarks"][0]["n"]) == ("val", 2)
    lines = (tmp_path / "out" / "eval" / "val" / "base" / "predictions.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    assert (first["question"], first["answers"]) == ("Its color?", ["Red."])
    assert first["context"] == [["user", "What is it?\n<image>"], ["assistant", "A disc."]]
    path.unlink()  # stored answers are scored without the file
    assert main(["score", str(tmp_path / "out" / "eval" / "val" / "base")]) == 0


def test_records_with_messages_are_accepted_as_they_are(tmp_path: Path) -> None:
    draw(tmp_path / "images" / "a.png", "red")
    parts = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "Its color?"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "Red."}]
    rows = [{"messages": messages}, {"prompt": "Is it red?", "completion": "Yes.", "images": ["a.png"]}]
    rows += [{"messages": messages[:1], key: "Red."} for key in ("answer", "answers")]
    (tmp_path / "val.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert evaluate(str(tmp_path / "val.jsonl"), tmp_path / "out")["benchmarks"][0]["n"] == 4
    lines = (tmp_path / "out" / "eval" / "val" / "base" / "predictions.jsonl").read_text().splitlines()
    asked = [json.loads(line) for line in lines]
    assert [line["answers"] for line in asked] == [["Red."], ["Yes."], ["Red."], ["Red."]]
    assert [line["question"] for line in asked[:2]] == ["<image>\nIts color?", "<image>\nIs it red?"]


def test_boxes_of_answers_are_scored_in_pixels_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture("red", (640, 428)).save(tmp_path / "a.png")
    turns = [{"role": "user", "content": "<image>Where?"}, {"role": "assistant", "content": "<bbox>"}]
    rows = [{"messages": turns, "images": ["a.png"], "objects": {"bbox": [[146, 137, 615, 415]]}}]
    rows += [{"image": "a.png", "question": "It?", "answer": "[146, 137, 200, 200]", "metric": "box"}]
    (tmp_path / "val.json").write_text(json.dumps(rows))

    def answers(self: Any, *, input_ids: Tensor, **_: Any) -> Tensor:
        ids = load_model("tiny")[1].tokenizer(" [0.23, 0.38, 0.96, 0.81]</s>", add_special_tokens=False)["input_ids"]
        return torch.cat([input_ids, torch.tensor([ids] * len(input_ids))], 1)

    monkeypatch.setattr(GenerationMixin, "generate", answers)
    [result] = evaluate(str(tmp_path / "val.json"), tmp_path / "out", "--forgetting_tokens", "0")["benchmarks"]
    assert (result["metrics"][0]["name"], result["metrics"][0]["value"]) == ("accuracy at IoU 0.5", 0.5)
    lines = (tmp_path / "out" / "eval" / "val" / "base" / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["prediction"] for line in lines] == ["[147.2, 137.2, 614.4, 412.4]"] * 2
    rows[0]["metric"] = "exact"  # would compare texts
    (tmp_path / "val.json").write_text(json.dumps(rows))
    with raises_code("record-box"):
        OwnData(str(tmp_path / "val.json")).load(tmp_path)


def two_files(folder: Path) -> tuple[Path, Path]:
    """Return two files of one name with other questions under the same ids, as two conversions make them."""
    for name, color in (("de", "rot"), ("ll", "red")):
        draw(folder / name / "images" / "a.png", "red")
        rows = [{"id": "1", "image": "a.png", "question": f"{name}?", "answer": color}]
        (folder / name / "eval.json").write_text(json.dumps(rows))
    return folder / "de" / "eval.json", folder / "ll" / "eval.json"


def names(output: Path, suite: str, which: str = "base") -> list[str]:
    results = json.loads((output / "eval" / suite / which / "results.json").read_text())
    return [entry["name"] for entry in results["benchmarks"]]


def test_a_second_file_of_one_name_is_named_after_its_folder(tmp_path: Path) -> None:
    de, ll = two_files(tmp_path)
    flags = ["run", "--model", "tiny", "--output_dir", str(tmp_path / "out"), "--benchmarks"]
    assert main([*flags, str(de)]) == main([*flags, str(ll)]) == main([*flags, str(ll)]) == 0
    assert sorted(path.name for path in (tmp_path / "out" / "eval").iterdir()) == ["eval", "ll-eval"]
    first = (tmp_path / "out" / "eval" / "eval" / "base" / "predictions.jsonl").read_text()
    assert json.loads(first)["question"] == "<image>\nde?"
    assert names(tmp_path / "out", "ll-eval") == ["ll-eval"]
    de.write_text(de.read_text().replace("rot", "Rot"))  # the same file after a change keeps its name
    (tmp_path / "copy").mkdir()
    shutil.copy(ll, tmp_path / "copy" / "ll-eval.json")  # and so does a copy of it
    assert (
        main([*flags, str(de)])
        == main([*flags, str(tmp_path / "copy" / "ll-eval.json"), "--data", str(ll.parent / "images")])
        == 0
    )
    assert len(list((tmp_path / "out" / "eval").iterdir())) == 2


def test_two_files_of_one_name_are_asked_in_one_call(tmp_path: Path) -> None:
    de, ll = two_files(tmp_path)
    output = ["--output_dir", str(tmp_path / "out")]
    assert main(["run", "--model", "tiny", "--benchmarks", f"{de},{ll}", *output]) == 0
    assert names(tmp_path / "out", "de-eval+ll-eval") == ["de-eval", "ll-eval"]
    assert main(["run", "--model", "tiny", "--benchmarks", f"{de},{ll}", *output]) == 0
    assert len(list((tmp_path / "out" / "eval").iterdir())) == 1
    suites = TrainingSuites(
        {str(de): None, str(ll): None}, 5, template="vicuna_v1", image_aspect_ratio="pad", batch_size=4
    )
    assert suites.names == ("de-eval", "ll-eval")
    with pytest.raises(UserError, match="listed twice"):
        main(["run", "--model", "tiny", "--benchmarks", f"{de},{de}", *output])


def test_answers_to_other_questions_are_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Equal ids are not equal questions: a table beside a base that answered another file has no difference."""
    de, ll = two_files(tmp_path)
    for file, output in ((de, "a"), (ll, "b")):
        assert main(["run", "--model", "tiny", "--benchmarks", str(file), "--output_dir", str(tmp_path / output)]) == 0
    a, b = (tmp_path / output / "eval" / "eval" / "base" for output in "ab")
    with raises_code("eval-nothing-in-common"):
        main(["compare", str(a), str(b)])
    b.rename(b.with_name("final"))
    a.rename(b)
    results = json.loads((b.with_name("final") / "results.json").read_text()) | {"which": "final"}
    (b.with_name("final") / "results.json").write_text(json.dumps(results))
    capsys.readouterr()
    assert main(["score", str(b.with_name("final"))]) == 0
    assert "difference" not in capsys.readouterr().out


def test_the_id_0_is_an_id(tmp_path: Path) -> None:
    rows = [{"id": 3, "question": "A?", "answer": "a"}, {"id": 0, "question": "B?", "answer": "b"}]
    rows += [{"question_id": 0, "id": None, "question": "C?", "answer": "c"}, {"question": "D?", "answer": "d"}]
    (tmp_path / "own.json").write_text(json.dumps(rows))
    items = OwnData(str(tmp_path / "own.json")).load(tmp_path)
    assert [item.id for item in items] == ["3", "0#2", "0#3", "4"]


def test_questions_without_a_type_have_the_most_frequent_answer_as_baseline(tmp_path: Path) -> None:
    rows = [{"question": f"{n}?", "answer": "red" if n < 2 else "blue"} for n in range(6)]
    (tmp_path / "own.json").write_text(json.dumps(rows))
    items = OwnData(str(tmp_path / "own.json")).load(tmp_path)
    assert [item.baseline for item in items] == [0.0, 0.0, 1.0, 1.0, 1.0, 1.0]
    said = ("No", "No", "Yes.", "yes", "YES")
    yes_no = [row | {"answer": answer, "metric": "yes_no"} for row, answer in zip(rows, said, strict=False)]
    (tmp_path / "yes.json").write_text(json.dumps(yes_no))
    assert [item.baseline for item in OwnData(str(tmp_path / "yes.json")).load(tmp_path)] == [0.0, 0.0, 1.0, 1.0, 1.0]
    answers = [Answer(item, f"It is {item.answers[0]}.", 0.0) for item in items]
    for metric, name in (("anls", "ANLS"), ("yes_no", "accuracy")):
        other = [Answer(replace(item, meta={"metric": metric}), "x", 0.5) for item in items]
        assert OwnData("data:own").summarise(other)[0].name == name
        expected = "accuracy" if name == "accuracy" else "mean score"
        assert OwnData("data:own").summarise([*other, *answers])[0].name == expected
    strict, lenient = OwnData("data:own").summarise(answers)
    assert (strict.value, strict.baseline) == (0.0, pytest.approx(4 / 6))
    assert (lenient.name, lenient.value) == ("answer in first line", 1.0)


def test_rows_with_a_metrics_name_need_no_code(tmp_path: Path) -> None:
    draw(tmp_path / "a.png", "blue")
    rows = [
        {"image": "a.png", "question": "Color?", "answer": "blue", "metric": "contains"},
        {"image": "a.png", "question": "How many?", "answers": ["1", "one"]},
    ]
    (tmp_path / "mine.json").write_text(json.dumps(rows))
    results = evaluate(str(tmp_path / "mine.json"), tmp_path / "out")
    assert results["benchmarks"][0]["protocol"] == "own data"
    lines = (tmp_path / "out" / "eval" / "mine" / "base" / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["meta"]["metric"] for line in lines] == ["contains", "exact"]


@pytest.mark.parametrize("name", ["shades.py", "shades.py:Shades", "shades:Shades"])
def test_a_file_of_code_is_a_benchmark(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("shades.py").write_text(code_of_the_docs())
    Path("shades.txt").write_text("Grey or black?\nWhite or black?\n")
    results = evaluate(name, tmp_path / "out", "--data", ".")
    assert [metric["name"] for metric in results["benchmarks"][0]["metrics"]] == ["accuracy"]
    assert len(code_of_the_docs().splitlines()) <= 50


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([{"question": "?", "answer": "a", "metric": "exactt"}], ["question 1", 'unknown metric "exactt"', "exact"]),
        ([{"question": "?"}], ["question 1", "no answer"]),
        ([{"question": "?", "answer": "a", "metric": "yes_no"}], ["question 1", "yes_no needs the answer yes or no"]),
        ([{"question": "?", "answer": "a", "image": 5}], ["question 1", '"image" must be a file name', "got 5"]),
        (
            [{"question": "?"}, {"question": "?", "answer": "a"}, *["x"] * 22],
            ["23 problems", "question 1: no answer", "question 3: expected an object", "... and 3 more"],
        ),
        ([{"question": "?", "answer": "a", "image": "nowhere.png"}], ["1 pictures", "nowhere.png"]),
        ([{"question": "?", "answer": "a", "image": "../../a.png"}], ["question 1", "../../a.png is outside"]),
        (
            [{"messages": [{"role": "assistant", "content": "a"}]}],
            ["question 1", "no turn of the user before the answer"],
        ),
    ],
)
def test_a_mistake_in_the_file_is_named(content: Any, words: list[str], tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text(json.dumps(content))
    with pytest.raises(UserError) as caught:
        evaluate(str(tmp_path / "mine.json"), tmp_path / "out")
    assert all(word in str(caught.value) for word in words), str(caught.value)
