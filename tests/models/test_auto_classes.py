"""A model with a timm tower in transformers' Auto classes: after `import milora_vl`, or with its code beside it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from milora_vl import apply_milora, compose, load_model, save_adapter
from milora_vl.export import Options, export
from support.adapter_cases import move
from support.problems import raises_code
from support.programs import run as run_program

POLICY = (
    "[{modules: language, method: milora, protect: 0, rank: 2}, "
    "{modules: projector, method: full, learning_rate: 1.0e-3}]"
)
INPUTS = {"input_ids": [[5, *[260] * 100, 9, 7]]}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A composed base with a timm tower, an adapter on it, and the logits of both together."""
    root = tmp_path_factory.mktemp("timm")
    words = ["--vision", "timm/test_vit", "--vision_weights", "random", "--language", "tiny-text"]
    compose.main([*words, "--output_dir", str(root / "base")])
    model = apply_milora(load_model(root / "base")[0], POLICY)
    move(model)
    save_adapter(model, root / "adapter")
    save_file({"pixels": torch.randn(1, 3, 160, 160)}, root / "pixels.safetensors")
    return SimpleNamespace(root=root, logits=logits(model.eval(), root))


@torch.no_grad()
def logits(model: torch.nn.Module, root: Path) -> torch.Tensor:
    return model(
        input_ids=torch.tensor(INPUTS["input_ids"]), pixel_values=load_file(root / "pixels.safetensors")["pixels"]
    ).logits


# Saves the logits of a merged model, in a process in which nothing is registered yet.
LOAD = """
import sys
{first}
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor
{last}
folder, root, options = sys.argv[1], sys.argv[2], {options}
assert type(AutoConfig.from_pretrained(folder, **options).vision_config).__name__ == "TimmTowerConfig"
assert AutoProcessor.from_pretrained(folder, **options).tokenizer
assert AutoImageProcessor.from_pretrained(folder, **options).do_pad
model = AutoModelForImageTextToText.from_pretrained(folder, **options)
pixels = load_file(root + "/pixels.safetensors")["pixels"]
with torch.no_grad():
    found = model(input_ids=torch.tensor({ids}), pixel_values=pixels).logits
save_file({{"logits": found}}, root + "/found.safetensors")
{then}
"""
WITHOUT_US = """
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("milora_vl", "milora_data"):
            raise ModuleNotFoundError(f"{name} is hidden", name=name)

sys.meta_path.insert(0, Blocker())
"""


def loaded(
    folder: Path, root: Path, *, first: str = "", last: str = "", options: str = "{}", then: str = ""
) -> torch.Tensor:
    code = LOAD.format(first=first, last=last, options=options, ids=INPUTS["input_ids"], then=then)
    words, modules = [code, str(folder), str(root)], str(root / "modules")
    if first == "import milora_vl" and options == "{}":
        env = {**os.environ, "HF_MODULES_CACHE": modules}
        done = run_program(["-c", *words], cwd=root, env=env, first_import=True)
    else:
        place = f"from transformers import dynamic_module_utils as utils\nutils.HF_MODULES_CACHE = {modules!r}\n"
        done = run_program(["-c", place + words[0], *words[1:]], cwd=root)
    assert done.returncode == 0, done.stderr
    return load_file(root / "found.safetensors")["logits"]


@pytest.mark.parametrize("when", ["first", "last"])
def test_importing_the_package_makes_a_merged_model_loadable(made: SimpleNamespace, when: str, tmp_path: Path) -> None:
    done = export(made.root / "adapter", "merged", tmp_path / "merged")
    assert done.loads_with == "milora_vl"
    assert not list((tmp_path / "merged").glob("*.py"))
    found = loaded(tmp_path / "merged", made.root, **{when: "import milora_vl"})
    torch.testing.assert_close(found, made.logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "module", ["models.timm_tower_config", "models.timm_tower", "models.timm_llava", "export.base"]
)
def test_each_module_can_be_the_first_to_import_transformers(module: str) -> None:
    first = f"import sys; assert 'transformers' not in sys.modules; import milora_vl.{module}"
    code = f"{first}; from transformers import AutoConfig; AutoConfig.for_model('milora_timm_tower')"
    done = run_program(["-c", code], first_import=True)
    assert done.returncode == 0, done.stderr


def test_a_merged_model_with_its_code_loads_without_the_package(made: SimpleNamespace, tmp_path: Path) -> None:
    done = export(made.root / "adapter", "merged", tmp_path / "merged", Options(remote_code=True))
    assert done.loads_with == "trust_remote_code"
    again = "".join(
        f'{saved}.save_pretrained("{tmp_path}/again")\n' for saved in ("model", "AutoProcessor.from_pretrained(folder)")
    )
    trusted = '{"trust_remote_code": True}'
    found = loaded(tmp_path / "merged", made.root, first=WITHOUT_US, options=trusted, then=again)
    torch.testing.assert_close(found, made.logits, atol=1e-5, rtol=0)
    found = loaded(tmp_path / "again", made.root, first=WITHOUT_US, options=trusted)
    torch.testing.assert_close(found, made.logits, atol=1e-5, rtol=0)
    found = loaded(tmp_path / "merged", made.root, first="import milora_vl", options=trusted)
    torch.testing.assert_close(found, made.logits, atol=1e-5, rtol=0)


def test_what_is_loaded_here_names_no_code_when_it_is_saved(made: SimpleNamespace, tmp_path: Path) -> None:
    export(made.root / "adapter", "merged", tmp_path / "merged", Options(remote_code=True))
    model = load_model(tmp_path / "merged")[0]
    torch.testing.assert_close(logits(model, made.root), made.logits, atol=1e-5, rtol=0)
    model.save_pretrained(tmp_path / "saved")
    assert "auto_map" not in json.loads((tmp_path / "saved" / "config.json").read_text(encoding="utf-8"))


def test_a_base_beside_an_adapter_gets_the_code_too(made: SimpleNamespace, tmp_path: Path) -> None:
    done = export(made.root / "adapter", "rank-4", tmp_path / "out", Options(with_base=True, remote_code=True))
    assert done.loads_with == "trust_remote_code"
    assert (tmp_path / "out" / "base" / "timm_llava.py").is_file()
    assert "auto_map" in json.loads((tmp_path / "out" / "base" / "config.json").read_text(encoding="utf-8"))


def test_code_that_nothing_needs_is_refused(made: SimpleNamespace, tiny_folder: Path, tmp_path: Path) -> None:
    with raises_code("flag-no-effect", where="--remote_code", message="does not apply to --to rank-4"):
        export(made.root / "adapter", "rank-4", tmp_path / "out", Options(remote_code=True))
    save_adapter(apply_milora(load_model(tiny_folder)[0], POLICY), tmp_path / "adapter")
    with raises_code("flag-no-effect", where="--remote_code", message="loads in plain transformers"):
        export(tmp_path / "adapter", "merged", tmp_path / "out", Options(remote_code=True))
    assert not (tmp_path / "out").exists()
    assert export(tmp_path / "adapter", "merged", tmp_path / "out").loads_with == "transformers"
    assert export(tmp_path / "adapter", "rank-1", tmp_path / "small").loads_with is None
