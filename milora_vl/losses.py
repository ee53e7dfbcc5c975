"""The loss of a step: cross-entropy of the supervised tokens, with logits made for a few hundred of them at a time.

Of a LLaVA sequence of 700 positions some 20-60 are supervised; of a text record nearly all are. Logits of 16 x 2,048
positions over a vocabulary of 32,000 would be most of a step's memory: 2 bytes, 4 in float32 and 4 for their gradient.

A model's own forward is called twice over: its inner model once, for the hidden states, and then the rest (head, and
whatever the model does to logits: a cap, a scale) on one chunk of supervised positions after another. Each chunk's
gradients are made right after its loss, so that nothing is computed twice and no logits are kept (they are where the
head trains under ZeRO-3). Nothing of what the rest does is known here: the model's forward does it, given hidden states
in place of its inner model's.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

IGNORE = -100
CHUNK = 2**24  # numbers in the logits of one chunk: 64 MiB in float32
Forward = Callable[..., Any]


def summed_loss(model: nn.Module, inputs: dict[str, Any], *, chunked: bool) -> tuple[Tensor, int]:
    """Summed cross-entropy in float32, and how many tokens it sums over.

    `inputs` holds labels (batch, length); they are not passed on as such, so the model makes no loss of its own.
    `chunked` is what `install` returned for the model inside; any wrapper may be around it. A batch with no supervised
    token gives zero, still attached to the graph.
    """
    labels = inputs["labels"]
    rest = {name: value for name, value in inputs.items() if name != "labels"}
    count = int((labels[:, 1:] != IGNORE).sum())
    if chunked:
        return model(**rest, supervised_labels=labels)["loss"], count
    return _cross_entropy(model(**rest)["logits"][:, :-1].flatten(0, 1), labels[:, 1:].flatten()), count


def install(model: nn.Module) -> bool:
    """Teach a Hugging Face model, in place, to return the summed loss when it is given `supervised_labels`.

    False, and nothing changes, for a model that does not consist of an inner model and a head.
    """
    inner = inner_model(model)
    if inner is None:
        return False
    own = model.forward
    size = max(CHUNK // model.config.get_text_config().vocab_size, 1)  # type: ignore[operator, union-attr]

    @functools.wraps(own)
    def forward(*args: Any, supervised_labels: Tensor | None = None, **kwargs: Any) -> Any:
        if supervised_labels is None:
            return own(*args, **kwargs)
        rest = [p for child in model.children() if child is not inner for p in child.parameters() if p.requires_grad]
        run = functools.partial(own, *args, **kwargs | {"use_cache": False})  # packed batches say it themselves
        return {"loss": _chunked_loss(run, inner, rest, supervised_labels, size)}

    model.forward = forward  # type: ignore[method-assign]
    return True


def inner_model(model: nn.Module) -> nn.Module | None:
    """The part of a model that makes the hidden states: the child with the embeddings, beside the head."""
    if not isinstance(model, PreTrainedModel) or model.config.is_encoder_decoder:
        return None
    head = model.get_output_embeddings()
    for child in model.children():
        inside = set(child.modules())
        if head is not None and model.get_input_embeddings() in inside and head not in inside:
            return child
    return None


def _chunked_loss(own: Forward, inner: nn.Module, rest: Sequence[nn.Parameter], labels: Tensor, size: int) -> Tensor:
    """The summed loss by `own`, a model's forward with its arguments, in pieces of `size` supervised positions.

    `rest` are the weights beside the inner model that train.
    """
    supervised = labels[:, 1:] != IGNORE
    if not supervised.any():
        supervised[0, 0] = True  # its target is to be ignored: zero, but attached to the graph
    rows, columns = supervised.nonzero(as_tuple=True)
    sizes = _sizes(len(rows), size, labels.device)
    targets = labels[rows, columns + 1].split(sizes)
    seen: list[tuple[Any, Tensor]] = []
    forward = inner.forward

    def first_position(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        seen.append((output, output[0][rows, columns]))
        return _with_hidden(output, seen[0][1][:1].detach())

    def loss_of(piece: Tensor, target: Tensor) -> Tensor:
        with _instead(inner, lambda *args, **kwargs: _with_hidden(output, piece)):
            return _cross_entropy(own()["logits"][0], target)

    with _instead(inner, first_position):
        logits = own()["logits"]
    if not seen:  # OPT's forward calls a part of its inner model: the logits are there, whole
        return _cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    (output, hidden), *more = seen
    assert not more, f"{type(inner).__name__} is called more than once by its model"
    # ZeRO-3 takes a weight's gradient where it reaches the weight itself, and nowhere before.
    if not torch.is_grad_enabled() or (rest and is_deepspeed_zero3_enabled()):
        return torch.stack([loss_of(*pair) for pair in zip(hidden.split(sizes), targets, strict=True)]).sum()
    summed: Tensor = GradientsAtOnce.apply(loss_of, hidden, targets, *rest)
    return summed


class GradientsAtOnce(torch.autograd.Function):
    """The sum of the pieces' losses, and its gradients: made piece by piece in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, loss_of: Callable[[Tensor, Tensor], Tensor], hidden: Tensor, targets: Sequence[Tensor], *rest: Tensor
    ) -> Tensor:
        """`hidden` (positions, width), `targets` in pieces of its rows; `rest` are the weights that `loss_of` uses."""
        total, of_hidden = hidden.new_zeros((), dtype=torch.float32), torch.empty_like(hidden)
        of_rest: list[Tensor | None] = [None] * len(rest)
        sizes = [len(target) for target in targets]
        for rows, target, out in zip(hidden.split(sizes), targets, of_hidden.split(sizes), strict=True):
            with torch.enable_grad():
                piece = rows.detach().requires_grad_()
                loss = loss_of(piece, target)
            first, *others = torch.autograd.grad(loss, (piece, *rest), allow_unused=True)
            out.copy_(first)
            of_rest = [a if b is None else b if a is None else a.add_(b) for a, b in zip(of_rest, others, strict=True)]
            total += loss.detach()
        ctx.save_for_backward(of_hidden, *of_rest)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Those gradients, by what the sum is multiplied with."""
        of_hidden, *of_rest = ctx.saved_tensors
        return None, of_hidden * grads[0], None, *(None if g is None else g * grads[0] for g in of_rest)


def _sizes(count: int, size: int, device: torch.device) -> list[int]:
    """Sizes of the pieces. Under ZeRO-3 each piece gathers the head: all processes must make the same number."""
    pieces = math.ceil(count / size)
    if is_deepspeed_zero3_enabled() and torch.distributed.is_initialized():
        most = torch.tensor(pieces, device=device)
        torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
        pieces = int(most)
    return [(count + number) // pieces for number in range(pieces)]


def _with_hidden(output: Any, hidden: Tensor) -> Any:
    """The inner model's output with other hidden states: (1, length, width)."""
    return type(output)(**{**output, "last_hidden_state": hidden[None]})


@contextmanager
def _instead(module: nn.Module, forward: Forward) -> Iterator[None]:
    """Let a module's forward be another one for a while; its hooks still run."""
    own = vars(module).get("forward")
    module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.float(), targets.to(logits.device), ignore_index=IGNORE, reduction="sum")
