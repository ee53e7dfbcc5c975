"""Where a model has its towers (language, projector, vision): module paths of each family, blocks, head.

LAYOUTS is a table of module paths. A model has the layout of the first row whose modules all exist. The table lists
module paths and not the keys of checkpoints, because transformers renames keys, and PEFT matches modules.
Only this file of the core inspects which attributes a model has.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from torch import nn

Tower = Literal["language", "projector", "vision"]
TOWERS: tuple[Tower, ...] = get_args(Tower)


@dataclass(frozen=True, slots=True)
class Layout:
    """One row of the table: the module paths of the towers, without the prefix `model.`, separated by spaces.

    `.` is the module that contains the other towers; the tower is that module without them.
    """

    families: str
    language: str
    projector: str
    vision: str

    def paths(self, tower: Tower, prefix: str) -> tuple[str, ...]:
        words: dict[Tower, str] = {"language": self.language, "projector": self.projector, "vision": self.vision}
        return tuple(prefix.rstrip(".") if path == "." else prefix + path for path in words[tower].split())


LAYOUTS: tuple[Layout, ...] = (
    # families, by their model_type in transformers            language, projector, vision
    Layout(
        "llava (BakLLaVA), llava_next, llava_next_video, llava_onevision, vipllava, paligemma, gemma3, internvl, "
        "mistral3, aya_vision, cohere2_vision, lfm2_vl, perception_lm, fast_vlm, got_ocr2, aria, florence2, molmo2",
        *("language_model", "multi_modal_projector", "vision_tower"),
    ),
    Layout("mllama, llama4, step3p7", "language_model", "multi_modal_projector", "vision_model"),
    Layout("video_llava", "language_model", "multi_modal_projector", "image_tower video_tower"),
    Layout("idefics2, idefics3, smolvlm", "text_model", "connector", "vision_model"),
    # The mergers are submodules of the vision module. The longest matching path decides.
    Layout("qwen3_vl", "language_model", "visual.merger visual.deepstack_merger_list", "visual"),
    Layout("qwen2_vl, qwen2_5_vl, qwen3_5, glm4v, exaone4_5", "language_model", "visual.merger", "visual"),
    Layout("deepseek_vl, janus", "language_model", "aligner", "vision_model"),
    Layout("blip-2, instructblip (the Q-Former is no tower)", "language_model", "language_projection", "vision_model"),
    Layout("gemma3n, gemma4", "language_model", "embed_vision", "vision_tower"),
    Layout("paddleocr_vl", "language_model", "projector", "visual"),
    Layout("video_llama_3, hyperclovax_vision_v2", "language_model", "projector", "vision_model"),
    Layout("minicpmv4_6", "language_model", "merger", "vision_tower"),
    Layout("kosmos-2", "text_model", "image_to_text_projection", "vision_model"),
    Layout("idefics", "embed_tokens layers gated_cross_attn_layers norm", "", "vision_model"),
    # Models of other code bases.
    Layout("LLaVA-NeXT (original)", ".", "mm_projector vision_resampler", "vision_tower"),
    Layout("LLaVA (original)", ".", "mm_projector", "vision_tower"),
    Layout("LLaVA (original) under FSDP, which hides the tower in a list", ".", "mm_projector", ""),
    Layout("TinyLLaVA", "language_model", "connector", "vision_tower"),
    Layout("nanoVLM", "decoder", "MP", "vision_encoder"),
)
# `model.` since transformers 4.52; no prefix before, and in models without a head (LlavaModel).
_PREFIXES = ("model.", "")
_HEAD = "lm_head"  # belongs to the language tower, but is not one of its submodules

# A model outside the table with such a module is not a text-only model. Rules must select its modules by full path.
_LOOKS_MULTIMODAL = re.compile(
    r"(^|[._])(vision|visual|image|video|audio|mm_projector|vqmodel|speech)(_|\.|$)", re.IGNORECASE
)
_SOUND = re.compile(r"(^|[._])(audio|speech)(_|\.|$)", re.IGNORECASE)
_ATTENTION = re.compile(r"att(n|ention)", re.IGNORECASE)
# A list of modules with a smaller share of the weights than this is not a list of blocks (a few heads or adapters).
_SMALLEST_STACK = 0.1


@dataclass(frozen=True, slots=True)
class Towers:
    """The towers of one model. `roots` maps each tower to its module paths; a missing tower has none.

    `stacks` maps a tower to the modules that contain its repeated blocks (`model.language_model.layers`).
    """

    layout: str
    roots: Mapping[Tower, tuple[str, ...]]
    stacks: Mapping[Tower, tuple[str, ...]] = field(default_factory=dict)

    @property
    def language(self) -> str | None:
        return self._first("language")

    @property
    def projector(self) -> str | None:
        return self._first("projector")

    @property
    def vision(self) -> str | None:
        return self._first("vision")

    def _first(self, tower: Tower) -> str | None:
        return next(iter(self.roots.get(tower, ())), None)

    def tower_of(self, path: str) -> Tower | None:
        """Return the tower of the module at `path`, or None for modules outside the towers."""
        matches = [(len(root), tower) for tower, roots in self.roots.items() for root in roots if _inside(path, root)]
        if matches:
            return max(matches)[1]
        return "language" if self.roots.get("language") and _inside(path, _HEAD) else None

    def block_of(self, path: str) -> int | None:
        """Return the number of the block that contains the module at `path`, or None outside the blocks.

        >>> Towers("text", {"language": ("",)}, {"language": ("model.layers",)}).block_of("model.layers.3.mlp.up_proj")
        3
        """
        stack = self._stack_of(path)
        number = path.removeprefix(f"{stack}.").split(".")[0]
        return int(number) if stack is not None and number.isdecimal() else None

    def family_of(self, path: str) -> Literal["attention", "mlp"] | None:
        """Return the family of a layer inside a block: attention if its path contains `attn` or `attention`."""
        if self.block_of(path) is None:
            return None
        return "attention" if _ATTENTION.search(self.inside_block(path)) else "mlp"

    def inside_block(self, path: str) -> str:
        return path.removeprefix(f"{self._stack_of(path)}.").partition(".")[2]

    def canonical(self, path: str) -> str:
        """Return a name that is equal in HF's and in LLaVA's layout: `language.layers.0.mlp.up_proj`."""
        tower, stack = self.tower_of(path), self._stack_of(path)
        if tower is None:
            return path
        if stack is not None and len(self.stacks[tower]) == 1:
            return f"{tower}.layers.{path.removeprefix(f'{stack}.')}"
        if stack is not None:
            return f"{tower}.{path}"
        if tower == "language":
            return f"language.{path.split('.')[-1]}"
        root = max((root for root in self.roots[tower] if _inside(path, root)), key=len)
        inside = path.removeprefix(f"{root}.")
        if tower == "projector" and inside.isdecimal() and int(inside) % 2 == 0:  # LLaVA: 0 linear, 1 activation, 2 ...
            inside = f"linear_{int(inside) // 2 + 1}"
        return f"{tower}.{inside}"

    def _stack_of(self, path: str) -> str | None:
        tower = self.tower_of(path)
        stacks = self.stacks.get(tower, ()) if tower else ()
        return next((stack for stack in stacks if path.startswith(f"{stack}.")), None)


def find_towers(model: nn.Module) -> Towers:
    """Return the towers of `model`. A model without a vision module is one language tower.

    For a multimodal model outside the table, the language tower is the decoder that `get_decoder` returns, if it
    contains no vision modules; the modules beside it are the others (`_beside`). Otherwise the layout is `unknown`.

    >>> find_towers(nn.Sequential(nn.Linear(2, 2))).tower_of("0")
    'language'
    """
    modules = dict(model.named_modules())
    for layout in LAYOUTS:
        for prefix in _PREFIXES:
            roots = {tower: layout.paths(tower, prefix) for tower in TOWERS}
            if all(path in modules for paths in roots.values() for path in paths):
                return _with_stacks(modules, Towers(layout.families, roots))
    if not any(_LOOKS_MULTIMODAL.search(name) for name in modules):
        return _with_stacks(modules, Towers("text", {"language": ("",)}))
    decoder = _decoder_path(model, modules)
    if decoder is not None:
        beside = {} if is_encoder_decoder(model) else _beside(modules, decoder)
        return _with_stacks(modules, Towers("by shape", {"language": (decoder,), **beside}))
    return Towers("unknown", {})


def _beside(modules: Mapping[str, nn.Module], decoder: str) -> dict[Tower, tuple[str, ...]]:
    """Return projector and vision tower of a model whose parts are modules beside its decoder.

    A part with blocks is a vision tower, and one without maps from it to the language model; parts for sounds are
    neither. If there is no such map, it is inside the vision tower: what comes after its blocks and has as many outputs
    as the decoder's embedding (mergers).
    """
    parent = decoder.rpartition(".")[0]
    parts = [
        path
        for path, module in _children(modules, parent)
        if path not in (decoder, _HEAD) and _size(module) and not _SOUND.search(path)
    ]
    vision = tuple(path for path in parts if _stacks_in(modules, path))
    projector = tuple(path for path in parts if path not in vision)
    if not projector:
        width = next((m.embedding_dim for m in modules[decoder].modules() if isinstance(m, nn.Embedding)), None)
        for tower in vision:
            inside = [path for path, _ in _children(modules, tower)]
            last = max((index for index, path in enumerate(inside) if _stacks_in(modules, path)), default=-1)
            projector += tuple(path for path in inside[last + 1 :] if _maps_to(modules[path], width))
    return {tower: paths for tower, paths in (("projector", projector), ("vision", vision)) if paths}  # type: ignore[misc]


def _children(modules: Mapping[str, nn.Module], parent: str) -> list[tuple[str, nn.Module]]:
    prefix = f"{parent}." if parent else ""
    return [(prefix + name, module) for name, module in modules[parent].named_children()]


def _stacks_in(modules: Mapping[str, nn.Module], root: str) -> list[str]:
    return [path for path, module in modules.items() if _inside(path, root) and _is_stack(path, module)]


def _maps_to(module: nn.Module, width: int | None) -> bool:
    return any(isinstance(layer, nn.Linear) and layer.out_features == width for layer in module.modules())


def canonical_names(model: nn.Module) -> dict[str, str]:
    """Return the name of every module that is equal in all layouts (see `Towers.canonical`), by path."""
    towers = find_towers(model)
    names = {path: towers.canonical(path) for path, _ in model.named_modules() if path}
    counts = Counter(names.values())
    return {path: name if counts[name] == 1 else path for path, name in names.items()}


def output_head(model: nn.Module) -> nn.Module | None:
    """Return the layer that maps hidden states to the vocabulary, or None if the model does not declare one."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    return head if isinstance(head, nn.Module) else None


