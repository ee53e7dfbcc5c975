"""SFT of a text model with TRL's SFTTrainer (needs trl) and protected MiLoRA:

python examples/sft_trl.py                                         # here: a tiny model, drawn records, a CPU
python examples/sft_trl.py Qwen/Qwen2.5-7B-Instruct train.jsonl    # on a GPU; lines with `messages`
"""

import sys

import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig, get_peft_model
from trl import SFTConfig, SFTTrainer

from milora_vl import calibration_texts, load_model, reinit_peft

name, *data = sys.argv[1:] or ["tiny-text"]
is_gpu = torch.cuda.is_available()
model, tokenizer = load_model(name, dtype=torch.bfloat16 if is_gpu else None, device="cuda" if is_gpu else "cpu")
if data:
    rows = load_dataset("json", data_files=data[0], split="train")
else:
    rows = Dataset.from_list([{"prompt": "What is it?", "completion": " A cat."}] * 32)

texts = calibration_texts(model)  # what the model writes: the inputs to protect
rank = 64 if is_gpu else 2  # a layer of the tiny model has few inputs that its texts leave free
model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM"))
model = reinit_peft(model, calibration=texts, progress=True)

arguments = SFTConfig(
    "sft-run",
    learning_rate=2e-4 if is_gpu else 1e-2,
    num_train_epochs=1,
    per_device_train_batch_size=8,
    gradient_checkpointing=is_gpu,
    bf16=is_gpu,
    logging_steps=1,
    save_strategy="no",
    report_to="none",
)
trainer = SFTTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer)
trainer.train()
trainer.save_model("sft-adapter")
print("saved: sft-adapter, a stock PEFT adapter for the unchanged base")
