"""Forgetting in nats per token: cross-entropy of a tuned model against its base's predictions, with its error.

The text probe is three books of the package, in blocks and batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor, nn

from milora_data.encode.tokens import bos_ids
from milora_vl.common.progress import progress_bar
from milora_vl.core.calibration.texts import padded
from milora_vl.core.evaluation_mode import evaluated
from milora_vl.core.weights.distributed import gathered_in_forward
from milora_vl.models.base import split_processor

# Positions at a time. Their distributions over the vocabulary, in float32, should stay in the caches of a CPU.
_POSITIONS, _POSITIONS_ON_CPU = 256, 16


@dataclass(frozen=True, slots=True)
class ProbeBatch:
    """The input of both models: forward arguments with `input_ids` (rows, length).

    `counted` (rows, length - 1) marks the predictions that count: position t predicts id t + 1. `documents` names the
    document of each row: predictions in one document are not independent of each other.
    """

    inputs: Mapping[str, Tensor]
    counted: Tensor
    documents: Sequence[str]


@dataclass(frozen=True, slots=True)
class Forgetting:
    """Means over tokens, in nats. Standard errors are clustered by document; None for a single document.

    `cross_entropy` is the number of the paper, `kl` its difference from the minimum `base_entropy`. `loss` and
    `base_loss` are the usual losses on the tokens, `loss_change` their difference.
    """

    cross_entropy: float
    stderr: float | None
    base_entropy: float
    kl: float
    kl_stderr: float | None
    loss: float
    base_loss: float
    loss_change: float
    loss_change_stderr: float | None
    n_tokens: int
    n_blocks: int
    n_documents: int
    text: str


def measure_forgetting(
    model: Any,
    tokenizer: Any,
    *,
    base: Any | None = None,
    texts: Mapping[str, str] | None = None,
    num_tokens: int = 8192,
    block_length: int = 256,
    batch_size: int = 4,
) -> Forgetting:
    """Compare `model` with its base model on `num_tokens` tokens of `texts` (default: `general_text()`) in blocks.

    The base model is the PeftModel without its adapter, or a second model `base` with the same vocabulary. A LLaVA
    gets no pictures. Raises ValueError if there is no base model or no text.

    >>> from milora_vl.models.tiny import tiny_llama
    >>> model, tokenizer = tiny_llama()
    >>> same = measure_forgetting(model, tokenizer, base=model, num_tokens=64, block_length=32)
    >>> abs(same.kl) < 1e-6
    True
    """
    texts = general_text() if texts is None else texts
    batches = text_batches(texts, tokenizer, num_tokens=num_tokens, block_length=block_length, batch_size=batch_size)
    return compare_on(batches, model, base=base, what=" + ".join(texts))


def compare_on(batches: Iterable[ProbeBatch], model: Any, *, base: Any | None = None, what: str) -> Forgetting:
    """Compare `model` with its base model (see `measure_forgetting`) on any batches; `what` names them in the result.

    Raises ValueError if there is no base model, if the vocabularies differ, or if there are no batches.
    """
    without = base_context(model, base)
    reference = model if base is None else base
    rows: list[Tensor] = []
    documents: list[str] = []
    batches = list(batches)
    bar = progress_bar("forgetting", len(batches), "batches")
    with torch.no_grad(), evaluated(model), evaluated(reference), bar:
        for batch in batches:
            bar.update()
            logits = logits_of(model, batch)
            with without():
                target = logits_of(reference, batch)
            if logits.shape != target.shape:
                raise ValueError(f"the vocabularies differ: {logits.shape[1]:,} tokens, base model {target.shape[1]:,}")
            rows.append(token_sums(logits, target, batch))
            documents += batch.documents
    if not rows:
        raise ValueError("there is nothing to measure forgetting on")
    return summary(torch.cat(rows), documents, what)


def base_context(model: Any, base: Any | None) -> Callable[[], AbstractContextManager[None]]:
    """Return the context for predictions of the base model; for a PeftModel it switches off the adapter."""
    if base is not None:
        return nullcontext
    if not can_recover_base(model):
        raise ValueError("forgetting needs a base model: give base=, or a model with an adapter that trained no biases")
    context: Callable[[], AbstractContextManager[None]] = model.disable_adapter
    return context


def can_recover_base(model: Any) -> bool:
    """Return whether switching off the adapter of `model` restores its base model.

    PEFT trains biases (`bias` of its config) in the base model itself, so they stay when the adapter is off.
    """
    from peft import PeftModel

    configs = model.peft_config.values() if isinstance(model, PeftModel) else ()
    return bool(configs) and all(config.to_dict().get("bias", "none") == "none" for config in configs)


def logits_of(model: Any, batch: ProbeBatch) -> Tensor:
    """Return the logits of the counted positions, (n, vocabulary), row by row."""
    # Some vision towers do not cast pixels to the data type of their weights.
    dtypes = {name: model.dtype if tensor.is_floating_point() else None for name, tensor in batch.inputs.items()}
    inputs = {name: tensor.to(model.device, dtypes[name]) for name, tensor in batch.inputs.items()}
    logits: Tensor = model(**inputs).logits[:, :-1]
    return logits[batch.counted.to(logits.device)]


def token_sums(logits: Tensor, target: Tensor, batch: ProbeBatch) -> Tensor:
    """Return (rows, 5), float64: sums of cross-entropy, base entropy, loss and base loss, and the number of tokens.

    `logits`, `target`: (n, vocabulary), the logits of the tuned and the base model at the counted positions.
    """
    ids = batch.inputs["input_ids"][:, 1:][batch.counted]
    row = torch.arange(len(batch.counted))[:, None].expand_as(batch.counted)[batch.counted]
    total = torch.zeros(len(batch.counted), 5, dtype=torch.float64)
    size = _POSITIONS_ON_CPU if logits.device.type == "cpu" else _POSITIONS
    for start in range(0, len(ids), size):
        part = slice(start, start + size)
        log_q = logits[part].float().log_softmax(-1)
        log_p = target[part].float().log_softmax(-1)
        tokens = ids[part, None].to(log_q.device)
        # Terms with p = 0 in float32 are 0, also if the tuned model has log q = -inf there.
        cross, entropy = (torch.where(log_p > -100, -log_p.exp() * log, 0.0).sum(-1) for log in (log_q, log_p))
        losses = [-log.gather(1, tokens.to(log.device))[:, 0] for log in (log_q, log_p)]
        terms = torch.stack([cross, entropy, *losses, torch.ones_like(cross)], dim=1)
        total.index_add_(0, row[part], terms.double().cpu())
    return total


def summary(sums: Tensor, documents: Sequence[str], what: str) -> Forgetting:
    cross, entropy, loss, base_loss, tokens = sums.unbind(1)
    mean = cluster_mean(documents, tokens)
    (ce, ce_error), (kl, kl_error) = mean(cross), mean(cross - entropy)
    change, change_error = mean(loss - base_loss)
    return Forgetting(
        cross_entropy=ce,
        stderr=ce_error,
        base_entropy=mean(entropy)[0],
        kl=kl,
        kl_stderr=kl_error,
        loss=mean(loss)[0],
        base_loss=mean(base_loss)[0],
        loss_change=change,
        loss_change_stderr=change_error,
        n_tokens=int(tokens.sum()),
        n_blocks=len(sums),
        n_documents=len(set(documents)),
        text=what,
    )


def cluster_mean(documents: Sequence[str], tokens: Tensor) -> Callable[[Tensor], tuple[float, float | None]]:
    """Return a function from sums by row to (mean per token, its standard error clustered by document).

    It is the linearised error of a ratio of two sums over G documents, times G/(G-1). For documents of equal length it
    equals the standard error of their means.
    """
    number = {name: i for i, name in enumerate(dict.fromkeys(documents))}
    index = torch.tensor([number[name] for name in documents])
    count, length = len(number), float(tokens.sum())

    def mean(sums: Tensor) -> tuple[float, float | None]:
        value = float(sums.sum()) / length
        residuals = torch.zeros(count, dtype=torch.float64).index_add_(0, index, sums - value * tokens)
        error = math.sqrt(count / (count - 1) * float(residuals.square().sum())) / length if count > 1 else None
        return value, error

    return mean


def general_text() -> dict[str, str]:
    """Return the texts of the package by name: parts of three public-domain books (general_text/)."""
    folder = files("milora_vl.forgetting") / "general_text"
    names = ("alice_in_wonderland", "news_from_nowhere", "origin_of_species")
    return {name: (folder / f"{name}.txt").read_text(encoding="utf-8") for name in names}


def text_blocks(
    texts: Mapping[str, str], tokenizer: Any, *, num_tokens: int, block_length: int
) -> list[tuple[str, list[int]]]:
    """Return blocks (name of the text, ids), taken from the texts in turn. BOS comes first if the tokenizer adds it.

    A text shorter than a block is one block. The incomplete last block of a longer text is dropped. Raises ValueError
    if the texts contain no tokens to predict.
    """
    first = bos_ids(tokenizer)
    step = block_length - len(first)
    cut: list[Iterator[tuple[str, list[int]]]] = []
    for name, text in texts.items():
        ids = tokenizer(text, add_special_tokens=False).input_ids
        ends = range(step, len(ids) + 1, step) if len(ids) > step else [len(ids)]
        cut.append(iter([(name, first + ids[max(0, end - step) : end]) for end in ends]))
    blocks: list[tuple[str, list[int]]] = []
    remaining = num_tokens
    while cut and remaining > 0:
        source = cut.pop(0)
        block = next(source, None)
        if block is not None:
            remaining -= len(block[1])
            blocks += [block] if len(block[1]) > 1 else []  # a single id has no prediction
            cut.append(source)
    if not blocks:
        raise ValueError("the texts are empty")
    return blocks


def text_batches(
    texts: Mapping[str, str], tokenizer: Any, *, num_tokens: int, block_length: int, batch_size: int
) -> Iterator[ProbeBatch]:
    yield from padded_batches(
        text_blocks(texts, tokenizer, num_tokens=num_tokens, block_length=block_length), batch_size, tokenizer
    )


def ends_of(tokenizer: Any) -> tuple[int, int]:
    """Return the ids that start and end a text: BOS, or EOS without a BOS, and EOS."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    return (eos if bos is None else bos), eos


