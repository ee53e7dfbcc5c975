from __future__ import annotations

import pytest
from torch import nn

from milora_vl.core.policy import PolicyError
from milora_vl.core.policy.resolve import Selector
from milora_vl.core.policy.towers import find_towers
from support.adapter_cases import tiny_gpt2
from support.problems import raises_code

LM = "model.language_model.layers"
VISION = "model.vision_tower"
LEAVES = [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]


@pytest.fixture
def selector(tiny_llava) -> Selector:
    model, _ = tiny_llava()
    return Selector(model, find_towers(model))


def test_language_means_the_linear_layers_of_its_blocks(selector: Selector) -> None:
    found = selector.match("language", whole_modules=False)
    assert len(found) == 14
    assert all(path.startswith(f"{LM}.") for path in found)
    assert selector.match("language", whole_modules=True) == found


def test_a_star_means_all_of_a_tower(selector: Selector) -> None:
    blocks = selector.match("language", whole_modules=False)
    ends = ["model.language_model.embed_tokens", "lm_head"]
    assert sorted(selector.match("language.*", whole_modules=False)) == sorted([*blocks, *ends])
    norms = [f"{LM}.{n}.{kind}_layernorm" for n in (0, 1) for kind in ("input", "post_attention")]
    everything = [*blocks, *ends, *norms, "model.language_model.norm"]
    assert sorted(selector.match("language.*", whole_modules=True)) == sorted(everything)
    assert len(selector.match("language.layers[1].*", whole_modules=True)) == 9


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("language.layers[1]", [f"{LM}.1.{leaf}" for leaf in LEAVES]),
        ("language.layers[0-1].down_proj", [f"{LM}.0.mlp.down_proj", f"{LM}.1.mlp.down_proj"]),
        ("language.layers[0].attention", [f"{LM}.0.{leaf}" for leaf in LEAVES[:4]]),
        ("language.layers[1].mlp", [f"{LM}.1.{leaf}" for leaf in LEAVES[4:]]),
        ("language.self_attn.k_proj", [f"{LM}.0.self_attn.k_proj", f"{LM}.1.self_attn.k_proj"]),
        ("projector", ["model.multi_modal_projector.linear_1", "model.multi_modal_projector.linear_2"]),
        ("projector.linear_2", ["model.multi_modal_projector.linear_2"]),
        ("lm_head", ["lm_head"]),
        ("*.embed_tokens", ["model.language_model.embed_tokens"]),
        (f"{LM}.0.mlp.up_proj", [f"{LM}.0.mlp.up_proj"]),
        ("*language_model*.q_proj", [f"{LM}.0.self_attn.q_proj", f"{LM}.1.self_attn.q_proj"]),
        ("*.patch_embedding", [f"{VISION}.embeddings.patch_embedding"]),
    ],
)  # fmt: skip
def test_selectors_name_full_paths(selector: Selector, text: str, expected: list[str]) -> None:
    assert sorted(selector.match(text, whole_modules=False)) == sorted(expected)


def test_no_language_selector_reaches_the_vision_tower(selector: Selector) -> None:
    for text in ("language", "language.q_proj", "language.attention", "language.mlp", "language.layers[0-1]"):
        assert not [path for path in selector.match(text, whole_modules=True) if "vision" in path]
    assert all("vision_tower" in path for path in selector.match("vision", whole_modules=False))


def test_norms_count_only_for_rules_on_whole_modules_or_when_planned(selector: Selector) -> None:
    norm = "model.language_model.norm"
    assert selector.match(norm, whole_modules=True) == [norm]
    assert selector.match(norm, whole_modules=False, planned=[norm]) == [norm]
    with raises_code("policy-no-match", hint="LlamaRMSNorm, which adapters do not support", kind=PolicyError):
        selector.match(norm, whole_modules=False)


@pytest.mark.parametrize(
    ("text", "hints"),
    [
        ("mm_projector.*", ["multi_modal_projector.linear_1", "blocks are model.language_model.layers[0-1]"]),
        ("langauge", ["did you mean  language"]),
        ("language.qproj", ["did you mean  language.q_proj"]),
        ("language.layers[0-7]", ["no layers [0-7] in language", f"{LM}[0-1]"]),
        ("language.layers[1-0]", ["no layers [1-0]"]),
        ("language.layers[-2--1]", ["no layers [-2--1] in language", f"its blocks are {LM}[0-1]"]),
        ("projector.layers[0]", ["no layers [0-0] in projector", "none"]),
    ],
)
def test_a_selector_without_match_says_what_there_is(selector: Selector, text: str, hints: list[str]) -> None:
    with pytest.raises(PolicyError) as caught:
        selector.match(text, whole_modules=False)
    for hint in hints:
        assert hint in str(caught.value)


def test_models_without_blocks_are_linear_layers_throughout() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Sequential(nn.Linear(2, 2)))
    assert Selector(model, find_towers(model)).match("language", whole_modules=False) == ["0", "2.0"]


def test_conv1d_layers_of_gpt2_are_linear_layers() -> None:
    model = tiny_gpt2()
    found = Selector(model, find_towers(model)).match("language", whole_modules=False)
    assert len(found) == 8
    assert "transformer.h.0.attn.c_attn" in found


def test_an_unknown_multimodal_layout_is_named_by_glob_alone() -> None:
    model = nn.Module()
    model.visual, model.text = nn.Linear(2, 2), nn.Linear(2, 2)
    selector = Selector(model, find_towers(model))
    with raises_code(
        "policy-no-match", hint="no known layout: select its modules by full path or glob", kind=PolicyError
    ):
        selector.match("language", whole_modules=False)
    assert selector.match("text", whole_modules=False) == ["text"]


@pytest.mark.parametrize("text", ["model.language_model.norm", "vision.mlpp", "projector.q_proj", "language.norm"])
def test_what_is_proposed_would_match(selector: Selector, text: str) -> None:
    with pytest.raises(PolicyError) as caught:
        selector.match(text, whole_modules=False)
    (line,) = [line for line in str(caught.value).splitlines() if line.startswith("did you mean  ")]
    for proposed in line.removeprefix("did you mean  ").removesuffix("?").split("  or  "):
        assert proposed != text
        assert selector.match(proposed, whole_modules=False)
