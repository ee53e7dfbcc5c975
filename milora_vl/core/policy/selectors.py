"""The `modules` field of a rule: a selector, and the full paths of the modules that it matches.

language                    the linear layers in the blocks of a tower (all linear layers of the projector)
language.*                  all modules of a tower, with embeddings and head; for method full and frozen also norms
language.layers[0-3].mlp    one family (attention, mlp) in the blocks 0 to 3, both included
language.q_proj             modules with this name, or a longer suffix of the path (self_attn.q_proj)
*.lm_head                   a glob over full paths, or an exact path
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase

from torch import nn

from milora_vl.core.policy.rules import PolicyError
from milora_vl.core.policy.towers import TOWERS, Towers, output_head
from milora_vl.core.weights.matrices import is_adaptable, is_linear, matrix_shape

_TOWER_SELECTOR = re.compile(
    rf"(?P<tower>{'|'.join(TOWERS)})(?:\.layers\[(?P<first>-?\d+)(?:-(?P<last>-?\d+))?\])?(?:\.(?P<tail>[\w.]+|\*))?"
)


class SelectorError(PolicyError):
    """A selector that matches nothing in this model. The hint lists candidates."""


class Selector:
    """The modules of one model by path, and the ways to select them: exact path, glob, tower, tower and name."""

    def __init__(self, model: nn.Module, towers: Towers) -> None:
        self.towers = towers
        self.modules = dict(model.named_modules())
        head = output_head(model)
        self.head = next((path for path, module in self.modules.items() if module is head), None) if head else None

    def match(self, text: str, *, whole_modules: bool, planned: Collection[str] = ()) -> list[str]:
        """Return the paths that the selector `text` matches, in model order.

        `whole_modules` (method full and frozen) also matches modules without a matrix, such as norms. Modules in
        `planned`, which an earlier rule has selected, always match.
        Raises SelectorError with candidates if nothing matches, or if a range of layers does not exist.
        """
        selector = None if text in self.modules else _TOWER_SELECTOR.fullmatch(text)
        if selector is not None:
            self._require_blocks(selector)
            paths = self._by_tower(selector, whole_modules)
        else:
            matching = [path for path in self.modules if fnmatchcase(path, text)]
            paths = [path for path in matching if path in planned or self._is_selectable(path, whole_modules)]
        if not paths:
            raise SelectorError(
                f'no module matches "{text}"', code="policy-no-match", hint=self._hint(text, whole_modules)
            )
        return paths

    def experts(self) -> list[str]:
        """Return the modules that hold the experts of a mixture in 3-D weights, which adapters do not support."""
        return [
            path
            for path, module in self.modules.items()
            if not isinstance(module, nn.Conv1d)
            and any(parameter.ndim == 3 for parameter in module.parameters(recurse=False))
            and self.towers.family_of(path) == "mlp"
        ]

    def _require_blocks(self, selector: re.Match[str]) -> None:
        if selector["first"] is None:
            return
        first, last = int(selector["first"]), int(selector["last"] or selector["first"])
        blocks = self._blocks(str(selector["tower"]))
        if not 0 <= first <= last < max(blocks.values(), default=0):
            raise SelectorError(
                f"no layers [{first}-{last}] in {selector['tower']}",
                code="policy-no-match",
                hint=f"its blocks are {_listed(blocks)}",
            )

    def _blocks(self, tower: str) -> dict[str, int]:
        """Return the length of each list of blocks in a tower; an encoder-decoder has two lists."""
        stacks = next((paths for name, paths in self.towers.stacks.items() if name == tower), ())
        return {path: len(list(self.modules[path].children())) for path in stacks}

    def _is_selectable(self, path: str, whole_modules: bool) -> bool:
        module = self.modules[path]
        if is_adaptable(module):
            return True
        return whole_modules and path != "" and next(module.parameters(recurse=False), None) is not None

    def _by_tower(self, selector: re.Match[str], whole_modules: bool) -> list[str]:
        tower, tail = str(selector["tower"]), selector["tail"]
        inside = [path for path in self.modules if self.towers.tower_of(path) == tower]
        if tail == "*":
            paths, tail = [path for path in inside if self._is_selectable(path, whole_modules)], None
        else:
            paths = [path for path in inside if self._in_tower(path, tower, whole_modules)]
        if selector["first"] is not None:
            blocks = range(int(selector["first"]), int(selector["last"] or selector["first"]) + 1)
            paths = [p for p in paths if self.towers.block_of(p) in blocks]
        if tail in ("attention", "mlp"):
            return [p for p in paths if self.towers.family_of(p) == tail]
        return [p for p in paths if tail is None or p.endswith(f".{tail}")]

    def _in_tower(self, path: str, tower: str, whole_modules: bool) -> bool:
        """Return True if the name of a tower alone selects the module: linear layers in blocks, all of a projector."""
        if tower == "projector" and whole_modules:
            return self._is_selectable(path, True)
        module = self.modules[path]
        if not is_linear(module) or path == self.head:
            return False
        if tower not in self.towers.stacks:
            return True
        is_gate = min(matrix_shape(module)) == 1 and not whole_modules  # one component is all of it
        return not is_gate and self.towers.block_of(path) is not None

    def _hint(self, text: str, whole_modules: bool) -> str:
        """Return why nothing matches, and candidates that would."""
        lines = []
        if not whole_modules and any(fnmatchcase(p, text) for p in self.modules):
            kinds = sorted({type(m).__name__ for p, m in self.modules.items() if fnmatchcase(p, text)})
            lines.append(f"it matches modules of type {', '.join(kinds[:4])}, which adapters do not support")
        experts = self.experts()
        if experts:
            lines.append(f"{experts[0]} holds its experts in 3-D weights, which adapters do not support")
            lines.append(f"to train them in full, select the module:  {{modules: {experts[0]}, method: full}}")
        if self.towers.layout == "unknown":
            lines.append("this model has a vision part but no known layout: select its modules by full path or glob")
        for tower in self.towers.stacks:
            lines.append(f"this model's {tower} blocks are {_listed(self._blocks(tower))}")
        projector = [
            p for p in self.modules if self.towers.tower_of(p) == "projector" and self._is_selectable(p, False)
        ]
        if projector:
            lines.append(f"its projector is {', '.join(projector[:4])}")
        candidates = {*self._names(), *(path for path in self.modules if self._is_selectable(path, whole_modules))} - {
            text
        }
        near = difflib.get_close_matches(text, sorted(candidates), n=3, cutoff=0.5)
        if near:
            lines.append(f"did you mean  {'  or  '.join(near)}?")
        return "\n".join(lines)

    def _names(self) -> list[str]:
        """Return tower selectors that match something in this model."""
        names: set[str] = set()
        for tower in TOWERS:
            layers = [path for path in self.modules if self.towers.tower_of(path) == tower]
            layers = [path for path in layers if self._in_tower(path, tower, False)]
            names |= {tower} if layers else set()
            names |= {f"{tower}.{self.towers.family_of(path) or path.split('.')[-1]}" for path in layers}
            names |= {f"{tower}.{path.split('.')[-1]}" for path in layers}
        return sorted(names)


def _listed(blocks: Mapping[str, int]) -> str:
    return ", ".join(f"{path}[0-{count - 1}]" for path, count in blocks.items()) or "none"
