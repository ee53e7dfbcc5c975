"""`method: gradient`: A starts at the input directions in which the task's gradient is largest."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from milora_vl import apply_milora, load_adapter, save_adapter
from milora_vl.core.adapter.install import lora_layer
from milora_vl.core.calibration import gradients as module
from milora_vl.core.calibration.gradients import gradient_sketches
from milora_vl.core.policy import Policy
from support.adapter_cases import one_rule, token_batch
from support.calibrated import directions, leaks, llava_batches, text_batches
from support.family_configs import batch, build
from support.launched import needs_deepspeed, results_of_two
from support.problems import raises_code

RULES = one_rule(method="gradient", rank=4, protect=0)
IDS = token_batch(200, 12, 20)
TASK = [{"input_ids": rows, "labels": rows} for rows in IDS.split(4)]


def gradients(base: nn.Module, batches: Any, paths: list[str]) -> dict[str, Tensor]:
    """The whole gradient of each weight, by torch."""
    twin = copy.deepcopy(base).requires_grad_(True)
    for inputs in batches:
        twin(**inputs).loss.backward()
    return {path: twin.get_submodule(path).weight.grad.flatten(1) for path in paths}


def test_the_rows_hold_most_of_the_gradient_that_any_rows_could(tiny_llama) -> None:
    base = tiny_llama()[0]
    model = apply_milora(copy.deepcopy(base), RULES, task=TASK)
    paths = [target.path for target in model.milora_targets]
    for path, G in gradients(base, TASK, paths).items():
        A = lora_layer(model, path).lora_A["default"].weight
        found = torch.linalg.qr(A.T).Q  # (in, r)
        most = torch.linalg.svdvals(G)[:4].square().sum()
        assert (G @ found).square().sum() > 0.5 * most, path


def test_a_gradient_of_low_rank_is_found_exactly() -> None:
    torch.manual_seed(0)

    class Scored(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch = nn.Conv2d(3, 8, 3, stride=2, padding=1)
            self.head = nn.Linear(8, 40)

        def forward(self, pixels: Tensor, wanted: Tensor) -> Any:
            out = self.head(self.patch(pixels).mean((2, 3)))
            return type("Output", (), {"loss": (out * wanted).sum()})()

    base = Scored()
    batch = {"pixels": torch.randn(2, 3, 8, 8), "wanted": torch.randn(2, 40)}  # two records: rank 2
    targets = Policy.parse([{"modules": "*", "method": "gradient", "rank": 2}]).resolve(base)
    for path, sketch in gradient_sketches(base, targets, [batch]).items():
        G = gradients(base, [batch], [path])[path]
        rows = torch.linalg.svd(sketch, full_matrices=False).Vh[:2]
        torch.testing.assert_close(G @ rows.T @ rows, G, atol=1e-5, rtol=1e-4)


def test_a_layer_that_is_called_by_keyword_is_seen() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(5, 7), nn.Linear(7, 3)

        def forward(self, x: Tensor) -> Any:
            return SimpleNamespace(loss=self.last(input=self.first(input=x)).square().sum())

    net, x = Net(), torch.randn(4, 5)
    targets = Policy.parse([{"modules": "first", "method": "gradient", "rank": 2}]).resolve(net)
    sketch = gradient_sketches(net, targets, [{"x": x}])["first"]
    whole = gradients(net, [{"x": x}], ["first"])["first"]
    rows = torch.linalg.svd(sketch, full_matrices=False).Vh[:3]
    assert torch.linalg.norm(whole - whole @ rows.T @ rows) < 1e-4 * torch.linalg.norm(whole)


def test_the_division_into_batches_has_no_effect(tiny_llama) -> None:
    base = tiny_llama()[0]
    targets = Policy.parse(RULES).resolve(base)
    labels = IDS.clone()
    for row, cut in enumerate(range(1, 13)):  # no model predicts the first label
        labels[row, :cut] = -100
    together = gradient_sketches(base, targets, [{"input_ids": IDS, "labels": labels}])
    alone = [{"input_ids": a, "labels": b} for a, b in zip(IDS.split(1), labels.split(1), strict=True)]
    for path, sketch in gradient_sketches(base, targets, alone).items():
        torch.testing.assert_close(sketch, together[path], rtol=1e-3, atol=1e-5 * float(sketch.abs().max()))


@pytest.fixture
def gathered(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Take the path of ZeRO-3; return how many parameters are gathered, after each change."""
    open_now, counts = [0], []

    @contextmanager
    def gather(parameters: list[nn.Parameter], modifier_rank: int | None) -> Iterator[None]:
        open_now[0] += len(parameters)
        counts.append(open_now[0])
        yield
        open_now[0] -= len(parameters)

    monkeypatch.setattr(module, "gather_params_ctx", gather)
    monkeypatch.setattr(module, "is_deepspeed_zero3_enabled", lambda: True)
    return counts


