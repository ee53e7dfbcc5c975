"""milora.json, and adapters on a model whose modules have other names (HF's and LLaVA's layouts)."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from milora_vl import apply_milora, load_adapter, save_adapter
from milora_vl.core.adapter.folders import ANCHORS_FILE, AdapterError
from milora_vl.core.adapter.initialize import LayerReport
from milora_vl.core.adapter.sidecar import FILE_NAME, Sidecar, locate, read_sidecar
from milora_vl.core.policy.rules import Target
from milora_vl.core.weights.matrices import fingerprint
from support.adapter_cases import LLAVA_POLICY, anchors, move, token_batch, train_steps
from support.llava_oracle import original_llava
from support.problems import raises_code, raises_problem

PATH = "model.language_model.layers.0.mlp.up_proj"
TARGETS = [
    Target(path=PATH, shape=(4, 3), tower="language", method="milora", rank=2, alpha=2.0),
    Target(path="lm_head", shape=(9, 3), tower="language", method="full", learning_rate=1e-4),
]
REPORT = LayerReport(
    path=PATH, shape=(4, 3), tower="language", method="milora", rank=2, sigma_min=0.1, sigma_max=0.2, sigma_top=3.0,
    energy=0.01, excess=0.0, svd="exact",
)  # fmt: skip


def sidecar() -> Sidecar:
    names = {PATH: "language.layers.0.mlp.up_proj", "lm_head": "language.lm_head"}
    return Sidecar(TARGETS, names, {PATH: fingerprint(torch.ones(4, 3))}, {PATH: REPORT})


def test_exact_anchors_are_stored_beside_it_and_found_by_path(tmp_path: Path) -> None:
    B0 = torch.randn(4, 2)
    sidecar().write(tmp_path, {PATH: B0})
    stored = read_sidecar(tmp_path)
    assert stored is not None
    assert list(stored.anchors) == ["language.layers.0.mlp.up_proj"]
    assert torch.equal(stored.read_anchors(tmp_path)[PATH], B0)
    sidecar().write(tmp_path, {})  # a later save that needs none ignores the old file
    assert read_sidecar(tmp_path).read_anchors(tmp_path) == {}
    (tmp_path / ANCHORS_FILE).unlink()
    with raises_code("", ANCHORS_FILE, "lacks the anchor of language.layers.0.mlp.up_proj"):
        stored.read_anchors(tmp_path)


def test_the_file_says_for_every_module_what_it_is() -> None:
    data = json.loads(sidecar().to_json())
    assert data["format_version"] == 3
    module = data["modules"][PATH]
    assert (module["rank"], module["alpha"], module["part"]) == (2, 2.0, "minor")
    assert module["report"]["svd"] == "exact"
    assert len(module["fingerprint"]["values"]) == 8
    assert data["modules"]["lm_head"]["method"] == "full"


MODULE = """{"format_version": 3, "frozen": {}, "anchors": [], "modules": {"a":
    {"name": "a", "tower": null, "shape": [2, 2], "method": "lora", "rank": %s}}}"""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format_version": 1}', "has format version 1, and only version 3"),
        ("{", "is damaged"),
        ('{"format_version": 3}', "is damaged .*modules"),
        (
            '{"format_version": 3, "modules": {"a": {"name": "a", "tower": null, "shape": [2, 2], "method": "odd"}}}',
            "method 'odd'",
        ),
        ("[]", "is damaged"),
        ("[" * 100_000, "is damaged .*too many lists and objects in each other"),
        (MODULE % '1e12, "alpha": 1', "is damaged .*rank 1000000000000.0"),
        (MODULE % '2, "alpha": NaN', "is damaged .*alpha nan"),
    ],
)
def test_a_file_that_cannot_be_read_says_what_to_do(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / FILE_NAME).write_text(text, encoding="utf-8")
    with raises_problem(str(tmp_path / FILE_NAME), says=message, kind=AdapterError):
        read_sidecar(tmp_path)


def test_paths_follow_the_layout_of_the_model() -> None:
    original = {"model.layers.0.mlp.up_proj": "language.layers.0.mlp.up_proj", "lm_head": "language.lm_head"}
    found = locate(sidecar(), original)
    assert [t.path for t in found.targets] == ["model.layers.0.mlp.up_proj", "lm_head"]
    assert set(found.fingerprints) == set(found.reports) == {"model.layers.0.mlp.up_proj"}
    assert found.ranks == {"model.layers.0.mlp.up_proj": 2}
    with raises_problem("", "language.lm_head"):
        locate(sidecar(), {"model.layers.0.mlp.up_proj": "language.layers.0.mlp.up_proj"})


@pytest.fixture
def adapted(tiny_llava, tmp_path: Path) -> SimpleNamespace:
    base, processor = tiny_llava()
    other = original_llava(base, processor, tmp_path / "parts")
    model = apply_milora(base, LLAVA_POLICY)
    move(model)
    save_adapter(model, tmp_path / "adapter")
    return SimpleNamespace(model=model, other=other, folder=tmp_path / "adapter")


@pytest.mark.filterwarnings("error:.*this frozen parameter")
@pytest.mark.parametrize("is_trainable", [False, True])
def test_it_gives_the_same_logits_and_the_same_projector(adapted, is_trainable: bool) -> None:
    ids = token_batch(200)
    loaded = load_adapter(adapted.other, adapted.folder, is_trainable=is_trainable)
    got = loaded.eval()(ids).logits
    assert torch.allclose(got, adapted.model.eval()(input_ids=ids).logits[..., : got.shape[-1]], atol=1e-5)
    x = torch.randn(2, 32)
    projector = adapted.model.get_base_model().model.multi_modal_projector
    assert torch.allclose(loaded.get_base_model().model.mm_projector(x), projector(x), atol=1e-5)
    assert [t.path for t in loaded.milora_targets][-1] == "model.layers.1.mlp.down_proj"
    assert len(anchors(loaded)) == 26
    assert any(p.requires_grad for p in loaded.parameters()) is is_trainable


@pytest.mark.filterwarnings("ignore:the optimizer ignores rules")
def test_it_trains_on_there_and_comes_back(adapted, tiny_llava) -> None:
    ids = token_batch(200)
    loaded = load_adapter(adapted.other, adapted.folder, is_trainable=True)
    train_steps(loaded.eval(), {"input_ids": ids}, steps=2)
    save_adapter(loaded, adapted.folder / "back")
    back = load_adapter(tiny_llava()[0], adapted.folder / "back")
    got = loaded(ids).logits
    assert torch.allclose(back(input_ids=ids).logits[..., : got.shape[-1]], got, atol=1e-5)


def test_weights_that_milora_json_does_not_tell_of_are_refused(adapted) -> None:
    file = adapted.folder / "adapter_model.safetensors"
    weights = load_file(file)
    weights["base_model.model.else.weight"] = weights.pop(next(key for key in weights if key.endswith("linear_2.bias")))
    save_file(weights, file)
    with raises_problem(says=r"do not match milora.json: .* \(2 differ\)", kind=AdapterError):
        load_adapter(adapted.other, adapted.folder)
