"""lmms-eval, lm_eval and VLMEvalKit run a local task through our plug-ins, each in its own environment (slow)."""

from __future__ import annotations

import base64
import importlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from pandas import read_excel

from milora_data.encode.labels import encode
from milora_data.encode.tokens import IGNORE
from milora_data.pictures.load import load_image
from milora_data.records.record import Record, Turn
from milora_eval.__main__ import main
from milora_eval.answers.runner import loglikelihoods
from milora_eval.benchmark import Answer
from milora_eval.benchmarks.plain_sets import AI2D
from milora_eval.lm_eval import main as lm_eval_main
from milora_eval.registry import find_benchmark, folder_of
from milora_eval.vlmevalkit import LONGEST, milora_vlm, register
from milora_vl.interop.load_model import load_model
from milora_vl.models.generate import LlavaReader, Prompt, generate
from milora_vl.models.prompts import Prompts
from support import official_data
from support.conversations import KINDS
from support.drawn import dump_lines, encoded
from support.llava_oracle import llama_tokenizer
from support.problems import raises_code

pytestmark = pytest.mark.usefixtures("picture_cache")
Made = tuple[Any, Any]

TEXT_TASK = """
task: milora_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/docs.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1}}
"""
PICTURE_TASK = """
task: milora_colours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/docs.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function pictures.visual
doc_to_text: question
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 4, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1}}
"""
KIT = """
import sys
from milora_eval.vlmevalkit import register

register("mine", "tiny", sys.argv.pop(1))
from vlmeval.run import main

main()
"""
VISUAL = "from PIL import Image\n\n\ndef visual(doc):\n    return [Image.new('RGB', (40, 30), doc['color'])]\n"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("adapter")
    config = LoraConfig(r=4, target_modules=r".*language_model.*proj", init_lora_weights=False)
    get_peft_model(load_model("tiny")[0], config).save_pretrained(folder)
    return folder


