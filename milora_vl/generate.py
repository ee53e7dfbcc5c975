"""Answers in batches: greedy, with stock `model.generate`, each picture computed once for all questions about it.

Rows are padded on the left. What all rows of a batch begin with (system text and picture, as a rule) is run once per
picture; its key-value cache is repeated for the questions, whose padding then stands between the two.
"""

from __future__ import annotations

import inspect
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from milora_data.encode import encode_prompt
from milora_data.errors import UserError
from milora_data.images import expand_to_square, load_image, picture_size, to_rgb, unmistakable
from milora_data.records import Record, Turn
from milora_data.templates import IMAGE, get_template, render
from milora_data.tokens import bos_ids, eos_text, fast_backend
from milora_vl.models.image_tokens import image_token_id, image_tokens, tiling_of
from milora_vl.models.loading import split_processor

if TYPE_CHECKING:
    from PIL import Image
    from transformers.generation.streamers import BaseStreamer

OnBatch = Callable[[list[int], list[str]], None]


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation up to a question, and its pictures: paths or PIL images, one for each `<image>` in the turns.

    form: training, as training encodes the turns (pictures to the front, text stripped); exact, as they stand, which is
    what LLaVA's evaluation does; raw, the last turn's text without any template.
    """

    turns: tuple[Turn, ...]
    images: tuple[str | Path | Image.Image, ...] = ()
    form: Literal["training", "exact", "raw"] = "training"


@dataclass(frozen=True, slots=True)
class _Row:
    """An encoded prompt; `place` is its number in the caller's list, `picture` the same for equal pictures.

    Until its batch comes, `ids` holds each picture as one id, since there may be a million rows. `length` is that of
    the whole prompt.
    """

    place: int
    ids: Sequence[int]
    length: int
    images: tuple[str | Path | Image.Image, ...]
    picture: tuple[str | int, ...]


def generate(
    model: Any,
    processor: Any,
    prompts: Sequence[Prompt],
    *,
    template: str = "vicuna_v1",
    max_new_tokens: int = 128,
    num_beams: int = 1,
    batch_size: int = 16,
    image_aspect_ratio: Literal["pad", "plain", "anyres"] = "pad",
    share_pictures: bool = True,
    on_batch: OnBatch | None = None,
    streamer: BaseStreamer | None = None,
) -> list[str]:
    """Return the model's answers, in the order of `prompts`; the same at every batch size, up to rounding.

    `model` is a LLaVA or a text-only causal model, also within a PeftModel. `on_batch(places, texts)` is called after
    each batch, with the numbers of its prompts; transformers' `streamer` gets the tokens of a single prompt as they
    come. A model of LLaVA-1.6 tiles its pictures, whatever `image_aspect_ratio` says. Raises UserError for a picture
    without a model that sees, ValueError for a streamer with several prompts and for a batch size below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if streamer is not None and len(prompts) != 1:
        raise ValueError(f"a streamer takes one prompt, got {len(prompts)}")
    reader = Reader(model, processor, template, image_aspect_ratio)
    answers = [""] * len(prompts)
    with torch.inference_mode(), _evaluating(model):
        for packed in _batches([reader.row(i, prompt) for i, prompt in enumerate(prompts)], batch_size):
            rows = [reader.whole(row) for row in packed]
            texts = _answer(reader, rows, (max_new_tokens, num_beams), share_pictures and num_beams == 1, streamer)
            for row, text in zip(rows, texts, strict=True):
                answers[row.place] = text
            if on_batch is not None:
                on_batch([row.place for row in rows], texts)
    return answers


