"""Every model family: the towers are found, and an adapter goes from start to merge, and into stock PEFT alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from milora_vl import Policy, apply_milora, load_adapter, merge, save_adapter
from milora_vl.core.policy.towers import find_towers
from milora_vl.core.weights.matrices import is_linear
from support.adapter_cases import anchors
from support.family_configs import FAMILIES, TEXT_ONLY, batch, build
from support.programs import STOCK_PEFT
from support.programs import run as run_program
from support.versions import CALLS_BY_KEYWORD

LACKS = {"idefics2": not CALLS_BY_KEYWORD}
ALL = [name for name in (*FAMILIES, *TEXT_ONLY) if not LACKS.get(name)]
pytestmark = pytest.mark.filterwarnings("ignore:.*experts as 3-D")


def rules(name: str) -> list[dict[str, object]]:
    made: list[dict[str, object]] = [{"modules": "language", "method": "milora", "protect": 0, "rank": 2, "alpha": 4}]
    return made + ([{"modules": "projector", "method": "full"}] if name in FAMILIES else [])


@pytest.mark.parametrize("name", ALL)
def test_a_language_rule_hits_exactly_the_language_layers(name: str) -> None:
    model = build(name)
    linear = {path for path, module in model.named_modules() if is_linear(module)}
    hit = {target.path for target in Policy.parse(rules(name)[:1]).resolve(model)}
    if name in TEXT_ONLY:
        head = {path for path, module in model.named_modules() if module is model.get_output_embeddings()}
        assert hit == linear - head
        return
    family = FAMILIES[name]
    assert hit == {path for path in linear if path.startswith(family.language)}
    assert not [path for path in hit if any(word in path for word in ("vision", "visual", "image_tower"))]


@pytest.mark.parametrize("name", FAMILIES)
def test_projector_and_vision_are_found_and_apart(name: str) -> None:
    model, family = build(name), FAMILIES[name]
    projector = Policy.parse([{"modules": "projector", "method": "full"}]).resolve(model)
    assert projector
    assert all(family.projector in target.path and target.tower == "projector" for target in projector)
    vision = Policy.parse([{"modules": "vision", "method": "lora", "rank": 2}]).resolve(model)
    assert vision
    assert not {t.path for t in vision} & {t.path for t in projector}
    assert all(family.projector not in target.path for target in vision)
    assert find_towers(model).layout.split()[0]  # a row of the table


@pytest.fixture(scope="module")
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For every family asked for (`-k NAME`): base, adapter after a step, batch, logits; then stock PEFT on all."""
    root = tmp_path_factory.mktemp("families")
    wanted = [item for item in request.session.items if item.path == request.path and "trained" in item.fixturenames]
    names = [item.callspec.params["name"] for item in wanted]
    for name in names:
        _train(name, root / name)
    done = run_program(["-c", STOCK_PEFT, *(str(root / name) for name in names)])
    assert done.returncode == 0, done.stderr
    return root


def _train(name: str, folder: Path) -> None:
    base, inputs = build(name), batch(name)
    base.save_pretrained(folder / "base")
    untouched = logits(base, name)
    model = apply_milora(base, rules(name))
    start, fixed = logits(model, name), anchors(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    optimizer.step()
    save_adapter(model, folder / "adapter")
    save_file(inputs, folder / "inputs.safetensors")
    made = {"base": untouched, "start": start, "trained": logits(model, name)}
    made["reloaded"] = logits(load_adapter(build(name), folder / "adapter"), name)
    after = anchors(model)
    assert after
    moved = [key for key, anchor in after.items() if not torch.equal(anchor, fixed[key])]
    (folder / "moved.json").write_text(json.dumps(moved), encoding="utf-8")
    merged: Any = merge(model)
    merged.save_pretrained(folder / "merged")
    made["merged"] = logits(merged, name)
    save_file({key: t.contiguous() for key, t in made.items()}, folder / "ours.safetensors")


@torch.no_grad()
def logits(model: nn.Module, name: str) -> torch.Tensor:
    return model.eval()(**batch(name)).logits


@pytest.mark.parametrize("name", ALL)
def test_from_start_to_merge_and_in_stock_peft(name: str, trained: Path) -> None:
    ours = load_file(trained / name / "ours.safetensors")
    assert torch.allclose(ours["start"], ours["base"], atol=1e-6)
    assert (ours["trained"] - ours["base"]).abs().max() > 1e-4, "nothing was learned"
    assert json.loads((trained / name / "moved.json").read_text(encoding="utf-8")) == []
    stock = load_file(trained / name / "stock.safetensors")
    for how, tensor in {"reloaded": ours["reloaded"], "merged": ours["merged"], **stock}.items():
        assert torch.allclose(tensor, ours["trained"], atol=1e-5), how
