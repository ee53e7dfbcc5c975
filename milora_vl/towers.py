"""Where the three parts of a model are: the language tower, the projector and the vision tower.

One table of module paths (LAYOUTS), read top down; a model matches the first row whose modules it has. Module paths,
not file keys: transformers renames the keys of checkpoints, the module tree is what PEFT sees.
The only file of the library that asks a model what attributes it has.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from torch import nn

Tower = Literal["language", "projector", "vision"]
TOWERS: tuple[Tower, ...] = get_args(Tower)


@dataclass(frozen=True, slots=True)
class Layout:
    """One row of the table: the module paths of the parts. Several paths where a model has several."""

    name: str
    language: tuple[str, ...]
    projector: tuple[str, ...]
    vision: tuple[str, ...]


LAYOUTS: tuple[Layout, ...] = (
    # HF LLaVA, LLaVA-NeXT, VipLLaVA and others from transformers 4.52 on
    Layout("llava", ("model.language_model",), ("model.multi_modal_projector",), ("model.vision_tower",)),
    # HF LLaVA up to transformers 4.51, and LlavaModel (without the head) of later ones
    Layout("llava (to 4.51)", ("language_model",), ("multi_modal_projector",), ("vision_tower",)),
    # haotian-liu/LLaVA and LLaVA-NeXT
    Layout("llava (original)", ("model.layers",), ("model.mm_projector",), ("model.vision_tower",)),
)

# A model outside the table that has such a module is no text-only model: its parts must be named by full path.
_LOOKS_MULTIMODAL = re.compile(r"(^|\.)(vision|visual|image|video|audio)(_|\.|$)|(^|\.)mm_projector", re.IGNORECASE)
_ATTENTION = re.compile(r"att(n|ention)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Towers:
    """The parts of one model. A path of a part is None where the model has no such part.

    `stacks` names, per tower, the module that holds its repeated blocks (`model.language_model.layers`).
    """

    layout: str
    language: str | None
    projector: str | None
    vision: str | None
    stacks: Mapping[str, str] = field(default_factory=dict)

    def tower_of(self, path: str) -> Tower | None:
        """Return the tower that the module at `path` belongs to; None in a multimodal model of unknown layout."""
        if self.layout == "unknown":
            return None
        if self.vision is not None and _inside(path, self.vision):
            return "vision"
        if self.projector is not None and _inside(path, self.projector):
            return "projector"
        return "language"

    def block_of(self, path: str) -> int | None:
        """Return the number of the block that `path` lies in, None outside the blocks.

        >>> Towers("text", "", None, None, {"language": "model.layers"}).block_of("model.layers.3.mlp.up_proj")
        3
        """
        tower = self.tower_of(path)
        stack = self.stacks.get(tower) if tower else None
        if stack is None or not path.startswith(f"{stack}."):
            return None
        number = path.removeprefix(f"{stack}.").split(".")[0]
        return int(number) if number.isdecimal() else None

    def family_of(self, path: str) -> Literal["attention", "mlp"] | None:
        """Return the family of a layer inside a block: attention if its path there says so, else mlp."""
        if self.block_of(path) is None:
            return None
        return "attention" if _ATTENTION.search(self.inside_block(path)) else "mlp"

    def inside_block(self, path: str) -> str:
        """Return the path of a layer within its block: `self_attn.q_proj`."""
        tower = self.tower_of(path)
        assert tower is not None
        return path.removeprefix(f"{self.stacks[tower]}.").partition(".")[2]

    def canonical(self, path: str) -> str:
        """Return a name that is the same in HF's and in LLaVA's own layout: `language.layers.0.mlp.up_proj`."""
        tower = self.tower_of(path)
        stack = self.stacks.get(tower) if tower else None
        if stack is not None and path.startswith(f"{stack}."):
            return f"{tower}.layers.{path.removeprefix(f'{stack}.')}"
        if tower == "language":
            return f"language.{path.split('.')[-1]}"
        root = self.projector if tower == "projector" else self.vision
        inside = path.removeprefix(f"{root}.")
        if tower == "projector" and inside.isdecimal() and int(inside) % 2 == 0:  # LLaVA: 0 a layer, 1 an activation
            inside = f"linear_{int(inside) // 2 + 1}"
        return f"{tower}.{inside}"


def find_towers(model: nn.Module) -> Towers:
    """Find the parts of `model` by the table; a model with no vision module is `language` as a whole.

    >>> find_towers(nn.Sequential(nn.Linear(2, 2))).tower_of("0")
    'language'
    """
    modules = dict(model.named_modules())
    for layout in LAYOUTS:
        rows = (layout.language, layout.projector, layout.vision)
        if all(path in modules for row in rows for path in row):
            language, projector, vision = (row[0] for row in rows)
            return _with_stacks(model, Towers(layout.name, language, projector, vision))
    if any(_LOOKS_MULTIMODAL.search(name) for name in modules):
        return Towers("unknown", None, None, None)
    return _with_stacks(model, Towers("text", "", None, None))


def canonical_names(model: nn.Module) -> dict[str, str]:
    """Return the layout-free name (see `Towers.canonical`) of every module, by path."""
    towers = find_towers(model)
    return {path: towers.canonical(path) for path, _ in model.named_modules() if path}


def output_head(model: nn.Module) -> nn.Module | None:
    """Return the layer that maps hidden states to the vocabulary, where the model names one."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    return head if isinstance(head, nn.Module) else None


def peft_task(model: nn.Module) -> str | None:
    """Return PEFT's task type for a model that generates text, None for any other."""
    if not callable(getattr(model, "prepare_inputs_for_generation", None)):
        return None
    return "SEQ_2_SEQ_LM" if getattr(getattr(model, "config", None), "is_encoder_decoder", False) else "CAUSAL_LM"


def can_save(model: nn.Module) -> bool:
    """Tell whether the model writes itself as an HF folder."""
    return callable(getattr(model, "save_pretrained", None))


def is_wrapped_by_peft(model: nn.Module) -> bool:
    """Tell whether the model is a PeftModel or already holds adapter layers."""
    return hasattr(model, "peft_config") or any("lora_A" in name.split(".") for name, _ in model.named_modules())


def _inside(path: str, root: str) -> bool:
    return root == "" or path == root or path.startswith(f"{root}.")


def _with_stacks(model: nn.Module, towers: Towers) -> Towers:
    stacks: dict[str, str] = {}
    towers_with_blocks: tuple[Tower, ...] = ("language", "vision")  # a projector counts as a whole
    for tower in towers_with_blocks:
        stack = _largest_stack(model, towers, tower)
        if stack is not None:
            stacks[tower] = stack
    return Towers(towers.layout, towers.language, towers.projector, towers.vision, stacks)


def _largest_stack(model: nn.Module, towers: Towers, tower: Tower) -> str | None:
    """The ModuleList with the most weights in a tower (timm names a Sequential `blocks`)."""
    sizes = {
        name: sum(p.numel() for p in module.parameters())
        for name, module in _stacks(model)
        if towers.tower_of(name) == tower
    }
    return max(sizes, key=lambda name: sizes[name]) if sizes else None


def _stacks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        is_blocks = isinstance(module, nn.Sequential) and name.split(".")[-1] == "blocks"
        if len(list(module.children())) > 0 and (isinstance(module, nn.ModuleList) or is_blocks):
            yield name, module
