"""`python -m milora_vl.compose`: make a LLaVA of a vision tower, a projector and a causal language model.

`python -m milora_vl.compose --vision V --language L --output_dir O` writes a folder that is ready for stage 1, which
trains the projector on captions (recipe pretrain-projector-llava).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from milora_vl.common.cli.console import next_step, run
from milora_vl.common.cli.parser import Command, option, shared
from milora_vl.common.errors import UserError, at_flag

COMMAND = Command(
    "milora_vl.compose",
    "Compose a LLaVA from a vision tower and a causal language model.",
    """\
examples:
  python -m milora_vl.compose --vision openai/clip-vit-large-patch14-336 --language lmsys/vicuna-7b-v1.5 \\
      --output_dir new
  python -m milora_vl.compose --vision timm/vit_base_patch16_siglip_224 --output_dir small \\
      --language HuggingFaceTB/SmolLM2-135M
""",
    inputs=(
        option("--vision", required=True, metavar="V", help="CLIP, SigLIP, a ViT (folder or id), or timm/NAME"),
        option("--vision_weights", metavar="FILE", help="weights file of timm/NAME, or random (no download)"),
        option("--language", required=True, metavar="L", help="causal language model: folder or id"),
        option("--projector", metavar="FILE", help="initial mm_projector.bin or .safetensors"),
    ),
    settings=(
        option("--select_layer", type=int, default=-2, help="layer that provides the features (default: -2)"),
        option("--select_feature", choices=("patch", "cls_patch"), default="patch", help="cls_patch: with class token"),
    ),
    outputs=(shared("output_dir", required=True, about="output folder, which must not exist"), shared("format")),
)


def main(argv: Sequence[str] | None = None) -> int:
    args = COMMAND.parse(argv)
    from milora_vl.models.base import Parts, language_config, require_parts, tower_config
    from milora_vl.models.loading import write

    folder: Path = args.output_dir
    if folder.exists():
        message = f"{folder} exists; it is not overwritten"
        raise UserError(message, code="output-exists", where="--output_dir", hint="use:  --output_dir ANOTHER")
    chosen = Parts(
        args.language, args.vision, args.projector, args.select_layer, args.select_feature, args.vision_weights
    )
    require_parts(chosen, chosen.projector)
    with at_flag("--language"):
        language_config(args.language)
    with at_flag("--vision"):
        tower_config(args.vision)
    write(chosen, folder)
    as_json = json.dumps({"folder": str(folder), "parts": chosen.describe()}, ensure_ascii=False)
    sys.stdout.write((as_json if args.format == "json" else f"{folder}: {chosen.describe()}") + "\n")
    stage = () if args.projector else ("--tune_mm_mlp_adapter", True, "--version", "plain", "--learning_rate", "1e-3")
    next_step("milora_vl.train", "--model", folder, *stage, "--data_path", "DATA.json")
    return 0


if __name__ == "__main__":
    run(main)
