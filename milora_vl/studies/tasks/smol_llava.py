"""smol-llava learns to answer questions about emoji; it may forget general text and other pictures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from functools import partial
from itertools import count
from operator import itemgetter
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft.helpers import disable_input_dtype_casting
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from milora_data.collate import ImageTextCollator
from milora_data.encode import IGNORE
from milora_data.lengths import encoded_lengths
from milora_data.records import Record, load_records
from milora_data.sampler import LengthGroupedSampler
from milora_vl.forgetting import answer_batches, drawn_questions, general_text
from milora_vl.forgetting.measure import Batch, Forgetting, logits_of, summary, token_sums
from milora_vl.forgetting.text import text_batches
from milora_vl.image_tokens import image_tokens
from milora_vl.models import load_model, split_processor
from milora_vl.studies.task import Measured
from milora_vl.studies.tasks import EMOJI
from milora_vl.training.losses import install, summed_loss

BATCH, TOKENS = 16, 1536


class EmojiQuestions:
    """The demo's task (`python -m milora_data emoji`): short answers about pictures that training has not shown.

    The score is cheaper than the demo's evaluator: every fourth test question is read with its answer once, and is
    right if each token of the answer, its end included, is the likeliest. That is what greedy decoding would write, but
    no other accepted answer counts.
    """

    metric = "whole answer right, share of the test questions"
    forgets = "KL from the base model on general text, nats a token"

    def __init__(self) -> None:
        base: Any
        base, processor = load_model("smol-llava", dtype=torch.bfloat16)
        base.set_attn_implementation("eager")  # for short sequences on CPUs
        self.base = base
        tokenizer, image_processor = split_processor(processor)
        tokens = image_tokens(base.config)
        self.collator = ImageTextCollator(
            tokenizer, image_processor, image_tokens=tokens, image_folder=EMOJI / "images",
            max_length=512,
        )  # fmt: skip
        length = partial(encoded_lengths, tokenizer=tokenizer, template="vicuna_v1", image_tokens=tokens)
        self.train = list(load_records(EMOJI / "train.json"))
        self.lengths = length(self.train)
        validation = list(load_records(EMOJI / "val.json"))[:64]
        test = list(load_records(EMOJI / "test.json"))[::4]
        self.validation, self.test = (
            [record for _, record in sorted(zip(length(records), records, strict=True), key=itemgetter(0))]
            for records in (validation, test)
        )  # those of similar length are read together
        texts = text_batches(general_text(), tokenizer, num_tokens=TOKENS, block_length=256, batch_size=4)
        with TemporaryDirectory() as folder:
            drawn = drawn_questions(Path(folder))[::4]
            pictures = list(answer_batches(base, processor, drawn, image_folder=Path(folder)))
        self.probes = {"text": self._with_targets(texts), "pictures": self._with_targets(pictures)}

    def model(self) -> nn.Module:
        """Return a copy of smol-llava in bfloat16, which computes its loss in chunks."""
        copied: nn.Module = deepcopy(self.base)
        install(copied)
        return copied

    def batches(self, batch_size: int, seed: int) -> Iterator[Any]:
        """Yield batches of records of similar length, in the order that the demo's training has for this seed."""
        sampler = LengthGroupedSampler(self.lengths, batch_size, seed)
        for epoch in count():
            order = sampler.order(epoch)
            for start in range(0, len(order) - batch_size + 1, batch_size):
                yield self.collator([self.train[place] for place in order[start : start + batch_size]])

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the mean loss of the answers' tokens, under bfloat16 autocast as the demo trains."""
        with torch.autocast("cpu", torch.bfloat16), disable_input_dtype_casting(model):
            loss, num_tokens = summed_loss(model, batch, chunked=True)
        return loss / num_tokens

    def measure(self, model: nn.Module) -> Measured:
        """Measure loss on held-out records, whole answers on test questions, KL on general text and drawn pictures."""
        losses, _ = self._answers(model, self.validation)
        test_losses, right = self._answers(model, self.test)
        items = {record.id: float(hit) for record, hit in zip(self.test, right, strict=True)}
        text, pictures = (self._kl(model, probe) for probe in self.probes.values())
        more = {
            "test_loss": fmean(test_losses), "forgetting_pictures": pictures.kl,
            "forgetting_stderr": text.kl_stderr or 0.0, "change_of_loss": text.loss_change,
        }  # fmt: skip
        return Measured(fmean(losses), fmean(items.values()), items, text.kl, more)

    def _answers(self, model: nn.Module, records: Sequence[Record]) -> tuple[list[float], list[bool]]:
        """Of each record the mean loss over the tokens of its answers, and whether each is the likeliest."""
        losses: list[float] = []
        right: list[bool] = []
        for start in range(0, len(records), BATCH):
            batch = self.collator(records[start : start + BATCH])
            labels = batch.pop("labels")[:, 1:]
            places = (labels != IGNORE).any(0).nonzero()[:, 0]  # logits are made where an answer stands
            with torch.autocast("cpu", torch.bfloat16), disable_input_dtype_casting(model):
                logits = model(**batch, logits_to_keep=places).logits
            labels = labels[:, places]
            learnt = labels != IGNORE
            own = torch.zeros(labels.shape)
            own[learnt] = cross_entropy(logits[learnt].float(), labels[learnt], reduction="none")
            losses += (own.sum(1) / learnt.sum(1)).tolist()
            right += ((logits.argmax(-1) == labels) | ~learnt).all(1).tolist()
        return losses, right

    def _with_targets(self, batches: Iterable[Batch]) -> list[tuple[Batch, Tensor]]:
        """Batches with the base model's predictions (n, vocabulary), which all trainings are compared with."""
        with torch.no_grad():
            return [(batch, logits_of(self.base, batch)) for batch in batches]

    def _kl(self, model: nn.Module, probe: Sequence[tuple[Batch, Tensor]]) -> Forgetting:
        rows = [token_sums(logits_of(model, batch), target, batch) for batch, target in probe]
        return summary(torch.cat(rows), [name for batch, _ in probe for name in batch.documents], "probe")
