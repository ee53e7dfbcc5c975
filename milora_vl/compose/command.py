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

from milora_data import command
from milora_data.errors import UserError
from milora_data.flags import shared

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
