"""Generate greedy answers in batches: left padding, KV cache of a shared prefix, max_new_tokens.

Rows are padded on the left. The common prefix of all rows in a batch (usually system text and picture) is computed once
per picture, and its key-value cache is repeated for the questions. Their padding is then between prefix and question.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor

from milora_data.batches.processor_collator import labelled_inputs, with_video_marks
from milora_data.batches.processor_inputs import PROCESSOR_ERRORS, ProcessorInputs
from milora_data.batches.record_collator import pad_id_of
from milora_data.encode.chat_template_mask import Rendered, parts_of, segments_of
from milora_data.encode.labels import encode_prompt
from milora_data.encode.templates import no_videos
from milora_data.encode.tokens import IGNORE, bos_ids, fast_backend
from milora_data.keys import file_key
from milora_data.pictures.load import Picture, expand_to_square, load_image, picture_size, to_rgb
from milora_data.pictures.videos import Frames
from milora_data.records.boxes import Boxes
from milora_data.records.record import IMAGE, VIDEO, Record, Turn, Video, with_boxes
from milora_vl.common.cli.console import amount
from milora_vl.common.errors import DataError, UserError, first_line, out_of_memory, with_context
from milora_vl.core.evaluation_mode import evaluated
from milora_vl.core.policy.towers import is_wrapped_by_peft
from milora_vl.models.base import Base, split_processor
from milora_vl.models.llava import image_token_id, image_tokens, is_llava, tiling_of, uses_processor

if TYPE_CHECKING:
    from PIL import Image
    from transformers.generation.streamers import BaseStreamer

Shown: TypeAlias = "str | Path | Picture | Image.Image"  # a path, a picture of a record with its path, or its pixels
LESS_MEMORY = "use a smaller --batch_size, --dtype bfloat16, or --device cpu"


@dataclass(frozen=True, slots=True)
class Reply:
    """A model's answer. `truncated` is whether the model was stopped at its largest length, before it ended."""

    text: str
    truncated: bool = False

    def __str__(self) -> str:
        return self.text


OnBatch = Callable[[list[int], list[Reply]], object]


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation up to a question, and its pictures, one for each `<image>` in the turns.

    `videos` has the frames of each `<video>`, or the files (`Video`, with paths), for models whose processor takes
    videos.

    form: `training` encodes the turns like training (pictures first, text stripped); `exact` keeps them unchanged, like
    LLaVA's evaluation; `raw` uses the text of the last turn without a template.

    `source` is the file and number of the question, for errors; without it they show its text. With `boxes`, the boxes
    in the reply are in pixels of the file of the only picture.
    """

    turns: tuple[Turn, ...]
    images: tuple[Shown, ...] = ()
    form: Literal["training", "exact", "raw"] = "training"
    videos: tuple[Frames | Video, ...] = ()
    source: str = ""
    boxes: bool = False


@dataclass(frozen=True, slots=True)
class _EncodedPrompt:
    """An encoded prompt, with an id for each token of a picture. Equal pictures have an equal `picture`."""

    ids: Sequence[int]
    images: tuple[Shown, ...]
    picture: tuple[str | int | None, ...]


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
) -> list[Reply]:
    """Return the answers in the order of `prompts`; they are equal at every batch size, up to rounding.

    `model` is a vision-language model or a text-only causal model, or a PeftModel of one. A model whose own processor
    prepares the pictures is asked in its own chat template; `template`, `image_aspect_ratio` and `share_pictures` are
    for LLaVA and text-only models. A LLaVA-1.6 model tiles its pictures and ignores `image_aspect_ratio`.
    `on_batch(indices, replies)` is called after each batch with the indices of its prompts. transformers' `streamer`
    gets the tokens of a single prompt.

    Raises UserError for a picture if the model reads only text, and ValueError for a streamer with several prompts or a
    batch size below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if streamer is not None and len(prompts) != 1:
        raise ValueError(f"a streamer needs exactly one prompt, got {len(prompts)}")
    answers = [Reply("")] * len(prompts)
    if not prompts:
        return answers

    def keep(indices: list[int], replies: list[Reply]) -> None:
        for number, index in enumerate(indices):
            if prompts[index].boxes:
                text = reader.boxes.read(replies[number].text, _size(prompts[index].images[0]))
                replies[number] = replace(replies[number], text=text)
            answers[index] = replies[number]
        if on_batch is not None:
            on_batch(indices, replies)

    reader = reader_of(model, processor, template, image_aspect_ratio, share_pictures and num_beams == 1)
    config = _greedy(reader, max_new_tokens, num_beams)
    with torch.no_grad(), _evaluated(model), out_of_memory(LESS_MEMORY):
        for indices in reader.batches(prompts, batch_size):
            inputs = reader.inputs([prompts[index] for index in indices])
            output = model.generate(**inputs, generation_config=config, streamer=streamer)
            keep(indices, _decoded(reader.tokenizer, output[:, inputs["input_ids"].shape[1] :], config.eos_token_id))
    return answers


