"""LLaVA-1.5 on your own records and pictures, with the Hugging Face Trainer.

python examples/llava_own_data.py                                   # here: random weights, three drawn pictures, a CPU
python examples/llava_own_data.py llava-1.5-7b train.json images    # on a GPU, with LLaVA's JSON

Language tower and projector train as by default with `milora train`: protected MiLoRA, off the inputs of texts that the
model writes and of your pictures. The command also has `base_kl`, resumes, evaluates and writes a report.
"""

import json
import sys
from pathlib import Path

import torch
from PIL import Image
from transformers import Trainer, TrainingArguments

from milora_data import load_records
from milora_vl import apply_milora, calibration_texts, collator_for, load_model, save_adapter
from milora_vl.core.adapter.rates import RatesOfRules


def drawn(folder: Path) -> tuple[Path, Path]:
    """Write three records with a picture each, as an example of the format; return the file and the folder."""
    records = []
    for colour in ("red", "green", "blue"):
        (folder / "images").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 48), colour).save(folder / "images" / f"{colour}.png")
        question, answer = "<image>\nWhat colour is it?", colour
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        records.append({"id": colour, "image": f"{colour}.png", "conversations": turns})
    (folder / "train.json").write_text(json.dumps(records))
    return folder / "train.json", folder / "images"


name, *data = sys.argv[1:] or ["tiny"]
file, images = map(Path, data) if data else drawn(Path("own-data"))
is_gpu = torch.cuda.is_available()
rank = 128 if is_gpu else 1  # the default leaves few inputs of layers as tiny as the layers of `tiny`

records = list(load_records(str(file)))
model, processor = load_model(name, dtype=torch.bfloat16 if is_gpu else None, device="cuda" if is_gpu else "cpu")
collator = collator_for(model, processor, image_folder=images, max_length=2048)
model = apply_milora(
    model,
    [
        {"modules": "language", "method": "milora", "rank": rank, "alpha": rank, "dropout": 0.05},
        {"modules": "projector", "method": "milora", "rank": max(rank // 2, 1), "learning_rate": 1e-4},
    ],
    calibration={"texts": calibration_texts(model), "pictures": [collator([record]) for record in records[:32]]},
    progress=True,
)
model.print_trainable_parameters()


class OwnTrainer(RatesOfRules, Trainer):
    """The Trainer with the learning rates of the rules."""


trainer = OwnTrainer(
    model=model,
    args=TrainingArguments(
        "own-run",
        per_device_train_batch_size=16 if is_gpu else 3,
        learning_rate=2e-4,
        weight_decay=0.0,
        num_train_epochs=1,
        bf16=is_gpu,
        gradient_checkpointing=is_gpu,
        remove_unused_columns=False,
        report_to="none",
        logging_steps=1,
        save_strategy="no",
    ),
    train_dataset=records,
    data_collator=collator,
)
trainer.train()
save_adapter(model, "own-adapter")
print("saved: own-adapter, a stock PEFT adapter for the unchanged base")
