"""GRPO with pictures on TRL's GRPOTrainer: a model learns from its own answers, by a reward (arXiv:2402.03300).

pip install trl
python examples/grpo_trl.py --data_path train.json --image_folder images --output_dir out --max_steps 200 --beta 0.04

Supervised training reads the same records (docs/data.md): the first turn is the question, and the second, the
answer, serves only the reward. All flags of TRL's GRPOConfig work. The base model is the reference of `--beta`: TRL
switches the adapter off, so it needs no second model. `protect` keeps the update off what ordinary text uses.
"""

import sys
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from pathlib import Path

import torch
from datasets import Dataset, Image, List
from trl import GRPOConfig, GRPOTrainer, TrlParser

from milora_data import load_records
from milora_data.batches.processor_inputs import limit_pixels
from milora_vl import apply_milora, calibration_texts, load_model, save_adapter
from milora_vl.common.errors import UserError


@dataclass
class Chosen:
    """What is trained, and on what."""

    data_path: str = field(metadata={"help": "records of a question, its pictures and its answer"})
    image_folder: str = field(metadata={"help": "folder of the pictures"})
    model: str = field(default="Qwen/Qwen2.5-VL-3B-Instruct", metadata={"help": "folder or hub id of the base"})
    max_pixels: int | None = field(default=None, metadata={"help": "pixels of a picture at most (Qwen-VL, GLM-V)"})
    policy: str = field(
        default="[{modules: language, method: milora, rank: 64, protect: 0.95}]",
        metadata={"help": "rules, as in a recipe (docs/train.md#the-policy)"},
    )


def similarity(completions: list, answer: list[str], **_: object) -> list[float]:
    """Return the reward of each completion: 1 for the answer itself, less for another text, 0 for no common letter."""
    texts = (completion[0]["content"].strip(" .\n").lower() for completion in completions)
    return [SequenceMatcher(None, text, right.lower()).ratio() for text, right in zip(texts, answer, strict=True)]


def questions(chosen: Chosen) -> Dataset:
    """Return TRL's rows of the records. The pictures are opened when they are needed."""
    rows = []
    for record in load_records(chosen.data_path):
        if [turn.role for turn in record.turns[:2]] != ["user", "assistant"]:
            sys.exit(f"{record.source}: the first two turns must be a question and its answer")
        question, answer = (turn.text.replace("<image>", "").strip() for turn in record.turns[:2])
        pictures = list(map(str, record.within(Path(chosen.image_folder)).images))
        rows.append({"prompt": [{"role": "user", "content": question}], "images": pictures, "answer": answer})
    return Dataset.from_list(rows).cast_column("images", List(Image()))


def main() -> GRPOTrainer:
    """Train, save the adapter to the output folder, and return the trainer."""
    parser = TrlParser((Chosen, GRPOConfig))
    parser.set_defaults(bf16=torch.cuda.is_available())
    chosen, arguments = parser.parse_args_and_config()
    data = questions(chosen)
    dtype = torch.bfloat16 if arguments.bf16 else None
    model, processor = load_model(chosen.model, device=arguments.device, dtype=dtype)
    limit_pixels(processor, None, chosen.max_pixels)
    processor.tokenizer.padding_side = "left"  # as TRL pads prompts
    model = apply_milora(model, chosen.policy, calibration=calibration_texts(model))
    trainer = GRPOTrainer(model, similarity, args=arguments, train_dataset=data, processing_class=processor)
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
