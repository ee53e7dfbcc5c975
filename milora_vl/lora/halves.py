"""A rank-2r LoRA factor in two halves: `trained` (a parameter) and `anchor` (a buffer that never changes).

PEFT's own layer keeps its place and its name; it gets one of the classes below. To PEFT, `weight` is the joined factor:
A' = [A; A0] of shape (2r, in), B' = [B, -B0] of shape (out, 2r). The halves are multiplied separately, so that with
A = A0 and B = B0 the two products cancel to the last bit (arXiv:2406.09044, written as W x + s (B A - B0 A0) x).

The anchor is a buffer because PEFT switches `requires_grad` on for every parameter of an adapter. State dicts hold the
joined factor under its stock name; under ZeRO-3, where the trained half has no elements, they hold the raw names.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from milora_vl.lora.errors import AdapterError
from milora_vl.lora.products import multiply_down, multiply_up

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
