"""The size of an update: what is written is exactly what the number says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

from milora_vl import apply_milora, load_adapter, load_model, save_adapter
from milora_vl.common.atomic_write import json_lines
from milora_vl.export import Options, export
from milora_vl.export.__main__ import main
from milora_vl.interop.scale import Update
from milora_vl.report.page import regenerate_report
from milora_vl.train.__main__ import main as train
from support.adapter_cases import LLAVA_POLICY, llava_batch, move, one_rule
from support.calibrated import directions, leaks, text_batches
from support.problems import raises_code
from support.train_runs import file_contents, read_json, training

Factory = Callable[..., tuple[Any, Any]]


@pytest.fixture(scope="module")
def made(tiny_llava: Factory, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A base, an adapter of several rules on it, and the matrices of the base."""
    root = tmp_path_factory.mktemp("made")
    for part in tiny_llava():
        part.save_pretrained(root / "base")
    rules = [*LLAVA_POLICY, {"modules": "*embed_tokens", "method": "lora", "rank": 3}]
    model = apply_milora(load_model(root / "base")[0], rules)
    move(model, 0.05)
    save_adapter(model, root / "a")
    return SimpleNamespace(root=root, before=weights_of(load_model(root / "base")[0]))


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in model.state_dict().items()}


def merged(made: SimpleNamespace, folder: Path) -> dict[str, Tensor]:
    """The weights with the adapter, as stock PEFT merges it."""
    base = AutoModelForImageTextToText.from_pretrained(made.root / "base")
    return weights_of(PeftModel.from_pretrained(base, folder).merge_and_unload())


def errors(made: SimpleNamespace, got: dict[str, Tensor], scale: float) -> tuple[float, float]:
    """The largest difference from W + scale (W' - W), and the largest change, over all weights."""
    after = merged(made, made.root / "a")
    wanted = {key: W + scale * (after[key] - W) for key, W in made.before.items()}
    assert got.keys() == wanted.keys()
    error = max(float((got[key] - W).abs().max()) for key, W in wanted.items())
    return error, max(float((got[key] - W).abs().max()) for key, W in made.before.items())


@pytest.mark.parametrize("form", ["adapter", "merged"])
def test_a_scaled_export_holds_that_share_of_the_update(made, tmp_path: Path, form: str) -> None:
    export(made.root / "a", form, tmp_path / "out", Options(scale=0.3))
    if form == "merged":
        got = weights_of(AutoModelForImageTextToText.from_pretrained(tmp_path / "out"))
    else:
        got = merged(made, tmp_path / "out")
    error, size = errors(made, got, 0.3)
    assert error < 1e-6
    assert size > 1e-2


@pytest.mark.parametrize("form", ["adapter", "rank-2", "merged"])
def test_an_update_of_size_zero_is_the_base_model(made, tmp_path: Path, form: str) -> None:
    assert main([str(made.root / "a"), "--to", form, "--scale", "0", "--output_dir", str(tmp_path / form)]) == 0
    if form == "merged":
        got = weights_of(load_model(tmp_path / form)[0])
    else:
        got = merged(made, tmp_path / form)
        assert load_adapter(load_model(made.root / "base")[0], tmp_path / form, is_trainable=form == "adapter")
    assert errors(made, got, 0)[0] < 1e-6


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -1, "a", None, True])
def test_a_size_that_is_no_number_from_zero_is_refused(made, tmp_path: Path, scale: Any) -> None:
    with raises_code("", where="--scale", message=f"must be a number from 0, got {scale!r}"):
        load_model(made.root / "base", adapter=made.root / "a", scale=scale)
    with raises_code("", where="--scale"):
        export(made.root / "a", "adapter", tmp_path / "out", Options(scale=scale))


def test_an_exported_adapter_stays_protected(tiny_llama: Factory, tmp_path: Path) -> None:
    for part in tiny_llama():
        part.save_pretrained(tmp_path / "base")
    base = load_model(tmp_path / "base")[0]
    base.name_or_path = base.config._name_or_path = str(tmp_path / "base")
    rules, texts = one_rule(method="milora", protect=0.6), text_batches(40, vocabulary=200)
    protected = directions(base, rules, texts)
    model = apply_milora(base, rules, calibration=texts)
    move(model, 0.2)
    save_adapter(model, tmp_path / "a")
    for name, options in {"plain": {}, "half": {"scale": 0.5}, "low": {"dtype": torch.bfloat16}}.items():
        export(tmp_path / "a", "adapter", tmp_path / name, Options(**options))
        again = load_adapter(load_model(tmp_path / "base")[0], tmp_path / name, is_trainable=True)
        assert not any("lora_A" in key for key, p in again.named_parameters() if p.requires_grad)
        assert max(leaks(again, protected)) < (0.01 if name == "low" else 1e-5)


