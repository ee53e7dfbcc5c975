"""Small models and steps that the adapter's tests share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from peft import PeftModel

LLAVA_POLICY = [
    {
        "modules": "language",
        "method": "milora",
        "protect": 0,
        "rank": 3,
        "alpha": 6,
        "dropout": 0.05,
        "learning_rate": 2e-4,
    },
    {"modules": "language.layers[1].mlp", "rank": 5},
    {"modules": "language.layers[0].q_proj", "method": "lora", "rank": 4, "alpha": 8},
    {"modules": "projector", "method": "full", "learning_rate": 2e-5},
]


def one_rule(**fields: object) -> list[dict[str, object]]:
    """A policy of one milora rule on the language tower, with `fields` over its defaults."""
    share = {} if fields.get("method") == "dora" else {"protect": 0}
    return [{"modules": "language", "method": "milora", "rank": 2, **share, **fields}]


def tiny_gpt2() -> nn.Module:
    """A GPT-2, whose layers are Conv1D, with untied embeddings."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=40, n_positions=32, n_embd=16, n_layer=2, n_head=2, tie_word_embeddings=False)
    return GPT2LMHeadModel(config).eval()


class Pictures(nn.Module):
    """A convolution, an embedding and a head: every kind of layer an adapter can sit on."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patch = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.words = nn.Embedding(11, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, pixels: Tensor, words: Tensor) -> Tensor:
        return self.head(self.patch(pixels).mean((2, 3)) + self.words(words).mean(1))


def picture_batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, 8, 8, generator=generator), torch.randint(0, 11, (2, 4), generator=generator)


def token_batch(vocabulary: int = 40, rows: int = 2, length: int = 9) -> Tensor:
    return torch.randint(5, vocabulary, (rows, length), generator=torch.Generator().manual_seed(1))


class Tokens(torch.utils.data.Dataset):
    """Sixteen rows of a language model, for HF's Trainer."""

    def __init__(self) -> None:
        self.rows = token_batch(200, 16, 12)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def llava_batch(model: nn.Module) -> dict[str, Tensor]:
    """One row with a picture and text, as the processor would make it."""
    config = model.config
    ids = token_batch(200, 1, 30)
    ids[0, 2:18] = config.image_token_id
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    dtype = next(model.parameters()).dtype
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels.to(dtype)}


def move(model: nn.Module, size: float = 0.05) -> None:
    """Change everything that trains, as training would."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += size * torch.randn(parameter.shape, generator=generator).to(parameter)


def pissa_trained(base: nn.Module, root: Path) -> PeftModel:
    """Train as PiSSA's scripts do: on a residual base, which is put into `root`/residual with its initial factors."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForImageTextToText

    config = LoraConfig(r=4, lora_alpha=8, target_modules=r".*language_model.*(q|up)_proj", init_lora_weights="pissa")
    model = get_peft_model(base, config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(root / "residual" / "pissa_init")
    model.unload().save_pretrained(root / "residual")
    residual = AutoModelForImageTextToText.from_pretrained(root / "residual")
    tuned = PeftModel.from_pretrained(residual, root / "residual", subfolder="pissa_init", is_trainable=True)
    move(tuned, 0.1)
    return tuned


def train_steps(model: nn.Module, inputs: dict[str, Tensor], steps: int = 3) -> list[float]:
    """Plain AdamW with weight decay on a language-model loss."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    losses = []
    for _ in range(steps):
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def anchors(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all anchors, by buffer name; there are some, or a comparison of them would say nothing."""
    found = {name: b.clone() for name, b in model.named_buffers() if name.endswith("anchor")}
    assert found
    return found
