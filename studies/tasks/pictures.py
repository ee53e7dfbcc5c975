"""EfficientNet-Lite0 learns by how many quarters an emoji is rotated; forgetting is measured on photographs.

ImageNet's features contain little information about rotation, so a new head alone is not enough. Some emoji look the
same after a rotation.

The pictures are from OpenMoji (CC BY-SA 4.0), split by base emoji as in `python -m milora_data emoji`. The photographs
are pieces of two photographs in scikit-learn (CC BY 2.0, by danielbuechele and vultilion). Protected inputs are
calibrated with pieces of a third photograph, in matplotlib (US Navy, public domain). The weights are the published
ImageNet weights in float32 (Apache-2.0).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate, kl_div

from milora_data.assets import fetch
from milora_data.emoji.catalogue import catalogue, on_background, render
from milora_vl.models.smol_llava import TOWER_WEIGHTS
from studies.task import Measured, shuffled

TURNS = 4
SIZE = 96  # pixels a side; the weights are from 224, the network takes any
NUM_PIECES, SMALLEST, LARGEST = 128, 128, 384  # of the photographs, in pixels of theirs
Batch = tuple[Tensor, Tensor]


class TurnedEmoji:
    """A new head on the pooled features predicts the rotation; the original head measures forgetting.

    Each emoji is either held out or trained on, in all four rotations.
    """

    metric = "accuracy on new emoji"
    forgets = "KL from the base's ImageNet predictions on photographs, nats"

    def __init__(self) -> None:
        from sklearn.datasets import load_sample_images

        emojis = catalogue()
        self.train, self.validation, self.test = (
            torch.stack([_pixels(on_background(render(e.code, SIZE))) for e in emojis if e.split == split])
            for split in ("train", "val", "test")
        )
        codes = [e.code for e in emojis if e.split == "test"]
        self.names = [f"{code}-{turn}" for turn in range(TURNS) for code in codes]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # for the weights of the new head
            base: Any = TwoHeads(imagenet_lite0(), TURNS).eval()
        self.base: TwoHeads = base.to(memory_format=torch.channels_last)  # reduces the time of a step by a third
        self.photographs = _pieces([_pixels(image) for image in load_sample_images().images], seed=0)
        with torch.no_grad():
            self.before = self.scores(self.base, self.photographs)[0].log_softmax(1)

    def model(self) -> nn.Module:
        """Return a copy of the network with a new head; its random weights are the same each time."""
        return deepcopy(self.base)

    def batches(self, batch_size: int, seed: int) -> Iterator[Batch]:
        """Yield rotated pictures with their rotations, with a new shuffle for every epoch."""
        for places in shuffled(TURNS * len(self.train), batch_size, seed):
            turns = [place % TURNS for place in places]
            pictures = [self.train[place // TURNS].rot90(place % TURNS, dims=(1, 2)) for place in places]
            yield torch.stack(pictures), torch.tensor(turns)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the mean cross-entropy of a batch."""
        pictures, turns = batch
        return cross_entropy(model(pictures)[1], turns)

    def calibration(self) -> list[Mapping[str, Tensor]]:
        """Return pieces of a photograph that no measurement uses."""
        from matplotlib.cbook import get_sample_data
        from PIL import Image

        portrait = _pixels(Image.open(get_sample_data("grace_hopper.jpg", asfileobj=False)).convert("RGB"))
        return [{"pictures": part} for part in _pieces([portrait], seed=1).split(16)]

    def measure(self, model: nn.Module) -> Measured:
        """Measure loss and accuracy on held-out emoji, and the KL and changed predictions on pieces of photographs."""
        scores, turns = self._turned(model, self.test)
        is_right = (scores.argmax(1) == turns).float().tolist()
        after = self.scores(model, self.photographs)[0].log_softmax(1)
        kl = kl_div(after, self.before, reduction="batchmean", log_target=True)
        is_other = (after.argmax(1) != self.before.argmax(1)).float()
        return Measured(
            float(cross_entropy(*self._turned(model, self.validation))),
            sum(is_right) / len(is_right),
            dict(zip(self.names, is_right, strict=True)),
            float(kl),
            {"forgetting_first_class": float(is_other.mean())},
        )

    def _turned(self, model: nn.Module, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scores of the new head for the pictures in every rotation, and the rotations."""
        scores = [self.scores(model, pictures.rot90(turn, dims=(2, 3)))[1] for turn in range(TURNS)]
        return torch.cat(scores), torch.arange(TURNS).repeat_interleave(len(pictures))

    def scores(self, model: nn.Module, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scores of both heads, computed in batches."""
        outputs = [model(part) for part in pictures.split(64)]
        return torch.cat([known for known, _ in outputs]), torch.cat([new for _, new in outputs])


class TwoHeads(nn.Module):
    """A timm network with its original classifier and a second, new one.

    Batch norms keep their statistics, also in training. The statistics are not weights, so an adapter cannot keep them
    unchanged, and updates from small batches of emoji would cause forgetting independently of the weights.
    """

    def __init__(self, network: Any, num_turns: int) -> None:
        super().__init__()
        self.network = network
        self.turns = nn.Linear(network.num_features, num_turns)

    def train(self, mode: bool = True) -> TwoHeads:
        """Switch all modules to training mode except the batch norms."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Map pictures (batch, 3, side, side) in -1..1 to the scores of ImageNet's classes and of the rotations."""
        pooled = self.network.forward_head(self.network.forward_features(pictures), pre_logits=True)
        return self.network.get_classifier()(pooled), self.turns(pooled)


def imagenet_lite0() -> nn.Module:
    """Return EfficientNet-Lite0 with its classifier: the tensors of the file are in the order of timm's state dict."""
    import timm

    network: nn.Module = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    weights = torch.load(fetch("efficientnet_lite0") / TOWER_WEIGHTS, map_location="cpu", weights_only=True)
    network.load_state_dict(dict(zip(network.state_dict(), weights.values(), strict=True)))
    return network


def _pixels(picture: Any) -> Tensor:
    """Return a picture (or an array of its pixels) as a tensor (3, side, side) in -1..1."""
    import numpy as np

    return torch.tensor(np.asarray(picture), dtype=torch.float32).permute(2, 0, 1) / 127.5 - 1


def _pieces(photographs: Sequence[Tensor], seed: int) -> Tensor:
    """Return squares of photographs (3, height, width) with random position and size, resized for the network."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number in range(NUM_PIECES):
        photograph = photographs[number % len(photographs)]
        side = int(torch.randint(SMALLEST, LARGEST, (), generator=generator))
        top, left = (int(torch.randint(edge - side, (), generator=generator)) for edge in photograph.shape[1:])
        piece = photograph[None, :, top : top + side, left : left + side]
        found.append(interpolate(piece, size=(SIZE, SIZE), mode="bilinear", antialias=True))
    return torch.cat(found)