def environment(folder: Path, *packages: str) -> Path:
    """Create an environment with the packages in addition to this environment's; return its Python."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    (own,) = folder.glob("lib/python*/site-packages")
    root = Path(__file__).resolve().parents[2]
    paths = [sysconfig.get_paths()["purelib"], root, root / "data_tools", root / "eval"]
    (own / "zz_this_one.pth").write_text("".join(f"{path}\n" for path in paths))
    subprocess.run([folder / "bin" / "python", "-m", "pip", "install", "-q", *packages], check=True)
    return folder / "bin" / "python"


def run_offline(command: list[Any], **more: str) -> str:
    offline = {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **offline, **more})
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_lm_eval_runs_a_local_task_on_base_and_adapter(adapter: Path, tmp_path: Path) -> None:
    python = environment(tmp_path / "env", "lm_eval>=0.4.13")
    docs = [{"question": "The sky is", "choices": ["blue", "cheese"], "answer": 0} for _ in range(3)]
    dump_lines(tmp_path / "tasks" / "docs.jsonl", docs)
    (tmp_path / "tasks" / "choice.yaml").write_text(TEXT_TASK.format(folder=tmp_path / "tasks"))
    flags = ["--tasks", "milora_choice", "--include_path", tmp_path / "tasks", "--output_dir", tmp_path / "out"]
    command = [python, "-m", "milora_eval.lm_eval", "--model", "tiny", "--adapter", adapter]
    assert "milora_choice" in run_offline([*command, *flags])
    results = json.loads((tmp_path / "out" / "lm_eval.json").read_text())
    assert results["n-samples"]["milora_choice"]["effective"] == 3
    assert results["adapter"] == str(adapter)


@pytest.mark.slow
def test_lmms_eval_finds_the_model_by_its_entry_point(adapter: Path, tmp_path: Path) -> None:
    python = environment(tmp_path / "env", "lmms-eval>=0.7.3", "filelock<4")  # 0.7.3 uses internals of filelock 3
    docs = [{"color": color, "question": "Is it red?", "answer": "yes"} for color in ("red", "blue", "blue")]
    dump_lines(tmp_path / "tasks" / "docs.jsonl", docs)
    (tmp_path / "tasks" / "pictures.py").write_text(VISUAL)
    (tmp_path / "tasks" / "colours.yaml").write_text(PICTURE_TASK.format(folder=tmp_path / "tasks"))
    flags = ["--tasks", "milora_colours", "--include_path", tmp_path / "tasks", "--batch_size", "2"]
    chosen = ["--model", "milora", "--model_args", f"pretrained=tiny,adapter={adapter}"]
    assert "milora_colours" in run_offline([python, "-m", "lmms_eval", *chosen, *flags])


@pytest.mark.slow
def test_vlmevalkit_runs_a_local_table_on_base_and_adapter(adapter: Path, tmp_path: Path) -> None:
    python = environment(tmp_path / "env", "nvidia-vlmeval>=26.3")
    colors = ("red", "blue", "green")
    images = [base64.b64encode(encoded(color)).decode() for color in colors]
    rows = [
        {"index": index, "image": image, "question": "Which?", "A": "red", "B": "blue", "answer": "AB"[index % 2]}
        for index, image in enumerate(images)
    ]
    official_data.write_table(tmp_path / "Colours.tsv", rows)
    (tmp_path / "kit.py").write_text(KIT)
    flags = ["--data", "Colours", "--judge", "exact_matching", "--work-dir", tmp_path / "out"]
    run_offline([python, tmp_path / "kit.py", adapter, *flags, "--model", "mine"], LMUData=str(tmp_path))
    assert (tmp_path / "out" / "mine" / "mine_Colours_acc.csv").is_file()
    found = list(read_excel(tmp_path / "out" / "mine" / "mine_Colours.xlsx", dtype=str)["prediction"])
    loaded = load_model("tiny", adapter=adapter)
    text = "Question: Which?\nOptions:\nA. red\nB. blue\nPlease select the correct answer from the options above. \n"
    turn = Turn("user", f"<image>\n{text}")
    pictures = sorted((tmp_path / "images" / "Colours").iterdir())  # it has written the table's as JPEG
    assert len(pictures) == len(colors)
    asked = [Prompt((turn,), (picture,), "exact") for picture in pictures]
    said = [reply.text for reply in generate(*loaded, asked, max_new_tokens=LONGEST)]
    # VLMEvalKit's Excel file has control characters as _x0005_, which is no part of an answer.
    assert [re.sub("_x00[01][0-9A-F]_", "", text) for text in found] == [re.sub("[\0-\x1f]", "", text) for text in said]


def test_a_harness_that_is_not_installed_is_said() -> None:
    with raises_code("package-missing", message="not installed", hint="pip install"):
        lm_eval_main(["--model", "tiny", "--tasks", "x"])
    with raises_code("package-missing", message="VLMEvalKit is not installed"):
        register("mine", "tiny")


def test_the_likeliest_answer_is_the_greedy_one(tiny_llava: Callable[..., Made]) -> None:
    turns = (Turn("user", "USER: <image>\nWhat? ASSISTANT:"),)
    prompt = Prompt(turns, (official_data.picture("red"),), "raw")
    for model, processor in map(tiny_llava, range(20)):
        said = generate(model, processor, [prompt], max_new_tokens=1)[0].text
        if said not in ("", "Q") and said.isascii():  # not a part of a letter
            break
    pairs = [(prompt, said), (prompt, "Q")]
    (value, is_greedy), (other, is_other) = loglikelihoods(model, processor, pairs, Prompts("vicuna_v1", "pad"))
    assert (is_greedy, is_other) == (True, False)
    assert other < value < 0


@pytest.mark.parametrize("template", ["vicuna_v1", "chatml", "mistral", "alpaca"])
@pytest.mark.parametrize("kind", ["tiny", *KINDS])
def test_the_tokens_of_a_target_are_those_that_a_training_supervises(
    kind: str, template: str, tiny_llava: Callable[..., Made]
) -> None:
    model, processor = tiny_llava()
    tokenizer = processor.tokenizer if kind == "tiny" else llama_tokenizer(kind)
    turns = (Turn("user", "Which color?"), Turn("assistant", "Dark red"))
    prompts = Prompt(turns[:1], (), "exact")
    inputs = LlavaReader(model, tokenizer, template, "pad").labelled(prompts, "Dark red")
    trained = encode(Record("", (), turns), tokenizer, template=template, image_token_id=-1)
    ids, labels = inputs["input_ids"][0].tolist(), inputs["labels"][0].tolist()
    assert ids == trained.input_ids[: len(ids)]
    assert labels == trained.labels[: len(ids)]
    assert "Dark red" in tokenizer.decode([label for label in labels if label != IGNORE])


@pytest.fixture
def run_folder(adapter: Path, tmp_path: Path) -> Path:
    """Return an adapter whose run had another template and whole pictures."""
    run = Path(shutil.copytree(adapter, tmp_path / "run"))
    (run / "recipe.yaml").write_text("template: chatml\ndata: {image_aspect_ratio: plain}\n")
    return run


def evaluated(run: Path, benchmark: str, data: Path, output: Path) -> tuple[float, dict[str, str]]:
    """Return the score of `milora_eval run` and its answers by id."""
    flags = ["--benchmarks", benchmark, "--data", str(data), "--output_dir", str(output), "--forgetting_tokens", "0"]
    assert main(["run", "--model", "tiny", "--adapter", str(run), *flags]) == 0
    folder = output / "eval" / benchmark / "final"
    lines = map(json.loads, (folder / "predictions.jsonl").read_text().splitlines())
    score = json.loads((folder / "results.json").read_text())["benchmarks"][0]["metrics"][0]["value"]
    return score, {line["id"]: line["prediction"] for line in lines}


def test_vlmevalkit_gets_the_answers_and_the_score_of_eval_run(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class BaseModel:
        """A substitute for VLMEvalKit's class: it writes the picture of a row."""

        def dump_image(self, line: Any, dataset: str) -> list[str]:
            (tmp_path / f"{line['index']}.png").write_bytes(base64.b64decode(line["image"]))
            return [str(tmp_path / f"{line['index']}.png")]

    monkeypatch.setattr(AI2D, "max_new_tokens", 40)  # other than any default
    image = {color: base64.b64encode(encoded(color)).decode() for color in ("red", "blue")}
    rows = [
        {"index": n, "image": image[color], "question": "Which?", "A": "red", "B": "blue", "answer": "AB"[n % 2]}
        for n, color in enumerate(["red", "blue", "red"])
    ]
    official_data.write_table(tmp_path / "data" / "AI2D_TEST.tsv", rows)
    score, answers = evaluated(run_folder, "ai2d", tmp_path / "data", tmp_path / "out")
    model = milora_vlm(BaseModel, "tiny", str(run_folder))
    assert model.use_custom_prompt("AI2D_TEST")
    said = [
        model.generate_inner(model.build_prompt(row | {"hint": math.nan}, "AI2D_TEST"), "AI2D_TEST") for row in rows
    ]
    assert said == list(answers.values())
    items = AI2D().load(tmp_path / "data")
    theirs = [Answer(item, text, AI2D().score(item, text)) for item, text in zip(items, said, strict=True)]
    assert AI2D().summarise(theirs)[0].value == score