@pytest.mark.parametrize("family", ["llama", "llava", "qwen2_5_vl", "gemma3"])
def test_blocks_that_run_twice_need_less_memory_and_find_the_same(family, gathered, monkeypatch) -> None:
    base, inputs = build(family), batch(family)
    task = [{**inputs, "labels": inputs["input_ids"]}]
    targets = Policy.parse([{"modules": "language", "method": "gradient", "rank": 4}]).resolve(base)
    saved = [0]

    def measured() -> dict[str, Tensor]:
        def pack(tensor: Tensor) -> Tensor:
            saved[-1] += tensor.nbytes
            return tensor

        saved.append(0)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            return gradient_sketches(base, targets, task)

    found = measured()
    blocks = max(sum(1 for _ in b.parameters()) for b in base.modules() if isinstance(b, GradientCheckpointingLayer))
    assert max(gathered) == gathered[0] + blocks, "one block at a time, and what is in no block"
    assert gathered[0] + blocks < sum(1 for _ in base.parameters())
    monkeypatch.undo()
    for path, sketch in measured().items():
        torch.testing.assert_close(found[path], sketch)
    assert saved[1] < saved[2] / 2
    assert not any("forward" in vars(block) for block in base.modules())


def test_nothing_of_the_model_changes(tiny_llama, gathered) -> None:
    base = tiny_llama()[0].train()
    base.model.layers[0].mlp.eval()
    before = {name: (p.clone(), p.requires_grad) for name, p in base.named_parameters()}
    gradient_sketches(base, Policy.parse(RULES).resolve(base), TASK)
    assert base.training
    assert not base.model.layers[0].mlp.training
    assert base.config.use_cache
    for name, parameter in base.named_parameters():
        assert parameter.grad is None
        assert torch.equal(parameter, before[name][0])
        assert parameter.requires_grad == before[name][1]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in base.modules())


@pytest.mark.parametrize("protect", [0, 0.6])
def test_it_starts_at_the_base_learns_and_stays_off_protected_inputs(tiny_llama, tmp_path: Path, protect) -> None:
    rules = one_rule(method="gradient", rank=4, protect=protect)
    base = tiny_llama()[0]
    texts = text_batches(vocabulary=200) if protect else None
    model = apply_milora(tiny_llama()[0], rules, calibration=texts, task=TASK)
    assert torch.equal(model(IDS).logits, base(IDS).logits)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    save_adapter(model, tmp_path)
    stock = PeftModel.from_pretrained(tiny_llama()[0], str(tmp_path))
    torch.testing.assert_close(stock(IDS).logits, model(IDS).logits)
    again = load_adapter(tiny_llama()[0], tmp_path, is_trainable=True)
    assert not any("lora_A" in name for name, p in again.named_parameters() if p.requires_grad)
    if texts:
        assert max(leaks(stock, directions(base, rules, texts))) < 1e-5


def test_pictures_reach_the_projector_and_a_frozen_tower_is_no_obstacle(tiny_llava) -> None:
    base = tiny_llava()[0]
    towers = ("language", "projector", "vision.layers[0]")
    rules = [{"modules": name, "method": "gradient", "rank": 2, "protect": 0} for name in towers]
    task = [{**batch, "labels": batch["input_ids"]} for batch in llava_batches(base) if "pixel_values" in batch]
    model = apply_milora(base, rules, task=task)
    assert {target.tower for target in model.milora_targets} == {"language", "projector", "vision"}