def reader_of(model: Any, processor: Any, template: str, image_aspect_ratio: str, share_images: bool = False) -> Reader:
    if split_processor(processor)[1] is not None and uses_processor(model.config):
        return ProcessorReader(model, processor)
    return LlavaReader(model, processor, template, image_aspect_ratio, share_images)


def prompt_ids(
    prompt: Prompt, tokenizer: Any, template: str, *, image_token_id: int, image_tokens: int | Sequence[int] = 576
) -> list[int]:
    """Return the ids of a prompt, with `image_tokens` copies of `image_token_id` per picture (a list: one count each).

    Form `exact` equals LLaVA's tokenizer_image_token on the text of the conversation. Raises UserError if the numbers
    of `<image>` and pictures differ.
    """
    if prompt.form == "training":
        return encode_prompt(
            Record("", (Picture(""),) * len(prompt.images), prompt.turns, source=prompt.source or "prompt"),
            tokenizer,
            template=template,
            image_token_id=image_token_id,
            image_tokens=image_tokens,
        )
    text, ids = prompt.turns[-1].text, bos_ids(tokenizer)
    if prompt.form == "exact":
        ids, segments = segments_of(prompt.turns, template, tokenizer, prompt=True)
        text = "".join(segment.text for segment in segments)
    # Each piece of text between pictures is tokenized separately.
    first, *pieces = text.split(IMAGE) if prompt.images else [text]
    if len(pieces) != len(prompt.images):
        message = f"the prompt contains {len(pieces)} {IMAGE}, but {amount(len(prompt.images), 'picture')}"
        hint = "write <image> once for each picture"
        raise UserError(message, where=prompt.source, hint=hint)
    backend = fast_backend(tokenizer)
    ids = [*ids, *backend.encode(first, add_special_tokens=False).ids]
    counts = [image_tokens] * len(pieces) if isinstance(image_tokens, int) else image_tokens
    for count, piece in zip(counts, pieces, strict=True):
        ids += [image_token_id] * count + backend.encode(piece, add_special_tokens=False).ids
    return ids


def _answered(prompt: Prompt, answer: str) -> tuple[Turn, ...]:
    return (*prompt.turns, Turn("assistant", answer))


def _up_to_answer(whole: str, prompt: str, answer: str) -> str:
    """Return a conversation up to the end of its last answer; prompt and answer where it begins in another way."""
    end = whole.rfind(answer) + len(answer)
    return whole[:end] if whole.startswith(prompt) and end > len(prompt) else prompt + answer


def require_prompts(base: Base, prompts: Iterable[Prompt]) -> None:
    """Raise UserError, before weights load, for a prompt that a model cannot be asked.

    These are prompts with images or videos that the model does not take, prompts whose roles and kinds of parts the
    chat template rejects, whose text has a token of images, and those with another number of `<image>` than of images.
    One prompt of each form is rendered.
    """
    if not base.own_pictures:
        for prompt in prompts:
            _require_taken(base, prompt)
        return
    reader = ProcessorReader(None, base.processor)
    seen: set[object] = set()
    for prompt in prompts:
        form = _form(prompt)
        if form not in seen or reader.call.may_refuse(prompt.turns, len(prompt.images), len(prompt.videos)):
            reader.rendered(prompt)
        seen.add(form)


