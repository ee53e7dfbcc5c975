"""A rank-2r LoRA factor in two halves: `trained` (a parameter) and `anchor` (a buffer that never changes).

PEFT's own layer keeps its place and its name; it gets one of the classes below. To PEFT, `weight` is the joined factor:
A' = [A; A0] of shape (2r, in), B' = [B, -B0] of shape (out, 2r). The halves are multiplied separately, so that with
A = A0 and B = B0 the two products cancel to the last bit (arXiv:2406.09044, written as W x + s (B A - B0 A0) x).

The anchor is a buffer because PEFT switches `requires_grad` on for every parameter of an adapter. State dicts hold the
joined factor under its stock name; under ZeRO-3, where the trained half has no elements, they hold the raw names.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TRAINED, ANCHOR = "trained", "anchor"


def join(trained: Tensor, anchor: Tensor, axis: int) -> Tensor:
    """Return [A; A0] for axis 0, [B, -B0] for axis 1, in the dtype of the trained half."""
    return torch.cat([trained, anchor.to(trained.dtype) if axis == 0 else -anchor.to(trained.dtype)], dim=axis)


def split(joined: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Undo `join`: the trained half and the anchor, contiguous copies."""
    trained, anchor = joined.detach().chunk(2, dim=axis)
    return trained.clone().contiguous(), (anchor.clone() if axis == 0 else -anchor).contiguous()