def peft_task(model: nn.Module) -> str | None:
    """Return PEFT's task type for a model that generates text, or None for other models."""
    if not callable(getattr(model, "prepare_inputs_for_generation", None)):
        return None
    return "SEQ_2_SEQ_LM" if is_encoder_decoder(model) else "CAUSAL_LM"


def is_encoder_decoder(model: nn.Module) -> bool:
    """Return whether an encoder and a decoder read different ids, as in T5."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def image_token_of(model: nn.Module) -> int | None:
    """Return the id of the token that marks picture positions in `input_ids`, or None without one."""
    config = getattr(model, "config", None)
    ids = (getattr(config, name, None) for name in ("image_token_id", "image_token_index"))
    return next((int(token) for token in ids if isinstance(token, int)), None)


def is_wrapped_by_peft(model: nn.Module) -> bool:
    """Return True if the model is a PeftModel or contains adapter layers."""
    return hasattr(model, "peft_config") or any("lora_A" in name.split(".") for name, _ in model.named_modules())


def _inside(path: str, root: str) -> bool:
    return root == "" or path == root or path.startswith(f"{root}.")


def _decoder_path(model: nn.Module, modules: Mapping[str, nn.Module]) -> str | None:
    get = getattr(model, "get_decoder", None)
    decoder = get() if callable(get) else None
    path = next((name for name, module in modules.items() if module is decoder and name), None)
    if path is None:
        return None
    inside = [name for name in modules if _inside(name, path) and _LOOKS_MULTIMODAL.search(name.removeprefix(path))]
    # A vision tower contains blocks. Experts for the tokens of pictures (Ernie 4.5) contain none.
    return None if any(_stacks_in(modules, name) for name in inside) else path


def _with_stacks(modules: Mapping[str, nn.Module], towers: Towers) -> Towers:
    stacks: dict[Tower, tuple[str, ...]] = {}
    towers_with_blocks: tuple[Tower, ...] = ("language", "vision")  # a projector is not divided into blocks
    for tower in towers_with_blocks:
        lists = [name for name, module in modules.items() if towers.tower_of(name) == tower and _is_stack(name, module)]
        outermost = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
        sizes = {name: _size(modules[name]) for name in outermost}
        if sizes:
            minimum = _SMALLEST_STACK * max(sizes.values())
            stacks[tower] = tuple(name for name, size in sizes.items() if size >= minimum)
    return Towers(towers.layout, towers.roots, stacks)


def _is_stack(name: str, module: nn.Module) -> bool:
    """Return True for a list of modules that have children. In timm this is a Sequential named `blocks`."""
    if not isinstance(module, nn.ModuleList | nn.Sequential):
        return False
    is_list = isinstance(module, nn.ModuleList) or name.split(".")[-1] == "blocks"
    return is_list and any(next(block.children(), None) is not None for block in module)


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
