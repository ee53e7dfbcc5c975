"""Small networks of three families learn digits rotated by 90 degrees; forgetting is measured on upright digits.

No published weights exist for pictures of 8 x 8. Each process therefore first trains the base on the upright digits,
from one seed. The data are 1,797 scanned digits (UCI, CC BY 4.0) that scikit-learn contains.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from copy import deepcopy
from itertools import pairwise
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div

from milora_vl.common.errors import UserError
from studies.linear_gru import LinearGru
from studies.task import Measured, shuffled

NUM_TRAIN, NUM_VALIDATION = 1000, 300  # the other 497 digits are the test set
BASE_BATCH, BASE_RATE, BASE_SEED = 64, 3e-3, 0
Batch = tuple[Tensor, Tensor]


class _Digits(ABC):
    """The task of all three families; only the network differs. It takes pictures (batch, 1, 8, 8) in 0..1."""

    metric = "accuracy on turned digits"
    forgets = "KL from the base on upright digits, nats"
    base_steps = 800

    def __init__(self, *, base_steps: int | None = None) -> None:
        upright, labels = _pictures()
        turned = upright.rot90(dims=(2, 3))
        places = (
            slice(NUM_TRAIN),
            slice(NUM_TRAIN, NUM_TRAIN + NUM_VALIDATION),
            slice(NUM_TRAIN + NUM_VALIDATION, None),
        )
        self.train, self.validation, self.test = ((turned[place], labels[place]) for place in places)
        self.known = upright[places[2]], labels[places[2]]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(BASE_SEED)
            self.base = self.network()
            self._learn((upright[places[0]], labels[places[0]]), base_steps or self.base_steps)
        self.base = self.adaptable(self.base).eval()
        with torch.inference_mode():
            self.before = self.base(self.known[0]).clone()

    @abstractmethod
    def network(self) -> nn.Module:
        """Return a network with random weights."""

    def adaptable(self, network: nn.Module) -> nn.Module:
        """Return the trained network in a form that can hold adapters."""
        return network

    def model(self) -> nn.Module:
        """Return a copy of the network that is trained on upright digits."""
        return deepcopy(self.base)

    def batches(self, batch_size: int, seed: int) -> Iterator[Batch]:
        """Yield rotated pictures with their labels, with a new shuffle for every epoch."""
        for places in shuffled(NUM_TRAIN, batch_size, seed):
            yield self.train[0][places], self.train[1][places]

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the mean cross-entropy of a batch."""
        pictures, labels = batch
        return cross_entropy(model(pictures), labels)

    def calibration(self) -> NoReturn:
        """Raise UserError: the task and the measurement of forgetting use all pictures."""
        raise UserError(
            "the digits have no calibration inputs",
            code="study-no-calibration",
            where="protect",
            hint="remove  protect  from the arms of this study",
        )

    def measure(self, model: nn.Module) -> Measured:
        """Measure loss (300 digits) and accuracy (497) on held-out rotated digits, and forgetting on upright digits."""
        pictures, labels = self.test
        is_right = (model(pictures).argmax(1) == labels).float()
        after = model(self.known[0])
        lost = _accuracy(self.before, self.known[1]) - _accuracy(after, self.known[1])
        kl = kl_div(after.log_softmax(1), self.before.log_softmax(1), reduction="batchmean", log_target=True)
        items = {str(place): right for place, right in enumerate(is_right.tolist())}
        loss = float(self.loss(model, self.validation))
        return Measured(loss, float(is_right.mean()), items, float(kl), {"forgetting_accuracy": lost})

    def _learn(self, upright: Batch, steps: int) -> None:
        optimizer = torch.optim.AdamW(self.base.parameters(), lr=BASE_RATE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
        order = shuffled(NUM_TRAIN, BASE_BATCH, BASE_SEED)
        for _ in range(steps):
            places = next(order)
            self.loss(self.base, (upright[0][places], upright[1][places])).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()


class DigitsCnn(_Digits):
    """A convolutional network: four 3 x 3 convolutions and a linear layer, without norms."""

    base_steps = 300

    def network(self) -> nn.Module:
        """Return it with random weights: 95,242 parameters."""
        return _Cnn()


class DigitsRnn(_Digits):
    """A recurrent network: the rows of a picture, from top to bottom, are the steps of a GRU.

    The base is trained as nn.GRU and adapted as `LinearGru`, an equal network with layers that can hold an adapter.
    """

    def network(self) -> nn.Module:
        """Return it with random weights: 14,858 parameters."""
        return _Rows(nn.GRU(8, 64, batch_first=True))

    def adaptable(self, network: nn.Module) -> nn.Module:
        """Replace the nn.GRU by a LinearGru with the same weights."""
        assert isinstance(network, _Rows)
        assert isinstance(network.gru, nn.GRU)
        network.gru = LinearGru.of(network.gru)
        return network


class DigitsVit(_Digits):
    """A vision transformer from timm: sixteen patches of 2 x 2 pixels, three blocks of width 64."""

    def network(self) -> nn.Module:
        """Return it with random weights: 102,666 parameters."""
        from timm.models import VisionTransformer

        made: nn.Module = VisionTransformer(
            img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=64, depth=3, num_heads=4, mlp_ratio=2
        )
        return made


class _Cnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        widths = (1, 32, 64, 64, 64)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths))
        self.head = nn.Linear(4 * 64, 10)

    def forward(self, pictures: Tensor) -> Tensor:
        features = pictures
        for number, conv in enumerate(self.convs):
            features = conv(features).relu()
            if number in (1, 3):  # 8 x 8 -> 4 x 4 -> 2 x 2
                features = nn.functional.max_pool2d(features, 2)
        scores: Tensor = self.head(features.flatten(1))
        return scores


class _Rows(nn.Module):
    def __init__(self, gru: nn.GRU) -> None:
        super().__init__()
        self.gru: nn.GRU | LinearGru = gru
        self.head = nn.Linear(gru.hidden_size, 10)

    def forward(self, pictures: Tensor) -> Tensor:
        _, last = self.gru(pictures[:, 0])
        scores: Tensor = self.head(last[0])
        return scores


def _pictures() -> Batch:
    """Return all digits (1797, 1, 8, 8) in 0..1 and their labels, shuffled, because the file is sorted by writer."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    pictures = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    return pictures[order], torch.tensor(digits.target)[order]


def _accuracy(scores: Tensor, labels: Tensor) -> float:
    return float((scores.argmax(1) == labels).float().mean())
