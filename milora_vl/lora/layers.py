"""A rank-2r LoRA factor in two halves: `trained` (a parameter) and `anchor` (a buffer that never changes).

PEFT's own layer keeps its place and its name; it gets one of the classes below. To PEFT, `weight` is the joined factor:
A' = [A; A0] of shape (2r, in), B' = [B, -B0] of shape (out, 2r). The halves are multiplied separately, so that with
A = A0 and B = B0 the two products cancel to the last bit (arXiv:2406.09044, written as W x + s (B A - B0 A0) x).

The anchor is a buffer because PEFT switches `requires_grad` on for every parameter of an adapter. State dicts hold the
joined factor under its stock name; under ZeRO-3, where the trained half has no elements, they hold the raw names.

An embedding's factors lie in PEFT's two ParameterDicts, which get the class EmbeddingHalves.

The two products of a linear layer are fused: one cast of the input, one product for each input's gradient. Backward,
nothing has to cancel: the joined factor gives the input's gradient in one product, and the anchor has none.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, autocast, nn
from torch.autograd.function import once_differentiable

from milora_vl.lora.errors import AdapterError

TRAINED, ANCHOR = "trained", "anchor"


def join(trained: Tensor, anchor: Tensor, axis: int) -> Tensor:
    """Return [A; A0] for axis 0, [B, -B0] for axis 1, in the dtype of the trained half."""
    return torch.cat([trained, anchor.to(trained.dtype) if axis == 0 else -anchor.to(trained.dtype)], dim=axis)


def split(joined: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Undo `join`: the trained half and the anchor, contiguous copies."""
    trained, anchor = joined.detach().chunk(2, dim=axis)
    return trained.clone(memory_format=torch.contiguous_format), (anchor if axis == 0 else -anchor).clone(
        memory_format=torch.contiguous_format
    )


