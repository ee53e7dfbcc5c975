"""Preferences about pictures (DPO, arXiv:2305.18290): the loss in ten lines, the base model as the reference.

python examples/dpo_with_pictures.py                  # random weights, drawn pictures, a CPU
python examples/dpo_with_pictures.py llava-1.5-7b     # on a GPU, with your own `pairs`

The reference costs no memory: it is the same model with its adapter switched off. The projector stays frozen.
"""

import sys
from pathlib import Path

import torch
from PIL import Image
from torch.nn.functional import logsigmoid

from milora_vl import apply_milora, collator_for, load_model, save_adapter

BETA = 0.1
name = sys.argv[1] if len(sys.argv) > 1 else "tiny"
device = "cuda" if torch.cuda.is_available() else "cpu"
folder = Path("dpo-pictures")
folder.mkdir(exist_ok=True)
pairs = []  # (picture, question, chosen, rejected)
for colour, other in (("red", "green"), ("green", "blue"), ("blue", "red")):
    Image.new("RGB", (64, 64), colour).save(folder / f"{colour}.png")
    pairs.append((f"{colour}.png", "What colour is it?", f"It is {colour}.", f"It is {other}."))

model, processor = load_model(name, device=device, dtype=torch.bfloat16 if device == "cuda" else None)
model = apply_milora(
    model, [{"modules": "language", "method": "milora", "protect": 0, "rank": 64 if device == "cuda" else 4}]
)
collate = collator_for(model, processor, image_folder=folder)


def batch_of(answers: list[str]) -> dict[str, torch.Tensor]:
    """Return the pairs with one of their answers, chosen or rejected."""
    records = []
    for (image, question, *_), answer in zip(pairs, answers, strict=True):
        turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
        records.append({"id": image, "image": image, "conversations": turns})
    return {key: value.to(device) for key, value in collate(records).items()}


def log_probability(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the log probability of each answer, (pairs)."""
    labels = batch["labels"][:, 1:]
    logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits[:, :-1]
    chosen = logits.float().log_softmax(-1).gather(2, labels.clamp(min=0)[..., None])[..., 0]
    return (chosen * (labels != -100)).sum(1)


good, bad = (batch_of([pair[place] for pair in pairs]) for place in (2, 3))
with torch.no_grad(), model.disable_adapter():
    reference = log_probability(good) - log_probability(bad)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0)
for step in range(10):
    margin = log_probability(good) - log_probability(bad) - reference
    loss = -logsigmoid(BETA * margin).mean()  # ln 2 at the first step
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}  loss {loss.item():.4f}")
save_adapter(model, "dpo-adapter")
