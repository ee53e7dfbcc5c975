"""Recipes and launcher configurations as data: YAML recipes, DeepSpeed JSON, accelerate YAML.

>>> "milora-llava-1.5-7b" in names()
True
"""

from importlib import resources
from typing import Literal

FileKind = Literal["recipe", "deepspeed", "accelerate"]
_FILES: dict[FileKind, tuple[str, str]] = {
    "recipe": (".", ".yaml"),
    "deepspeed": ("deepspeed", ".json"),
    "accelerate": ("accelerate", ".yaml"),
}

__all__ = ["names", "read"]


def names(kind: FileKind = "recipe") -> list[str]:
    """Return the names of the packaged files, without suffixes, sorted."""
    folder, ending = _FILES[kind]
    files = resources.files(__name__).joinpath(folder).iterdir()
    return sorted(file.name.removesuffix(ending) for file in files if file.name.endswith(ending))


def read(name: str, kind: FileKind = "recipe") -> str:
    """Return the text of a packaged file. Raises KeyError if the name is unknown."""
    folder, ending = _FILES[kind]
    file = resources.files(__name__).joinpath(folder, name + ending)
    if not file.is_file():
        raise KeyError(name)
    return file.read_text(encoding="utf-8")