def lossless(anchor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the anchor in `dtype` if that changes no value, else in float32."""
    narrow = anchor.to(dtype)
    return narrow if torch.equal(narrow.to(anchor.dtype), anchor) else anchor.float()


def rank_message(path: str, got: torch.Size, expected: torch.Size, axis: int) -> str:
    """Say in the user's terms why a saved factor does not fit: its rank, or else its shape."""
    if got[1 - axis] == expected[1 - axis] and len(got) == len(expected):
        return f"{path}: the saved adapter has rank {got[axis] / 2:g}, this model's has rank {expected[axis] // 2}"
    return f"{path}: the saved factor has shape {tuple(got)}, expected {tuple(expected)}"


class Joined(Tensor):
    """A joined factor as others see it. Writing into it would change nothing but a copy, so that raises.

    PEFT's hotswap_adapter, reset_lora_parameters and weight surgery of other kinds write into `lora_A[name].weight`.
    """

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run `func` on plain tensors; what looks at the same numbers stays guarded."""
        name = func.__name__
        if args and isinstance(args[0], Joined) and (name == "__setitem__" or _is_in_place(name)):
            raise AdapterError(_NO_WRITES)
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **(kwargs or {}))
        is_view = name in ("__get__", "__getitem__", "detach") and isinstance(out, Tensor)
        return out.as_subclass(Joined) if is_view else out

    def __setattr__(self, name: str, value: Any) -> None:
        raise AdapterError(_NO_WRITES)


_NO_WRITES = (
    "writing into the joined factor [A; A0] or [B, -B0] would change a copy and nothing else\n"
    "to put another adapter in:  model.load_adapter(folder, name); to change A or B: their `trained` half"
)


def _is_in_place(name: str) -> bool:
    return name.endswith("_") and not name.startswith("__")


class Halves(nn.Module):
    """What the classes below share. `axis` is the dimension of the factor that the rank runs along."""

    axis: ClassVar[int]
    trained: nn.Parameter
    anchor: Tensor

    @classmethod
    def take_over(cls, layer: nn.Module, trained: Tensor, anchor: Tensor) -> Halves:
        """Turn PEFT's factor layer into this class, in place: hooks, name and bias stay."""
        requires_grad = layer.get_parameter("weight").requires_grad
        del layer.weight
        layer.__class__ = cls
        assert isinstance(layer, cls)
        layer.register_parameter(TRAINED, nn.Parameter(trained, requires_grad=requires_grad))
        layer.register_buffer(ANCHOR, anchor)
        return layer

    @property
    def joined(self) -> Tensor:
        """The stock factor: a fresh tensor, so writing into it changes nothing."""
        if self.trained.numel() == 0:  # ZeRO-3 outside forward; PEFT still asks for the dtype
            return self.trained
        return join(self.trained, self.anchor, self.axis)

    @property
    def weight(self) -> Tensor:
        """The factor that PEFT multiplies and merges with, to be read."""
        joined = self.joined
        is_plain = type(joined) in (Tensor, nn.Parameter)  # fake tensors of torch's own tools stay what they are
        return joined.as_subclass(Joined) if is_plain and not torch.compiler.is_compiling() else joined

    def anchor_for(self, x: Tensor) -> Tensor:
        """Return the anchor in the dtype of the multiplication; autocast casts both halves alike by itself."""
        autocast = torch.is_autocast_enabled(x.device.type)
        return self.anchor if autocast else self.anchor.to(self.trained.dtype)

    def _save_to_state_dict(self, destination: MutableMapping[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[arg-type]
        if self.trained.numel() == 0:
            return
        del destination[prefix + TRAINED], destination[prefix + ANCHOR]
        destination[f"{prefix}weight"] = self.joined if keep_vars else self.joined.detach()

    def _load_from_state_dict(
        self,
        state_dict: MutableMapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        joined = state_dict.pop(f"{prefix}weight", None)
        if joined is not None:
            if joined.shape != self.joined.shape:
                path = prefix.removeprefix("base_model.model.").split(".lora_")[0]
                error_msgs.append(rank_message(path, joined.shape, self.joined.shape, self.axis))
                return
            trained, anchor = split(joined, self.axis)
            state_dict[prefix + TRAINED], state_dict[prefix + ANCHOR] = trained, lossless(anchor, self.anchor.dtype)
            self.anchor = self.anchor.to(state_dict[prefix + ANCHOR].dtype)
        missing: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs)
        raw = {prefix + TRAINED, prefix + ANCHOR}
        if raw & set(missing):
            missing_keys.append(f"{prefix}weight")
        missing_keys.extend(key for key in missing if key not in raw)


class LinearA(Halves, nn.Linear):  # type: ignore[misc,override]
    """[A; A0], (2r, in): maps x to both halves of the hidden vector, (..., 2r)."""

    axis = 0

    def forward(self, x: Tensor) -> Tensor:
        """Multiply by A and A0 separately: (..., in) -> (..., 2r)."""
        return multiply_down(x, self.trained, self.anchor)


class LinearB(Halves, nn.Linear):  # type: ignore[misc,override]
    """[B, -B0], (out, 2r): the trained half's output less the anchor's."""

    axis = 1

    def forward(self, x: Tensor) -> Tensor:
        """Multiply by B and B0 separately and subtract: (..., 2r) -> (..., out)."""
        out = multiply_up(x, self.trained, self.anchor)
        return out if self.bias is None else out + self.bias


class Conv2dA(Halves, nn.Conv2d):  # type: ignore[misc,override]
    """[A; A0] of a convolution, (2r, in, kh, kw)."""

    axis = 0

    def forward(self, x: Tensor) -> Tensor:
        """Convolve with A and A0 separately: (n, in, h, w) -> (n, 2r, h', w')."""
        hidden = self._conv_forward(x, self.trained, None)
        return torch.cat([hidden, self._conv_forward(x, self.anchor_for(x), None)], dim=1)


class Conv2dB(Halves, nn.Conv2d):  # type: ignore[misc,override]
    """[B, -B0] of a convolution, (out, 2r, 1, 1)."""

    axis = 1

    def forward(self, x: Tensor) -> Tensor:
        """Convolve with B and B0 separately and subtract: (n, 2r, h, w) -> (n, out, h, w)."""
        hidden, anchored = x.chunk(2, dim=1)
        out = self._conv_forward(hidden, self.trained, self.bias)
        return out - self._conv_forward(anchored, self.anchor_for(x), None)


class _Residual(Halves):
    """The base weight holds W - s B0 A0: only the trained half is multiplied and merged. What is saved is joined."""

    @property
    def weight(self) -> Tensor:
        """The trained half alone, to be read."""
        return self.trained if torch.compiler.is_compiling() else self.trained.as_subclass(Joined)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply by the trained half."""
        return F.linear(x, self.trained)


class ResidualA(_Residual, LinearA):  # type: ignore[misc,override]
    """A (r, in) of the residual form, with A0 kept for saving."""


class ResidualB(_Residual, LinearB):  # type: ignore[misc,override]
    """B (out, r) of the residual form, with B0 kept for saving."""


ANCHOR_SUFFIX = "_anchor"


class EmbeddingHalves(nn.ParameterDict):
    """PEFT's `lora_embedding_A` or `_B` with some adapters in halves; `axis` 0 is A' (2r, tokens), 1 is B' (dim, 2r).

    Indexing gives the joined factor, iteration the trained half (PEFT switches gradients through it).
    """

    axis: int

    @classmethod
    def take_over(cls, factors: nn.ParameterDict, axis: int) -> EmbeddingHalves:
        """Turn PEFT's ParameterDict into this class, in place."""
        factors.__class__ = cls
        assert isinstance(factors, cls)
        factors.axis = axis
        return factors

    def set_halves(self, adapter: str, trained: Tensor, anchor: Tensor) -> None:
        """Put the two halves of an adapter in place of its stock factor."""
        requires_grad = self.get_parameter(adapter).requires_grad
        self.register_buffer(adapter + ANCHOR_SUFFIX, anchor)
        super().__setitem__(adapter, nn.Parameter(trained, requires_grad=requires_grad))

    def anchor_of(self, adapter: str) -> Tensor | None:
        """Return the anchor of an adapter; None where it has a stock factor."""
        return self._buffers.get(adapter + ANCHOR_SUFFIX)

    def __getitem__(self, key: str) -> Any:
        anchor = self.anchor_of(key)
        return super().__getitem__(key) if anchor is None else join(self.get_parameter(key), anchor, self.axis)

    def __setitem__(self, key: str, value: Any) -> None:
        anchor = self.anchor_of(key)
        if anchor is None:
            super().__setitem__(key, value)
            return
        trained, new_anchor = split(value, self.axis)
        requires_grad = self.get_parameter(key).requires_grad
        self.register_buffer(key + ANCHOR_SUFFIX, lossless(new_anchor, anchor.dtype))
        super().__setitem__(key, nn.Parameter(trained, requires_grad=requires_grad))

    def __delitem__(self, key: str) -> None:
        self._buffers.pop(key + ANCHOR_SUFFIX, None)
        super().__delitem__(key)

    def items(self) -> Iterator[tuple[str, Any]]:  # type: ignore[override]
        """Iterate over (adapter, trained half or stock factor)."""
        return ((key, self.get_parameter(key)) for key in self)

    def values(self) -> Iterator[Any]:  # type: ignore[override]
        """Iterate over the trained halves and stock factors."""
        return (self.get_parameter(key) for key in self)

    def _save_to_state_dict(self, destination: MutableMapping[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[arg-type]
        for key in self:
            if self.anchor_of(key) is not None and self.get_parameter(key).numel() > 0:
                del destination[prefix + key + ANCHOR_SUFFIX]
                destination[prefix + key] = self[key] if keep_vars else self[key].detach()

    def _load_from_state_dict(
        self,
        state_dict: MutableMapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        for key in self:
            name, anchor_name = prefix + key, prefix + key + ANCHOR_SUFFIX
            anchor = self.anchor_of(key)
            if anchor is None or name not in state_dict or anchor_name in state_dict:
                continue
            if state_dict[name].shape != self[key].shape:
                path = prefix.removeprefix("base_model.model.").split(".lora_")[0]
                error_msgs.append(rank_message(path, state_dict[name].shape, self[key].shape, self.axis))
                return
            trained, new_anchor = split(state_dict[name], self.axis)
            state_dict[name], state_dict[anchor_name] = trained, lossless(new_anchor, anchor.dtype)
            self.register_buffer(key + ANCHOR_SUFFIX, anchor.to(state_dict[anchor_name].dtype))
        missing: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs)
        # A checkpoint without this adapter misses one key of it, the joined one.
        missing_keys.extend(key for key in missing if not key.endswith(ANCHOR_SUFFIX))


def multiply_down(x: Tensor, trained: Tensor, anchor: Tensor) -> Tensor:
    """Return [A x, A0 x], (..., in) -> (..., 2r), in autocast's dtype if that is on, else in the trained half's."""
    return _Down.apply(x, trained, anchor, _dtype(x, trained))  # type: ignore[no-any-return,no-untyped-call]


def multiply_up(hidden: Tensor, trained: Tensor, anchor: Tensor) -> Tensor:
    """Return B h - B0 h0 of the two halves of `hidden`, (..., 2r) -> (..., out), in the dtype as above."""
    return _Up.apply(hidden, trained, anchor, _dtype(hidden, trained))  # type: ignore[no-any-return,no-untyped-call]


def _dtype(x: Tensor, trained: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else trained.dtype


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


class _Down(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, trained: Tensor, anchor: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtypes = x.dtype, trained.dtype
        x, trained, anchor = x.to(dtype), trained.to(dtype), anchor.to(dtype)
        ctx.save_for_backward(x, trained, anchor)
        with autocast(x.device.type, enabled=False):
            return torch.cat([F.linear(x, trained), F.linear(x, anchor)], dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, trained, anchor = ctx.saved_tensors
        of_x = of_trained = None
        with autocast(grad.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                of_x = (grad @ torch.cat([trained, anchor])).to(ctx.dtypes[0])
            if ctx.needs_input_grad[1]:
                of_trained = (_rows(grad[..., : len(trained)]).T @ _rows(x)).to(ctx.dtypes[1])
        return of_x, of_trained, None, None


class _Up(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, trained: Tensor, anchor: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtypes = hidden.dtype, trained.dtype
        hidden, trained, anchor = hidden.to(dtype), trained.to(dtype), anchor.to(dtype)
        ctx.save_for_backward(hidden, trained, anchor)
        # Some CPU libraries round by how the memory is aligned: as copies both halves are aligned alike. The halves of
        # a single row are contiguous as they lie, so `contiguous` would not copy them.
        first, second = (half.clone(memory_format=torch.contiguous_format) for half in hidden.chunk(2, dim=-1))
        with autocast(hidden.device.type, enabled=False):
            return F.linear(first, trained).sub_(F.linear(second, anchor))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden, trained, anchor = ctx.saved_tensors
        of_hidden = of_trained = None
        with autocast(grad.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                of_hidden = (grad @ torch.cat([trained, -anchor], dim=1)).to(ctx.dtypes[0])
            if ctx.needs_input_grad[1]:
                of_trained = (_rows(grad).T @ _rows(hidden.chunk(2, dim=-1)[0])).to(ctx.dtypes[1])
        return of_hidden, of_trained, None, None
