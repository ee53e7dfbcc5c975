"""The core runs where only its own dependencies are installed: torch, peft and theirs, and a few small packages."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shlex
import subprocess
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
CORE = ("common", "core")
ALLOWED = "torch numpy peft safetensors pydantic pyyaml xxhash tqdm filelock".split()

PROGRAM = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from milora_vl.core.adapter.apply import apply_milora, merge
from milora_vl.core.adapter.load import load_adapter
from milora_vl.core.adapter.save import save_adapter


def base():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, max_position_embeddings=32, **sizes)).eval()


ids = torch.randint(0, 50, (4, 12), generator=torch.Generator().manual_seed(0))
rules = "[{modules: language, method: milora, protect: 0, rank: 4}, {modules: language.mlp, protect: 0.5}]"
before = base()(ids).logits
model = apply_milora(base(), rules, calibration=[{"input_ids": ids}, {"input_ids": ids + 0}], cache_dir="cache")
assert torch.equal(model(ids).logits, before)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
losses = []
for _ in range(5):
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(float(loss))
assert losses[-1] < losses[0]
trained = model(ids).logits
save_adapter(model, "adapter")
torch.testing.assert_close(load_adapter(base(), "adapter")(ids).logits, trained)
torch.testing.assert_close(merge(model)(ids).logits, trained, atol=1e-4, rtol=1e-4)
"""


def with_dependencies(names: list[str]) -> list[importlib.metadata.Distribution]:
    """The installed distributions with these names, and all that they require without extras."""
    found: dict[str, importlib.metadata.Distribution] = {}
    left = list(names)
    while left:
        name = re.sub(r"[-_.]+", "-", left.pop()).lower()
        if name in found:
            continue
        try:
            found[name] = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # for another platform
        for requirement in found[name].requires or ():
            if "extra ==" not in requirement:
                left.append(re.match(r"[\w.-]+", requirement)[0])  # type: ignore[index]
    return list(found.values())


def python_with(names: list[str], folder: Path) -> tuple[Path, Path]:
    """Return Python of an environment with these distributions and what they require, and the folder of packages."""
    packages = folder / "packages"
    packages.mkdir()
    for distribution in with_dependencies(names):
        place = Path(str(distribution.locate_file("")))
        for top in {file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")}:
            if not (packages / top).exists():
                (packages / top).symlink_to(place / top)
    venv.create(folder / "venv", symlinks=True)
    (site,) = (folder / "venv").glob("lib/python*/site-packages")
    (site / "packages.pth").write_text(f"{packages}\n", encoding="utf-8")
    return folder / "venv" / "bin" / "python", packages


def run_alone(python: Path, folder: Path, *words: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"MILORA_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [str(python), *words], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{words}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.mark.slow
def test_the_core_trains_saves_loads_and_merges_with_its_own_dependencies_alone(tmp_path: Path) -> None:
    python, packages = python_with(ALLOWED, tmp_path)
    (packages / "milora_vl").mkdir()
    (packages / "milora_vl" / "__init__.py").touch()
    for name in CORE:
        (packages / "milora_vl" / name).symlink_to(ROOT / "milora_vl" / name)
    assert not {"datasets", "deepspeed", "timm", "matplotlib"} & {path.name for path in packages.iterdir()}
    run_alone(python, tmp_path, "-c", PROGRAM)


@pytest.mark.slow
def test_readmes_commands_run_with_what_readme_installs(tiny_data: Path, tmp_path: Path) -> None:
    """Without extras: no deepspeed, no bitsandbytes, no gguf, no pytest. The models are tiny."""
    project = (
        (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("\ndependencies = [")[2].partition("\n]")[0]
    )
    python, packages = python_with(re.findall(r'"([\w-]+)', project), tmp_path)
    assert not {"deepspeed", "gguf", "torchdata", "openai", "pytest"} & {path.name for path in packages.iterdir()}
    for path in ("milora_vl", "data_tools/milora_data", "eval/milora_eval", "llava_recipes"):
        (packages / Path(path).name).symlink_to(ROOT / path)
    for file in (tiny_data / "train.json", tiny_data / "images"):
        (tmp_path / file.name).symlink_to(file)
    readme = (ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    commands = re.findall(r"^milora (.+)$", readme, re.MULTILINE)
    assert [command.split()[0] for command in commands] == ["train", "chat", "export"]
    picture = next((tiny_data / "images").iterdir())
    for command in commands:
        words = shlex.split(
            command.replace("llava-1.5-7b --bf16", "tiny --max_steps 2").replace("cat.png", str(picture))
        )
        run_alone(python, tmp_path, "-m", "milora_vl", *words)
    for recipe in ("milora-llava-1.5-7b", "milora-paper-llava-1.5-7b", "lora-llava-1.5-7b"):
        run_alone(python, tmp_path, "-m", "milora_vl.train", "--recipe", recipe, "--dry-run")
    run_alone(python, tmp_path, "-m", "milora_vl.train", "--model", "llava-1.5-7b", "--dry-run")
    run_alone(python, tmp_path, "-c", readme.partition("```python\n")[2].partition("```")[0])
