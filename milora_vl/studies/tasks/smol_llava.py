"""smol-llava learns to answer questions about emoji; it may forget general text and other pictures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
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
from milora_data.records import Record, load_records
from milora_vl.forgetting import answer_batches, drawn_questions, general_text
from milora_vl.forgetting.measure import Batch, Forgetting, logits_of, summary, token_sums
from milora_vl.forgetting.text import text_batches
from milora_vl.image_tokens import image_tokens
from milora_vl.models import load_model, split_processor
from milora_vl.studies.task import Measured
from milora_vl.studies.tasks import EMOJI

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
        self.collator = ImageTextCollator(
            tokenizer, image_processor, image_tokens=image_tokens(base.config), image_folder=EMOJI / "images",
            max_length=512,
        )  # fmt: skip
        self.train = list(load_records(EMOJI / "train.json"))
        self.validation = list(load_records(EMOJI / "val.json"))[:64]
        self.test = list(load_records(EMOJI / "test.json"))[::4]
        texts = text_batches(general_text(), tokenizer, num_tokens=TOKENS, block_length=256, batch_size=4)
        with TemporaryDirectory() as folder:
            drawn = drawn_questions(Path(folder))[::4]
            pictures = list(answer_batches(base, processor, drawn, image_folder=Path(folder)))
        self.probes = {"text": self._with_targets(texts), "pictures": self._with_targets(pictures)}

    def model(self) -> nn.Module:
        """Return a copy of smol-llava in bfloat16."""
        copied: nn.Module = deepcopy(self.base)
        return copied

    def batches(self, batch_size: int, seed: int) -> Iterator[Any]:
        """Yield batches of records as a new shuffle of the training set orders them."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(self.train), generator=generator).tolist()
            for start in range(0, len(order) - batch_size + 1, batch_size):
                yield self.collator([self.train[place] for place in order[start : start + batch_size]])

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the mean loss of the answers' tokens, under bfloat16 autocast as the demo trains."""
        with torch.autocast("cpu", torch.bfloat16), disable_input_dtype_casting(model):
            loss: Tensor = model(**batch).loss
        return loss

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
            with torch.autocast("cpu", torch.bfloat16), disable_input_dtype_casting(model):
                logits = model(**batch).logits[:, :-1].float()
            own = cross_entropy(logits.transpose(1, 2), labels, reduction="none")
            learnt = labels != IGNORE
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