def lossless(anchor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the anchor in `dtype` if that changes no value, else in float32."""
    narrow = anchor.to(dtype)
    return narrow if torch.equal(narrow.to(anchor.dtype), anchor) else anchor.float()


class Halves(nn.Module):
    """What the four classes share. `axis` is the dimension of the factor that the rank runs along."""

    axis: ClassVar[int]
    trained: nn.Parameter
    anchor: Tensor

    @classmethod
    def take_over(cls, layer: nn.Module, trained: Tensor, anchor: Tensor) -> Halves:
        """Turn PEFT's factor layer into this class, in place: hooks, name and bias stay."""
        joined = layer.get_parameter("weight")
        del layer.weight
        layer.__class__ = cls
        assert isinstance(layer, cls)
        layer.register_parameter(TRAINED, nn.Parameter(trained, requires_grad=joined.requires_grad))
        layer.register_buffer(ANCHOR, anchor)
        return layer

    @property
    def weight(self) -> Tensor:
        """The joined factor, as stock PEFT reads it: a fresh tensor, so writing into it changes nothing."""
        if self.trained.numel() == 0:  # ZeRO-3 outside forward; PEFT still asks for the dtype
            return self.trained
        return join(self.trained, self.anchor, self.axis)

    def anchor_like_trained(self, input: Tensor) -> Tensor:
        """Return the anchor in the dtype of the multiplication: autocast casts both halves alike by itself."""
        autocast = torch.is_autocast_enabled(input.device.type)
        return self.anchor if autocast else self.anchor.to(self.trained.dtype)

    def _save_to_state_dict(self, destination: MutableMapping[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.trained.numel() == 0:
            return
        del destination[prefix + TRAINED], destination[prefix + ANCHOR]
        destination[f"{prefix}weight"] = self.weight if keep_vars else self.weight.detach()

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
            expected = self.weight.shape
            if joined.shape != expected:
                error_msgs.append(_rank_message(prefix, joined.shape, expected, self.axis))
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


def _rank_message(prefix: str, got: torch.Size, expected: torch.Size, axis: int) -> str:
    path = prefix.removeprefix("base_model.model.").split(".lora_")[0]
    if got[1 - axis :][:1] == expected[1 - axis :][:1]:
        return f"{path}: the saved adapter has rank {got[axis] / 2:g}, this model's has rank {expected[axis] // 2}"
    return f"{path}: the saved factor has shape {tuple(got)}, expected {tuple(expected)}"


class LinearA(Halves, nn.Linear):
    """[A; A0], (2r, in): maps x to both halves of the hidden vector, (..., 2r)."""

    axis = 0

    def forward(self, input: Tensor) -> Tensor:
        """Multiply by A and A0 separately: (..., in) -> (..., 2r)."""
        return torch.cat([F.linear(input, self.trained), F.linear(input, self.anchor_like_trained(input))], dim=-1)


class LinearB(Halves, nn.Linear):
    """[B, -B0], (out, 2r): the trained half's output less the anchor's."""

    axis = 1

    def forward(self, input: Tensor) -> Tensor:
        """Multiply by B and B0 separately and subtract: (..., 2r) -> (..., out)."""
        hidden, anchored = input.chunk(2, dim=-1)
        out = F.linear(hidden, self.trained) - F.linear(anchored, self.anchor_like_trained(input))
        return out if self.bias is None else out + self.bias


class Conv2dA(Halves, nn.Conv2d):
    """[A; A0] of a convolution, (2r, in, kh, kw)."""

    axis = 0

    def forward(self, input: Tensor) -> Tensor:
        """Convolve with A and A0 separately: (n, in, h, w) -> (n, 2r, h', w')."""
        anchor = self.anchor_like_trained(input)
        return torch.cat([self._conv_forward(input, self.trained, None), self._conv_forward(input, anchor, None)], 1)


class Conv2dB(Halves, nn.Conv2d):
    """[B, -B0] of a convolution, (out, 2r, 1, 1)."""

    axis = 1

    def forward(self, input: Tensor) -> Tensor:
        """Convolve with B and B0 separately and subtract: (n, 2r, h, w) -> (n, out, h, w)."""
        hidden, anchored = input.chunk(2, dim=1)
        anchor = self.anchor_like_trained(input)
        return self._conv_forward(hidden, self.trained, self.bias) - self._conv_forward(anchored, anchor, None)


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

    def set_halves(self, name: str, trained: Tensor, anchor: Tensor) -> None:
        """Put the two halves of adapter `name` in place of its stock factor."""
        requires_grad = self.get_parameter(name).requires_grad
        self.register_buffer(_anchor_name(name), anchor)
        super().__setitem__(name, nn.Parameter(trained, requires_grad=requires_grad))

    def anchor_of(self, name: str) -> Tensor | None:
        """Return the anchor of adapter `name`; None where it is a stock factor."""
        return self._buffers.get(_anchor_name(name))

    def __getitem__(self, key: str) -> Any:
        anchor = self.anchor_of(key)
        return super().__getitem__(key) if anchor is None else join(self.get_parameter(key), anchor, self.axis)

    def __setitem__(self, key: str, value: Any) -> None:
        anchor = self.anchor_of(key)
        if anchor is None:
            super().__setitem__(key, value)
            return
        trained, new_anchor = split(value, self.axis)
        self.register_buffer(_anchor_name(key), lossless(new_anchor, anchor.dtype).to(trained.device))
        super().__setitem__(key, nn.Parameter(trained, requires_grad=self.get_parameter(key).requires_grad))

    def __delitem__(self, key: str) -> None:
        if self.anchor_of(key) is not None:
            del self._buffers[_anchor_name(key)]
        super().__delitem__(key)

    def items(self) -> Iterator[tuple[str, Any]]:
        """Iterate over (adapter name, trained half or stock factor)."""
        return ((key, super(EmbeddingHalves, self).__getitem__(key)) for key in self.keys())

    def values(self) -> Iterator[Any]:
        """Iterate over the trained halves and stock factors."""
        return (value for _, value in self.items())

    def _save_to_state_dict(self, destination: MutableMapping[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for key in self.keys():
            if self.anchor_of(key) is not None and self.get_parameter(key).numel() > 0:
                del destination[prefix + _anchor_name(key)]
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
        for key in self.keys():
            anchor, joined = self.anchor_of(key), state_dict.get(prefix + key)
            if anchor is None or joined is None or prefix + _anchor_name(key) in state_dict:
                continue
            if joined.shape != self[key].shape:
                error_msgs.append(_rank_message(f"{prefix}", joined.shape, self[key].shape, self.axis))
                return
            trained, new_anchor = split(joined, self.axis)
            state_dict[prefix + key], state_dict[prefix + _anchor_name(key)] = (
                trained,
                lossless(new_anchor, anchor.dtype),
            )
            self.register_buffer(_anchor_name(key), anchor.to(state_dict[prefix + _anchor_name(key)].dtype))
        missing: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs)
        # A stock checkpoint without this adapter misses one key of it, the joined one.
        missing_keys.extend(key for key in missing if not key.endswith(_ANCHOR_SUFFIX))


_ANCHOR_SUFFIX = "_anchor"


def _anchor_name(adapter: str) -> str:
    return adapter + _ANCHOR_SUFFIX
