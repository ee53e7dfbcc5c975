# %% [markdown]
# # A first adapter
#
# MiLoRA trains the *minor* singular components of each weight and keeps the principal ones. This file trains a small
# LLaVA on three drawn pictures, on a CPU, in seconds; editors open its cells as a notebook. The model has random
# weights, so its answers mean nothing.
#
# **On a GPU**, use `load_model("llava-1.5-7b", dtype=torch.bfloat16, device="cuda")`, rank 128, your own
# records, and move each batch with `.to("cuda")`.

# %%
import torch
from PIL import Image

from milora_vl import apply_milora, collator_for, load_adapter, load_model, merge, save_adapter

model, processor = load_model("tiny")
name = "model.language_model.layers.0.mlp.up_proj.weight"
before = model.state_dict()[name].clone()

# %% [markdown]
# A policy decides which modules train, and how. The language tower gets adapters of rank 4 on the last four singular
# components of each weight; the projector trains in full; the vision tower stays frozen.

# %%
policy = """
- {modules: language, method: milora, protect: 0, rank: 4}
- {modules: projector, method: full}
"""
model = apply_milora(model, policy)
model.print_trainable_parameters()

# %% [markdown]
# Records have the format of LLaVA's JSON files.

# %%
records = []
for colour in ("red", "green", "blue"):
    Image.new("RGB", (64, 64), colour).save(f"{colour}.png")
    turns = [{"from": "human", "value": "<image>\nWhat colour is it?"}, {"from": "gpt", "value": colour}]
    records.append({"id": colour, "image": f"{colour}.png", "conversations": turns})
collate = collator_for(model, processor, image_folder=".")
batch = collate(records)
{name: tuple(tensor.shape) for name, tensor in batch.items()}

# %% [markdown]
# The result is a PeftModel, which any trainer takes. This is a plain training loop.

# %%
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3, weight_decay=0)
for step in range(20):
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 5 == 0:
        print(f"step {step:2}  loss {loss.item():.3f}")

# %% [markdown]
# The adapter is a stock PEFT folder for the unchanged base model. `scale` makes its update smaller: often it then
# forgets less.

# %%
save_adapter(model, "first-adapter")
half, _ = load_model("tiny", adapter="first-adapter", scale=0.5)
with torch.no_grad():
    print({"trained": model(**batch).loss.item(), "half of the update": half(**batch).loss.item()})

# %%
merged = merge(load_adapter(load_model("tiny")[0], "first-adapter"))
print(type(merged).__name__, "changed by", (merged.state_dict()[name] - before).norm().item())
