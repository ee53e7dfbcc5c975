"""The base class of tasks for language models: learn short answers; forgetting is measured on general text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy, deepcopy
from functools import cached_property
from itertools import count
from statistics import fmean
from typing import Any

import torch
from peft.helpers import disable_input_dtype_casting
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from milora_data.batches.image_text_collator import ImageTextCollator
from milora_data.batches.lengths import LengthGroupedSampler, lengths_of
from milora_data.encode.labels import IGNORE
from milora_data.records.record import Record
from milora_vl.core.calibration.bases import Calibration
from milora_vl.core.calibration.texts import COUNT, LENGTH, SEED, sampled_rows
from milora_vl.forgetting.measure import (
    Forgetting,
    ProbeBatch,
    ends_of,
    general_text,
    logits_of,
    padded_batches,
    summary,
    text_batches,
    token_sums,
)
from milora_vl.models.losses import add_chunked_loss, summed_loss
from milora_vl.train.start import shares_probe_text
from studies.task import Measured

BATCH, TOKENS = 16, 1536


class AnswerTask:
    """Questions with short answers.

    One forward pass scores each test question with its answer: it is right if every token of the answer, including the
    end token, is the most likely one, so greedy decoding would produce it. No other accepted answer counts. `probes`
    are further batches, besides general text, on which forgetting is measured.
    """

    metric = "share of test questions with the whole answer right"
    forgets = "KL from the base on general text, nats per token"

    def __init__(
        self,
        base: Any,
        collator: ImageTextCollator,
        train: Sequence[Record],
        validation: Sequence[Record],
        test: Sequence[Record],
        probes: Mapping[str, Iterable[ProbeBatch]],
    ) -> None:
        self.base, self.collator, self.train = base, collator, train
        self.lengths = lengths_of(train, collator)
        self.calibrated: Calibration | None = None  # instead of the base's own texts
        self.validation, self.test = self._by_length(validation), self._by_length(test)
        text = text_batches(general_text(), collator.tokenizer, num_tokens=TOKENS, block_length=256, batch_size=4)
        with torch.no_grad():  # predictions of the base model (n, vocabulary), the reference for all trainings
            self.probes = {
                name: [(batch, self._predicted(base, batch)) for batch in batches]
                for name, batches in {"text": text, **probes}.items()
            }

    def model(self) -> nn.Module:
        """Return a copy of the base model, which computes its loss in chunks."""
        copied: nn.Module = deepcopy(self.base)
        add_chunked_loss(copied)
        return copied

    def changed(self, train: Sequence[Record], calibration: Calibration) -> AnswerTask:
        """Return the same task with other training records and calibration batches."""
        other = copy(self)
        other.train, other.lengths, other.calibrated = train, lengths_of(train, self.collator), calibration
        return other

    def inputs(self, records: Sequence[Record]) -> list[Mapping[str, Tensor]]:
        """Return records as calibration batches."""
        batches = (self.collator(records[start : start + BATCH]) for start in range(0, len(records), BATCH))
        return [{name: value for name, value in batch.items() if name != "labels"} for batch in batches]

    def batches(self, batch_size: int, seed: int) -> Iterator[Any]:
        """Yield batches of records of similar length, in an order that depends on the seed."""
        sampler = LengthGroupedSampler(self.lengths, batch_size, seed)
        for epoch in count():
            order = sampler.order(epoch)
            for start in range(0, len(order) - batch_size + 1, batch_size):
                yield self.collator([self.train[index] for index in order[start : start + batch_size]])

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the mean loss of the answer tokens, in the data type that is fastest here, as in the demo."""
        with _autocast(model):
            loss, num_tokens = summed_loss(model, batch, chunked=True)
        return loss / num_tokens

    def logits(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the logits (rows, length, vocabulary) of arguments of the model's forward."""
        with _autocast(model):
            logits: Tensor = model(**inputs).logits
        return logits

    @staticmethod
    def at_answers(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return logits and labels at the positions where any row has an answer token."""
        labels = batch["labels"][:, 1:]
        positions = (labels != IGNORE).any(0).nonzero()[:, 0]
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        with _autocast(model):
            logits: Tensor = model(**inputs, logits_to_keep=positions).logits
        return logits, labels[:, positions]

    @cached_property
    def _written(self) -> list[list[int]]:
        """Texts that the base model writes (ids), without those that it recites from the probe."""
        tokenizer = self.collator.tokenizer
        rows = sampled_rows(
            self.base,
            *ends_of(tokenizer),
            count=COUNT,
            length=LENGTH,
            batch_size=COUNT,
            seed=SEED,
        )
        return [row for row in rows if not shares_probe_text(tokenizer.decode(row, skip_special_tokens=True))]

    def calibration(self) -> Calibration:
        """Return texts that the base model writes itself, at temperature 1."""
        if self.calibrated is not None:
            return self.calibrated
        rows = [(str(number), row) for number, row in enumerate(self._written)]
        return [batch.inputs for batch in padded_batches(rows, 8, self.collator.tokenizer)]

    def losses(self, model: nn.Module) -> dict[str, float]:
        """Return the mean loss on validation and on test records."""
        parts = {"validation_loss": self.validation, "test_loss": self.test}
        return {name: fmean(self._answers(model, records)[0]) for name, records in parts.items()}

    def measure(self, model: nn.Module) -> Measured:
        """Measure the loss on held-out records, exact answers on test questions, and the KL on text and the probes."""
        losses, _ = self._answers(model, self.validation)
        test_losses, items = self.tested(model)
        text, *others = (self._kl(model, probe) for probe in self.probes.values())
        more = {"test_loss": fmean(test_losses)}
        more |= {f"forgetting_{name}": probe.kl for name, probe in zip(list(self.probes)[1:], others, strict=True)}
        more |= {"forgetting_stderr": text.kl_stderr or 0.0, "change_of_loss": text.loss_change}
        return Measured(fmean(losses), fmean(items.values()), items, text.kl, more)

    def tested(self, model: nn.Module) -> tuple[list[float], dict[str, float]]:
        """Return the loss of each test question, and by record id whether the whole answer is right."""
        losses, right = self._answers(model, self.test)
        return losses, {record.id: float(hit) for record, hit in zip(self.test, right, strict=True)}

    def _answers(self, model: nn.Module, records: Sequence[Record]) -> tuple[list[float], list[bool]]:
        """Return per record the mean loss over its answer tokens, and whether every token is the most likely one."""
        losses: list[float] = []
        right: list[bool] = []
        for start in range(0, len(records), BATCH):
            logits, labels = self.at_answers(model, self.collator(records[start : start + BATCH]))
            supervised = labels != IGNORE
            token_losses = torch.zeros(labels.shape)
            token_losses[supervised] = cross_entropy(logits[supervised].float(), labels[supervised], reduction="none")
            losses += (token_losses.sum(1) / supervised.sum(1)).tolist()
            right += ((logits.argmax(-1) == labels) | ~supervised).all(1).tolist()
        return losses, right

    def _kl(self, model: nn.Module, probe: Sequence[tuple[ProbeBatch, Tensor]]) -> Forgetting:
        rows = [token_sums(self._predicted(model, batch), target, batch) for batch, target in probe]
        return summary(torch.cat(rows), [name for batch, _ in probe for name in batch.documents], "probe")

    def _predicted(self, model: nn.Module, batch: ProbeBatch) -> Tensor:
        with _autocast(model):
            return logits_of(model, batch)

    def _by_length(self, records: Sequence[Record]) -> list[Record]:
        """Return the records sorted by length, for less padding."""
        lengths = lengths_of(records, self.collator)
        return [records[index] for index in sorted(range(len(records)), key=lengths.__getitem__)]


@contextmanager
def _autocast(model: nn.Module) -> Iterator[None]:
    """Use bfloat16 autocast with float32 trainable weights, like the demo's training; none on a base in float32."""
    if next(model.parameters()).dtype != torch.bfloat16:
        yield
        return
    with torch.autocast("cpu", torch.bfloat16), disable_input_dtype_casting(model):
        yield