def require_shown(processor: Any, prompt: Prompt) -> None:
    """Raise UserError if the processor of a model refuses a prompt, or an image or video of it."""
    ProcessorReader(None, processor).processed([prompt])


def _require_taken(base: Base, prompt: Prompt) -> None:
    """Raise UserError if a LLaVA or a text-only model is asked about a video, or a text-only model about an image."""
    if prompt.videos:
        raise with_context(no_videos(base.name), prompt.source)
    if prompt.images and not base.reads_pictures:
        message, hint = f"{base.name} reads only text", "use a vision-language model, or remove the image"
        raise UserError(message, code="model-reads-only-text", where=prompt.source, hint=hint)


def _form(prompt: Prompt) -> object:
    parts = tuple((turn.role, *(part["type"] for part in parts_of(turn.text))) for turn in prompt.turns)
    return prompt.form, prompt.boxes, len(prompt.videos), parts


class ProcessorReader:
    """Asks a model whose own processor prepares the pictures, in its own chat template."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.model = model
        self.call = ProcessorInputs(processor)
        self.boxes = Boxes.of(processor)
        self.tokenizer = self.call.tokenizer
        self.pad = pad_id_of(self.tokenizer)

    def rendered(self, prompt: Prompt) -> Rendered:
        """Return the text of a prompt. Raises UserError if the numbers of `<image>` and pictures differ.

        The forms `training` and `exact` are the same here: the template writes the turns unchanged.
        """
        try:
            if prompt.form == "raw":
                text = Rendered(prompt.turns[-1].text.replace(IMAGE, self.call.placeholder), ())
            else:
                turns = self._marked(prompt, prompt.turns)
                form = self.call.video_format if prompt.videos else self.call.format
                text = form.render(turns, prompt=True)
            self.call.require_images(text.text, len(prompt.images), len(prompt.videos))
            self.call.require_one_kind(len(prompt.images), [self.call.num_frames(video) for video in prompt.videos])
        except DataError as error:
            raise with_context(error, _named(prompt)) from None
        return text

    def _marked(self, prompt: Prompt, turns: Sequence[Turn]) -> list[Turn]:
        turns = _with_boxes(prompt, turns, self.boxes)
        return with_video_marks(turns, len(prompt.images), len(prompt.videos))

    def batches(self, prompts: Sequence[Prompt], batch_size: int) -> Iterator[list[int]]:
        lengths = [self._length(self.rendered(prompt), prompt) for prompt in prompts]
        kinds = [self._kind(prompt) for prompt in prompts]
        order = sorted(range(len(prompts)), key=lambda index: (kinds[index], lengths[index]), reverse=True)
        yield from _in_batches(order, kinds.__getitem__, batch_size)

    def _kind(self, prompt: Prompt) -> tuple[bool, bool, tuple[int, ...]]:
        alone = not self.call.takes_mixed_rows and bool(prompt.images)
        is_counted = bool(prompt.videos) and not self.call.takes_mixed_videos
        counts = tuple(self.call.num_frames(video) for video in prompt.videos) if is_counted else ()
        return alone, bool(prompt.videos), counts

    def processed(self, batch: Sequence[Prompt]) -> dict[str, Any]:
        """Return the processor's tensors for prompts, padded on the left. Raises UserError if it refuses them."""
        texts = [self.rendered(prompt) for prompt in batch]
        images = [[_opened(image) for image in prompt.images] for prompt in batch]
        try:
            inputs = self.call(texts, images, [self._frames(prompt) for prompt in batch], padding_side="left")
        except UserError:
            raise
        except PROCESSOR_ERRORS as error:
            for one in batch if len(batch) > 1 else ():
                self.processed([one])  # names the prompt that is refused alone
            prompt = batch[0]
            paths = [str(image) for image in prompt.images if isinstance(image, str | Path | Picture)]
            raise UserError(
                f"the processor refuses this question, or a picture or video of it: {first_line(error)}",
                where=": ".join([prompt.source] * bool(prompt.source) + paths) or _named(prompt),
                hint="use another picture, or leave the question out",
            ) from None
        inputs.pop("labels", None)  # some processors add them
        return inputs

    def labelled(self, prompt: Prompt, answer: str) -> dict[str, Any]:
        rendered = self.rendered(prompt)
        if self.call.format.takes_conversations:
            start, text = len(rendered.text), rendered.text + answer
            if prompt.form != "raw":
                turns = self._marked(prompt, _answered(prompt, answer))
                form = self.call.video_format if prompt.videos else self.call.format
                text = _up_to_answer(form.render(turns).text, rendered.text, answer)
            rendered = Rendered(text, ((start, len(text)),))
        else:
            rendered = rendered._replace(suffix=answer)
        images = [_opened(image) for image in prompt.images]
        inputs = labelled_inputs(self.call, rendered, images, self._frames(prompt))
        return {name: self._on_device(value) for name, value in inputs.items()}

    def inputs(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        inputs = {name: self._on_device(value) for name, value in self.processed(prompts).items()}
        base = self.model.get_base_model() if is_wrapped_by_peft(self.model) else self.model
        if "mm_token_type_ids" not in inspect.signature(base.forward).parameters:
            inputs.pop("mm_token_type_ids", None)  # `generate` refuses what a model does not take
        return inputs

    def _on_device(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(self.model.device, self.model.dtype if value.is_floating_point() else None)

    def _length(self, text: Rendered, prompt: Prompt) -> int:
        return self.call.num_tokens(text, [_size(image) for image in prompt.images], prompt.videos)

    def _frames(self, prompt: Prompt) -> list[Frames]:
        try:
            return [self.call.frames(video) for video in prompt.videos]
        except DataError as error:
            raise with_context(error, prompt.source) from None


def _opened(image: Shown) -> Any:
    return load_image(image) if isinstance(image, str | Path | Picture) else to_rgb(image)


def _size(image: Shown) -> tuple[int, int]:
    return picture_size(image) if isinstance(image, str | Path | Picture) else (image.height, image.width)


def _with_boxes(prompt: Prompt, turns: Sequence[Turn], boxes: Boxes) -> Sequence[Turn]:
    if prompt.boxes:
        boxes.form()  # raises DataError before the question is asked
    return with_boxes(turns, boxes, lambda: list(map(_size, prompt.images)))


def _named(prompt: Prompt) -> str:
    """Return how an error names a prompt: by its source, else by the start of its question."""
    if prompt.source:
        return prompt.source
    text = prompt.turns[-1].text.replace(IMAGE, "").replace(VIDEO, "")
    return f"question {text.strip()[:60]!r}"


class LlavaReader:
    """Asks a LLaVA or a text-only model. With `share_images`, the common prefix runs once for each image."""

    def __init__(
        self, model: Any, processor: Any, template: str, image_aspect_ratio: str, share_images: bool = False
    ) -> None:
        self.model = model
        self.tokenizer, images = split_processor(processor)
        if images is not None and not is_llava(model.config):
            message = f"{model.config.model_type} reads only text here: its config has no vision_config"
            hint = "pass its tokenizer in place of the processor, and no pictures"
            raise UserError(message, code="model-reads-only-text", hint=hint)
        self.template = template
        self.image_aspect_ratio = image_aspect_ratio
        self.share_images = share_images
        self.image_processor: Any = images
        self.image_token = None if images is None else image_token_id(model.config)
        self.image_tokens = 0 if images is None else image_tokens(model.config)
        self.tiling = None if images is None else tiling_of(model.config)
        self.boxes = Boxes(f"LLaVA ({image_aspect_ratio if self.tiling is None else 'anyres'})")
        self.pad = pad_id_of(self.tokenizer)
        self._key_of = cache(file_key)

    def batches(self, prompts: Sequence[Prompt], batch_size: int) -> Iterator[list[int]]:
        """Yield batches with the same number of pictures, grouped by picture and then by length.

        Longest first: a batch too large for memory fails at once, and the remaining time is not underestimated.
        """
        lengths, keys = [self.length(prompt) for prompt in prompts], list(map(self._picture_keys, prompts))
        longest: dict[tuple[str | int | None, ...], int] = {}
        for key, tokens in zip(keys, lengths, strict=True):
            longest[key] = max(tokens, longest.get(key, 0))

        def rank(index: int) -> tuple[int, int, str, int]:
            key = keys[index]
            return len(key), longest[key], str(key), lengths[index]

        order = sorted(range(len(prompts)), key=rank, reverse=True)
        yield from _in_batches(order, lambda index: len(keys[index]), batch_size)

    def inputs(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        rows = [self.row(prompt) for prompt in prompts]
        first = {row.picture: row for row in reversed(rows)}
        prefix = _common_prefix(rows, self.image_token) if self.share_images and len(first) < len(rows) else 0
        width = max(len(row.ids) for row in rows)
        ids = torch.full((len(rows), width), self.pad)
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        for i, row in enumerate(rows):
            for start, part in ((0, row.ids[:prefix]), (width - len(row.ids) + prefix, row.ids[prefix:])):
                ids[i, start : start + len(part)] = torch.tensor(part, dtype=torch.long)
                mask[i, start : start + len(part)] = 1
        device = self.model.device
        inputs: dict[str, Any] = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
        if prefix:
            inputs |= _shared_cache(self, list(first.values()), rows, prefix)
        else:
            inputs |= self.pixels(rows)
        return inputs

    def labelled(self, prompt: Prompt, answer: str) -> dict[str, Any]:
        prompt = self._boxed(prompt)
        row, text = self.row(prompt), prompt.turns[-1].text
        answered = text + answer
        if prompt.form != "raw":
            sides = ((prompt.turns, True), (_answered(prompt, answer), False))
            rendered = [segments_of(turns, self.template, self.tokenizer, prompt=ends)[1] for turns, ends in sides]
            text, whole = ("".join(segment.text for segment in segments) for segments in rendered)
            answered = _up_to_answer(whole, text, answer)
        # The answer is tokenized behind the text before it: SentencePiece puts a blank in front of a separate text.
        start = text.rfind(IMAGE) + len(IMAGE) if prompt.images else 0
        before, joined = (
            self.tokenizer(each[start:], add_special_tokens=False)["input_ids"] for each in (text, answered)
        )
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(before, joined, strict=False)))
        known, after = row.ids[: len(row.ids) - len(before) + shared], joined[shared:]
        ids = torch.tensor([[*known, *after]], device=self.model.device)
        labels = torch.tensor([[IGNORE] * len(known) + after], device=self.model.device)
        return {"input_ids": ids, "labels": labels, **self.pixels([row])}

    def row(self, prompt: Prompt) -> _EncodedPrompt:
        counts = map(self._num_tokens, prompt.images)
        repeats = ((token, next(counts, 1) if token == self.image_token else 1) for token in self._ids(prompt))
        return _EncodedPrompt(
            [token for token, count in repeats for _ in range(count)], prompt.images, self._picture_keys(prompt)
        )

    def length(self, prompt: Prompt) -> int:
        if prompt.videos:
            raise with_context(no_videos("this model"), prompt.source)
        return len(self._ids(prompt)) + sum(self._num_tokens(picture) - 1 for picture in prompt.images)

    def _boxed(self, prompt: Prompt) -> Prompt:
        return replace(prompt, turns=tuple(_with_boxes(prompt, prompt.turns, self.boxes)))

    def _ids(self, prompt: Prompt) -> list[int]:
        if prompt.images and self.image_token is None:
            message, hint = "the question has a picture, but this model reads only text", "use a vision-language model"
            raise UserError(message, code="model-reads-only-text", hint=hint)
        image = -1 if self.image_token is None else self.image_token
        return prompt_ids(self._boxed(prompt), self.tokenizer, self.template, image_token_id=image, image_tokens=1)

    def pixels(self, rows: Sequence[_EncodedPrompt]) -> dict[str, Tensor]:
        """Return {"pixel_values": (num_images, 3, H, W)} for the pictures of the rows in order; {} without pictures.

        A model that tiles pictures gets (num_images, tiles, 3, H, W) and image_sizes.
        """
        images = [self._picture(image) for row in rows for image in row.images]
        if not images:
            return {}
        # Square pictures are not padded again. A processor that pads must not do so for "plain".
        options = {"do_pad": False} if self.tiling is None and self.image_processor.to_dict().get("do_pad") else {}
        inputs = dict(self.image_processor(images=list(images), return_tensors="pt", **options))
        inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        return {name: tensor.to(self.model.device) for name, tensor in inputs.items()}

    def _picture_keys(self, prompt: Prompt) -> tuple[str | int | None, ...]:
        return tuple(
            self._key_of(image) if isinstance(image, str | Path | Picture) else id(image) for image in prompt.images
        )

    def _num_tokens(self, image: Shown) -> int:
        if self.tiling is None:
            return self.image_tokens
        return self.tiling.num_tokens(*_size(image))

    def _picture(self, image: Shown) -> Any:
        picture = _opened(image)
        if self.tiling is not None or self.image_aspect_ratio == "plain":
            return picture
        red, green, blue = (int(255 * mean) for mean in self.image_processor.image_mean)
        return expand_to_square(picture, (red, green, blue))


Reader = ProcessorReader | LlavaReader  # turns prompts into the inputs of one model


def _in_batches(order: Sequence[int], kind: Callable[[int], Any], batch_size: int) -> Iterator[list[int]]:
    """Yield the indices of `order` in batches of one kind each; indices of equal kind follow each other."""
    for _, group in groupby(order, key=kind):
        indices = list(group)
        for start in range(0, len(indices), batch_size):
            yield indices[start : start + batch_size]


def _decoded(tokenizer: Any, rows: Tensor, ends: Collection[int]) -> list[Reply]:
    generated = rows.tolist()
    ids = [list(takewhile(lambda token: token not in ends, row)) for row in generated]
    return [
        Reply(tokenizer.decode(kept, skip_special_tokens=True).strip(), len(kept) == len(row))
        for kept, row in zip(ids, generated, strict=True)
    ]


def _common_prefix(rows: Sequence[_EncodedPrompt], image_token: int | None) -> int:
    """Return the length of the common prefix, below the shortest row; 0 if a picture comes after it."""
    shortest = min(len(row.ids) for row in rows) - 1
    columns = zip(*(row.ids[:shortest] for row in rows), strict=True)
    prefix = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
    return 0 if any(image_token in row.ids[prefix:] for row in rows) else prefix


def _shared_cache(
    reader: LlavaReader, first: Sequence[_EncodedPrompt], rows: Sequence[_EncodedPrompt], prefix: int
) -> dict[str, Any]:
    """Run the common prefix once per picture. Return {argument name: cache} with one entry per row."""
    from transformers import DynamicCache, GenerationMixin

    # transformers 5.24 renames the argument. The old name warns until 5.40 removes it.
    names = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    name = "cache" if "cache" in names else "past_key_values"
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
    """Return a complete config: `generate` would take missing values from the config of the model."""
    from transformers import GenerationConfig

    eos = reader.model.generation_config.eos_token_id
    own = reader.call.end_ids() if isinstance(reader, ProcessorReader) else []
    ends = {reader.tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos]), *own} - {None}
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


@contextmanager
def _evaluated(model: Any) -> Iterator[None]:
    # The last position is a strided slice of the hidden states. For its product with a frozen head, torch would use a
    # batched product, in which CPUs copy the head once per row.
    contiguous = model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
    try:
        with evaluated(model):
            yield
    finally:
        contiguous.remove()
