"""`import milora_vl` makes the timm tower known to transformers' Auto classes, without importing transformers.

transformers has no entry point for the models of other packages. So a finder waits until the modules with the Auto
classes' tables are imported, and registers right after; if they are imported already, it registers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType


def install() -> None:
    """Register the tower now, or when transformers' Auto classes are imported. A second call does nothing."""
    for name, register in _REGISTER.items():
        if name in sys.modules:
            register()
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register_config() -> None:
    from milora_vl.timm_tower_config import register_config

    register_config()


def _register_tower() -> None:
    from milora_vl.timm_tower import register

    register()


# AutoTokenizer and AutoProcessor import the first alone; the second one's model classes take another second to import.
_REGISTER: dict[str, Callable[[], None]] = {
    "transformers.models.auto.configuration_auto": _register_config,
    "transformers.models.auto.modeling_auto": _register_tower,
}


class _Finder(MetaPathFinder):
    """Finds the two modules as Python does, and has them loaded by a loader that registers the tower."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of one of the two modules; None for all others."""
        if fullname not in _REGISTER:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, _REGISTER[fullname])
        return spec


class _Loader(Loader):
    """Python's own loader of a module, and a call when the module is complete."""

    def __init__(self, loader: Loader, register: Callable[[], None]) -> None:
        self._loader = loader
        self._register = register

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Leave that to Python's loader."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Execute the module under Python's loader, which it then names as its own, and register."""
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        self._register()
