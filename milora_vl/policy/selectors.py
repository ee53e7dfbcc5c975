"""The `modules` field of a rule: which modules it means, as full module paths.

language                    the linear layers of a tower's blocks (of the whole projector)
language.*                  all of a tower: embeddings, head and, where weights train themselves, norms too
language.layers[0-3].mlp    blocks 0 to 3, both included, of one family (attention, mlp)
language.q_proj             a leaf name, or a longer end of the path (self_attn.q_proj)
*.lm_head                   a glob over full paths; an exact path is one
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase

from torch import nn

from milora_vl.policy.rules import PolicyError
from milora_vl.towers import TOWERS, Towers, output_head
from milora_vl.weights.matrices import is_adaptable, is_linear

_TOWER_SELECTOR = re.compile(
    rf"(?P<tower>{'|'.join(TOWERS)})(?:\.layers\[(?P<first>\d+)(?:-(?P<last>\d+))?\])?(?:\.(?P<tail>[\w.]+|\*))?"
)


class SelectorError(PolicyError):
    """A `modules` text that matches nothing in this model; the hint says what would."""


class Selector:
    """The modules of one model, by path, and the three ways a rule names them."""

    def __init__(self, model: nn.Module, towers: Towers) -> None:
        self.towers = towers
        self.modules = dict(model.named_modules())
        head = output_head(model)
        self.head = next((path for path, module in self.modules.items() if module is head), None) if head else None

    def match(self, text: str, *, whole_modules: bool, planned: Collection[str] = ()) -> list[str]:
        """Return the paths that `text` names, in model order. Never empty.

        With `whole_modules` (rules that train or freeze a weight itself) modules without a matrix, such as norms,
        count too; those in `planned` (an earlier rule named them) always do.
        Raises SelectorError, with candidates, when nothing matches or a layer range does not exist.
        """
        selector = None if text in self.modules else _TOWER_SELECTOR.fullmatch(text)
        if selector is not None:
            self._require_blocks(selector)
            found = self._by_tower(selector, whole_modules)
        else:
            named = [path for path in self.modules if fnmatchcase(path, text)]
            found = [path for path in named if path in planned or self._counts(path, whole_modules)]
        if not found:
            raise SelectorError(
                f'no module matches "{text}"', code="policy-no-match", hint=self._hint(text, whole_modules)
            )
        return found

    def experts(self) -> list[str]:
        """Return the modules of the blocks that keep a mixture's experts in 3-D weights, where no adapter can sit."""
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
        if not first <= last < max(blocks.values(), default=0):
            raise SelectorError(
                f"no layers [{first}-{last}] in {selector['tower']}",
                code="policy-no-match",
                hint=f"its blocks are {_listed(blocks)}",
            )

    def _blocks(self, tower: str) -> dict[str, int]:
        """The lists of blocks of a tower, with their lengths; an encoder and a decoder are two."""
        stacks = next((paths for name, paths in self.towers.stacks.items() if name == tower), ())
        return {path: len(list(self.modules[path].children())) for path in stacks}

    def _counts(self, path: str, whole_modules: bool) -> bool:
        module = self.modules[path]
        if is_adaptable(module):
            return True
        return whole_modules and path != "" and next(module.parameters(recurse=False), None) is not None

    def _by_tower(self, selector: re.Match[str], whole_modules: bool) -> list[str]:
        tower, tail = str(selector["tower"]), selector["tail"]
        inside = [path for path in self.modules if self.towers.tower_of(path) == tower]
        if tail == "*":
            found, tail = [path for path in inside if self._counts(path, whole_modules)], None
        else:
            found = [path for path in inside if self._in_tower(path, tower, whole_modules)]
        if selector["first"] is not None:
            blocks = range(int(selector["first"]), int(selector["last"] or selector["first"]) + 1)
            found = [p for p in found if self.towers.block_of(p) in blocks]
        if tail in ("attention", "mlp"):
            return [p for p in found if self.towers.family_of(p) == tail]
        return [p for p in found if tail is None or p.endswith(f".{tail}")]

    def _in_tower(self, path: str, tower: str, whole_modules: bool) -> bool:
        """What a bare tower name means: linear layers of the blocks; all of a projector; all where no blocks are."""
        if tower == "projector" and whole_modules:
            return self._counts(path, True)
        if not is_linear(self.modules[path]) or path == self.head:
            return False
        return tower not in self.towers.stacks or self.towers.block_of(path) is not None

    def _hint(self, text: str, whole_modules: bool) -> str:
        """Say why nothing matches, and what would."""
        lines = []
        if not whole_modules and any(fnmatchcase(p, text) for p in self.modules):
            kinds = sorted({type(m).__name__ for p, m in self.modules.items() if fnmatchcase(p, text)})
            lines.append(f"it names modules of kind {', '.join(kinds[:4])}: no layer an adapter can sit on")
        experts = [path for path in self.experts() if self._means_experts(text, path)]
        if experts:
            lines.append(f"{experts[0]} keeps its experts in 3-D weights, where no adapter can sit")
            lines.append(f"to train them in full, name the module:  {{modules: {experts[0]}, method: full}}")
        if self.towers.layout in ("unknown", "decoder alone"):
            lines.append("this model has a vision part but no known layout: name its modules by full path or glob")
        for tower in self.towers.stacks:
            lines.append(f"this model's {tower} blocks are {_listed(self._blocks(tower))}")
        projector = [p for p in self.modules if self.towers.tower_of(p) == "projector" and self._counts(p, False)]
        if projector:
            lines.append(f"its projector is {', '.join(projector[:4])}")
        candidates = {*self._names(), *(path for path in self.modules if self._counts(path, whole_modules))} - {text}
        near = difflib.get_close_matches(text, sorted(candidates), n=3, cutoff=0.5)
        if near:
            lines.append(f"did you mean  {'  or  '.join(near)} ?")
        return "\n".join(lines)

    def _means_experts(self, text: str, path: str) -> bool:
        """Whether `text` names the experts at `path`, or one of their weights."""
        names = [path, *(f"{path}.{name}" for name, _ in self.modules[path].named_parameters(recurse=False))]
        selector = _TOWER_SELECTOR.fullmatch(text)
        if selector is None:
            return any(fnmatchcase(name, text) for name in names)
        tail = selector["tail"]
        in_tail = tail in (None, "mlp") or any(name.endswith(f".{tail}") for name in names)
        return in_tail and self.towers.tower_of(path) == selector["tower"]

    def _names(self) -> list[str]:
        """Tower selectors that match something in this model."""
        found: set[str] = set()
        for tower in TOWERS:
            layers = [path for path in self.modules if self.towers.tower_of(path) == tower]
            layers = [path for path in layers if self._in_tower(path, tower, False)]
            found |= {tower} if layers else set()
            found |= {f"{tower}.{self.towers.family_of(path) or path.split('.')[-1]}" for path in layers}
            found |= {f"{tower}.{path.split('.')[-1]}" for path in layers}
        return sorted(found)


def _listed(blocks: Mapping[str, int]) -> str:
    return ", ".join(f"{path}[0-{count - 1}]" for path, count in blocks.items()) or "none"