def test_lmms_eval_gets_the_answers_and_so_the_score_of_eval_run(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("lmms_eval", "lmms_eval.api", "lmms_eval.api.model", "lmms_eval.models.registry_v2"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(sys.modules["lmms_eval.api.model"], "lmms", object, raising=False)
    monkeypatch.setattr(sys.modules["lmms_eval.models.registry_v2"], "ModelManifest", SimpleNamespace, raising=False)
    data = official_data.write(tmp_path / "data", "gqa")
    score, answers = evaluated(run_folder, "gqa", data, tmp_path / "out")
    benchmark = find_benchmark("gqa")
    items = benchmark.load(folder_of(benchmark, data))
    model = importlib.import_module("milora_eval.lmms").Milora("tiny", str(run_folder), batch_size=4)
    model.task_dict = {"gqa": {"testdev": items}}
    requests = [
        SimpleNamespace(args=(item.plain_text, {}, lambda item: map(load_image, item.images), index, "gqa", "testdev"))
        for index, item in enumerate(items)
    ]
    said = model.generate_until(requests)
    assert {item.id: text for item, text in zip(items, said, strict=True)} == answers
    assert score == sum(benchmark.score(item, text) for item, text in zip(items, said, strict=True)) / len(items)
    context, _, *source = requests[0].args
    alone = loglikelihoods(model.loaded, model.processor, [(model._prompt(context, *source), "Q")], model.prompts)
    assert model.loglikelihood([SimpleNamespace(args=(context, "Q", *source))]) == alone, "no blank before the target"


def test_vlmevalkit_builds_a_registered_model_with_its_own_keyword(monkeypatch: pytest.MonkeyPatch) -> None:
    config, bases = ModuleType("vlmeval.config"), ModuleType("vlmeval.vlm.base")
    config.supported_VLM, bases.BaseModel = {}, type("BaseModel", (), {})  # type: ignore[attr-defined]
    for module in (config, bases):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    register("mine-Qwen2-VL", "tiny")
    build = config.supported_VLM["mine-Qwen2-VL"]
    assert build() and build(use_vllm=False)  # noqa: PT018 - run.py calls it with or without the keyword, by the name
    with raises_code("flag-conflict", where="--use-vllm"):
        build(use_vllm=True)
