"""README's commands run where only what README installs is installed."""

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
        installed = Path(str(distribution.locate_file("")))
        for top in {file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")}:
            if not (packages / top).exists():
                (packages / top).symlink_to(installed / top)
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
