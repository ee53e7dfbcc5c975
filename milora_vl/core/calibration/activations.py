"""Run the base model on calibration batches with hooks, sum C = E[x x'] of each layer input, find its protected inputs.

C is the mean of the E[x x'] of all sources of batches, so that a small source counts as much as a large one.
Each process takes a share of the inputs and sees all batches: a forward is cheap, the eigenvectors of C are not, and
the result does not depend on the number of processes. Free memory decides how many inputs one pass over the batches
serves. A pass ends at its last layer. Nothing of the model changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from inspect import signature
from itertools import zip_longest
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations import is_deepspeed_zero3_enabled

from milora_vl.common.progress import progress_bar
from milora_vl.core.calibration import INPUTS
from milora_vl.core.calibration.bases import (
    Batches,
    Calibration,
    CalibrationError,
    InputBasis,
    first_directions,
    positions_of,
    sources_of,
)
from milora_vl.core.evaluation_mode import evaluated, without_caches
from milora_vl.core.policy.rules import Target
from milora_vl.core.policy.towers import image_token_of, is_encoder_decoder
from milora_vl.core.svd.gram import add_to_lower, full_precision, mirror
from milora_vl.core.weights.distributed import (
    free_memory,
    gather_objects,
    gathered,
    gathered_in_forward,
    rank_and_world_size,
)
from milora_vl.core.weights.matrices import Made, for_each_weight, is_linear

Batch = Mapping[str, Any]
Hook = Callable[[Tensor], None]
ROOM = 0.6  # share of the free memory for the sums of one pass
# A position counts with at most this many times the median energy. Attention sinks have thousands of times the energy,
# and one of them would be 90 % of C. Without them, V lacks their directions: the update then moves what all later
# positions read, and SmolLM2 forgets six times as much at p = 0.9.
LARGEST = 10.0
HELD_OUT = 8  # one batch in so many checks the shares and does not enter C


def require_calibration(targets: Sequence[Target], calibration: Calibration | None) -> None:
    """Raise CalibrationError for calibration batches that are missing, that no rule needs, or that are no list."""
    wanted = next((t for t in targets if t.protect), None)
    if wanted is None and calibration is not None:
        message = "no rule protects inputs, so the calibration would have no effect"
        hint = "add  protect: 0.95  to a rule, or remove the calibration"
        raise CalibrationError(message, where="calibration", hint=hint)
    if wanted is not None and calibration is None:
        message = f"{wanted.path} protects {wanted.protect:.0%} of its inputs, which needs calibration batches"
        hint = "pass  calibration=calibration_texts(model)  or batches of your own, or set  protect: 0"
        raise CalibrationError(message, where="calibration", hint=hint)
    for batches in () if calibration is None else sources_of(calibration):
        rows: Any = batches if isinstance(batches, Sequence) else ()
        wrong = next((row for row in rows if not isinstance(row, Mapping)), None if rows is batches else batches)
        if wrong is not None:
            message = f"expected a list of batches (mappings of tensors), found {type(wrong).__name__}"
            hint = 'pass calibration=list(loader)  or  [{"input_ids": ids, "attention_mask": mask}, ...] (rows, length)'
            raise CalibrationError(message, where="calibration", hint=hint)


@dataclass(slots=True, eq=False)
class _Sum:
    """E[x x'] (in, in) of one layer input below its diagonal, the mean over each source, summed over the sources."""

    total: Tensor | None = None
    now: Tensor | None = None  # of the present source, the sum
    num_now: int = 0  # positions in `now`
    num_positions: int = 0  # in `total`

    def add(self, rows: Tensor) -> None:
        self.num_now += len(rows)
        with full_precision(rows.device):
            self.now = rows.new_zeros(rows.shape[1], rows.shape[1]) if self.now is None else self.now
            add_to_lower(self.now, rows)

    def end_source(self, count: int) -> None:
        """Add the mean of a source over `count` positions: an expert that few of them reach weighs the source less."""
        if self.now is not None and count:
            mean = self.now.div_(count)
            self.total = mean if self.total is None else self.total.add_(mean)
        self.num_positions += self.num_now
        self.now, self.num_now = None, 0


@dataclass(slots=True, eq=False)
class _Input:
    """One layer input: the modules that read it, and what is summed over its positions."""

    module: nn.Module  # the first of the modules
    protect: float
    most: int  # directions, so that the rank fits
    has_positions: bool  # False in the vision tower and the projector, where every position counts
    size: int
    is_repeated: bool  # True if a forward runs the module more than once
    paths: list[str] = field(default_factory=list)
    fit: _Sum = field(default_factory=_Sum)
    held: _Sum = field(default_factory=_Sum)  # of held-out batches
    basis: InputBasis | None = None


_Positioned = Sequence[tuple[Batch, Tensor | None]]


@torch.no_grad()
def for_each_input(
    model: nn.Module,
    targets: Sequence[Target],
    calibration: Calibration,
    make: Callable[[Target, Tensor, InputBasis], Made],
    *,
    is_shown: bool = False,
) -> dict[str, Made]:
    """Return `make(target, W, inputs)` by path, of the targets with `protect` whose inputs this process decomposes.

    W (out, in) is the weight; `inputs` has at most `in` - r directions, so that the rank fits, and is not kept. One
    batch in eight is held out. `is_shown` shows a progress bar on stderr.

    Raises, in every process, CalibrationError for batches without tokens, for a layer that no batch reaches and for NaN
    activations, and what `make` raises.
    """
    require_calibration(targets, calibration)
    wanted = {target.path: target for target in targets if target.protect}
    parted = [_split(batches) for batches in sources_of(calibration)]
    sources = [(_with_positions(model, fit), _with_positions(model, held) if held else []) for fit, held in parted]
    rank = rank_and_world_size()[0]
    made: dict[str, Made] = {}

    def decomposed(path: str, W: Tensor) -> Made:
        one, target = readers[path], wanted[path]
        basis = one.basis or _basis(one)
        one.basis = None if path == one.paths[-1] else basis
        return make(target, W, basis)

    with gathered(model), evaluated(model), without_caches(model):
        inputs = _inputs_in_order(model, wanted, [batch for fit, _ in sources for batch, _ in fit])
        readers = {path: one for one in inputs for path in one.paths}
        solver = 20 * max((one.size for one in inputs), default=0) ** 2  # bytes: a copy of C, and what `eigh` works in
        room = ROOM * max(0, min(gather_objects(free_memory(next(model.parameters()).device))) - solver)
        room /= 4 if len(sources) > 1 else 2  # sums of two kinds; of a source and in all
        passes = list(zip_longest(*(_passes(share, room) for share in _shares(inputs)), fillvalue=[]))
        count = sum(len(fit) + len(held) for fit, held in sources)
        with progress_bar(INPUTS, len(passes) * count, "batches", is_shown=is_shown and rank == 0) as bar:
            for parts in passes:
                for fit, held in sources:
                    _add(model, fit, {one: one.fit for one in parts[rank]}, bar.update)
                    _add(model, held, {one: one.held for one in parts[rank]}, bar.update)
                queues = [[path for one in part for path in one.paths] for part in parts]
                made |= for_each_weight(model, queues, decomposed)
    return made


def _add(model: nn.Module, batches: _Positioned, sums: Mapping[_Input, _Sum], on_batch: Callable[[], object]) -> None:
    """Add one source of batches to the sums. Under ZeRO-3 all processes run the same forwards, and to their ends."""
    ends = not (is_deepspeed_zero3_enabled() or any(one.is_repeated for one in sums))
    for batch, positions in batches:
        if sums or is_deepspeed_zero3_enabled():
            _run(model, batch, {one.module: _adder(one, one_sum, positions) for one, one_sum in sums.items()}, ends)
        on_batch()
    for one, one_sum in sums.items():
        one_sum.end_source((_count(batches) if one.has_positions else 0) or one_sum.num_now)


def _shares(inputs: Sequence[_Input]) -> list[list[_Input]]:
    """Return the inputs of each process, in their order: shares of about equal n^3."""
    shares: list[list[_Input]] = [[] for _ in range(rank_and_world_size()[1])]
    for one in sorted(inputs, key=lambda one: -one.size):
        min(shares, key=lambda share: sum(float(other.size) ** 3 for other in share)).append(one)
    return [[one for one in inputs if one in share] for share in shares]


def _split(batches: Sequence[Batch]) -> tuple[list[Batch], list[Batch]]:
    """Return the batches for C and those that are held out: the last of each eight, or the last of two to seven.

    Batches with and without pictures are split separately.
    """
    fit: list[Batch] = []
    held: list[Batch] = []
    for kind in dict.fromkeys(map(_kind, batches)):
        members = [batch for batch in batches if _kind(batch) == kind]
        for number, batch in enumerate(members, start=1):
            is_last = number == len(members) and 1 < number < HELD_OUT
            (held if number % HELD_OUT == 0 or is_last else fit).append(batch)
    return fit, held


def _with_positions(model: nn.Module, batches: Batches) -> list[tuple[Batch, Tensor | None]]:
    weights = positions_of(batches, image_token_of(model))
    # An encoder and its decoder read different ids: there every position counts.
    return [(batch, None if is_encoder_decoder(model) else one) for batch, one in zip(batches, weights, strict=True)]


def _count(source: Sequence[tuple[Batch, Tensor | None]]) -> int:
    return sum(int((positions > 0).sum()) for _, positions in source if positions is not None)


def _kind(batch: Batch) -> tuple[str, ...]:
    return tuple(sorted(batch))


class _AllSeen(Exception):
    pass


def _run(model: nn.Module, batch: Batch, hooks: Mapping[nn.Module, Hook], ends: bool) -> None:
    """Call the model on a batch, and each hook with the input of its module. `ends`: stop after the last module."""
    left = set(hooks)
    handles = []

    def hook_of(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        hooks[module](x)
        left.discard(module)
        if ends and not left:
            raise _AllSeen

    try:
        with gathered_in_forward(model):
            handles += [module.register_forward_pre_hook(hook_of, with_kwargs=True) for module in hooks]
            given, takes = model_inputs(model, batch), signature(model.forward).parameters
            if "logits_to_keep" in takes and getattr(model, "get_output_embeddings", lambda: None)() not in hooks:
                given |= {"labels": None, "logits_to_keep": 1}  # of large pictures all logits have gigabytes
            model(**given)
    except _AllSeen:
        pass
    finally:
        for handle in handles:
            handle.remove()


def model_inputs(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """Return a batch on the device of the model, with pixels in its data type."""
    first = next(parameter for parameter in model.parameters() if parameter.is_floating_point())

    def moved(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(first) if value.is_floating_point() else value.to(first.device)

    return {name: moved(value) for name, value in batch.items()}


def _inputs_in_order(model: nn.Module, targets: Mapping[str, Target], batches: Sequence[Batch]) -> list[_Input]:
    """Return the layer inputs in the order of the forward pass, from one batch of each kind.

    While layers are missing, other batches follow: an expert of a mixture sees no token of some batches. Linear layers
    that get the same tensor, one after the other and in every call, read one input: q, k and v, or gate and up.
    """
    wanted = {model.get_submodule(path): target for path, target in targets.items()}
    calls: dict[nn.Module, list[int]] = {}  # the numbers of the tensors that each module gets
    last: list[Any] = [None, 0]  # the last tensor, and its number
    ran: set[nn.Module] = set()  # in this forward
    repeated: set[nn.Module] = set()

    def hook_of(module: nn.Module) -> Hook:
        def see(x: Tensor) -> None:
            if x.numel() == 0:  # an expert without tokens
                return
            if x is not last[0]:
                last[:] = [x, last[1] + 1]
            calls.setdefault(module, []).append(last[1])
            (repeated if module in ran else ran).add(module)

        return see

    hooks = {module: hook_of(module) for module in wanted}
    firsts = {_kind(batch): number for number, batch in reversed(list(enumerate(batches)))}.values()
    order = sorted(range(len(batches)), key=lambda number: number not in firsts)
    for index, number in enumerate(order):
        if index >= len(firsts) and len(calls) == len(wanted):
            break
        batch = batches[number]
        if batch.keys() <= {"input_ids", "attention_mask"}:  # the layers have the same order in every row
            batch = {name: value[:1] for name, value in batch.items()}
        _run(model, batch, hooks, ends=False)
        last[0] = None
        ran.clear()
    inputs: dict[Any, _Input] = {}
    for module, numbers in calls.items():
        target = wanted[module]
        most = target.shape[1] - (target.rank or 0)
        key = (tuple(numbers), target.protect, most, "" if is_linear(module) else target.path)
        if key not in inputs:
            has_positions = target.tower not in ("vision", "projector")
            inputs[key] = _Input(module, target.protect, most, has_positions, target.shape[1], module in repeated)
        inputs[key].paths.append(target.path)
    missing = [target.path for module, target in wanted.items() if module not in calls]
    if missing:
        message = f"no calibration batch reaches {len(missing):,} of the {len(wanted):,} layers with protected inputs"
        hint = "calibrate with pictures or leave the vision tower out, with more text for experts, or do not protect it"
        raise CalibrationError(message, where=missing[0], hint=hint)
    return list(inputs.values())


def _passes(inputs: Sequence[_Input], room: float) -> Iterator[list[_Input]]:
    """Yield consecutive inputs whose sums fit into `room` bytes together; at least one at a time."""
    part: list[_Input] = []
    for one in inputs:
        if part and sum(4 * other.size**2 for other in (*part, one)) > room:  # in float32
            yield part
            part = []
        part.append(one)
    if part:
        yield part


def input_rows(module: nn.Module, x: Tensor) -> Tensor:
    """Return the vectors (positions, in) that the matrix of a layer is multiplied with."""
    if isinstance(module, nn.Conv2d):
        x = _patches(module, x)
    return x.detach().reshape(-1, x.shape[-1])


def _rows(one: _Input, x: Tensor, positions: Tensor | None) -> Tensor:
    """Return the input vectors (positions, in) in float32, times the roots of their weights."""
    rows = input_rows(one.module, x)
    if positions is None or not one.has_positions or positions.numel() != len(rows):
        weights = torch.ones(len(rows), device=rows.device)  # pictures, and layers that see a part of the positions
    else:
        weights = positions.reshape(-1).to(rows.device)
        rows, weights = rows[weights > 0], weights[weights > 0]
    rows = rows.float()
    return rows * (weights * energy_limits(rows)).sqrt()[:, None]


def energy_limits(rows: Tensor) -> Tensor:
    """Return the factors (positions,), at most 1, that limit the energy of each position to LARGEST medians."""
    energies = torch.linalg.vector_norm(rows, dim=1).square()
    limit = LARGEST * energies.median() if len(rows) else 0.0
    return torch.where(energies > limit, limit / energies, 1.0) if limit > 0 else torch.ones_like(energies)


def _patches(module: nn.Conv2d, x: Tensor) -> Tensor:
    """Return the input of a convolution as the vectors that its kernel is multiplied with, (images, positions, in)."""
    padding: Any = module.padding
    if padding == "same":
        (top, left), (height, width) = (((size - 1) // 2 for size in module.kernel_size), module.kernel_size)
        x = F.pad(x, (left, width - 1 - left, top, height - 1 - top))
    padding = 0 if isinstance(padding, str) else padding
    unfolded = F.unfold(x.float(), module.kernel_size, padding=padding, stride=module.stride)  # type: ignore[arg-type]
    return unfolded.transpose(1, 2)


def _adder(one: _Input, one_sum: _Sum, positions: Tensor | None) -> Hook:
    return lambda x: one_sum.add(_rows(one, x, positions))


def _basis(one: _Input) -> InputBasis:
    """Decompose the sum of an input, check its directions V on held-out batches, and drop both sums."""
    fit, held = one.fit.total, one.held.total
    assert fit is not None
    if not all(bool(torch.isfinite(total).all()) for total in (fit, held) if total is not None):
        message = "the inputs of this layer contain NaN or infinite values on the calibration text"
        hint = "load the base model in bfloat16 or float32, and check its weights and the calibration batches"
        raise CalibrationError(message, where=one.paths[0], hint=hint)
    V, share = first_directions(mirror(fit), one.protect, one.most)
    basis = InputBasis(V, share, one.fit.num_positions)
    one.fit.total = one.held.total = None
    if held is None or (total := float(held.diagonal().sum(dtype=torch.float64))) == 0:
        return basis
    with full_precision(V.device):
        inside = float(((mirror(held) @ V) * V).sum(dtype=torch.float64))
    return replace(basis, held_out=inside / total)
