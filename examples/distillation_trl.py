"""Self-distillation with pictures on TRL's DistillationTrainer: the base teaches its own adapter (arXiv:2306.13649).

pip install trl
python examples/distillation_trl.py --hint "Be brief." --data_path train.json --image_folder images --output_dir out
python examples/distillation_trl.py --adapter runs/a --data_path train.json --image_folder images --output_dir out

The student answers the first question of each record, and learns the teacher's probabilities of each token. With
`--hint`, the teacher reads one more sentence after each question, which the student learns to do without. With
`--adapter`, a trained adapter learns back what it forgot. The teacher is the base without the adapter, around the same
tensors, so no weight is in memory twice. All flags of TRL's DistillationConfig work.
"""

import copy
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Image, List
from trl import DistillationConfig, DistillationTrainer, TrlParser

from milora_data import load_records
from milora_data.batches.processor_inputs import limit_pixels
from milora_vl import apply_milora, calibration_texts, load_adapter, load_model, save_adapter
from milora_vl.common.errors import UserError


@dataclass
class Chosen:
    """What is trained, and on what."""

    data_path: str = field(metadata={"help": "records of a question and its pictures; their answers are not used"})
    image_folder: str = field(metadata={"help": "folder of the pictures"})
    hint: str = field(default="", metadata={"help": "sentence that only the teacher reads, after each question"})
    adapter: str = field(default="", metadata={"help": "adapter that trains further (default: a new one)"})
    model: str = field(default="Qwen/Qwen2.5-VL-3B-Instruct", metadata={"help": "folder or hub id of the base"})
    max_pixels: int | None = field(default=None, metadata={"help": "pixels of a picture at most (Qwen-VL, GLM-V)"})
    policy: str = field(
        default="[{modules: language, method: milora, rank: 64, protect: 0.95}]",
        metadata={"help": "rules of a new adapter, as in a recipe (docs/train.md#the-policy)"},
    )


def questions(chosen: Chosen) -> Dataset:
    """Return TRL's rows of the records. The pictures are opened when they are needed."""
    rows = []
    for record in load_records(chosen.data_path):
        question = record.turns[0].text.replace("<image>", "").strip()
        pictures = list(map(str, record.within(Path(chosen.image_folder)).images))
        rows.append({"prompt": [{"role": "user", "content": question}], "images": pictures})
    return Dataset.from_list(rows).cast_column("images", List(Image()))


def read_hint(teacher: Any, processor: Any, text: str) -> None:
    """Let the teacher read `text` at the end of each question. TRL gives it rows of prompt and completion."""
    turn = [{"role": "user", "content": [{"type": "text", "text": "QUESTION"}]}]
    prompt = processor.apply_chat_template(turn, add_generation_prompt=True)
    asked = prompt.rpartition("QUESTION")[0] + "QUESTION"
    whole, before, hinted = (processor.tokenizer(part)["input_ids"] for part in (prompt, asked, f"{asked} {text}"))
    num_after, hint = len(whole) - len(before), torch.tensor([hinted[len(before) :]])

    def insert(_: Any, args: tuple, inputs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        place = inputs["input_ids"].shape[1] - (inputs["logits_to_keep"] - 1) - num_after
        for name in {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"} & inputs.keys():
            rows = inputs[name]
            new = hint if name == "input_ids" else torch.full_like(hint, name == "attention_mask")
            inputs[name] = torch.cat([rows[:, :place], new.to(rows).expand(len(rows), -1), rows[:, place:]], dim=1)
        return args, inputs

    teacher.base_model.register_forward_pre_hook(insert, with_kwargs=True)


def main() -> DistillationTrainer:
    """Train, save the adapter to the output folder, and return the trainer."""
    parser = TrlParser((Chosen, DistillationConfig))
    parser.set_defaults(bf16=torch.cuda.is_available())
    chosen, arguments = parser.parse_args_and_config()
    if not (chosen.hint or chosen.adapter):
        sys.exit("error: a new adapter has nothing to learn from its own base\ntry:   --hint TEXT, or --adapter FOLDER")
    data = questions(chosen)
    dtype = torch.bfloat16 if arguments.bf16 else None
    base, processor = load_model(chosen.model, device=arguments.device, dtype=dtype)
    limit_pixels(processor, None, chosen.max_pixels)
    processor.tokenizer.padding_side = "left"  # as TRL pads prompts
    tensors = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
    teacher = copy.deepcopy(base, tensors)  # new modules around the same tensors
    if chosen.hint:
        read_hint(teacher, processor, chosen.hint)
    if chosen.adapter:
        model = load_adapter(base, chosen.adapter, is_trainable=True)
    else:
        model = apply_milora(base, chosen.policy, calibration=calibration_texts(base))
    trainer = DistillationTrainer(model, teacher, arguments, train_dataset=data, processing_class=processor)
    trainer.train()
    save_adapter(model, arguments.output_dir)
    return trainer


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
