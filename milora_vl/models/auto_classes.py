"""`import milora_vl` registers the timm tower with transformers' Auto classes, without importing transformers.

transformers has no entry point for models of other packages. So an import hook registers the tower right after the
modules with the Auto mappings are imported, or at once if they are imported already.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType


def register_when_imported() -> None:
    """Register the tower now, or when transformers' Auto classes are imported. A second call does nothing."""
    for name, register in _REGISTER.items():
        if name in sys.modules:
            register()
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register_config() -> None:
    from milora_vl.models.timm_tower_config import register_config

    register_config()


def _register_tower() -> None:
    from milora_vl.models.timm_tower import register

    register()


# AutoTokenizer and AutoProcessor import only the first; the second takes another second to import.
_REGISTER: dict[str, Callable[[], None]] = {
    "transformers.models.auto.configuration_auto": _register_config,
    "transformers.models.auto.modeling_auto": _register_tower,
}


class _Finder(MetaPathFinder):
    """Finds the two modules as Python does, and wraps their loader to register the tower."""

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
    """Python's loader of a module; calls `register` when the module is complete."""

    def __init__(self, loader: Loader, register: Callable[[], None]) -> None:
        self._loader = loader
        self._register = register

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Create the module with Python's loader."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Execute the module with Python's loader, restore that loader on the module, and register the tower."""
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        self._register()
