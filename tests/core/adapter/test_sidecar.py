from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from milora_vl.core.adapter.folders import AdapterError
from milora_vl.core.adapter.initialize import LayerReport
from milora_vl.core.adapter.sidecar import ANCHORS_FILE, FILE_NAME, Sidecar, locate, read_sidecar
from milora_vl.core.policy.rules import FloorSigma, Target
from milora_vl.core.weights.matrices import fingerprint
from support.problems import raises_code

PATH = "model.language_model.layers.0.mlp.up_proj"
TARGETS = [
    Target(path=PATH, shape=(4, 3), tower="language", method="milora", rank=2, alpha=2.0, sigma=FloorSigma(floor=0.1)),
    Target(path="lm_head", shape=(9, 3), tower="language", method="full", learning_rate=1e-4),
]
REPORT = LayerReport(
    path=PATH, shape=(4, 3), tower="language", method="milora", rank=2, sigma_min=0.1, sigma_max=0.2, sigma_top=3.0,
    energy=0.01, excess=0.0, svd="exact", seconds=0.5,
)  # fmt: skip


def sidecar() -> Sidecar:
    names = {PATH: "language.layers.0.mlp.up_proj", "lm_head": "language.lm_head"}
    return Sidecar(TARGETS, names, {PATH: fingerprint(torch.ones(4, 3))}, {PATH: REPORT})


def test_a_sidecar_comes_back_as_it_was(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text(sidecar().to_json(), encoding="utf-8")
    assert read_sidecar(tmp_path) == sidecar()


def test_keys_of_an_older_version_are_not_read(tmp_path: Path) -> None:
    data = json.loads(sidecar().to_json()) | {"form": "anchored"}
    data["modules"][PATH]["report"]["drift"] = 0.0
    (tmp_path / FILE_NAME).write_text(json.dumps(data), encoding="utf-8")
    assert read_sidecar(tmp_path) == sidecar()


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
    with raises_code("adapter-missing-weights", ANCHORS_FILE, "lacks the anchor of language.layers.0.mlp.up_proj"):
        stored.read_anchors(tmp_path)


def test_the_file_says_for_every_module_what_it_is() -> None:
    data = json.loads(sidecar().to_json())
    assert data["format_version"] == 3
    module = data["modules"][PATH]
    assert (module["rank"], module["alpha"], module["part"], module["sigma"]) == (2, 2.0, "minor", {"floor": 0.1})
    assert module["report"]["svd"] == "exact"
    assert len(module["fingerprint"]["values"]) == 8
    assert data["modules"]["lm_head"]["method"] == "full"


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        ('{"format_version": 1}', "adapter-other-format", "has format version 1, and only version 3"),
        ("{", "adapter-damaged-file", "is damaged"),
        ('{"format_version": 3}', "adapter-damaged-file", "is damaged .*modules"),
        (
            '{"format_version": 3, "modules": {"a": {"name": "a", "tower": null, "shape": [2, 2], "method": "odd"}}}',
            "adapter-damaged-file",
            "method 'odd'",
        ),
        ("[]", "adapter-damaged-file", "is damaged"),
    ],
)
def test_a_file_that_cannot_be_read_says_what_to_do(tmp_path: Path, text: str, code: str, message: str) -> None:
    (tmp_path / FILE_NAME).write_text(text, encoding="utf-8")
    with raises_code(code, says=message, kind=AdapterError) as error:
        read_sidecar(tmp_path)
    assert error.value.problems[0].where == str(tmp_path / FILE_NAME)


def test_paths_follow_the_layout_of_the_model() -> None:
    original = {"model.layers.0.mlp.up_proj": "language.layers.0.mlp.up_proj", "lm_head": "language.lm_head"}
    found = locate(sidecar(), original)
    assert [t.path for t in found.targets] == ["model.layers.0.mlp.up_proj", "lm_head"]
    assert set(found.fingerprints) == set(found.reports) == {"model.layers.0.mlp.up_proj"}
    assert found.ranks == {"model.layers.0.mlp.up_proj": 2}
    with raises_code("adapter-missing-modules", "", "language.lm_head"):
        locate(sidecar(), {"model.layers.0.mlp.up_proj": "language.layers.0.mlp.up_proj"})
