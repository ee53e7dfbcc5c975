"""smol-llava learns to answer questions about emoji; it may forget general text and other pictures."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft.helpers import disable_input_dtype_casting
from torch import Tensor, nn

from milora_data.collate import ImageTextCollator
from milora_data.errors import UserError
from milora_data.records import Record, load_records
from milora_vl.forgetting import answer_batches, drawn_questions, general_text
from milora_vl.forgetting.measure import compare_on
from milora_vl.forgetting.text import text_batches
from milora_vl.image_tokens import image_tokens
from milora_vl.models import load_model, split_processor
from milora_vl.studies.task import Measured

DATA = Path("data/emoji")
VALIDATION, QUESTIONS, TOKENS = 64, 160, 2048


class EmojiQuestions:
    """The demo's task (`python -m milora_data emoji`): short answers about pictures that training has not shown."""

    metric = "emoji, mean accuracy over question types"
    forgets = "KL from the base model on general text, nats a token"

    def __init__(self) -> None:
        if not (DATA / "train.json").is_file():
            raise UserError(f"no {DATA / 'train.json'}\nmake it:  python -m milora_data emoji --output_dir {DATA}")
        self.base, self.processor = load_model("smol-llava", dtype=torch.bfloat16)
        self.base.set_attn_implementation("eager")  # for short sequences on CPUs
        tokenizer, image_processor = split_processor(self.processor)
        self.collator = ImageTextCollator(
            tokenizer, image_processor, image_tokens=image_tokens(self.base.config), image_folder=DATA / "images",
            max_length=512,
        )  # fmt: skip
        self.train = list(load_records(DATA / "train.json"))
        held_out = list(islice(load_records(DATA / "val.json"), VALIDATION))
        self.held_out = [self.collator(held_out[start : start + 16]) for start in range(0, len(held_out), 16)]
        texts = general_text()
        self.texts = list(text_batches(texts, tokenizer, num_tokens=TOKENS, block_length=256, batch_size=4))
        with TemporaryDirectory() as folder:
            drawn = drawn_questions(Path(folder))[::2]
            self.pictures = list(answer_batches(self.base, self.processor, drawn, image_folder=Path(folder)))

    def model(self) -> nn.Module:
        """Return a copy of smol-llava in bfloat16."""
        return deepcopy(self.base)

    def batches(self, batch_size: int, seed: int) -> Iterator[Any]:
        """Yield batches of records as a new shuffle of the training set orders them."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(self.train), generator=generator).tolist()
            for start in range(0, len(order) - batch_size + 1, batch_size):
                chosen: list[Record] = [self.train[place] for place in order[start : start + batch_size]]
                yield self.collator(chosen)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the mean loss of the answers' tokens, under bfloat16 autocast as the demo trains."""
        with torch.autocast("cpu", torch.bfloat16), disable_input_dtype_casting(model):
            loss: Tensor = model(**batch).loss
        return loss

    def measure(self, model: nn.Module) -> Measured:
        """Loss on held-out records; answers to the test questions; KL on general text and on drawn pictures."""
        losses = [float(self.loss(model, batch)) for batch in self.held_out]
        score, items = self._answers(model)
        text = compare_on(self.texts, model, base=self.base, what="text")
        seen = compare_on(self.pictures, model, base=self.base, what="pictures")
        more = {"forgetting_stderr": text.kl_stderr or 0.0, "forgetting_pictures": seen.kl}
        return Measured(sum(losses) / len(losses), score, items, text.kl, more)

    def _answers(self, model: nn.Module) -> tuple[float, dict[str, float]]:
        from milora_eval.evaluate import results_folder, run
        from milora_eval.results import require_lines

        with TemporaryDirectory() as folder:
            found = run(
                model, self.processor, ["emoji"], data_dir=DATA, output_dir=folder, limit=QUESTIONS, batch_size=32
            )
            assert found is not None
            lines = require_lines(results_folder(folder, "emoji", "final"))
        items = {line["id"]: float(line["correct"]) for line in lines if line["correct"] is not None}
        return float(found["benchmarks"][0]["metrics"][0]["value"]), items
