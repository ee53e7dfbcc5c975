"""The Python API with a model on a device that is not the CPU: it computes what it computes on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from milora_vl import apply_milora, decompose, load_adapter, merge, save_adapter
from milora_vl.core.svd.decomposition import Part
from support.adapter_cases import Pictures as PictureModel
from support.adapter_cases import move, one_rule, picture_batch, tiny_gpt2, token_batch, train_steps
from support.family_configs import batch, build
from support.simulated_device import counted_waits

FAMILIES = ("llama", "llava", "qwen2_5_vl", "gemma3")
RULES = [*one_rule(), {"modules": "language.layers[0].mlp", "method": "lora", "rank": 3}]


def on(device: torch.device | str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.to(device) for name, value in inputs.items()}


def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model.eval()(**inputs).logits.cpu()


def rules_for(name: str) -> list[dict[str, object]]:
    return RULES if name == "llama" else [*RULES, {"modules": "projector", "method": "full"}]


@pytest.mark.parametrize("name", FAMILIES)
def test_apply_train_save_load_and_merge(name: str, sim: torch.device, tmp_path: Path) -> None:
    inputs = batch(name)
    here = on(sim, inputs)
    before = logits(build(name), inputs)
    tuned = apply_milora(build(name).to(sim), rules_for(name))
    assert torch.allclose(logits(tuned, here), before, atol=1e-5)
    on_cpu = apply_milora(build(name), rules_for(name))
    assert train_steps(tuned.train(), here) == pytest.approx(train_steps(on_cpu.train(), inputs), rel=1e-3)
    save_adapter(tuned, tmp_path)
    trained = logits(tuned, here)
    assert not torch.allclose(trained, before, atol=1e-4)
    for device in (sim, "cpu"):
        loaded = load_adapter(build(name).to(device), tmp_path)
        assert torch.allclose(logits(loaded, on(device, inputs)), trained, atol=1e-5)
        assert torch.allclose(logits(merge(loaded), on(device, inputs)), trained, atol=1e-4)


@pytest.mark.parametrize("made", [PictureModel, tiny_gpt2])
def test_convolutions_embeddings_and_conv1d(made: Callable[[], nn.Module], sim: torch.device) -> None:
    model = made()
    inputs = picture_batch() if made is PictureModel else (token_batch(),)
    output = lambda m, device: getattr(out := m(*(x.to(device) for x in inputs)), "logits", out)  # noqa: E731
    before = output(model.eval(), "cpu")
    rules = [{"modules": "*", "method": "milora", "protect": 0, "rank": 2}]
    rules += [{"modules": name, "method": "lora"} for name, m in model.named_modules() if isinstance(m, nn.Embedding)]
    tuned = apply_milora(model.to(sim), rules).eval()
    assert torch.allclose(output(tuned, sim).cpu(), before, atol=1e-5)
    move(tuned)
    expected = output(tuned, sim).cpu()
    assert torch.allclose(output(merge(tuned), sim).cpu(), expected, atol=1e-4)


@pytest.mark.parametrize(("shape", "method"), [((300, 280), "fast"), ((96, 40), "exact")])
@pytest.mark.parametrize("part", get_args(Part))
def test_decompose_gives_the_factors_of_the_cpu(
    part: Any, shape: tuple[int, int], method: Any, sim: torch.device
) -> None:
    W = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with counted_waits() as waits:
        factors = decompose(W.to(sim), 4, part, method=method)
    assert factors.U.device == factors.S.device == factors.Vh.device == sim
    there = decompose(W, 4, part, method=method)
    product = lambda f: (f.U * f.S) @ f.Vh  # noqa: E731
    torch.testing.assert_close(product(factors).cpu(), product(there), atol=1e-4, rtol=1e-4)
    assert sum(waits.lines.values()) < 100
