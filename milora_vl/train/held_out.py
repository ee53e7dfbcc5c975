"""The losses of the held-out records at the end of a run, highest first: wrong labels stand at the top."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, cast

from milora_data.records.record import Record
from milora_data.stream import within
from milora_vl.common.errors import DataError
from milora_vl.core.weights.distributed import gather
from milora_vl.models.generate import Prompt, generate
from milora_vl.report.read_run import HELD_OUT
from milora_vl.train import finish
from milora_vl.train.screen import Screen
from milora_vl.train.setup import Run
from milora_vl.train.trainer import MiloraTrainer

NUM_ANSWERED, MAX_NEW_TOKENS = 20, 32  # records that the model answers for the report


def write_losses(
    run: Run, trainer: MiloraTrainer, records: Sequence[Record] | None, processor: Any, screen: Screen
) -> None:
    """Write the losses of the last evaluation, beside those with the adapter off. All processes take part."""
    is_over = trainer.is_deepspeed_enabled and trainer.deepspeed is None  # resumed without a step left: no engine
    if records is None or is_over or trainer.args.eval_strategy == "no":
        return
    with screen.step("losses of the held-out records"), finish.run_failures(trainer.args):
        is_last = trainer.evaluated_step == trainer.state.global_step and not trainer.args.load_best_model_at_end
        after, before = _losses(trainer, measure=not is_last), dict[str, float]()
        if trainer.checkpoint_kind == "adapter":
            with cast("Any", trainer.trained()).disable_adapter():
                before = _losses(trainer)
        order = sorted(after, key=lambda place: -after[place])
        by_place = {record.place: record for record in records if record.place in set(order[:NUM_ANSWERED])}
        shown = _shown(run, trainer, [by_place[place] for place in order[:NUM_ANSWERED]], processor)
    if run.args.should_save:
        lines = [
            {"source": place, "loss": after[place], "base_loss": before.get(place), **shown.get(place, {})}
            for place in order
        ]
        run.folder.write_text(HELD_OUT, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def _losses(trainer: MiloraTrainer, *, measure: bool = True) -> dict[str, float]:
    """Return the losses of all processes, by the place of the record."""
    if measure:
        trainer.evaluation_loop(trainer.get_eval_dataloader(), "held-out records", prediction_loss_only=True)
    return {place: loss for part in gather(trainer.record_losses) for place, loss in part.items()}


def _shown(run: Run, trainer: MiloraTrainer, records: Sequence[Record], processor: Any) -> dict[str, Mapping[str, Any]]:
    """Return what the report shows of each record, by place: its last question and answer, and the model's own."""
    recipe, shown = run.recipe, dict[str, Mapping[str, Any]]()
    for record in records:
        placed = within(record, recipe.data.image_folder)
        last = max(number for number, turn in enumerate(record.turns) if turn.role == "assistant")
        prompt = Prompt(record.turns[:last], placed.images, videos=placed.videos)
        with suppress(DataError), trainer.compute_loss_context_manager():  # a picture that --bad_images replaced
            (reply,) = generate(
                trainer.trained(), processor, [prompt], template=recipe.template, max_new_tokens=MAX_NEW_TOKENS,
                image_aspect_ratio=recipe.data.image_aspect_ratio,
            )  # fmt: skip
            question, answer = (turn.text for turn in record.turns[last - 1 : last + 1])
            line = {"id": record.id, "images": placed.images, "question": question, "answer": answer, "reply": reply}
            shown[record.place] = line
    return shown
