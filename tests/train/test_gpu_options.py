"""What users of GPUs switch on, as far as it runs on a CPU: attention, kernels, torch.compile, optimizers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from milora_vl import apply_milora, load_model
from milora_vl.train import launch
from milora_vl.train.__main__ import main
from milora_vl.train.launch import set_attention
from milora_vl.train.settings import Recipe
from milora_vl.train.start import compile_blocks
from support.adapter_cases import one_rule, token_batch
from support.problems import raises_code
from support.train_runs import losses, training

PLAIN = ("--rank", "4", "--dropout", "0", "--save_strategy", "no")


@pytest.mark.parametrize(
    ("name", "code", "says"),
    [
        ("flash_atention_2", "", "is not supported"),
        ("flash_attention_2", "", "doesn't seem to be installed"),
        ("kernels-community/flash-attn3", "", "install kernels"),
        ("{projector: sdpa}", "recipe-value", "attn_implementation"),
    ],
)
def test_attention_is_refused_before_weights_load(
    name: str, code: str, says: str, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "load_weights", lambda *_, **__: pytest.fail("the weights load"))
    with raises_code(code, where="attn_implementation", says=says):
        main(training(tiny_data, tmp_path / "run", *PLAIN, "--attn_implementation", name))


@pytest.mark.parametrize("name", ["tiny", "tiny-text"])
def test_each_tower_has_its_attention(name: str) -> None:
    model, _ = load_model(name)
    recipe = Recipe.parse({"model": name, "attn_implementation": {"language": "eager", "vision": "sdpa"}})
    set_attention(model, recipe)
    kinds = {type(m).__name__: m.config._attn_implementation for m in model.modules() if isinstance(m, PreTrainedModel)}
    assert {kind: "sdpa" if "CLIP" in kind else "eager" for kind in kinds} == kinds


def count_compilations(counts: list[int]) -> Callable[..., Any]:
    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        counts.append(len(graph.graph.nodes))
        return graph.forward

    return backend


CASES: dict[str, list[dict[str, object]]] = {
    "milora": one_rule(),
    "dropout": one_rule(dropout=0.1),
    "lora": one_rule(method="lora"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_block_is_one_graph_and_blocks_share_it(case: str, tiny_llama: Callable[..., Any]) -> None:
    model = apply_milora(tiny_llama()[0], CASES[case]).train()
    ids = token_batch(200)
    block, captured = model.base_model.model.model.layers[0], {}

    def capture(module: Any, args: Any, kwargs: Any) -> None:
        captured["args"], captured["kwargs"] = args, kwargs

    with block.register_forward_pre_hook(capture, with_kwargs=True):
        model(ids, use_cache=False)
    explained = torch._dynamo.explain(block)(*captured["args"], **captured["kwargs"])
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)
    torch._dynamo.reset()
    model.enable_input_require_grads()  # else the first block differs: what it gets needs no gradient
    counts: list[int] = []
    compile_blocks(model, {"backend": count_compilations(counts)})  # type: ignore[dict-item]
    model(ids, use_cache=False)
    assert len(counts) == 1
    torch._dynamo.reset()


class _RmsNorm:
    calls = 0

    @classmethod
    def apply(cls, x: Any, weight: Any, eps: float, offset: float, *_: Any) -> Any:
        cls.calls += 1
        return F.rms_norm(x, x.shape[-1:], weight + offset, eps)


class _SiluMul:
    calls = 0

    @classmethod
    def apply(cls, gate: Any, up: Any, *_: Any) -> Any:
        cls.calls += 1
        return F.silu(gate) * up


@pytest.mark.parametrize("model", ["tiny", "tiny-text"])
def test_ligers_kernels_run_beside_our_loss(
    model: str, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Liger patches the model as on a GPU; torch computes what its Triton kernels would."""
    pytest.importorskip("liger_kernel.transformers")
    from liger_kernel.transformers import monkey_patch, rms_norm, swiglu
    from transformers.models.llama import modeling_llama

    if model == "tiny-text":
        records = [record for record in json.loads((tiny_data / "train.json").read_text()) if "image" not in record]
        (tiny_data / "train.json").write_text(json.dumps(records))
    words = [*PLAIN, "--model", model, "--max_steps", "2"]
    assert main(training(tiny_data, tmp_path / "plain", *words)) == 0
    monkeypatch.setattr(monkey_patch, "liger_rotary_pos_emb", modeling_llama.apply_rotary_pos_emb)
    monkeypatch.setattr(rms_norm, "LigerRMSNormFunction", _RmsNorm)
    monkeypatch.setattr(swiglu, "LigerSiLUMulFunction", _SiluMul)
    for name in ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP"):  # which Liger replaces for the whole process
        monkeypatch.setattr(modeling_llama, name, getattr(modeling_llama, name))
    _RmsNorm.calls = _SiluMul.calls = 0
    assert main(training(tiny_data, tmp_path / "liger", *words, "--use_liger_kernel")) == 0
    assert _RmsNorm.calls
    assert _SiluMul.calls
    for (_, loss), (_, expected) in zip(losses(tmp_path / "liger"), losses(tmp_path / "plain"), strict=True):
        assert loss == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("optim", ["adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "paged_lion_8bit"])
def test_8_bit_and_paged_optimizers_take_the_rates_of_rules(optim: str, tiny_data: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    words = [*PLAIN, "--optim", optim, "--max_steps", "3", "--mm_projector_lr", "1e-4", "--learning_rate", "1e-2"]
    assert main(training(tiny_data, tmp_path / "run", *words, "--save_strategy", "steps", "--save_steps", "3")) == 0
    groups = torch.load(tmp_path / "run" / "checkpoint-3" / "optimizer.pt")["param_groups"]
    assert {group["initial_lr"] for group in groups} == {1e-2, 1e-4}
    first, *_, last = losses(tmp_path / "run")
    assert last[1] < first[1]
