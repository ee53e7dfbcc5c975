"""Save, load and continue an adapter: the same numbers, and no other base."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from milora_vl import apply_milora, load_adapter, save_adapter
from milora_vl.core.adapter.load import load_checkpoint
from milora_vl.core.adapter.sidecar import Sidecar, fitted
from milora_vl.core.weights.matrices import distance, fingerprint
from support.adapter_cases import (
    LLAVA_POLICY,
    Pictures,
    anchors,
    llava_batch,
    move,
    one_rule,
    picture_batch,
    token_batch,
)
from support.problems import raises_code, raises_problem


@pytest.fixture
def saved(tiny_llava, tmp_path: Path):
    model = apply_milora(tiny_llava()[0], LLAVA_POLICY)
    move(model)
    save_adapter(model, tmp_path / "a")
    return model, tmp_path / "a"


@pytest.mark.parametrize("is_trainable", [False, True])
def test_loading_gives_the_same_logits_differences_and_anchors(saved, tiny_llava, is_trainable: bool) -> None:
    model, folder = saved
    back = load_adapter(tiny_llava()[0], folder, is_trainable=is_trainable)
    batch = llava_batch(model)
    assert is_trainable or not any(module.training for module in back.modules())
    assert torch.equal(back.eval()(**batch).logits, model.eval()(**batch).logits)
    assert all(torch.equal(anchors(back)[name], anchor) for name, anchor in anchors(model).items())
    trained = {name for name, p in back.named_parameters() if p.requires_grad}
    assert trained == ({name for name, p in model.named_parameters() if p.requires_grad} if is_trainable else set())
    assert back.milora_targets == model.milora_targets
    assert back.milora_report == model.milora_report


def test_dropout_per_module_comes_back(tiny_llama, tmp_path: Path) -> None:
    rules = [*one_rule(dropout=0.3), {"modules": "language.mlp", "dropout": 0.1}]
    save_adapter(apply_milora(tiny_llama()[0], rules), tmp_path)
    layer = load_adapter(tiny_llama()[0], tmp_path, is_trainable=True).base_model.model.model.layers[0]
    assert layer.self_attn.q_proj.lora_dropout["default"].p == 0.3
    assert layer.mlp.up_proj.lora_dropout["default"].p == 0.1


@pytest.mark.parametrize("modules", ["patch", "words", "head", "*"])
def test_every_kind_of_layer_comes_back(tmp_path: Path, modules: str) -> None:
    rules = [{"modules": modules, "method": "milora", "protect": 0, "rank": 2}, {"modules": "words", "method": "lora"}]
    model = apply_milora(Pictures(), rules if modules in ("words", "*") else rules[:1])
    move(model)
    save_adapter(model, tmp_path)
    back = load_adapter(Pictures(), tmp_path, is_trainable=True)
    assert torch.equal(back(*picture_batch()), model(*picture_batch()))
    assert not torch.equal(back(*picture_batch()), Pictures()(*picture_batch()))


def test_an_adapter_of_a_bfloat16_base_is_kept_exactly(tiny_llama, tmp_path: Path) -> None:
    model = apply_milora(tiny_llama()[0].bfloat16(), one_rule())
    move(model, 0.01)
    save_adapter(model, tmp_path)
    narrow = load_adapter(tiny_llama()[0].bfloat16(), tmp_path, is_trainable=True)
    assert {a.dtype for a in anchors(narrow).values()} == {torch.bfloat16}
    ids = token_batch()
    assert torch.equal(narrow(ids).logits, model(ids).logits)


def test_an_adapter_of_a_float32_base_keeps_its_anchor_on_a_bfloat16_one(tiny_llama, tmp_path: Path) -> None:
    model = apply_milora(tiny_llama()[0], one_rule())
    save_adapter(model, tmp_path)
    back = load_adapter(tiny_llama()[0].bfloat16(), tmp_path, is_trainable=True)
    assert all(torch.equal(anchors(back)[name], anchor) for name, anchor in anchors(model).items())
    ids = token_batch()
    assert torch.equal(back(ids).logits, tiny_llama()[0].bfloat16()(ids).logits)


def test_without_milora_json_the_folder_is_a_plain_lora(saved, tiny_llava, caplog) -> None:
    model, folder = saved
    (folder / "milora.json").unlink()
    with caplog.at_level(logging.INFO, logger="milora_vl.core.adapter.load"):
        back = load_adapter(tiny_llava()[0], folder)
    assert "has no milora.json: loaded as a plain LoRA" in caplog.text
    batch = llava_batch(model)
    assert torch.allclose(back(**batch).logits, model.eval()(**batch).logits, atol=1e-5)
    assert type(back).__module__ == "peft.peft_model"


def test_what_is_no_adapter_folder_is_refused_in_words(saved, tiny_llava, tmp_path: Path) -> None:
    _, folder = saved
    base, _ = tiny_llava()
    (tmp_path / "run" / "checkpoint-10").mkdir(parents=True)
    (tmp_path / "run" / "checkpoint-10" / "adapter_model.safetensors").touch()
    (tmp_path / "file").write_text("x")
    newest = "checkpoint-10? It is the newest checkpoint"
    for path, message, hint in (
        (tmp_path / "nowhere", "no such adapter folder", ""),
        (tmp_path / "file", "this is a file", ""),
        (tmp_path / "run", "adapter_config.json is missing, found checkpoint-10", newest),
    ):
        with raises_problem(str(path), message, hint):
            load_adapter(base, path)
    weights = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").unlink()
    with raises_problem(str(folder), "adapter_model.safetensors is missing"):
        load_adapter(base, folder)
    (folder / "adapter_model.safetensors").write_bytes(weights[:-100])
    with raises_code("weights-unreadable", str(folder), "cannot be read"):
        load_adapter(base, folder)
    (folder / "adapter_config.json").write_text("{")
    with raises_problem("adapter_config.json", "not a mapping in JSON"):
        load_adapter(base, folder)


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        ("q_proj.lora_A.weight", "", "q_proj.lora_A"),
        ("multi_modal_projector.linear_2", "", "linear_2"),
        ("rank", "", "does not fit"),
    ],
)
def test_weights_that_are_not_those_of_the_config_are_refused(saved, tiny_llava, change, code, message) -> None:
    from safetensors.torch import load_file, save_file

    model, folder = saved
    weights = load_file(folder / "adapter_model.safetensors")
    if change == "rank":
        weights = {name: t[:2].clone() if "lora_A" in name else t for name, t in weights.items()}
    weights = {name: t for name, t in weights.items() if change not in name}
    save_file(weights, folder / "adapter_model.safetensors")
    with raises_code(code, str(folder), message):
        load_adapter(tiny_llava()[0], folder)
    with raises_code(code, str(folder), message):
        model.load_adapter(str(folder), "default")


def test_a_plain_folder_without_its_projector_is_refused(tiny_llava, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file, save_file

    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["linear_1"])
    get_peft_model(tiny_llava()[0], config).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({name: t for name, t in load_file(file).items() if "linear_1" not in name}, file)
    with raises_code("", str(tmp_path), "linear_1.weight"):
        load_adapter(tiny_llava()[0], tmp_path)


@pytest.mark.parametrize(
    "field", ['"lora_alpha": NaN', '"r": 1e12', '"rank_pattern": {"a": 1e12}', '"x": ' + "[" * 100_000]
)
def test_a_config_that_no_lora_has_is_refused(tiny_llama, tmp_path: Path, field: str) -> None:
    save_adapter(apply_milora(tiny_llama()[0], one_rule()), tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().rstrip().removesuffix("}") + f', "x": 1, {field}}}')
    with raises_problem(str(config), says="no number that a LoRA can have|not a mapping in JSON"):
        load_adapter(tiny_llama()[0], tmp_path)


def sidecar_of(model: nn.Module, rules) -> Sidecar:
    return apply_milora(model, rules).sidecars["default"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_base_fits_in_any_precision(tiny_llava, dtype: torch.dtype) -> None:
    sidecar = sidecar_of(tiny_llava()[0].to(dtype), LLAVA_POLICY)
    for here in (torch.float32, torch.bfloat16):
        assert fitted(tiny_llava()[0].to(here), sidecar, allow_base_mismatch=False) == sidecar


def test_another_base_is_refused_with_the_way_out(tiny_llava) -> None:
    sidecar = sidecar_of(tiny_llava()[0], LLAVA_POLICY)
    other, _ = tiny_llava(seed=1)
    way_out = "load the base model that adapter_config.json names"
    with raises_code("adapter-wrong-base", "model.language_model.layers.", "14 of 14 weights differ", way_out):
        fitted(other, sidecar, allow_base_mismatch=False)
    assert fitted(other, sidecar, allow_base_mismatch=True) == sidecar


def test_one_changed_layer_is_found(tiny_llava) -> None:
    sidecar = sidecar_of(tiny_llava()[0], LLAVA_POLICY)
    other, _ = tiny_llava()
    other.model.language_model.layers[1].mlp.up_proj.weight.data *= 1.01
    with raises_code("adapter-wrong-base", "layers.1.mlp.up_proj", "1 of 14 weights"):
        fitted(other, sidecar, allow_base_mismatch=False)


@torch.no_grad()
def changed(model: nn.Module, case: str) -> nn.Module:
    parameters = dict(model.named_parameters())
    if case == "embeddings":
        parameters["model.language_model.embed_tokens.weight"].normal_()
    elif case == "head":
        parameters["lm_head.weight"].neg_()
    elif case == "norms":
        parameters["model.language_model.layers.1.input_layernorm.weight"].mul_(3)
    elif case == "biases":
        parameters["model.vision_tower.encoder.layers.0.mlp.fc1.bias"].add_(0.1)
    else:
        torch.manual_seed(1)
        model.model.vision_tower = type(model.model.vision_tower)(model.config.vision_config)
    return model


@pytest.mark.parametrize("rules", [LLAVA_POLICY, one_rule(method="lora")], ids=["anchored", "lora"])
@pytest.mark.parametrize(
    ("case", "first"),
    [
        ("embeddings", "language.embed_tokens.weight"),
        ("head", "language.lm_head.weight"),
        ("norms", "language.layers.1.input_layernorm.weight"),
        ("biases", "vision.layers.0.mlp.fc1.bias"),
        ("tower", "vision.embeddings.class_embedding"),
    ],
)
def test_other_frozen_parameters_warn_and_no_training_continues_on_them(
    tiny_llava, tmp_path: Path, rules, case: str, first: str
) -> None:
    save_adapter(apply_milora(tiny_llava()[0], rules), tmp_path)
    with pytest.warns(UserWarning, match=f"{first}: this frozen parameter"):
        load_adapter(changed(tiny_llava()[0], case), tmp_path)
    with raises_code("adapter-wrong-base", first):
        load_checkpoint(changed(tiny_llava()[0], case), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter(changed(tiny_llava()[0], case), tmp_path, allow_base_mismatch=True)
        load_adapter(tiny_llava()[0].bfloat16(), tmp_path)
        load_checkpoint(tiny_llava()[0], tmp_path)


def test_a_padded_vocabulary_is_the_same_base(tiny_llama) -> None:
    rules = [{"modules": "lm_head", "method": "milora", "protect": 0, "rank": 2}]
    sidecar = sidecar_of(tiny_llama()[0], rules)
    other, _ = tiny_llama()
    other.resize_token_embeddings(320)
    assert fitted(other, sidecar, allow_base_mismatch=False) == sidecar


def weight(seed: int = 0, rows: int = 48, columns: int = 40) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("there", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("here", [torch.float32, torch.bfloat16, torch.float16])
def test_roundings_of_one_weight_are_the_same(there: torch.dtype, here: torch.dtype) -> None:
    for seed in range(20):
        assert distance(fingerprint(weight(seed).to(there)), weight(seed).to(here)) < 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_weights_are_not(dtype: torch.dtype) -> None:
    for seed in range(20):
        assert distance(fingerprint(weight(seed).to(dtype)), weight(seed + 1).to(dtype)) > 5


class TensorCores(TorchDispatchMode):
    """Products read ten bits of a mantissa, as on a GPU with `tf32: true`, unless the setting of torch forbids it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.mm.default and torch.backends.cuda.matmul.fp32_precision == "tf32":
            args = [((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32) for x in args]
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch < 2.9")
def test_tensor_cores_do_not_make_a_weight_another_one() -> None:
    A = weight(rows=128, columns=4096)
    saved, product, matmul = fingerprint(A), A @ A.T, torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    try:
        with TensorCores():
            assert not torch.allclose(A @ A.T, product)
            assert distance(saved, A) < 1
    finally:
        matmul.fp32_precision = before
