"""held_out.jsonl: the loss of each held-out record at the end of a run, beside the base's."""

from __future__ import annotations

import json
import random
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from milora_data.__main__ import main as milora_data
from milora_data.batches.lengths import lengths_of
from milora_data.batches.processor_collator import ProcessorCollator
from milora_data.keys import FileKeys, record_key
from milora_data.stream import load_records
from milora_eval.__main__ import main as milora_eval
from milora_vl import collator_for, load_adapter, load_model
from milora_vl.common.atomic_write import json_lines
from milora_vl.common.evaluator_protocol import QuestionSet
from milora_vl.models.losses import summed_loss
from milora_vl.report.page import summary, write_report
from milora_vl.report.read_run import read_run
from milora_vl.sweep.__main__ import _require_same_sweep
from milora_vl.sweep.runner import Sweep
from milora_vl.train.__main__ import main
from milora_vl.train.settings import Recipe
from support.launched import KINDS, needs_deepspeed, train_in_two
from support.problems import raises_code
from support.train_runs import losses, read_json, training
from support.versions import needs_spans
from support.vlm_families import processor_of

EXTRA = ["--rank", "4", "--per_device_eval_batch_size", "3"]


def held_out(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "held_out.jsonl").read_text(encoding="utf-8").splitlines()]


def losses_alone(model: Any, processor: Any, data: Path) -> dict[str, float]:
    """Return the loss of each record of val.json in its own batch."""
    collate, losses = collator_for(model, processor, image_folder=data / "images"), {}
    for record in load_records(data / "val.json"):
        with torch.no_grad():
            loss, count = summed_loss(model, collate([record]), chunked=False)
        losses[record.source] = float(loss) / count
    return losses


@pytest.fixture
def data(tiny_data: Path) -> Path:
    """7 held-out records, with and without a picture; the last two batches of 3 are not full."""
    records = json.loads((tiny_data / "train.json").read_text())[:5]
    for number in range(2):
        turns = [{"from": "human", "value": f"Count to {number}."}, {"from": "gpt", "value": "one " * (3 + number)}]
        records.append({"id": f"text-{number}", "conversations": turns})
    (tiny_data / "val.json").write_text(json.dumps(records))
    return tiny_data


def run_on(data: Path, run: Path, *more: str) -> list[str]:
    return training(data, run, "--eval_data_path", str(data / "val.json"), *more)


def test_the_losses_are_those_of_each_record_alone(
    data: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("milora_vl.common.progress.INTERVAL", 0.0)
    run = tmp_path / "run"
    assert main(run_on(data, run, *EXTRA)) == 0
    assert "held-out records: 3/3 batches" in capsys.readouterr().err
    lines, (model, processor) = held_out(run), load_model("tiny")
    base = losses_alone(model.eval(), processor, data)
    tuned = losses_alone(load_adapter(load_model("tiny")[0], run).eval(), processor, data)
    assert {line["source"]: line["loss"] for line in lines} == pytest.approx(tuned, abs=1e-5)
    assert {line["source"]: line["base_loss"] for line in lines} == pytest.approx(base, abs=1e-5)
    assert [line["loss"] for line in lines] == sorted((line["loss"] for line in lines), reverse=True)
    answers = {record.source: record.turns[-1].text for record in load_records(data / "val.json")}
    assert all(line["answer"] == answers[line["source"]] and line["reply"] for line in lines)
    out = tmp_path / "losses.jsonl"
    words = ["losses", str(data / "val.json"), "--adapter", str(run), "--batch_size", "2", "--output", str(out)]
    assert milora_eval(words) == 0
    found = {line["key"]: line["loss"] for line in json_lines(out)}
    assert found == pytest.approx({line["key"]: line["loss"] for line in lines}, abs=1e-5)
    page = (run / "report.html").read_text(encoding="utf-8")
    table = page[page.index('id="held-out"') : page.index('id="forgetting"')]
    assert table.count("<li data-kinds=") == 7
    assert table.count("data:image/jpeg") == 5
    capsys.readouterr()
    shown = ["show", str(data / "val.json"), "--worst", str(run), "--limit", "7", "--format", "json"]
    assert milora_data(shown) == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["source"] for line in printed] == [line["source"] for line in lines]
    assert [line["extra"]["loss"] for line in printed] == [line["loss"] for line in lines]
    rows = json.loads((data / "val.json").read_text())
    (data / "val.json").write_text(json.dumps([row for row in rows if row["id"] != lines[0]["id"]]))
    assert milora_data(shown) == 0
    said = capsys.readouterr()
    left = [json.loads(line)["id"] for line in said.out.splitlines()]
    assert left == [line["id"] for line in lines[1:]]
    assert "lacks 1 record with a loss" in said.err
    pictures = sorted((data / "images").iterdir())  # one is exchanged: its loss is not shown beside another picture
    pictures[0].write_bytes(pictures[1].read_bytes())
    assert write_report(run).read_text(encoding="utf-8").count("picture not found") == 1


