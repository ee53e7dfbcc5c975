"""The three towers of any model, and selectors: which modules a name in a rule means."""

from __future__ import annotations

from itertools import pairwise

import pytest
from torch import nn

from milora_vl.core.policy import PolicyError
from milora_vl.core.policy.resolve import Selector
from milora_vl.core.policy.towers import canonical_names, find_towers, output_head, peft_task
from support.adapter_cases import tiny_gpt2
from support.problems import raises_code


def tree(*paths: str) -> nn.Module:
    """A module tree with a small Linear at every path, and ModuleLists where a name is a number."""
    root = nn.Module()
    for path in paths:
        parent = root
        for name, following in pairwise(path.split(".")):
            if name not in dict(parent.named_children()):
                parent.add_module(name, nn.ModuleList() if following.isdecimal() else nn.Module())
            parent = parent.get_submodule(name)
        parent.add_module(path.split(".")[-1], nn.Linear(2, 2))
    return root


BLOCK = ("self_attn.q_proj", "mlp.up_proj")


LAYOUTS = {
    "transformers 4.51": (
        *(f"language_model.model.layers.{i}.{leaf}" for i in range(2) for leaf in BLOCK),
        "language_model.lm_head",
        "multi_modal_projector.linear_1",
        "multi_modal_projector.linear_2",
        "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj",
    ),
    "transformers 4.57": (
        *(f"model.language_model.layers.{i}.{leaf}" for i in range(2) for leaf in BLOCK),
        "lm_head",
        "model.multi_modal_projector.linear_1",
        "model.multi_modal_projector.linear_2",
        "model.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj",
    ),
    "original": (
        *(f"model.layers.{i}.{leaf}" for i in range(2) for leaf in BLOCK),
        "lm_head",
        "model.mm_projector.0",
        "model.mm_projector.2",
        "model.vision_tower.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj",
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_llava_has_its_three_parts(layout: str) -> None:
    towers = find_towers(tree(*LAYOUTS[layout]))
    for path in LAYOUTS[layout]:
        expected = "vision" if "vision" in path else "projector" if "projector" in path else "language"
        assert towers.tower_of(path) == expected
        assert towers.block_of(path) == (int(path.split("layers.")[1][0]) if ".layers." in path else None)


def test_a_real_llava_of_this_transformers(tiny_llava) -> None:
    model, _ = tiny_llava()
    towers = find_towers(model)
    assert (towers.language, towers.projector, towers.vision) == (
        "model.language_model",
        "model.multi_modal_projector",
        "model.vision_tower",
    )
    assert towers.stacks["language"] == ("model.language_model.layers",)
    assert towers.stacks["vision"][0].endswith("encoder.layers")
    assert towers.tower_of("lm_head") == "language"
    assert find_towers(model.model).projector == "multi_modal_projector"
    assert output_head(model) is model.lm_head
    assert peft_task(model) == "CAUSAL_LM"


def test_text_only_models_are_language_as_a_whole(tiny_llama) -> None:
    model, _ = tiny_llama()
    towers = find_towers(model)
    assert (towers.projector, towers.vision) == (None, None)
    assert {towers.tower_of(path) for path, _ in model.named_modules()} == {"language"}
    assert towers.stacks == {"language": ("model.layers",)}
    assert find_towers(tiny_gpt2()).stacks == {"language": ("transformer.h",)}


def test_a_vision_model_of_unknown_layout_has_no_towers() -> None:
    """Its vision part must never count as language."""
    towers = find_towers(tree("model.visual.blocks.0.attn.qkv", "model.language_model.layers.0.self_attn.q_proj"))
    assert towers.tower_of("model.visual.blocks.0.attn.qkv") is None
    assert towers.tower_of("model.language_model.layers.0.self_attn.q_proj") is None


OTHER_CODE_BASES = {
    "TinyLLaVA": (
        *(f"language_model.model.layers.{i}.{leaf}" for i in range(2) for leaf in BLOCK),
        "language_model.lm_head",
        "connector._connector.0",
        "vision_tower._vision_tower.vision_model.encoder.layers.0.self_attn.q_proj",
    ),
    "nanoVLM": (
        *(f"decoder.blocks.{i}.{leaf}" for i in range(2) for leaf in ("attn.q_proj", "mlp.up_proj")),
        "decoder.head",
        "MP.proj",
        "vision_encoder.blocks.0.attn.qkv_proj",
    ),
    "LLaVA-NeXT (original)": (*LAYOUTS["original"], "model.vision_resampler.perceiver.layers.0.to_q"),
}


@pytest.mark.parametrize("name", OTHER_CODE_BASES)
def test_other_code_bases_have_their_row(name: str) -> None:
    paths = OTHER_CODE_BASES[name]
    towers = find_towers(tree(*paths))
    assert towers.layout.startswith(name)
    for path in paths:
        is_projector = path.startswith(("connector", "MP", "model.mm_projector", "model.vision_resampler"))
        assert towers.tower_of(path) == ("projector" if is_projector else "vision" if "vision" in path else "language")


def test_an_audio_tower_is_none_of_the_three() -> None:
    towers = find_towers(tree(*LAYOUTS["transformers 4.57"], "model.audio_tower.layers.0.self_attn.q_proj"))
    assert towers.tower_of("model.audio_tower.layers.0.self_attn.q_proj") is None
    assert towers.tower_of("lm_head") == "language"


class Named(nn.Module):
    """A model outside the table that names its decoder."""

    def get_decoder(self) -> nn.Module:
        return self.get_submodule("core.text")


OUTSIDE = {
    "pixels mapped without blocks": {"core.embed_vision.proj": "projector"},
    "a tower, and two maps beside it": {
        "core.vision_part.layers.0.q_proj": "vision",
        "core.vision_adapter.fc1": "projector",
        "core.vision_map": "projector",
    },
    "a map after the blocks of the tower": {
        "core.visual.patches.proj": "vision",
        "core.visual.encoder.layers.0.q_proj": "vision",
        "core.visual.merging.proj": "projector",
    },
    "sounds": {"core.audio_part.layers.0.q_proj": None, "core.embed_audio.proj": None, "core.vision_map": "projector"},
}


@pytest.mark.parametrize("case", OUTSIDE)
def test_outside_the_table_the_parts_are_found_beside_the_decoder(case: str) -> None:
    expected = {"core.text.layers.0.self_attn.q_proj": "language", **OUTSIDE[case]}
    model = tree(*expected)
    model.core.text.embed_tokens = nn.Embedding(3, 2)  # type: ignore[union-attr]
    model.__class__ = Named
    towers = find_towers(model)
    assert {path: towers.tower_of(path) for path in expected} == expected


def test_encoder_and_decoder_are_both_blocks() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2))
    towers = find_towers(model)
    assert towers.stacks == {"language": ("encoder.block", "decoder.block")}
    names = canonical_names(model)
    assert len(set(names.values())) == len(names)


def test_layout_free_names_of_the_language_tower_agree() -> None:
    names = [
        {name for name in canonical_names(tree(*paths)).values() if "language.layers" in name and "proj" in name}
        for paths in LAYOUTS.values()
    ]
    assert names[0] == names[1] == names[2] == {f"language.layers.{i}.{leaf}" for i in range(2) for leaf in BLOCK}


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
