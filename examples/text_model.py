"""A text model on instructions: only the minor components of its weights train.

python examples/text_model.py                  # random weights, on a CPU
python examples/text_model.py qwen2.5-7b       # or smollm2, llama-3-8b, a folder, any hub id

The command `python -m milora_vl.train --method milora --model NAME --data_path instructions.json` does the same.
"""

import sys

import torch
from transformers import Trainer, TrainingArguments

from milora_data import ImageTextCollator, Record
from milora_data.records.record import Turn
from milora_vl import apply_milora, load_model, save_adapter

name = sys.argv[1] if len(sys.argv) > 1 else "tiny-text"
is_gpu = torch.cuda.is_available()
facts = {"What is the capital of Peru?": "Lima.", "What is 2 + 2?": "4.", "Which planet is red?": "Mars."}
records = [
    Record(id=str(number), images=(), turns=(Turn("user", question), Turn("assistant", answer)))
    for number, (question, answer) in enumerate(facts.items())
]

model, tokenizer = load_model(name, dtype=torch.bfloat16 if is_gpu else None)
template = "chat_template" if tokenizer.chat_template else "vicuna_v1"
model = apply_milora(model, [{"modules": "language", "method": "milora", "protect": 0, "rank": 64 if is_gpu else 4}])

trainer = Trainer(
    model=model,
    args=TrainingArguments(
        "text-run",
        max_steps=10,
        per_device_train_batch_size=3,
        learning_rate=1e-3,
        weight_decay=0.0,
        remove_unused_columns=False,
        report_to="none",
        logging_steps=5,
        save_strategy="no",
    ),
    train_dataset=records,
    data_collator=ImageTextCollator(tokenizer, template=template, max_length=1024),
)
trainer.train()
save_adapter(model, "text-adapter")