def test_what_is_no_product_of_factors_is_refused(made, tmp_path: Path) -> None:
    q = "model.language_model.layers.0.self_attn.q_proj"
    for name, changes in {"dora": {"use_dora": True}, "bias": {"bias": "lora_only"}}.items():
        model = get_peft_model(load_model(made.root / "base")[0], LoraConfig(r=3, target_modules=[q], **changes))
        move(model)
        model.save_pretrained(tmp_path / name)
        with raises_code("", message="cannot be scaled"):
            export(tmp_path / name, "merged", tmp_path / "out", Options(scale=0.5))
        with raises_code("", hint="remove --scale"):
            load_model(made.root / "base", adapter=tmp_path / name, scale=0.5)


@torch.no_grad()
def test_a_loaded_model_has_the_output_of_the_scaled_export(made, tmp_path: Path) -> None:
    export(made.root / "a", "adapter", tmp_path / "out", Options(scale=0.5))
    wanted, _ = load_model(made.root / "base", adapter=tmp_path / "out")
    model, _ = load_model(made.root / "base", adapter=made.root / "a", scale=0.5)
    batch = llava_batch(wanted)
    assert torch.allclose(model(**batch).logits, wanted(**batch).logits, atol=1e-6)
    update = Update(model)
    base, full = (load_model(made.root / "base", adapter=adapter)[0] for adapter in (None, made.root / "a"))
    update.set(0.0)
    assert torch.equal(model(**batch).logits, base(**batch).logits)
    loaded = load_model(made.root / "base", adapter=made.root / "a")[0]
    update = Update(loaded)
    for scale in (0.3, 1.0):
        update.set(scale)
    assert torch.equal(loaded(**batch).logits, full(**batch).logits)


def test_a_projector_alone_scales(made, tmp_path: Path) -> None:
    from milora_vl.models.projector import save_projector

    base = load_model(made.root / "base")[0]
    W = base.model.multi_modal_projector.linear_1.weight.clone()
    with torch.no_grad():
        base.model.multi_modal_projector.linear_1.weight += 1.0
    (tmp_path / "projector").mkdir()
    save_projector(base, tmp_path / "projector")
    half, _ = load_model(made.root / "base", adapter=tmp_path / "projector", scale=0.5)
    assert torch.allclose(half.model.multi_modal_projector.linear_1.weight, W + 0.5, atol=1e-6)


def test_a_scale_without_an_update_is_refused(made) -> None:
    with raises_code("flag-needs-another", where="--scale"):
        load_model(made.root / "base", scale=0.5)


@pytest.mark.parametrize("form", ["adapter", "merged"])
def test_auto_exports_the_smallest_scale_that_keeps_the_fall(tiny_data: Path, tmp_path: Path, form: str) -> None:
    run, auto, by_number = tmp_path / "run", tmp_path / "auto", tmp_path / "by_number"
    more = ["--eval_data_path", str(tiny_data / "val.json"), "--rank", "4", "--learning_rate", "2e-2"]
    assert train(training(tiny_data, run, *more)) == 0
    assert main([str(run), "--to", form, "--scale", "auto", "--output_dir", str(auto)]) == 0
    found, lines = read_json(run, "scales.json"), list(json_lines(run / "held_out.jsonl"))
    loss = {point["scale"]: point["held_out_loss"] for point in found["scales"]}
    assert loss[1] == pytest.approx(fmean(line["loss"] for line in lines), abs=1e-4)
    assert loss[0] == pytest.approx(fmean(line["base_loss"] for line in lines), abs=1e-4)
    least = loss[0] - 0.95 * (loss[0] - min(loss.values()))
    assert 1 > found["chosen"] == min(scale for scale in loss if loss[scale] <= least)
    assert found["scales"][0]["forgetting"] < 1e-6 < found["scales"][-1]["forgetting"]
    export(run, form, by_number, Options(scale=found["chosen"]))
    assert file_contents(auto) == file_contents(by_number)
    assert f"{found['chosen']:g} (chosen)" in (run / "report.html").read_text(encoding="utf-8")
    (run / "adapter_model.safetensors").write_bytes(b"of a training that went on")
    regenerate_report(run)
    assert "(chosen)" not in (run / "report.html").read_text(encoding="utf-8")


def test_auto_without_held_out_records_is_refused(made, tmp_path: Path) -> None:
    with raises_code("scale-no-held-out", where="--scale", hint="--eval_data_path"):
        export(made.root / "a", "adapter", tmp_path / "out", Options(scale="auto"))
