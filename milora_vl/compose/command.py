"""Put a vision tower, a projector and a causal language model together into a LLaVA in Hugging Face layout.

`python -m milora_vl.compose --vision V --language L --output_dir O`: the folder is ready for stage 1, in which the
projector learns captions (recipe pretrain-projector-llava).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from milora_data import command
from milora_data.errors import UserError
from milora_data.flags import shared

if TYPE_CHECKING:
    from milora_vl.models.assemble import TowerPlan

IMAGE_TOKEN = "<image>"
PROG = "python -m milora_vl.compose"
EXAMPLES = f"""\
examples:
  {PROG} --vision openai/clip-vit-large-patch14-336 --language lmsys/vicuna-7b-v1.5 --output_dir new
  {PROG} --vision timm/vit_base_patch16_siglip_224 --language HuggingFaceTB/SmolLM2-135M --output_dir small
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Compose what the command line names and write it. UserError where the parts do not fit. Returns the exit code."""
    args = _options(argv)
    from milora_vl.models import parts

    folder = Path(args.output_dir)
    if folder.exists():
        raise UserError(f"--output_dir {folder} exists; nothing is overwritten")
    chosen = parts.Parts(
        args.language, args.vision, args.projector, args.select_layer, args.select_feature, args.vision_weights
    )
    parts.require_parts(chosen)
    parts.write(chosen, folder)
    as_json = json.dumps({"folder": str(folder), "parts": chosen.describe()}, ensure_ascii=False)
    sys.stdout.write((as_json if args.format == "json" else f"{folder}: {chosen.describe()}") + "\n")
    stage = () if args.projector else ("--tune_mm_mlp_adapter", True, "--version", "plain", "--learning_rate", "1e-3")
    command.next_step("milora_vl.train", "--model", folder, *stage, "--data_path", "DATA.json")
    return 0


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    options = command.parser(PROG, "Make a LLaVA from a vision tower and a causal language model.", EXAMPLES)
    given = options.add_argument_group("input")
    given.add_argument("--vision", required=True, metavar="V", help="CLIP, SigLIP, a ViT (folder or id), or timm/NAME")
    given.add_argument("--vision_weights", metavar="FILE", help="for timm/NAME without a hub: a file, or random")
    given.add_argument("--language", required=True, metavar="L", help="a causal LM: folder or id")
    given.add_argument("--projector", metavar="FILE", help="mm_projector.bin or .safetensors to start from")
    settings = options.add_argument_group("settings")
    settings.add_argument(
        "--select_layer", type=int, default=-2, help="of the tower, whose features are taken (default: %(default)s)"
    )
    settings.add_argument(
        "--select_feature",
        choices=("patch", "cls_patch"),
        default="patch",
        help="with cls_patch the class token too (default: %(default)s)",
    )
    out = options.add_argument_group("output")
    shared(out, "output_dir", required=True, about="to write; must not exist")
    shared(out, "format")
    parsed: argparse.Namespace = options.parse_args(argv)
    return parsed


def compose(
    tower: Any,
    language: Any,
    tokenizer: Any,
    *,
    plan: TowerPlan | None = None,
    rows: int = 1,
    projector_seed: int = 0,
) -> Any:
    """Return a LlavaForConditionalGeneration of a tower and a causal language model, with a fresh two-layer projector.

    `<image>` is added to the tokenizer (in place) and to the embeddings, whose rows become a multiple of `rows`.
    Without a `plan`, the features of a timm tower are used whole. The given models become parts of the new one, which
    holds nothing else: a model of 7B is composed in the memory that its parts take.
    """
    import torch
    from transformers import LlavaForConditionalGeneration
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

    from milora_vl.models.assemble import llava_config, plan_tower

    tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    _add_image_row(language, -(-len(tokenizer) // rows) * rows)
    plan = plan_tower(tower.config, layer=-1, feature="patch") if plan is None else plan
    config = llava_config(plan, language.config, image_token=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
    with torch.device("meta"):
        model: Any = LlavaForConditionalGeneration(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(projector_seed)
        projector = LlavaMultiModalProjector(config)
        for layer in (projector.linear_1, projector.linear_2):
            torch.nn.init.normal_(layer.weight, std=0.02)  # as transformers starts a LLaVA
            torch.nn.init.zeros_(layer.bias)
    model.model.multi_modal_projector = projector.to(language.dtype)
    model.model.vision_tower = tower
    model.model.language_model = language.base_model
    model.lm_head = language.get_output_embeddings()
    if config.tie_word_embeddings:
        model.tie_weights()
    elif model.lm_head.weight is language.get_input_embeddings().weight:  # GPT-2's: the two go apart
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.eval()


def processor_for(
    tokenizer: Any,
    *,
    image_size: int,
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    template: str = "vicuna_v1",
    strategy: str = "full",
    extra_tokens: int = 0,
) -> Any:
    """Return the LlavaProcessor of a composed model: square padding, our prompt, as many image tokens as features."""
    from transformers import LlavaProcessor
    from transformers.models.llava.image_processing_llava import LlavaImageProcessor

    from milora_data.templates import render_chat_template

    image_processor = LlavaImageProcessor(
        do_pad=True,
        size={"shortest_edge": image_size},
        crop_size={"height": image_size, "width": image_size},
        image_mean=list(mean),
        image_std=list(std),
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy=strategy,
        chat_template=render_chat_template(template, tokenizer),
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=extra_tokens,
    )


def _add_image_row(language: Any, size: int) -> None:
    """Grow embeddings and head to `size`; new rows of each are the mean of its old ones.

    So no new token is ever the likeliest.
    """
    import torch

    count = len(language.get_input_embeddings().weight)
    if count >= size:
        return
    language.resize_token_embeddings(size, mean_resizing=False)
    with torch.no_grad():
        for layer in (language.get_input_embeddings(), language.get_output_embeddings()):
            layer.weight[count:] = layer.weight[:count].float().mean(0).to(layer.weight.dtype)


if __name__ == "__main__":
    command.run(main)
