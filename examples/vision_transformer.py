"""A vision transformer from timm on your own classes: attention by MiLoRA, the new head in full.

Nothing is protected here: `protect` needs pictures that the network must not forget, as `calibration`.

python examples/vision_transformer.py                                       # random weights, drawn pictures, a CPU
python examples/vision_transformer.py vit_base_patch16_224 FOLDER           # FOLDER/CLASS/*.jpg, weights from the hub
"""

import sys
from pathlib import Path

import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch.nn.functional import cross_entropy

from milora_vl import apply_milora, save_adapter

name, *folder = sys.argv[1:] or ["test_vit"]
if folder:
    files = sorted(Path(folder[0]).glob("*/*.*"))
    classes = sorted({file.parent.name for file in files})
    pictures = [Image.open(file).convert("RGB") for file in files]
    labels = torch.tensor([classes.index(file.parent.name) for file in files])
else:
    classes = ["red", "green", "blue"]
    pictures = [Image.new("RGB", (160, 160), colour) for colour in classes for _ in range(4)]
    labels = torch.arange(3).repeat_interleave(4)

torch.manual_seed(0)
network = timm.create_model(name, pretrained=bool(folder), num_classes=len(classes))
prepare = create_transform(**resolve_model_data_config(network))
pixels = torch.stack([prepare(picture) for picture in pictures])

model = apply_milora(
    network,
    [
        {"modules": "blocks.*.attn.*", "method": "milora", "protect": 0, "rank": 8},
        {"modules": "head", "method": "full"},
    ],
)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0)
for _step in range(20):
    rows = torch.randint(len(labels), (8,))
    loss = cross_entropy(model(pixels[rows]), labels[rows])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print(f"loss {loss.item():.3f}")
save_adapter(model, "vit-adapter")