def prompt_ids(
    prompt: Prompt, tokenizer: Any, template: str, *, image_token_id: int, image_tokens: int | Sequence[int] = 576
) -> list[int]:
    """Return the ids of a prompt, each picture as `image_tokens` copies of `image_token_id` (a list: one count each).

    Form exact is LLaVA's tokenizer_image_token on its conversation's text. Raises UserError where the number of
    `<image>` is not that of the pictures.
    """
    if prompt.form == "training":
        return encode_prompt(
            Record("", ("",) * len(prompt.images), prompt.turns, source="prompt"),
            tokenizer,
            template=template,
            image_token_id=image_token_id,
            image_tokens=image_tokens,
        )
    text = prompt.turns[-1].text
    if prompt.form == "exact":
        segments = render(prompt.turns, get_template(template), eos_text(tokenizer), prompt=True)
        text = "".join(segment.text for segment in segments)
    # Text between pictures is tokenized stretch by stretch.
    first, *rest = text.split(IMAGE) if prompt.images else [text]
    if len(rest) != len(prompt.images):
        raise UserError(f"{len(rest)} {IMAGE} in the prompt, but {len(prompt.images)} pictures")
    backend = fast_backend(tokenizer)
    ids = [*bos_ids(tokenizer), *backend.encode(first, add_special_tokens=False).ids]
    counts = [image_tokens] * len(rest) if isinstance(image_tokens, int) else image_tokens
    for count, stretch in zip(counts, rest, strict=True):
        ids += [image_token_id] * count + backend.encode(stretch, add_special_tokens=False).ids
    return ids


class Reader:
    """What turns prompts into tensors for one model."""

    def __init__(self, model: Any, processor: Any, template: str, image_aspect_ratio: str) -> None:
        self.model = model
        self.tokenizer, images = split_processor(processor)
        self.template = template
        self.image_aspect_ratio = image_aspect_ratio
        self.image_processor: Any = images
        self.image_token = None if images is None else image_token_id(model.config)
        self.image_tokens = 0 if images is None else image_tokens(model.config)
        self.tiling = None if images is None else tiling_of(model.config)
        own = self.tokenizer.pad_token_id
        self.pad = self.tokenizer.eos_token_id if own is None else own

    def row(self, place: int, prompt: Prompt) -> _Row:
        """Encode one prompt."""
        if prompt.images and self.image_token is None:
            raise UserError("a question with a picture, but this model reads only text\nuse a vision-language model")
        image = -1 if self.image_token is None else self.image_token
        ids = prompt_ids(prompt, self.tokenizer, self.template, image_token_id=image, image_tokens=1)
        length = len(ids) + sum(self._num_tokens(picture) - 1 for picture in prompt.images)
        names = tuple(str(image) if isinstance(image, str | Path) else id(image) for image in prompt.images)
        return _Row(place, array("i", ids), length, prompt.images, names)

    def whole(self, row: _Row) -> _Row:
        """Return the row with as many ids for each picture as the model wants."""
        counts = map(self._num_tokens, row.images)
        times = (next(counts, 1) if own == self.image_token else 1 for own in row.ids)
        return replace(row, ids=[own for own, count in zip(row.ids, times, strict=True) for _ in range(count)])

    def pixels(self, rows: Sequence[_Row]) -> dict[str, Tensor]:
        """Return {"pixel_values": (num_images, 3, H, W)} of the rows' pictures in order; {} without any.

        Of a model that tiles them, (num_images, tiles, 3, H, W), and image_sizes.
        """
        images = [self._picture(image) for row in rows for image in row.images]
        if not images:
            return {}
        # What is square already is not padded again; a processor that pads by itself must not do so for "plain".
        options = {"do_pad": False} if self.tiling is None and self.image_processor.to_dict().get("do_pad") else {}
        made = dict(self.image_processor(images=unmistakable(images), return_tensors="pt", **options))
        made["pixel_values"] = made["pixel_values"].to(self.model.dtype)
        return {name: tensor.to(self.model.device) for name, tensor in made.items()}

    def _num_tokens(self, image: str | Path | Image.Image) -> int:
        if self.tiling is None:
            return self.image_tokens
        size = picture_size(image) if isinstance(image, str | Path) else (image.height, image.width)
        return self.tiling.num_tokens(*size)

    def _picture(self, image: str | Path | Image.Image) -> Any:
        picture = load_image(image) if isinstance(image, str | Path) else to_rgb(image)
        if self.tiling is not None or self.image_aspect_ratio == "plain":
            return picture
        red, green, blue = (int(255 * mean) for mean in self.image_processor.image_mean)
        return expand_to_square(picture, (red, green, blue))