def renamed_and_shuffled(data: Path, folder: Path) -> Path:
    """Write a data set again: other names, folders, ids and order; `in_order.json` has the order of train.json."""
    (folder / "images" / "more").mkdir(parents=True)
    old = [path.name for path in sorted((data / "images").iterdir())]
    names = {name: f"more/{number}.png" for number, name in enumerate(old[::-1])}
    for name, new in names.items():
        shutil.copy(data / "images" / name, folder / "images" / new)
    for file in ("train.json", "val.json"):
        rows = [
            row | {"id": f"new {number}"} | ({"image": names[row["image"]]} if "image" in row else {})
            for number, row in enumerate(json.loads((data / file).read_text()))
        ]
        (folder / file.replace("train", "in_order")).write_text(json.dumps(rows))
        (folder / file).write_text(json.dumps(random.Random(1).sample(rows, len(rows))))
    return folder


@pytest.mark.parametrize("what", [["--method", "milora"], ["--train", "projector", "--method", "full"]])
def test_losses_are_never_those_of_another_model_than_the_saved_one(
    what: list[str], data: Path, tmp_path: Path, capsys: Any
) -> None:
    flags = ["--eval_data_path", str(data / "val.json"), "--eval_strategy", "steps", "--eval_steps", "1"]
    flags += ["--save_steps", "1", "--load_best_model_at_end", "--greater_is_better", "True", "--max_steps", "2"]
    assert main(training(data, tmp_path / "run", *what, *flags, "--learning_rate", "0.1")) == 0
    assert read_json(tmp_path / "run", "trainer_state.json")["best_global_step"] == 1, "the loss falls"
    assert not (tmp_path / "run" / "held_out.jsonl").exists()
    (command,) = re.findall(r"milora_eval (losses .*) --output", capsys.readouterr().err)
    assert milora_eval([*shlex.split(command), "--output", str(tmp_path / "losses.jsonl")]) == 0