def padded_batches(rows: Sequence[tuple[str, list[int]]], batch_size: int, tokenizer: Any) -> Iterator[ProbeBatch]:
    """Yield rows of ids, each with the name of its document, in batches padded on the right."""
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        inputs = padded([ids for _, ids in part], tokenizer.eos_token_id or 0)
        yield ProbeBatch(inputs, inputs["attention_mask"][:, 1:].bool(), [name for name, _ in part])


# Tokens of general text. The base model's predictions stay in memory: vocabulary x 2 or 4 bytes per token.
NUM_TOKENS, BLOCK_LENGTH, BATCH_SIZE = 1536, 128, 4


class Probe:
    def __init__(self, base: nn.Module, processor: Any) -> None:
        texts, tokenizer = general_text(), split_processor(processor)[0]
        self.batches = list(
            text_batches(texts, tokenizer, num_tokens=NUM_TOKENS, block_length=BLOCK_LENGTH, batch_size=BATCH_SIZE)
        )
        # In inference_mode, weights that ZeRO-3 gathers could not train afterwards.
        with torch.no_grad(), evaluated(base), gathered_in_forward(base):
            self.targets = [logits_of(base, batch).cpu() for batch in self.batches]

    def measure(self, model: nn.Module, context: Callable[[], AbstractContextManager[Any]]) -> dict[str, float]:
        """Return the log entry of the current model. Its forward runs in `context`, like a training step."""
        rows: list[Tensor] = []
        documents: list[str] = []
        with torch.no_grad(), evaluated(model):
            for batch, target in zip(self.batches, self.targets, strict=True):
                with context():
                    logits = logits_of(model, batch)
                rows.append(token_sums(logits, target.to(logits.device), batch))
                documents += batch.documents
        result = summary(torch.cat(rows), documents, "general text")
        return {
            "forgetting": result.kl,
            "forgetting_stderr": result.kl_stderr or 0.0,
            "forgetting_loss_change": result.loss_change,
        }
