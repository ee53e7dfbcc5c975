"""Run the base model on calibration batches with hooks, sum C = E[x x'] of each layer input, find its protected inputs.

C is the mean of the E[x x'] of all sources of batches, so that a small source counts as much as a large one.
The memory of C (in, in) decides how many layers one pass over the batches serves: all layers of a small model, a few
blocks of a large one. A pass ends at its last layer. Nothing of the model changes. Too little data gets a warning.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
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
    ProtectedInputs,
    first_directions,
    leaving_ranks,
    positions_of,
    sources_of,
)
from milora_vl.core.policy.rules import Target
from milora_vl.core.policy.towers import image_token_of, is_encoder_decoder, keep_weights_readable
from milora_vl.core.svd.gram import add_to_lower, full_precision, mirror
from milora_vl.core.weights.distributed import gather, rank_and_world_size
from milora_vl.core.weights.matrices import gathered_in_forward, is_linear

Batch = Mapping[str, Any]
Hook = Callable[[Tensor], None]
PASS_BYTES = 2 * 1024**3  # memory of all C of one pass; as much again with several sources
# A position counts with at most this many times the median energy. Attention sinks have thousands of times the energy,
# and one of them would be 90 % of C. Without them, V lacks their directions: the update then moves what all later
# positions read, and SmolLM2 forgets six times as much at p = 0.9.
LARGEST = 10.0
HELD_OUT = 8  # one batch in so many checks the shares and does not enter C
LEAST_HELD_OUT = 0.5  # of the share; a layer that holds less of held-out energy than this gets a warning
FEWEST = 0.01  # a layer that protects a smaller share of its input directions than this gets a warning


def protected_inputs(
    model: nn.Module, targets: Sequence[Target], calibration: Calibration | None, *, is_shown: bool = False
) -> ProtectedInputs | None:
    """Return the protected inputs of all targets with `protect`, or None without such targets.

    A layer keeps as many free directions as its rank, so it may protect less than its rule asks for.
    `is_shown` shows a progress bar on stderr. Warns about layers that protect less than asked or almost nothing, and
    about too little data. Raises CalibrationError as `find_inputs` and `require_calibration`.
    """
    require_calibration(targets, calibration)
    wanted = [t for t in targets if t.protect]
    if calibration is None:
        return None
    found = find_inputs(model, wanted, calibration, is_shown=is_shown)
    lowered, changed = leaving_ranks(
        found, {t.path: t.rank for t in wanted if t.rank is not None and t.path in found.numbers}
    )
    told = gather((_told(found), _told(lowered), changed))
    if rank_and_world_size()[0] == 0:
        _warn(*(_joined([part[n] for part in told]) for n in (0, 1)), [path for part in told for path in part[2]])
    return lowered


def _told(inputs: ProtectedInputs) -> ProtectedInputs:
    """Return the inputs without their directions, which are large."""
    return replace(inputs, bases=[replace(one, V=one.V.to("meta")) for one in inputs.bases])


def _joined(parts: Sequence[ProtectedInputs]) -> ProtectedInputs:
    bases = [basis for part in parts for basis in part.bases]
    starts = [sum(len(part.bases) for part in parts[:n]) for n in range(len(parts))]
    return ProtectedInputs(
        bases, {path: start + n for start, part in zip(starts, parts, strict=True) for path, n in part.numbers.items()}
    )


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
            raise CalibrationError(
                f"expected a list of batches (mappings of tensors), found {type(wrong).__name__}",
                where="calibration",
                hint='pass  calibration=[{"input_ids": ids, "attention_mask": mask}, ...]  with tensors (rows, '
                "length); list(loader) makes it from a DataLoader",
            )


def _warn(found: ProtectedInputs, lowered: ProtectedInputs, changed: Sequence[str]) -> None:
    """Warn about layers that protect almost nothing, or less than their rule asks for, and about too little data.

    With too little data, directions describe the calibration batches and not the inputs of the layer in general.
    """
    bases = {path: found.bases[number] for path, number in found.numbers.items()}
    few = [path for path, basis in bases.items() if basis.num_directions < FEWEST * basis.size]
    if few:
        basis = bases[few[0]]
        warnings.warn(
            f"{len(few):,} of {len(bases):,} layers protect almost nothing: {few[0]} protects {basis.num_directions} "
            f"of {basis.size} input directions, which hold {basis.share:.1%} of its activation energy. A few "
            "directions dominate there; raise protect for these layers.",
            stacklevel=3,
        )
    unsure = [path for path, basis in bases.items() if _is_unsure(basis)]
    if unsure:
        basis = bases[unsure[0]]
        seen = "nothing was held out" if basis.held_out is None else f"{basis.held_out:.1%} on held-out data"
        warnings.warn(
            f"too little calibration data for {len(unsure):,} of {len(bases):,} layers: {unsure[0]} has {basis.size:,} "
            f"inputs and {basis.num_positions:,} positions; its directions hold {basis.share:.1%} of the activation "
            f"energy on them, and {seen}. Calibrate with more data.",
            stacklevel=3,
        )
    if changed:
        lowest = min(changed, key=lambda path: lowered.of(path).share)
        warnings.warn(
            f"{len(changed):,} of {len(bases):,} layers protect less than their rule asks for, so that their rank "
            f"fits; the lowest share is {lowered.of(lowest).share:.1%}, in {lowest}. A lower rank protects more.",
            stacklevel=3,
        )


def _is_unsure(basis: InputBasis) -> bool:
    if basis.held_out is not None:
        return basis.held_out < LEAST_HELD_OUT * basis.share
    return basis.num_positions < basis.size


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode; afterwards each module is in its own mode, such as a frozen batch norm.

    Quantised weights, which a forward in this mode can repack, stay readable, after an error too.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
        keep_weights_readable(model)


@contextmanager
def without_caches(model: nn.Module) -> Iterator[None]:
    """Let forwards keep no keys, values and states: they need memory, and a block that runs again would add to them."""
    found: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    configs = [config for config in {id(one): one for one in found}.values() if getattr(config, "use_cache", False)]
    for config in configs:
        config.use_cache = False
    try:
        yield
    finally:
        for config in configs:
            config.use_cache = True


@dataclass(slots=True, eq=False)
class _Input:
    """One layer input: the modules that read it, and what is summed over its positions."""

    module: nn.Module  # the first of the modules
    protect: float
    has_positions: bool  # False in the vision tower and the projector, where every position counts
    size: int
    is_repeated: bool  # True if a forward runs the module more than once
    paths: list[str] = field(default_factory=list)
    total: Tensor | None = None  # of the sources so far, the sum of E[x x'] (in, in) below its diagonal
    num_positions: int = 0  # in `total`
    now: Tensor | None = None  # of the present source, the sum of x x' below its diagonal
    num_now: int = 0  # positions in `now`
    basis: InputBasis | None = None
    held: Tensor | float = 0.0  # of held-out batches (k + 1,): the energy along each of V, and in total
    held_now: Tensor | float = 0.0  # the same of the present source


@torch.no_grad()
def find_inputs(
    model: nn.Module, targets: Sequence[Target], calibration: Calibration, *, is_shown: bool = False
) -> ProtectedInputs:
    """Return the protected inputs of all targets whose rule has `protect`.

    One batch in eight is held out. All processes get identical bits from the first one.
    `is_shown` shows a progress bar on stderr.

    Raises CalibrationError for batches without tokens, for a layer that no batch reaches, and for NaN activations.
    """
    parted = [_split(batches) for batches in sources_of(calibration)]
    fits = [_with_positions(model, fit) for fit, _ in parted]
    helds = [_with_positions(model, held) for _, held in parted if held]
    num_fit, num_held = (sum(map(len, part)) for part in (fits, helds))
    shown = is_shown and rank_and_world_size()[0] == 0
    with evaluated(model), without_caches(model):
        inputs = _inputs_in_order(model, targets, [batch for fit, _ in parted for batch in fit])
        mine = _share(inputs)
        passes = list(_passes(mine))
        if is_deepspeed_zero3_enabled():  # all processes run the same forwards, and to their ends
            passes += [[]] * (max(gather(len(passes))) - len(passes))
        with progress_bar(INPUTS, len(passes) * num_fit + num_held, "batches", is_shown=shown) as bar:
            for part in passes:
                for fit in fits:
                    for batch, positions in fit:
                        _run(model, batch, {one.module: _adder(one, positions) for one in part}, _ends(part))
                        bar.update()
                    for one in part:
                        _end_source(one, _count(fit))
                for one in part:
                    one.basis = _basis(one)
                    one.total = None
            for held in helds:
                for batch, positions in held:
                    _run(model, batch, {one.module: _checker(one, positions) for one in mine}, _ends(mine))
                    bar.update()
                for one in mine:
                    _end_source(one, _count(held))
    return ProtectedInputs(
        [_checked(one) for one in mine], {path: number for number, one in enumerate(mine) for path in one.paths}
    )


def _share(inputs: Sequence[_Input]) -> list[_Input]:
    """Return the inputs of this process: shares of equal work, each input with the layers that read it."""
    rank, processes = rank_and_world_size()
    work = [0.0] * processes
    mine = []
    for number in sorted(range(len(inputs)), key=lambda n: -inputs[n].size):
        owner = work.index(min(work))
        work[owner] += float(inputs[number].size) ** 3
        if owner == rank:
            mine.append(number)
    return [inputs[number] for number in sorted(mine)]


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


def _ends(inputs: Sequence[_Input]) -> bool:
    """Return whether a forward may end when each module ran: not if one runs again."""
    return not (is_deepspeed_zero3_enabled() or any(one.is_repeated for one in inputs))


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
            model(**model_inputs(model, batch))
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


def _inputs_in_order(model: nn.Module, targets: Sequence[Target], batches: Sequence[Batch]) -> list[_Input]:
    """Return the layer inputs in the order of the forward pass, from one batch of each kind.

    While layers are missing, other batches follow: an expert of a mixture sees no token of some batches. Linear layers
    that get the same tensor, one after the other and in every call, read one input: q, k and v, or gate and up.
    """
    wanted = {model.get_submodule(t.path): t for t in targets if t.protect}
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
    for place, number in enumerate(order):
        if place >= len(firsts) and len(calls) == len(wanted):
            break
        batch = batches[number]
        if batch.keys() <= {"input_ids", "attention_mask"}:  # the order of the layers is that of every row
            batch = {name: value[:1] for name, value in batch.items()}
        _run(model, batch, hooks, ends=False)
        last[0] = None
        ran.clear()
    inputs: dict[Any, _Input] = {}
    for module, numbers in calls.items():
        target = wanted[module]
        key = (tuple(numbers), target.protect, "" if is_linear(module) else target.path)
        if key not in inputs:
            has_positions = target.tower not in ("vision", "projector")
            inputs[key] = _Input(module, target.protect, has_positions, target.shape[1], module in repeated)
        inputs[key].paths.append(target.path)
    missing = [target.path for module, target in wanted.items() if module not in calls]
    if missing:
        message = f"no calibration batch reaches {len(missing):,} of the {len(wanted):,} layers with protected inputs"
        hint = "calibrate with pictures too, and with more text for experts of a mixture, or do not protect it"
        raise CalibrationError(message, where=missing[0], hint=hint)
    return list(inputs.values())


def _passes(inputs: Sequence[_Input]) -> Iterator[list[_Input]]:
    """Yield consecutive inputs whose sums fit into memory together; at least one at a time."""
    part: list[_Input] = []
    for one in inputs:
        if part and sum(4 * other.size**2 for other in (*part, one)) > PASS_BYTES:  # in float32
            yield part
            part = []
        part.append(one)
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
    """Return the input of a convolution as the vectors that its kernel is multiplied with, (images, places, in)."""
    padding: Any = module.padding
    if padding == "same":
        (top, left), (height, width) = (((size - 1) // 2 for size in module.kernel_size), module.kernel_size)
        x = F.pad(x, (left, width - 1 - left, top, height - 1 - top))
    padding = 0 if isinstance(padding, str) else padding
    unfolded = F.unfold(x.float(), module.kernel_size, padding=padding, stride=module.stride)  # type: ignore[arg-type]
    return unfolded.transpose(1, 2)


def _adder(one: _Input, positions: Tensor | None) -> Hook:
    def add(x: Tensor) -> None:
        rows = _rows(one, x, positions)
        one.num_now += len(rows)
        with full_precision(rows.device):
            one.now = rows.new_zeros(one.size, one.size) if one.now is None else one.now
            add_to_lower(one.now, rows)

    return add


def _end_source(one: _Input, count: int) -> None:
    """Add the mean over the positions of a source to the sum of all.

    `count` is their number where it is known: an expert that few of them reach weighs the source less.
    """
    count = count if one.has_positions and count else one.num_now
    if one.now is not None and count:
        mean = one.now.div_(count)
        one.total = mean if one.total is None else one.total.add_(mean)
    if count:
        one.held = one.held + one.held_now / count
    if one.basis is None:
        one.num_positions += one.num_now
    one.now, one.num_now, one.held_now = None, 0, 0.0


def _basis(one: _Input) -> InputBasis:
    assert one.total is not None
    if not bool(torch.isfinite(one.total).all()):
        raise _not_finite(one)
    return InputBasis(*first_directions(mirror(one.total), one.protect), one.num_positions)


def _not_finite(one: _Input) -> CalibrationError:
    message = "the inputs of this layer contain NaN or infinite values on the calibration text"
    hint = "load the base model in bfloat16 or float32, and check its weights and the calibration batches"
    return CalibrationError(message, where=one.paths[0], hint=hint)


def _checker(one: _Input, positions: Tensor | None) -> Hook:
    def check(x: Tensor) -> None:
        assert one.basis is not None
        rows = _rows(one, x, positions)
        with full_precision(rows.device):
            inside = (rows @ one.basis.V.to(rows.device)).double().square().sum(0).cpu()
            one.held_now = one.held_now + F.pad(inside, (0, 1), value=float(rows.double().square().sum()))
            one.num_now += len(rows)

    return check


def _checked(one: _Input) -> InputBasis:
    assert one.basis is not None
    if not isinstance(one.held, Tensor) or one.held[-1] == 0:
        return one.basis
    if not bool(torch.isfinite(one.held[-1])):
        raise _not_finite(one)
    return replace(one.basis, held_out_shares=F.pad(one.held[:-1].cumsum(0) / one.held[-1], (1, 0)))
