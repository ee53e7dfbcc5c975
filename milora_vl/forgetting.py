"""How much a tuned model has forgotten: its cross-entropy against the base model's predictions on general text.

The measure of the paper (arXiv:2406.09044, after Kalajdzievski 2024): at every position of a text, the base model's
predicted distribution is the target. In nats per token; its floor is the base model's own entropy; what lies above is
the Kullback-Leibler divergence. The text is from three public-domain books (general_text/).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

from milora_data.tokens import bos_ids

# Positions whose distributions over the vocabulary are held in float32 at a time.
_POSITIONS = 256


@dataclass(frozen=True, slots=True)
class Forgetting:
    """Means over tokens, in nats; standard errors are over blocks of text.

    `cross_entropy` is the paper's number, `kl` its distance from the floor `base_entropy`. `loss` and `base_loss` are
    the plain cross-entropies of the text itself, `loss_change` their difference.
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
    """Compare `model` with its base on `num_tokens` tokens of `texts` (default: `general_text()`), block by block.

    The base is the PeftModel itself without its adapter, or the second model `base` with the same vocabulary. A LLaVA
    reads text alone. Raises ValueError when there is no base, or too little text for one block.

    >>> from milora_vl.tiny import tiny_llama
    >>> model, tokenizer = tiny_llama()
    >>> same = measure_forgetting(model, tokenizer, base=model, num_tokens=64, block_length=32)
    >>> abs(same.kl) < 1e-6
    True
    """
    texts = general_text() if texts is None else texts
    without = _base_context(model, base)
    blocks = text_blocks(texts, tokenizer, num_tokens=num_tokens, block_length=block_length)
    sums = []
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for start in range(0, len(blocks), batch_size):
                ids = torch.tensor(blocks[start : start + batch_size], device=model.device)
                tuned = model(input_ids=ids).logits
                with without():
                    target = (model if base is None else base)(input_ids=ids).logits
                sums.append(_block_means(tuned, target, ids))
    finally:
        model.train(training)
    return _summary(torch.cat(sums), (block_length - 1) * len(blocks), " + ".join(texts))


def general_text() -> dict[str, str]:
    """Return the package's own texts by name."""
    folder = files("milora_vl") / "general_text"
    names = ("alice_in_wonderland", "news_from_nowhere", "origin_of_species")
    return {name: (folder / f"{name}.txt").read_text(encoding="utf-8") for name in names}


def text_blocks(texts: Mapping[str, str], tokenizer: Any, *, num_tokens: int, block_length: int) -> list[list[int]]:
    """Return blocks of `block_length` ids, cut from the texts in turn; BOS first where the tokenizer adds one.

    Raises ValueError when the texts do not fill one block.
    """
    first = bos_ids(tokenizer)
    step = block_length - len(first)
    cut: list[Iterator[list[int]]] = []
    for text in texts.values():
        ids = tokenizer(text, add_special_tokens=False).input_ids
        cut.append(iter([first + ids[i : i + step] for i in range(0, len(ids) - step + 1, step)]))
    blocks: list[list[int]] = []
    while cut and (not blocks or len(blocks) * block_length < num_tokens):
        source = cut.pop(0)
        block = next(source, None)
        if block is not None:
            blocks.append(block)
            cut.append(source)
    if not blocks:
        raise ValueError(f"the texts are shorter than one block of {block_length} tokens; give more text")
    return blocks


def _base_context(model: Any, base: Any | None) -> Callable[[], AbstractContextManager[None]]:
    from peft import PeftModel

    if base is not None:
        return nullcontext
    if not isinstance(model, PeftModel):
        raise ValueError("forgetting is measured against a base: give base=, or a model with an adapter")
    return model.disable_adapter


def _block_means(tuned: Tensor, target: Tensor, ids: Tensor) -> Tensor:
    """Return (blocks, 4) means over positions: cross-entropy, base entropy, own loss, the base's loss."""
    rows = []
    for block in range(len(ids)):
        total = torch.zeros(4, dtype=torch.float64)
        for start in range(0, ids.shape[1] - 1, _POSITIONS):
            part = slice(start, min(start + _POSITIONS, ids.shape[1] - 1))
            own = tuned[block, part].float().log_softmax(-1)
            base = target[block, part].float().log_softmax(-1)
            words = ids[block, part.start + 1 : part.stop + 1, None]
            weight = base.exp()
            terms = (weight * own, weight * base, own.gather(1, words), base.gather(1, words))
            total -= torch.stack([term.sum(dtype=torch.float64).cpu() for term in terms])
        rows.append(total / (ids.shape[1] - 1))
    return torch.stack(rows)


def _summary(means: Tensor, n_tokens: int, text: str) -> Forgetting:
    cross, entropy, loss, base_loss = means.unbind(1)

    def stderr(values: Tensor) -> float | None:
        return float(values.std() / len(values) ** 0.5) if len(values) > 1 else None

    return Forgetting(
        cross_entropy=float(cross.mean()),
        stderr=stderr(cross),
        base_entropy=float(entropy.mean()),
        kl=float((cross - entropy).mean()),
        kl_stderr=stderr(cross - entropy),
        loss=float(loss.mean()),
        base_loss=float(base_loss.mean()),
        loss_change=float((loss - base_loss).mean()),
        loss_change_stderr=stderr(loss - base_loss),
        n_tokens=n_tokens,
        n_blocks=len(means),
        text=text,
    )
