"""The input directions of a layer in which the gradient of a task's loss is largest, without a weight's gradient.

The gradient of a weight W (out, in) is G = sum g x' over the positions of a batch, with the layer's input x (in) and
the gradient g (out) of its output. A small change of W lowers the loss most along the first right singular vectors of
G. G is as large as W; a sketch Y = Omega G with a few more rows than the rank has nearly the same row space
(Halko, Martinsson and Tropp, arXiv:0909.4061) and is summed while the model runs backward. Related work: LoRA-GA
(arXiv:2407.05000), KeepLoRA (arXiv:2601.19659).
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from peft.utils.integrations import gather_params_ctx
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_layers import GradientCheckpointingLayer

from milora_vl.common.progress import progress_bar
from milora_vl.core.calibration import GRADIENT
from milora_vl.core.calibration.activations import input_rows, model_inputs
from milora_vl.core.calibration.bases import CalibrationError
from milora_vl.core.calibration.modes import evaluated, without_caches
from milora_vl.core.policy.rules import Target
from milora_vl.core.policy.towers import peft_task
from milora_vl.core.svd.precision import full_precision
from milora_vl.core.weights.distributed import from_first_rank, rank_and_world_size

OVERSAMPLED = 8  # rows of a sketch beyond the rank
RECORDS = 32  # of the training data, in a run of milora_vl.train: docs/studies/fixed-a.md


def gradient_sketches(
    model: nn.Module, targets: Sequence[Target], batches: Sequence[Mapping[str, Any]], *, is_shown: bool = False
) -> dict[str, Tensor]:
    """Return a sketch (r + 8, in) in float32 of the gradient of each target's weight, by path.

    `batches` holds arguments of the model's forward, whose output has a `loss` (pass `labels`). Each batch runs forward
    and backward once and counts by the number of labels in its loss; no weight gets a gradient. On accelerators and
    under ZeRO-3 the blocks of the model run a second time in the backward, so that only their inputs stay in memory.
    All processes get the sketches of the first one.

    Warns about layers without a gradient, whose sketch is random. Raises CalibrationError without batches, for a model
    whose output has no loss, and for gradients that are not finite, or zero everywhere.
    """
    sketches = {target.path: _Sketch(target) for target in targets}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    handles = []
    for target in targets:
        layer = model.get_submodule(target.path)
        handles.append(layer.register_forward_pre_hook(_tracked, with_kwargs=True))
        handles.append(layer.register_forward_hook(partial(_watched, sketches[target.path]), with_kwargs=True))
    bar = progress_bar(GRADIENT, len(batches), "batches", is_shown=is_shown and rank_and_world_size()[0] == 0)
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        with evaluated(model), without_caches(model), _little_memory(model), torch.enable_grad(), bar:
            for batch in batches:
                loss = getattr(model(**model_inputs(model, batch)), "loss", None)
                if not isinstance(loss, Tensor):
                    raise CalibrationError(
                        f"the output of {type(model).__name__} has no loss",
                        code="task-no-loss",
                        where="task",
                        hint='pass batches with labels:  task=[{"input_ids": ..., "labels": ...}]',
                    )
                weight = _weight(model, batch)
                if loss.requires_grad and weight:  # not if the batch reaches no target; without labels the mean is NaN
                    (loss * weight).backward()
                bar.update()
    finally:
        for handle in handles:
            handle.remove()
        for parameter in trained:
            parameter.requires_grad_(True)
    device = next(model.parameters()).device
    found = {path: one.finished(device) for path, one in sketches.items()}
    without = [path for path, sketch in found.items() if not bool(sketch.any())]
    if len(without) == len(found):
        raise CalibrationError(
            "the task's gradient is zero in every layer",
            code="task-no-gradient",
            where="task",
            hint="pass batches with supervised tokens: labels other than -100",
        )
    if without:
        warnings.warn(
            f"{len(without):,} of {len(found):,} layers get no gradient from the task's batches, for example "
            f"{without[0]}: their A is random, and they learn only if the training reaches them",
            stacklevel=3,
        )
    return {path: sketches[path].filled(sketch) for path, sketch in found.items()}


def _tracked(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Let gradients flow to the output of a layer although no weight before it trains."""
    return tuple(map(_with_gradient, args)), {name: _with_gradient(value) for name, value in kwargs.items()}


def _with_gradient(x: Any) -> Any:
    is_constant = isinstance(x, Tensor) and x.is_floating_point() and not x.requires_grad
    return x.detach().requires_grad_() if is_constant else x