def test_layers_without_a_gradient_are_counted_and_get_random_rows(tiny_llava, tiny_llama) -> None:
    """LLaVA reads the vision tower before its last block, and text reaches no projector."""
    base = tiny_llava()[0]
    towers = ("language", "projector", "vision")
    rules = [{"modules": name, "method": "gradient", "rank": 2, "protect": 0} for name in towers]
    task = [{**batch, "labels": batch["input_ids"]} for batch in llava_batches(base) if "pixel_values" in batch]
    with pytest.warns(UserWarning, match=r"6 of 34 layers get no gradient.*vision_tower.*layers\.2"):
        apply_milora(base, rules, task=task)
    with pytest.warns(UserWarning, match="2 of 16 layers get no gradient.*projector"):
        model = apply_milora(tiny_llava()[0], rules[:2], task=TASK)
    A = [lora_layer(model, t.path).lora_A["default"].weight for t in model.milora_targets if t.tower == "projector"]
    assert all(rows.count_nonzero() == rows.numel() for rows in A)
    one = [{"input_ids": IDS[:1, :3], "labels": IDS[:1, :3]}]  # two tokens give a gradient of rank two
    model = apply_milora(tiny_llama()[0], one_rule(method="gradient", rank=8, protect=0), task=one)
    for target in model.milora_targets:
        rows = lora_layer(model, target.path).lora_A["default"].weight
        assert (rows.abs() > 1e-3 * rows.abs().max()).float().mean() > 0.9, "no row is a unit vector"


ZERO3 = """
import json, os, sys
os.environ["DS_ACCELERATOR"] = "cpu"
import torch
import torch.distributed as dist
import deepspeed
from transformers import AutoModelForCausalLM
from transformers.integrations import HfDeepSpeedConfig
from milora_vl import calibration_texts
from milora_vl.core.policy import Policy
from milora_vl.core.calibration.gradients import gradient_sketches

folder = sys.argv[1]
whole = AutoModelForCausalLM.from_pretrained(folder)
deepspeed.init_distributed("gloo")
config = HfDeepSpeedConfig({"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}})
ids = torch.randint(5, 200, (4, 12), generator=torch.Generator().manual_seed(0))
task = [{"input_ids": ids, "labels": ids}]
targets = Policy.parse([{"modules": "language", "method": "gradient", "rank": 4}]).resolve(whole)
model = AutoModelForCausalLM.from_pretrained(folder)
parts = gradient_sketches(model, targets, task)
held = sum(p.numel() for p in model.parameters())
texts = calibration_texts(model, count=8, length=8)
del config
expected = gradient_sketches(whole, targets, task)
same = all(torch.allclose(parts[path], expected[path], rtol=1e-4, atol=1e-6) for path in expected)
print("RESULT" + json.dumps([same, held, [row["input_ids"].tolist() for row in texts]]))
dist.barrier()
"""


@needs_deepspeed
def test_zero3_finds_what_a_whole_model_finds_and_writes_texts(tiny_llama, tmp_path: Path) -> None:
    tiny_llama()[0].save_pretrained(tmp_path / "base")
    first, second = results_of_two(ZERO3, tmp_path, str(tmp_path / "base"))
    assert first == second
    assert first[:2] == [True, 0], "nothing stays gathered"


def test_bad_task_batches_are_refused(tiny_llama, tiny_llava) -> None:
    with raises_code("task-missing", hint="task=["):
        apply_milora(tiny_llama()[0], RULES)
    with raises_code("task-missing"):  # before a calibration, which would fail here
        apply_milora(tiny_llama()[0], [RULES[0] | {"protect": 0.5}], calibration=[{"input_ids": None}])
    with raises_code("task-unused"):
        apply_milora(tiny_llama()[0], one_rule(), task=TASK)
    with raises_code("task-unused"):
        apply_milora(tiny_llama()[0], one_rule(), task=[])
    with raises_code("policy-no-adapter", message="embedding"):
        apply_milora(tiny_llama()[0], [{"modules": "model.embed_tokens", "method": "gradient", "rank": 2}], task=TASK)
    with raises_code("calibration-batch", where="task"):
        apply_milora(tiny_llama()[0], RULES, task=["hello"])  # type: ignore[list-item]
    with raises_code("calibration-batch", where="task", message="found dict"):
        apply_milora(tiny_llama()[0], RULES, task=TASK[0])  # type: ignore[arg-type]
    with raises_code("task-no-loss", hint="labels"):
        apply_milora(tiny_llama()[0], RULES, task=[{"input_ids": IDS}])
    with raises_code("task-no-gradient", hint="-100"):
        apply_milora(tiny_llama()[0], RULES, task=[{"input_ids": IDS, "labels": torch.full_like(IDS, -100)}])
    broken = tiny_llama()[0]
    broken.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    with raises_code("task-not-finite"):
        apply_milora(broken, RULES, task=TASK)
