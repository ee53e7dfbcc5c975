"""Names of adapter tensors: PEFT's prefix in state dicts, the module path in a name, and a path that moves."""

from __future__ import annotations

from collections.abc import Collection, Mapping

PREFIX = "base_model.model."
EARLIER = ("earlier_A", "earlier_B")  # buffers of a base layer with the update of an earlier run


def module_path(name: str, paths: Collection[str]) -> str:
    """Return the longest module path in `paths` that the tensor `name` is inside, or "" if none.

    >>> module_path("base_model.model.lm.q.lora_A.weight", ["lm.q", "lm"])
    'lm.q'
    """
    path = name.removeprefix(PREFIX)
    while path and path not in paths:
        path = path.rpartition(".")[0]
    return path


def moved(name: str, paths: Mapping[str, str]) -> str:
    """Return the name of a tensor with its module path replaced by that in `paths`, if it is there.

    >>> moved("base_model.model.a.b.lora_A.weight", {"a.b": "c"})
    'base_model.model.c.lora_A.weight'
    """
    path = module_path(name, paths)
    if not path:
        return name
    prefix = PREFIX if name.startswith(PREFIX) else ""
    return prefix + paths[path] + name.removeprefix(prefix + path)