@needs_spans
def test_renamed_pictures_and_shuffled_files_change_no_output(data: Path, tmp_path: Path, capsys: Any) -> None:
    """Findings, leaks, held-out division, lengths, start, losses, weights, answers and scores follow content.

    So do the cells of a sweep. The second evaluation asks nothing, and the first run resumes on the second data set.
    """
    shutil.copy(data / "images" / "0.png", data / "images" / "copy.png")
    rows = json.loads((data / "train.json").read_text())
    wrong = {"conversations": [rows[1]["conversations"][0], {"from": "gpt", "value": "pink"}]}
    rows += [rows[0] | {"id": "again", "image": "copy.png"}, rows[1] | {"id": "no"} | wrong]
    (data / "train.json").write_text(json.dumps(rows))
    outputs: list[list[Any]] = []
    for folder, train in ((data, "train.json"), (renamed_and_shuffled(data, tmp_path / "other"), "in_order.json")):
        images, out, run = folder / "images", folder / "divided", folder / "run"
        key_of, pictures = FileKeys(images), ["--image_folder", str(images)]
        words = [str(folder / "train.json"), *pictures]
        capsys.readouterr()
        milora_data(["check", *words, "--against", str(folder / "val.json"), "--format", "json"])
        report = json.loads(capsys.readouterr().out)
        checked = {name: value for name, value in report.items() if name not in ("path", "image_folder", "findings")}
        assert checked["kinds"].keys() >= {"duplicate", "contradiction", "leaked"}
        assert milora_data(["convert", *words, "--hold_out", "3", "--output_dir", str(out)]) == 0
        divided = [{record_key(record, key_of) for record in load_records(file)} for file in sorted(out.glob("*.json"))]
        records = list(load_records(folder / "train.json"))
        counted = lengths_of(records, ProcessorCollator(processor_of("qwen2_5_vl"), image_folder=images), beside=images)
        lengths = {record_key(record, key_of): length for record, length in zip(records, counted, strict=True)}
        assert main(run_on(folder, run, *EXTRA, "--data_path", str(folder / train), *pictures)) == 0
        assert milora_eval(["losses", *words, "--adapter", str(run), "--output", str(folder / "losses.jsonl")]) == 0
        found = [{line["key"]: line["loss"] for line in json_lines(file)}
                 for file in (folder / "losses.jsonl", run / "held_out.jsonl")]  # fmt: skip
        capsys.readouterr()
        milora_data(["show", *words, "--worst", str(data / "losses.jsonl"), "--limit", "99", "--format", "json"])
        worst = [json.loads(line)["extra"]["loss"] for line in capsys.readouterr().out.splitlines()]
        if outputs:
            shutil.copytree(data / "run" / "eval", run / "eval")
        asked = ["run", "--model", "tiny", "--adapter", str(run), "--benchmarks", str(folder / "val.json")]
        asked += ["--data", str(images), "--with_base", "--limit", "5", "--forgetting_tokens", "0"]
        asked += ["--output_dir", str(run)]
        assert milora_eval(asked) == 0
        scored = [read_json(run, f"eval/val/{which}/results.json") for which in ("base", "final")]
        assert [bool(each["asked"]) for each in scored] == [not outputs] * 2
        scores = [[each.get(name) for name in ("benchmarks", "comparison", "predictions", "table")] for each in scored]
        shown = [
            (run / "README.md").read_text().partition("model-index")[2].partition("## Use")[0],
            summary(read_run(run)),
        ]
        kept = {"path": str(folder / "train.json"), "eval_path": str(folder / "val.json"), "image_folder": str(images)}
        sweep = Sweep(
            folder, Recipe.parse({"model": "tiny", "data": kept}), QuestionSet(benchmarks=str(folder / "val.json"))
        )
        start, weights = read_json(run, "_start/texts.json"), (run / "adapter_model.safetensors").read_bytes()
        assert start["captions"]
        start = [start["captions"], start["rows"]]
        cells = _require_same_sweep(sweep)
        exact = [checked, divided, lengths, start, losses(run), weights, worst, scores, shown, cells]
        outputs.append([*exact, *found])
    for name, (one, other) in enumerate(zip(*outputs, strict=True)):
        assert one == (pytest.approx(other, abs=1e-5) if name >= 10 else other), name
    shutil.rmtree(data / "run" / "checkpoint-6")
    for name in ("adapter_model.safetensors", "trainer_state.json"):
        (data / "run" / name).unlink()
    words = run_on(folder, data / "run", *EXTRA, "--data_path", str(folder / train), *pictures)
    assert main([*words, "--resume_from_checkpoint", "auto"]) == 0
    assert (data / "run" / "adapter_model.safetensors").read_bytes() == weights


def test_wrong_labels_of_the_training_file_are_shown_first(tmp_path: Path, capsys: Any) -> None:
    """Forty disks are red; two answers in the training file say otherwise."""
    answers = ["red" if number not in (9, 27) else "blue" for number in range(40)]
    rows = [
        {"conversations": [{"from": "human", "value": f"Disk {number}?"}, {"from": "gpt", "value": answer}]}
        for number, answer in enumerate(answers)
    ]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    (tmp_path / "images").mkdir()
    run, data, out = tmp_path / "run", str(tmp_path / "train.json"), str(tmp_path / "losses.jsonl")
    more = ["--model", "tiny-text", "--method", "full", "--max_steps", "20", "--learning_rate", "0.01"]
    assert main(training(tmp_path, run, *more, "--per_device_train_batch_size", "10")) == 0
    assert milora_eval(["losses", data, "--model", str(run), "--output", out]) == 0
    capsys.readouterr()
    assert milora_data(["show", data, "--worst", out, "--limit", "2", "--format", "json"]) == 0
    sources = [json.loads(line)["source"] for line in capsys.readouterr().out.splitlines()]
    assert set(sources) == {f"{data}:record 10", f"{data}:record 28"}
    with raises_code("output-exists"):
        milora_eval(["losses", data, "--model", str(run), "--output", out])


