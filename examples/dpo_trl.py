"""DPO with pictures on TRL's DPOTrainer (arXiv:2305.18290): a model learns which of two answers is better.

pip install trl
python examples/dpo_trl.py --data_path pairs.json --image_folder images --output_dir out --max_steps 200 --beta 0.1

pairs.json has TRL's rows: {"images": ["a.jpg"], "prompt": [{"role": "user", "content": "What is it?"}], "chosen":
[{"role": "assistant", "content": "A cat."}], "rejected": [{"role": "assistant", "content": "A dog."}]}. TRL's own
collator makes the batches, and all flags of its DPOConfig work. The base model is the reference: TRL switches the
adapter off, so it needs no second model. `protect` keeps the update off what ordinary text uses.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset, Image, List
from trl import DPOConfig, DPOTrainer, TrlParser

from milora_data.batches.processor_inputs import limit_pixels
from milora_data.formats.jsonfile import read_objects
from milora_vl import apply_milora, calibration_texts, load_model, save_adapter
from milora_vl.common.errors import UserError


@dataclass
class Chosen:
    """What is trained, and on what."""

    data_path: str = field(metadata={"help": "pairs of answers: a JSON list or JSON lines"})
    image_folder: str = field(metadata={"help": "folder of the pictures"})
    model: str = field(default="Qwen/Qwen2.5-VL-3B-Instruct", metadata={"help": "folder or hub id of the base"})
    max_pixels: int | None = field(default=None, metadata={"help": "pixels of a picture at most (Qwen-VL, GLM-V)"})
    policy: str = field(
        default="[{modules: language, method: milora, rank: 64, protect: 0.95}]",
        metadata={"help": "rules, as in a recipe (docs/train.md#the-policy)"},
    )


def pairs(chosen: Chosen) -> Dataset:
    """Return TRL's rows. The pictures are opened when they are needed."""
    rows = []
    for place, value in read_objects(Path(chosen.data_path)):
        missing = {"prompt", "chosen", "rejected"} - set(value)
        if missing:
            sys.exit(f"{chosen.data_path}:{place}: a pair has no {' and no '.join(sorted(missing))}")
        pictures = [str(Path(chosen.image_folder, name)) for name in value.get("images", [])]
        rows.append({key: value[key] for key in ("prompt", "chosen", "rejected")} | {"images": pictures})
    return Dataset.from_list(rows).cast_column("images", List(Image()))


def main() -> DPOTrainer:
    """Train, save the adapter to the output folder, and return the trainer."""
    parser = TrlParser((Chosen, DPOConfig))
    parser.set_defaults(bf16=torch.cuda.is_available())
    chosen, arguments = parser.parse_args_and_config()
    data = pairs(chosen)
    dtype = torch.bfloat16 if arguments.bf16 else None
    model, processor = load_model(chosen.model, device=arguments.device, dtype=dtype)
    limit_pixels(processor, None, chosen.max_pixels)
    model = apply_milora(model, chosen.policy, calibration=calibration_texts(model))
    trainer = DPOTrainer(model, args=arguments, train_dataset=data, processing_class=processor)
    if "ref" in model.peft_config:
        model.delete_adapter("ref")  # TRL's copy of the adapter; without it, TRL switches the adapter off
    trainer.train()
    save_adapter(model, arguments.output_dir)
    return trainer


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