def _batches(rows: Sequence[_Row], batch_size: int) -> Iterator[list[_Row]]:
    """Yield batches of rows with equally many pictures: those about one picture together, and those of like length."""
    longest: dict[tuple[str | int, ...], int] = {}
    for row in rows:
        longest[row.picture] = max(longest.get(row.picture, 0), row.length)

    def like(row: _Row) -> tuple[int, int, str, int]:
        return len(row.picture), longest[row.picture], str(row.picture), row.length

    # Long ones first: what does not fit into memory fails at once, and the time left is not underestimated.
    for _, group in groupby(sorted(rows, key=like, reverse=True), key=lambda row: len(row.picture)):
        alike = list(group)
        for start in range(0, len(alike), batch_size):
            yield alike[start : start + batch_size]


def _answer(
    reader: Reader,
    rows: Sequence[_Row],
    decoding: tuple[int, int],
    share_pictures: bool,
    streamer: BaseStreamer | None,
) -> list[str]:
    first = {row.picture: row for row in reversed(rows)}
    prefix = _common_prefix(rows, reader.image_token) if share_pictures and len(first) < len(rows) else 0
    width = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), width), reader.pad)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        for start, part in ((0, row.ids[:prefix]), (width - len(row.ids) + prefix, row.ids[prefix:])):
            ids[i, start : start + len(part)] = torch.tensor(part, dtype=torch.long)
            mask[i, start : start + len(part)] = 1
    device = reader.model.device
    inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
    if prefix:
        inputs |= _shared_cache(reader, list(first.values()), rows, prefix)
    else:
        inputs |= reader.pixels(rows)
    config = _greedy(reader, *decoding)
    inputs |= {"generation_config": config, "streamer": streamer} | _own_config_alone()
    output = reader.model.generate(**inputs)[:, width:].tolist()
    ends = set(config.eos_token_id)
    return [
        reader.tokenizer.decode(list(takewhile(lambda t: t not in ends, row)), skip_special_tokens=True).strip()
        for row in output
    ]


def _common_prefix(rows: Sequence[_Row], image_token: int | None) -> int:
    """Return how many ids all rows begin with, short of the shortest; 0 where a picture comes after them."""
    shortest = min(len(row.ids) for row in rows) - 1
    columns = zip(*(row.ids[:shortest] for row in rows), strict=True)
    prefix = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
    return 0 if any(image_token in row.ids[prefix:] for row in rows) else prefix


def _shared_cache(reader: Reader, first: Sequence[_Row], rows: Sequence[_Row], prefix: int) -> dict[str, Any]:
    """Run the common prefix once per picture and return its cache, one entry a row, under its argument's name."""
    from transformers import DynamicCache, GenerationMixin

    # Renamed in transformers 5.24; the old name warns since, and goes with 5.40.
    known = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    name = "cache" if "cache" in known else "past_key_values"
    cache = DynamicCache(config=reader.model.config.get_text_config(decoder=True))
    ids = torch.tensor([row.ids[:prefix] for row in first], device=reader.model.device)
    reader.model(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        use_cache=True,
        logits_to_keep=1,
        **{name: cache},
        **reader.pixels(first),
    )
    numbers = {row.picture: number for number, row in enumerate(first)}
    cache.batch_select_indices(torch.tensor([numbers[row.picture] for row in rows], device=ids.device))
    return {name: cache}


def _greedy(reader: Reader, max_new_tokens: int, num_beams: int) -> Any:
    """Return a config that says everything: what it left open, `generate` would take from the model's own."""
    from transformers import GenerationConfig

    own = reader.model.generation_config.eos_token_id
    ends = {reader.tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=num_beams,
        temperature=1.0,
        top_k=50,
        top_p=1.0,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        eos_token_id=sorted(ends),
        pad_token_id=reader.pad,
    )


def _own_config_alone() -> dict[str, bool]:
    """Transformers 4 takes what a given config has at its default from the model's own, unless it is told not to."""
    from transformers import GenerationMixin

    known = "use_model_defaults" in inspect.signature(GenerationMixin.generate).parameters
    return {"use_model_defaults": False} if known else {}


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    training = model.training
    model.eval()
    # The last position is a strided slice of the hidden states; times a frozen head, torch would make it a batched
    # product for which CPUs copy the head once a row.
    dense = model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
    try:
        yield
    finally:
        dense.remove()
        model.train(training)