def test_losses_leave_out_and_count_what_no_training_can_use(tmp_path: Path, capsys: Any, caplog: Any) -> None:
    images = tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (8, 8)).save(images / "good.png")
    (images / "broken.png").write_bytes(b"no picture")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Red."}]
    rows: list[Any] = [{"image": f"{name}.png", "conversations": turns} for name in ("broken", "good", "missing")]
    rows += [{"conversations": "no list"}, {"conversations": turns[:1]}]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    words = [str(tmp_path / "data.json"), "--model", "tiny", "--batch_size", "1", "--format", "json"]
    assert milora_eval(["losses", *words, "--output", str(tmp_path / "losses.jsonl")]) == 0
    assert json.loads(capsys.readouterr().out) | {"file": ""} == {"file": "", "records": 1, "left_out": 4}
    assert [line["source"] for line in json_lines(tmp_path / "losses.jsonl")] == [f"{tmp_path / 'data.json'}:record 2"]
    assert all(f"record {number}" in caplog.text for number in (4, 5))
    with raises_code("data-missing-file"):
        milora_eval(["losses", "none.json", *words[1:], "--output", str(tmp_path / "none.jsonl")])
    assert all(f"{name}.png" in caplog.text for name in ("broken", "missing"))


def test_records_are_shown_in_the_template_of_the_run(tiny_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = next(load_records(tiny_data / "val.json"))
    line = {"key": record_key(record, FileKeys(tiny_data / "images")), "loss": 2.0}
    words = ["show", str(tiny_data / "val.json"), "--worst", str(tiny_data)]
    for flag in ("--model", "--adapter"):
        with raises_code("", hint=f"--image_folder {tiny_data / 'images'} {flag} {tiny_data} --output"):
            milora_data(words)
        (tiny_data / "adapter_config.json").touch()
    (tiny_data / "held_out.jsonl").write_text(json.dumps(line) + "\n" + "[" * 20_000)  # not JSON, and deep
    for template, text in {"llama_3": "<|start_header_id|>", "chat_template": "ASSISTANT:"}.items():
        (tiny_data / "recipe.yaml").write_text(f"template: {template}")
        assert milora_data(words) == 0
        said = capsys.readouterr()
        assert text in said.out
        assert f"of {words[1]} without a loss, not shown" in said.err
        assert ("the model's own prompt format" in said.err) == (template == "chat_template")


def test_a_projector_in_full_on_a_bfloat16_base_answers_and_has_no_losses_of_a_base(data: Path, tmp_path: Path) -> None:
    flags = "--train projector --method full --dtype bfloat16 --bf16".split()
    assert main(run_on(data, tmp_path / "run", *flags)) == 0
    assert all("reply" in line for line in held_out(tmp_path / "run"))
    assert {line["base_loss"] for line in held_out(tmp_path / "run")} == {None}
    assert "its losses are missing" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


def test_a_record_that_a_batch_leaves_out_has_no_line(data: Path, tmp_path: Path) -> None:
    (data / "images" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    records = json.loads((data / "val.json").read_text())
    records[1]["image"] = "broken.png"
    (data / "val.json").write_text(json.dumps(records))
    assert main(run_on(data, tmp_path / "run", *EXTRA, "--bad_images", "skip")) == 0
    found = {line["source"].rpartition("record ")[2]: line["loss"] for line in held_out(tmp_path / "run")}
    assert sorted(found) == ["1", "3", "4", "5", "6", "7"]
    model, processor = load_model("tiny")
    records.pop(1)
    (data / "val.json").write_text(json.dumps(records))
    tuned = losses_alone(load_adapter(model, tmp_path / "run").eval(), processor, data)
    assert [found[key] for key in sorted(found)] == pytest.approx(list(tuned.values()), abs=1e-5)


@pytest.mark.slow
@needs_deepspeed
def test_two_processes_write_the_losses_of_one(data: Path, tiny_folder: Path, tmp_path: Path) -> None:
    """Seven records: accelerate repeats some, so that both processes have full batches."""
    extra = ["--model", str(tiny_folder), *EXTRA, "--dropout", "0", "--max_steps", "4"]
    assert main(run_on(data, tmp_path / "one", *extra)) == 0
    halved = ["--per_device_train_batch_size", "2"]
    train_in_two([run_on(data, tmp_path / kind, *extra, *halved, *more) for kind, more in KINDS.items()], tmp_path)
    for kind in KINDS:
        one, two = ({line["source"]: line for line in held_out(tmp_path / run)} for run in ("one", kind))
        for key in ("loss", "base_loss"):
            found = {source: line[key] for source, line in two.items()}
            assert found == pytest.approx({source: line[key] for source, line in one.items()}, abs=1e-5), kind
        assert {line["reply"] for line in two.values()} == {line["reply"] for line in one.values()}
