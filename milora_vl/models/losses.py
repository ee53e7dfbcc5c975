"""The loss of a step: the summed cross-entropy of the supervised tokens, computed in chunks of positions.

Why chunks: about 20 to 60 of the 700 positions of a LLaVA sequence are supervised, and nearly all of a text record.
Logits for 16 x 2,048 positions and 32,000 tokens need 10 bytes each (2 in bf16, 4 in float32, 4 for the gradient). That
is 10 GB, most of a step's memory.

How it works, for a model that consists of an inner model and a head:

1. `first_position` runs the inner model on the whole batch and selects the hidden states of the supervised positions:
   (batch, length, width) -> (positions, width).
2. `logits_of` runs the model's own forward again for one chunk of these positions. The inner model is replaced by a
   function that returns the chunk, so only the head runs, with all that the model does to logits (a cap, a scale).
3. `GradientsAtOnce` computes the gradients of a chunk right after its loss. No logits are kept for backward, and
   nothing is computed twice. The gradient of the logits is softmax - one-hot, written into one buffer for all chunks:
   autograd would fill three more tensors of the size of the logits.

If the head trains under ZeRO-3, and always under FSDP2, step 3 is left to autograd, which keeps the logits.

>>> from milora_vl.models.tiny import tiny_llama
>>> model, tokenizer = tiny_llama()
>>> ids = torch.tensor([[1, 5, 6, 7]])
>>> batch = {"input_ids": ids, "labels": torch.tensor([[IGNORE, IGNORE, 6, 7]])}
>>> whole, count = summed_loss(model, batch, chunked=False)
>>> is_chunked = add_chunked_loss(model)
>>> chunked, _ = summed_loss(model, batch, chunked=is_chunked)
>>> count, is_chunked, torch.allclose(whole, chunked)
(2, True, True)
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from milora_data.batches.record_collator import RecordCollator
from milora_data.encode.tokens import IGNORE
from milora_data.records.record import Record
from milora_vl.common.compat.torch import extend_forward
from milora_vl.common.progress import progress_bar
from milora_vl.core.weights.distributed import maximum_later, rank_and_world_size, uses_fsdp

CHUNK = 2**24  # numbers in the logits of one chunk: 64 MiB in float32
Forward = Callable[..., Any]


def supervised_positions(labels: Tensor) -> Tensor:
    """Return (2, supervised tokens): the positions in the flattened batch that predict a token, and these tokens.

    `labels` is (batch, length), with -100 where a position is not supervised. Computed on the CPU, before a batch moves
    to a GPU, it spares the step a wait for the GPU.

    >>> supervised_positions(torch.tensor([[IGNORE, 5, 6], [IGNORE, IGNORE, 7]]))  # position i predicts token i + 1
    tensor([[0, 1, 4],
            [5, 6, 7]])
    """
    rows, columns = (labels[:, 1:] != IGNORE).nonzero(as_tuple=True)
    return torch.stack([rows * labels.shape[1] + columns, labels[rows, columns + 1]])


def summed_loss(model: Forward, inputs: dict[str, Any], *, chunked: bool) -> tuple[Tensor, int]:
    """Return the summed cross-entropy in float32 and the number of supervised tokens.

    `inputs` contains labels (batch, length), with -100 where a position is not supervised. The labels are not passed to
    the model, which would compute its own mean. `chunked` is the result of `add_chunked_loss`; the model may be wrapped
    since. For a batch without supervised tokens the loss is zero and attached to the graph. `inputs` may contain
    `supervised`, the `supervised_positions` of the labels.

    The sum and the count are returned separately, so that gradient accumulation and data parallelism can divide by the
    number of tokens of the whole step.
    """
    losses, supervised = _losses(model, inputs, chunked)
    return losses.sum(), supervised.shape[1]


def row_losses(model: Forward, inputs: dict[str, Any], *, chunked: bool) -> Tensor:
    """Return the summed cross-entropy of each row, (batch,). Gradients must be off; the arguments are as above."""
    losses, supervised = _losses(model, inputs, chunked)
    batch, length = inputs["labels"].shape
    rows = supervised[0].to(losses.device) // length
    return losses.new_zeros(batch).index_add_(0, rows, losses[: len(rows)])


def record_losses(
    model: nn.Module, collate: RecordCollator[Any], records: Iterable[Record], size: int
) -> list[tuple[Record, float]]:
    """Return each record that has an answer with its loss, in nats per token; batches hold up to `size` of one kind."""
    collate, found = collate.for_evaluation(), list[tuple[Record, float]]()
    answered = [each for each in records if any(turn.role == "assistant" and turn.weight for turn in each.turns)]
    answered.sort(key=lambda record: (repr(collate.kind(record)), collate.num_tokens(record)))  # little padding
    parts = [list(group) for _, group in groupby(answered, collate.kind)]
    batches = [part[start : start + size] for part in parts for start in range(0, len(part), size)]
    device = next(model.parameters()).device
    with progress_bar("losses", len(batches), "batches") as bar, torch.no_grad():
        for batch in batches:
            inputs = collate(batch)
            counts = (inputs["labels"][:, 1:] != IGNORE).sum(1).tolist()
            inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
            kept = [record for record in batch if record.place not in collate.left_out]  # if none: a row replaces them
            rows = zip(kept, row_losses(model, inputs, chunked=False).tolist(), counts, strict=False)
            found += [(record, loss / count) for record, loss, count in rows if count]
            bar.update()
    return found


def _losses(model: Forward, inputs: dict[str, Any], chunked: bool) -> tuple[Tensor, Tensor]:
    """Return the summed loss, without gradients the loss of each supervised position, and these positions."""
    model_inputs = {name: value for name, value in inputs.items() if name not in ("labels", "supervised")}
    supervised = inputs["supervised"] if "supervised" in inputs else supervised_positions(inputs["labels"])
    if chunked:
        return model(**model_inputs, supervised=supervised)["loss"], supervised
    logits = model(**model_inputs)["logits"].flatten(0, 1)
    positions, tokens = supervised.to(logits.device)
    return _cross_entropy(logits[positions], tokens), supervised


def add_chunked_loss(model: nn.Module) -> bool:
    """Add the argument `supervised` to the forward of a Hugging Face model; with it, forward returns the loss.

    Return False and change nothing if the model does not consist of an inner model and a head, or if accelerate has
    replaced its forward, to spread it over devices.
    """
    if inner_model(model) is None or "forward" in vars(model):
        return False
    extend_forward(model, _forward)
    return True


def _forward(model: Any, stock: Forward, *args: Any, supervised: Tensor | None = None, **kwargs: Any) -> Any:
    if supervised is None:
        return stock(*args, **kwargs)
    inner = inner_model(model)
    assert inner is not None
    size = max(CHUNK // model.config.get_text_config().vocab_size, 1)
    head = [p for child in model.children() if child is not inner for p in child.parameters() if p.requires_grad]
    run = functools.partial(stock, *args, **kwargs | {"use_cache": False})  # packed batches pass it already
    return {"loss": _chunked_loss(run, inner, head, supervised, size)}


def inner_model(model: nn.Module) -> nn.Module | None:
    """Return the child of a model that computes the hidden states: it has the embeddings and not the head.

    Return None for models of another structure, for encoder-decoders and for models that are not Hugging Face's.
    """
    if not isinstance(model, PreTrainedModel) or model.config.is_encoder_decoder:
        return None
    head = model.get_output_embeddings()
    for child in model.children():
        inside = set(child.modules())
        if head is not None and model.get_input_embeddings() in inside and head not in inside:
            return child
    return None


def _chunked_loss(
    run: Forward, inner: nn.Module, head: Sequence[nn.Parameter], supervised: Tensor, size: int
) -> Tensor:
    """Return the summed loss, without gradients each position's, in chunks of `size` supervised positions.

    `run` is the model's forward with its arguments bound, `head` the trained weights outside the inner model, and
    `supervised` (2, positions) as in `supervised_positions`.
    """
    is_empty = supervised.shape[1] == 0
    if is_empty:  # cross-entropy ignores the target: the loss is zero, but attached to the graph
        supervised = supervised.new_zeros((2, 1))
        supervised[1] = IGNORE
    positions, tokens = supervised
    count, is_fsdp = len(positions), uses_fsdp(inner)
    read: Callable[[], int] = functools.partial(math.ceil, count / size)
    if (is_fsdp or is_deepspeed_zero3_enabled()) and rank_and_world_size()[1] > 1:
        read = maximum_later(read(), positions.device)  # each chunk gathers the head, in all processes
    calls: list[tuple[Any, Tensor]] = []
    forward = inner.forward

    def first_position(*args: Any, **kwargs: Any) -> Any:
        # The head then runs on a single position, because the logits of this first pass are not needed.
        output = forward(*args, **kwargs)
        calls.append((output, output[0].flatten(0, 1)[positions]))
        return _with_hidden(output, calls[0][1][:1].detach())

    def logits_of(piece: Tensor) -> Tensor:
        with _replaced_forward(inner, lambda *args, **kwargs: _with_hidden(output, piece)):
            return run()["logits"].flatten(0, 1)  # a view; the gradient of [0] would be a new tensor of zeros

    with _replaced_forward(inner, first_position):
        logits = run()["logits"]
    if not calls:  # OPT's forward calls a child of its inner model, so these are the logits of all positions
        return _cross_entropy(logits.flatten(0, 1)[positions], tokens)
    (output, hidden), *more = calls
    assert not more, f"{type(inner).__name__} is called more than once by its model"
    num_chunks = read()
    sizes = [(count + number) // num_chunks for number in range(num_chunks)]
    targets = tokens.split(sizes)
    # ZeRO-3 reduces a gradient when autograd accumulates it in the weight. `torch.autograd.grad` would bypass that.
    # FSDP2 ends the backward of a step at the first backward that passes through a sharded module.
    by_autograd = (head and is_deepspeed_zero3_enabled()) or is_fsdp
    if is_empty or not torch.is_grad_enabled() or by_autograd:
        pairs = zip(hidden.split(sizes), targets, strict=True)
        losses = [_cross_entropy(logits_of(piece), target) for piece, target in pairs]
        return torch.stack(losses).sum() if torch.is_grad_enabled() else torch.cat(losses)
    summed: Tensor = GradientsAtOnce.apply(logits_of, hidden, targets, *head)
    return summed


class GradientsAtOnce(torch.autograd.Function):
    """The sum of the losses of all chunks. Forward also computes the gradients, chunk by chunk, and saves them.

    For hidden states h = [h_1; h_2; ...] (positions, width) in chunks and head weights w:

        loss = sum_c loss_c(h_c, w)        d loss / d h_c = d loss_c / d h_c        d loss / d w = sum_c d loss_c / d w

    Each chunk contributes on its own, so its logits (chunk, vocabulary) can be dropped before the next chunk makes its
    logits. Backward receives the gradient of the sum, one number, and multiplies the saved gradients by it: gradient
    accumulation and the number of tokens only scale the loss.

    >>> w, h = torch.tensor([[1.0, 2.0], [0.0, 1.0]], requires_grad=True), torch.ones(3, 2, requires_grad=True)
    >>> targets = torch.tensor([0, 1, 0])
    >>> chunked = GradientsAtOnce.apply(lambda piece: piece @ w.T, h, targets.split(2), w) / 3
    >>> whole = _cross_entropy(h @ w.T, targets) / 3
    >>> pairs = zip(torch.autograd.grad(chunked, (h, w)), torch.autograd.grad(whole, (h, w)))
    >>> [torch.allclose(a, b) for a, b in pairs]
    [True, True]
    """

    @staticmethod
    def forward(
        ctx: Any, logits_of: Callable[[Tensor], Tensor], hidden: Tensor, targets: Sequence[Tensor], *head: Tensor
    ) -> Tensor:
        """Return the loss, a float32 scalar.

        `hidden` is (positions, width), `targets` holds the token ids (positions,) in chunks, `head` the trained weights
        that `logits_of` uses.
        """
        total, grad_hidden = hidden.new_zeros((), dtype=torch.float32), torch.empty_like(hidden)
        grad_head: list[Tensor | None] = [None] * len(head)
        sizes = [len(target) for target in targets]
        buffer: Tensor | None = None  # for the gradient of the logits, (longest chunk, vocabulary)
        for rows, target, out in zip(hidden.split(sizes), targets, grad_hidden.split(sizes), strict=True):
            with torch.enable_grad():
                piece = rows.detach().requires_grad_()
                logits = logits_of(piece)
            if buffer is None:
                buffer = logits.new_empty((max(sizes), logits.shape[-1]), dtype=torch.float32)
            loss, of_logits = _loss_and_gradient(logits.detach(), target, buffer[: len(target)])
            of_piece, *of_head = torch.autograd.grad(logits, (piece, *head), of_logits, allow_unused=True)
            del logits  # before the next chunk makes its logits
            out.copy_(of_piece)
            pairs = zip(grad_head, of_head, strict=True)
            grad_head = [a if b is None else b if a is None else a.add_(b) for a, b in pairs]
            total += loss
        ctx.save_for_backward(grad_hidden, *grad_head)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        grad_hidden, *grad_head = ctx.saved_tensors
        return None, grad_hidden * grads[0], None, *(None if g is None else g * grads[0] for g in grad_head)


def _with_hidden(output: Any, hidden: Tensor) -> Any:
    """Return the output of the inner model with these hidden states, (positions, width), as a batch of one."""
    return type(output)(**{**output, "last_hidden_state": hidden[None]})


@contextmanager
def _replaced_forward(module: nn.Module, forward: Forward) -> Iterator[None]:
    previous = vars(module).get("forward")  # set on the instance, for example by accelerate
    module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        if previous is None:
            del module.forward
        else:
            module.forward = previous


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    reduction = "sum" if torch.is_grad_enabled() else "none"
    targets = targets.to(logits.device)
    return nn.functional.cross_entropy(logits.float(), targets, ignore_index=IGNORE, reduction=reduction)


def _loss_and_gradient(logits: Tensor, targets: Tensor, buffer: Tensor) -> tuple[Tensor, Tensor]:
    """Return the summed cross-entropy, and its gradient softmax(logits) - one-hot(targets) in the dtype of `logits`.

    `logits` is (positions, vocabulary), and every position has a target. `buffer`, of the same shape in float32, is
    overwritten. `_cross_entropy` and autograd give the same numbers.
    """
    targets = targets.to(logits.device)
    torch.log_softmax(logits.float(), dim=-1, out=buffer)
    loss = nn.functional.nll_loss(buffer, targets, reduction="sum")
    columns = targets[:, None]
    buffer.exp_().scatter_add_(1, columns, buffer.new_full((1, 1), -1.0).expand(columns.shape))
    return loss, buffer.to(logits.dtype)