def _weight(model: nn.Module, batch: Mapping[str, Any]) -> int:
    """Return the number of labels whose mean is the loss of a batch: the division into batches has no effect.

    A causal model predicts each token from those before it, so the first label of a row does not count.
    """
    labels = batch.get("labels")
    if not isinstance(labels, Tensor):
        return 1
    return int(((labels[:, 1:] if peft_task(model) == "CAUSAL_LM" else labels) != -100).sum())


@contextmanager
def _little_memory(model: nn.Module) -> Iterator[None]:
    """Keep of each block only its input for the backward, and gather one block at a time under ZeRO-3.

    A 7B in half precision holds 5 MB of activations a token otherwise. On a CPU time counts more, so blocks run once.
    """
    is_sharded = is_deepspeed_zero3_enabled()
    on_cpu = next(model.parameters()).device.type == "cpu"
    blocks = [] if on_cpu and not is_sharded else _outermost(model)
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    outside = [parameter for parameter in model.parameters() if id(parameter) not in inside]
    own = {block: vars(block).get("forward") for block in blocks}
    with gather_params_ctx(outside, modifier_rank=None), ExitStack() as opened:
        for block in blocks:
            run = partial(_gathered, opened, block, block.forward)
            block.forward = partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False)
        try:
            yield
        finally:
            for block, forward in own.items():
                if forward is None:
                    del block.forward
                else:
                    block.forward = forward


def _outermost(model: nn.Module) -> list[nn.Module]:
    """Return the blocks of a model of transformers that are not inside another block."""
    found: list[nn.Module] = []
    for child in model.children():
        found += [child] if isinstance(child, GradientCheckpointingLayer) else _outermost(child)
    return found


def _gathered(opened: ExitStack, block: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run a block with its own parameters in place of the last block's, which has finished, also in the backward."""
    opened.close()
    opened.enter_context(gather_params_ctx(list(block.parameters()), modifier_rank=None))
    return forward(*args, **kwargs)


class _Watch(torch.autograd.Function):
    """The output of a layer; in the backward, a sketch reads the input, which a checkpointed block computes again."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, add: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.add = add
        return output.clone()  # the model may change it in place

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        ctx.add(*ctx.saved_tensors, gradient)
        return gradient, None, None


def _watched(
    sketch: _Sketch, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> Tensor | None:
    x = (*args, *kwargs.values())[0]
    return _Watch.apply(output, x, partial(sketch.add, module)) if output.requires_grad else None


class _Sketch:
    """The sum Omega G of one layer, with a random Omega (r + 8, out) that depends on its path alone."""

    def __init__(self, target: Target) -> None:
        assert target.rank is not None
        self.path = target.path
        self.width = target.shape[1]
        self.generator = torch.Generator().manual_seed(zlib.crc32(target.path.encode(), target.seed))
        self.omega = torch.randn(target.rank + OVERSAMPLED, target.shape[0], generator=self.generator)
        self.total: Tensor | None = None

    def add(self, module: nn.Module, x: Tensor, gradient: Tensor) -> None:
        rows = input_rows(module, x).float()
        if isinstance(module, nn.Conv2d):
            gradient = gradient.flatten(2).transpose(1, 2)
        gradient = gradient.reshape(-1, gradient.shape[-1]).float()
        with full_precision(rows.device):
            self.omega = self.omega.to(rows.device)
            part = (gradient @ self.omega.T).T @ rows
            self.total = part if self.total is None else self.total.add_(part)

    def finished(self, device: torch.device) -> Tensor:
        total = torch.zeros(len(self.omega), self.width, device=device) if self.total is None else self.total
        if not bool(torch.isfinite(total).all()):
            raise CalibrationError(
                "the task's gradient contains NaN or infinite values",
                code="task-not-finite",
                where=self.path,
                hint="load the base model in bfloat16 or float32, and check its weights and the task batches",
            )
        return from_first_rank(total) if rank_and_world_size()[1] > 1 else total

    def filled(self, total: Tensor) -> Tensor:
        """Add noise of a millionth of the norm: rows that a gradient of low rank leaves open become random."""
        noise = torch.randn(total.shape, generator=self.generator).to(total.device)
        norm = torch.linalg.vector_norm(total)
        return noise if norm == 0 else total + noise * (1e-6 * norm / total.numel() ** 0.5)
