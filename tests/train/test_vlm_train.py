"""`train` for vision-language models of other families than LLaVA: plan, steps, resuming, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from milora_data.batches.processor_collator import ProcessorCollator
from milora_eval.__main__ import main as evaluate
from milora_vl.chat.__main__ import main as chat
from milora_vl.common.errors import UserError
from milora_vl.export.__main__ import main as export
from milora_vl.forgetting.__main__ import main as forgetting
from milora_vl.interop.load_model import load_model
from milora_vl.train import trainer
from milora_vl.train.__main__ import main
from support import official_data
from support.launched import KINDS, needs_zero3, train_in_two
from support.train_runs import losses
from support.versions import needs_spans
from support.vlm_families import VLM_FAMILIES
from support.vlm_runs import mixed_records, record, write_model, write_pictures, write_records

pytestmark = [pytest.mark.filterwarnings("ignore"), needs_spans]
ONE_KIND = ("paligemma",)
OTHERS = [name for name in VLM_FAMILIES if name != "qwen2_5_vl"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_pictures(folder / "images")
    write_records(folder / "mixed.json")
    write_records(folder / "single.json", single=True)
    return folder


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model("qwen2_5_vl", tmp_path_factory.mktemp("qwen"))


ALIKE = ["--base_kl_weight", "0", "--dropout", "0"]  # each process reads its own texts, and drops other numbers


def flags(model: Path, data: Path, records: str = "mixed.json", steps: int = 5) -> list[str]:
    words = ["--model", str(model), "--data_path", str(data / records), "--image_folder", str(data / "images")]
    words += ["--rank", "2", "--per_device_train_batch_size", "2", "--logging_steps", "1", "--learning_rate", "1e-2"]
    return [*words, "--max_steps", str(steps), "--device", "cpu"]


def test_the_plan_shows_the_first_batch_in_the_models_own_template(
    qwen: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*flags(qwen, data), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "first batch: 2 records, 64 tokens per record, 10 of them supervised" in out
    assert "<|im_start|>user\\n<|vision_start|><image><|vision_end|>What is 0?<|im_end|>" in out
    assert "  > A cat.<|im_end|>\n" in out
    assert "the activations of the vision tower" in out


def test_a_model_of_another_family_describes_pictures_for_its_calibration(
    qwen: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MILORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("milora_vl.core.adapter.fixed_a.LEAST_HELD_OUT", 0.0)  # few texts
    monkeypatch.setattr("milora_vl.core.calibration.texts.CACHE_BYTES", 1)
    rules = [{"modules": "language", "method": "milora", "rank": 2, "protect": 0.5}]
    words = [*flags(qwen, data, steps=2), "--policy", json.dumps(rules)]
    words[words.index("--rank") : words.index("--rank") + 2] = []
    assert main([*words, "--output_dir", str(tmp_path / "run")]) == 0
    files = (tmp_path / "cache" / "calibration").glob("calibration-*.json")
    assert {len(json.loads(file.read_text())) for file in files} == {1}  # each text and picture alone
    protection = json.loads((tmp_path / "run" / "policy.json").read_text())["protection"]
    assert max(layer["overlap"] for layer in protection.values()) < 1e-5


@pytest.mark.parametrize(
    "how", [["--train_sampling_strategy", "group_by_length"], ["--packing", "True", "--max_length", "100"]], ids=str
)
def test_a_run_learns_and_a_resumed_one_ends_the_same(how: list[str], qwen: Path, data: Path, tmp_path: Path) -> None:
    words = [*flags(qwen, data), "--save_steps", "2", "--max_pixels", "512", *how]
    assert main([*words, "--output_dir", str(tmp_path / "whole")]) == 0
    recipe = yaml.safe_load((tmp_path / "whole" / "recipe.yaml").read_text())
    assert (recipe["template"], recipe["data"]["max_pixels"]) == ("chat_template", 512)
    saved = json.loads((tmp_path / "whole" / "processor_config.json").read_text())
    assert saved["image_processor"]["size"]["longest_edge"] == 512
    half = [*words, "--output_dir", str(tmp_path / "half")]
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(RuntimeError, match="power"):
            main(half)
    assert main([*half, "--resume_from_checkpoint", "auto"]) == 0
    assert losses(tmp_path / "half") == losses(tmp_path / "whole")


def stop_after(patch: pytest.MonkeyPatch, steps: int) -> None:
    """Fail after so many steps, as if the power went off."""
    from transformers import TrainerCallback

    class PowerCut(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step > steps:
                raise RuntimeError("power")

    make = trainer.MiloraTrainer.__init__

    def with_cut(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        self.add_callback(PowerCut())

    patch.setattr(trainer.MiloraTrainer, "__init__", with_cut)


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--template", "vicuna_v1"], ""),
        (["--image_aspect_ratio", "anyres"], "image-aspect-ratio"),
        (["--min_pixels", "999999"], ""),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_weights_load(
    words: list[str], code: str, qwen: Path, data: Path, tmp_path: Path
) -> None:
    for more in ([], ["--dry-run"]):
        with pytest.raises(UserError) as error:
            main([*flags(qwen, data), *words, *more, "--output_dir", str(tmp_path / "run")])
        assert code in [problem.code for problem in error.value.problems]


@pytest.mark.slow
@pytest.mark.parametrize("name", VLM_FAMILIES)
def test_every_family_is_planned_and_trained(name: str, data: Path, tmp_path: Path) -> None:
    if name == "smolvlm":
        pytest.importorskip("num2words")
    model = write_model(name, tmp_path / "model")
    words = flags(model, data, "single.json" if name in ONE_KIND else "mixed.json")
    words[words.index("--rank") + 1] = "1"  # the default protects all but few inputs of layers as tiny as these
    runs = {"run": [], "packed": ["--packing", "True", "--max_length", "256"]}
    if name in ("mllama", "gemma4", "qwen3_5"):  # refused
        del runs["packed"]
    for run, more in runs.items():
        assert main([*words, *more, "--dry-run"]) == 0
        assert main([*words, *more, "--output_dir", str(tmp_path / run)]) == 0
        values = [loss for _, loss in losses(tmp_path / run)]
        assert len(values) == 5
        assert all(0 < value < 20 for value in values)


@pytest.mark.parametrize("name", ["qwen2_5_vl", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_a_run_is_asked_evaluated_and_exported(
    name: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if name == "smolvlm":
        pytest.importorskip("num2words")
    model, run = write_model(name, tmp_path / "model"), tmp_path / "run"
    words = flags(model, data, "single.json" if name in ONE_KIND else "mixed.json", steps=2)
    assert main([*words, "--output_dir", str(run)]) == 0
    for benchmark in ("pope", "MME"):
        official_data.write(tmp_path / "benchmarks", benchmark)
    words = ["--model", str(model), "--adapter", str(run), "--data", str(tmp_path / "benchmarks"), "--limit", "1"]
    words += ["--benchmarks", "pope,mme", "--forgetting_tokens", "64", "--output_dir", str(run)]
    assert evaluate(["run", *words]) == 0
    (results,) = run.glob("eval/*/final/results.json")
    content = json.loads(results.read_text())
    assert content["template"] == "chat_template"
    assert forgetting(["--model", str(model), "--adapter", str(run), "--on", "pictures", "--limit", "1"]) == 0

    def answer(*words: str) -> str:
        capsys.readouterr()
        image = ["--image", str(data / "images" / "0.png"), "--max_new_tokens", "6"]
        assert chat([*words, *image, "What?"]) == 0
        return capsys.readouterr().out

    expected = answer("--model", str(model), "--adapter", str(run))
    for form in ("merged", "adapter", "rank-r"):
        folder = tmp_path / form
        assert export([str(run), "--to", form, "--output_dir", str(folder)]) == 0
        how = ("--model", str(folder)) if form == "merged" else ("--model", str(model), "--adapter", str(folder))
        assert answer(*how) == expected
    collate = ProcessorCollator(AutoProcessor.from_pretrained(model), image_folder=data / "images")
    batch = collate(mixed_records(single=True)[:2])
    with torch.no_grad():
        ours = load_model(model, adapter=run)[0](**batch).logits
        stock = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32)
        stock = PeftModel.from_pretrained(stock, run).eval()
        merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype=torch.float32)
        assert torch.allclose(stock(**batch).logits, ours, atol=1e-5)
        assert torch.allclose(merged(**batch).logits, ours, atol=1e-4)


@pytest.mark.slow
@needs_zero3
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "idefics3", "internvl", "mllama", "gemma4"])
def test_records_with_and_without_pictures_mix_on_two_processes(name: str, data: Path, tmp_path: Path) -> None:
    """In the first step and the last two one process has a picture, in the others none: momentum still moves them.

    Without the hidden pictures, ZeRO-3 waits for ever; `train_in_two` has a time limit.
    """
    records = [record([("human", f"Count {'on ' * n}"), ("gpt", f"{n} {n}")], [], n) for n in range(7)]
    shown = mixed_records(single=True)
    records = [shown[0], *records[:5], shown[1], *records[5:], shown[2]]
    (data / "few.json").write_text(json.dumps(records))
    model = Path("tiny") if name == "llava" else write_model(name, tmp_path / "model")
    words = [*flags(model, data, "few.json"), "--train_sampling_strategy", "sequential"]
    two = [*words[: words.index("--device")], *words[words.index("--device") + 2 :], "--use_cpu", "True"]
    two[two.index("--per_device_train_batch_size") + 1] = "1"
    runs = {kind: [*ALIKE, *KINDS[kind]] for kind in ("ddp", "fsdp")}
    if name not in ("mllama", "gemma4"):
        runs["packed"] = [*ALIKE, *KINDS["fsdp"], "--packing", "True", "--max_length", "256"]
    runs |= {kind: [*ALIKE, *KINDS[kind]] for kind in ("zero2", "zero3")} | {"kl": KINDS["zero3"]}
    assert main([*words, *ALIKE, "--output_dir", str(tmp_path / "one")]) == 0
    train_in_two([[*two, *how, "--output_dir", str(tmp_path / kind)] for kind, how in runs.items()], tmp_path)
    one, weights = torch.tensor(losses(tmp_path / "one")), load_file(tmp_path / "one" / "adapter_model.safetensors")
    assert one[0, 1] - one[:, 1].min() > 1e-3
    for kind in runs.keys() - {"kl", "packed"}:
        torch.testing.assert_close(torch.tensor(losses(tmp_path / kind)), one, rtol=0, atol=1e-4)
        found = load_file(tmp_path / kind / "adapter_model.safetensors")
        assert found.keys() == weights.keys()
        assert all(torch.allclose(found[key], weights[key], atol=2e-4) for key in weights), kind
    assert all(losses(tmp_path / kind) for kind in runs)


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_quantized_base_trains_with_its_projector_in_full(bits: Any, qwen: Path, data: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    run = tmp_path / "run"
    words = [*flags(qwen, data), "--quantization", bits]
    assert main([*words, "--dry-run"]) == 0
    assert main([*words, "--output_dir", str(run)]) == 0
    values = [loss for _, loss in losses(run)]
    assert min(values[1:]) < values[0]
    collate = ProcessorCollator(AutoProcessor.from_pretrained(qwen), image_folder=data / "images")
    batch = collate(mixed_records()[:4])
    with torch.no_grad():
        base, tuned = (load_model(qwen, adapter=folder, quantization=bits)[0](**batch).loss for folder in (None, run))
    assert tuned < base
    merger = load_model(qwen, quantization=bits)[0].model.visual.merger
    assert type(merger.mlp[0]) is torch.nn.Linear
