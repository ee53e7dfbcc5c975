"""LoRA factors of rank 2r that hold a trained half and a frozen half, the anchor (arXiv:2406.09044).

A layer with weight W computes

    y = W x + s (B A - B0 A0) x          s = alpha / r

A0 and B0 hold the initial factors: s B0 A0 is the part of W that trains, its r last singular triplets for MiLoRA. A
starts at A0 and B at B0, so the layer starts at y = W x. W, A0 and B0 never change. The paper writes W_p + s B A with
W_p = W - s B0 A0, which is the same function; here the base weight stays as the user loaded it.

Stock PEFT sees one LoRA of rank 2r:

    B A - B0 A0 = B' A'                  A' = [A; A0],  B' = [B, -B0]

| name      | tensor  | shape               | held as                            |
| --------- | ------- | ------------------- | ---------------------------------- |
| W         | weight  | (out, in)           | frozen parameter of the base layer |
| A, B      | trained | (r, in), (out, r)   | parameters, trained                |
| A0, B0    | anchor  | (r, in), (out, r)   | buffers, never changed             |
| A', B'    | weight  | (2r, in), (out, 2r) | not held: joined at each read      |
| x         | input   | (..., in)           |                                    |
| A' x      | hidden  | (..., 2r)           | [A x, A0 x]                        |
| s B' A' x | output  | (..., out)          | s (B A x - B0 A0 x)                |

A convolution with kernel (kh, kw) has A' of shape (2r, in, kh, kw) and B' of shape (out, 2r, 1, 1). An embedding has
A' of shape (2r, tokens) and B' of shape (dim, 2r); PEFT keeps both in ParameterDicts, see `EmbeddingHalves`.

PEFT creates the factor layers; `Halves.take_over` then changes the class of each one. Names, hooks and the PeftModel
stay PEFT's. State dicts hold the joined factor under its stock name, so that PEFT loads the file without this package.

Three choices need a reason:

- The anchor is a buffer, not a parameter, because PEFT sets `requires_grad` on every parameter of an adapter.
- The trained half is not called `weight`: `weight` must be the joined factor, which PEFT merges and saves.
- The halves are multiplied separately. A single product B' A' x would sum 2r terms in an order that the library
  chooses, and the step-0 output would differ from W x by rounding. Two equal products cancel to the last bit.

>>> layer = nn.Linear(3, 4, bias=False)  # PEFT's lora_A, in -> 2r with r = 2
>>> A0 = torch.arange(6.0).reshape(2, 3)
>>> half = LinearA.take_over(layer, A0.clone(), A0)
>>> half.weight.shape, half(torch.ones(5, 3)).shape
(torch.Size([4, 3]), torch.Size([5, 4]))
>>> sorted(half.state_dict()), [name for name, _ in half.named_parameters()]
(['weight'], ['trained'])
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
    """Undo `join`: return the trained half and the anchor as contiguous copies.

    >>> A, A0 = torch.ones(2, 3), torch.zeros(2, 3)
    >>> [torch.equal(*pair) for pair in zip(split(join(A, A0, axis=0), axis=0), (A, A0))]
    [True, True]
    """
    trained, anchor = joined.detach().chunk(2, dim=axis)
    return trained.clone(memory_format=torch.contiguous_format), (anchor if axis == 0 else -anchor).clone(
        memory_format=torch.contiguous_format
    )


def lossless(anchor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the anchor in `dtype` if that changes no value, else in float32."""
    narrow = anchor.to(dtype)
    return narrow if torch.equal(narrow.to(anchor.dtype), anchor) else anchor.float()


def rank_message(path: str, got: torch.Size, expected: torch.Size, axis: int) -> str:
    """Return the message for a saved factor that does not fit: its rank differs, or its shape does."""
    if got[1 - axis] == expected[1 - axis] and len(got) == len(expected):
        return f"{path}: the saved adapter has rank {got[axis] / 2:g}, this model's has rank {expected[axis] // 2}"
    return f"{path}: the saved factor has shape {tuple(got)}, expected {tuple(expected)}"


class Joined(Tensor):
    """The joined factor that `weight` returns: a copy to read. Raises AdapterError if it is written to.

    PEFT's hotswap_adapter and reset_lora_parameters write into `lora_A[name].weight`. Here that would change the copy
    and not the adapter, without any sign of it.
    """

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run `func` on plain tensors. Views of the factor keep this class, other results are plain tensors."""
        name = func.__name__
        if args and isinstance(args[0], Joined) and (name == "__setitem__" or _is_in_place(name)):
            raise _write_error()
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **(kwargs or {}))
        is_view = name in ("__get__", "__getitem__", "detach") and isinstance(out, Tensor)
        return out.as_subclass(Joined) if is_view else out

    def __setattr__(self, name: str, value: Any) -> None:
        raise _write_error()


def _write_error() -> AdapterError:
    return AdapterError(
        "writing into the joined factor [A; A0] or [B, -B0] would change a copy and nothing else",
        code="adapter-read-only-factor",
        hint="to load another adapter:  model.load_adapter(folder, name); to change A or B, write into their `trained`",
    )


def _is_in_place(name: str) -> bool:
    # torch names in-place methods with a trailing underscore: add_, copy_, fill_.
    return name.endswith("_") and not name.startswith("__")


class Halves(nn.Module):
    """Base class of the factors below: a trained half, an anchor, and the joined factor that PEFT sees.

    `axis` is the dimension that the rank runs along: 0 for A' = [A; A0], 1 for B' = [B, -B0].
    """

    axis: ClassVar[int]
    trained: nn.Parameter
    anchor: Tensor

    @classmethod
    def take_over(cls, layer: nn.Module, trained: Tensor, anchor: Tensor) -> Halves:
        """Change the class of PEFT's factor layer and give it the two halves. Hooks, name and bias stay.

        Both halves have rank r: (r, in) for A, (out, r) for B. `layer.weight` of rank 2r is removed.
        """
        # The module object stays the same one, so that every reference and forward hook to it stays valid.
        requires_grad = layer.get_parameter("weight").requires_grad
        del layer.weight
        layer.__class__ = cls
        assert isinstance(layer, cls)
        layer.register_parameter(TRAINED, nn.Parameter(trained, requires_grad=requires_grad))
        layer.register_buffer(ANCHOR, anchor)
        return layer

    @property
    def joined(self) -> Tensor:
        """Return the factor of rank 2r, (2r, in) or (out, 2r), as a new tensor."""
        if self.trained.numel() == 0:  # under ZeRO-3 parameters are empty outside forward; PEFT reads the dtype alone
            return self.trained
        return join(self.trained, self.anchor, self.axis)

    @property
    def weight(self) -> Tensor:
        """Return the factor of rank 2r that PEFT merges and saves. It is read-only, see `Joined`."""
        joined = self.joined
        is_plain = type(joined) in (Tensor, nn.Parameter)  # torch's fake tensors keep their class
        return joined.as_subclass(Joined) if is_plain and not torch.compiler.is_compiling() else joined

    def anchor_for(self, x: Tensor) -> Tensor:
        """Return the anchor in the dtype of the trained half, so that equal halves round equally.

        Autocast casts both halves to its own dtype, so nothing is cast here while it is on.
        """
        autocast = torch.is_autocast_enabled(x.device.type)
        return self.anchor if autocast else self.anchor.to(self.trained.dtype)

    def _save_to_state_dict(self, destination: MutableMapping[str, Any], prefix: str, keep_vars: bool) -> None:
        """Write `weight`, the joined factor, instead of `trained` and `anchor`: the name and shape of stock PEFT."""
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[arg-type]
        if self.trained.numel() == 0:  # ZeRO-3: the raw names are gathered later and joined by `install.joined_state`
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
        """Read `weight`, the joined factor, or the raw names `trained` and `anchor`."""
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
    """A' = [A; A0] of a linear layer: `trained` is A (r, in), `anchor` is A0 (r, in)."""

    axis = 0

    def forward(self, x: Tensor) -> Tensor:
        """Return [A x, A0 x]: (..., in) -> (..., 2r)."""
        return multiply_down(x, self.trained, self.anchor)


class LinearB(Halves, nn.Linear):  # type: ignore[misc,override]
    """B' = [B, -B0] of a linear layer: `trained` is B (out, r), `anchor` is B0 (out, r)."""

    axis = 1

    def forward(self, x: Tensor) -> Tensor:
        """Return B h - B0 h0 for the hidden vector [h, h0]: (..., 2r) -> (..., out)."""
        out = multiply_up(x, self.trained, self.anchor)
        return out if self.bias is None else out + self.bias


class Conv2dA(Halves, nn.Conv2d):  # type: ignore[misc,override]
    """A' = [A; A0] of a convolution: `trained` and `anchor` are (r, in, kh, kw)."""

    axis = 0

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolutions with A and A0, along the channels: (n, in, h, w) -> (n, 2r, h', w')."""
        hidden = self._conv_forward(x, self.trained, None)
        return torch.cat([hidden, self._conv_forward(x, self.anchor_for(x), None)], dim=1)


class Conv2dB(Halves, nn.Conv2d):  # type: ignore[misc,override]
    """B' = [B, -B0] of a convolution: `trained` and `anchor` are (out, r, 1, 1)."""

    axis = 1

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution with B minus the one with B0: (n, 2r, h, w) -> (n, out, h, w)."""
        hidden, anchored = x.chunk(2, dim=1)
        out = self._conv_forward(hidden, self.trained, self.bias)
        return out - self._conv_forward(anchored, self.anchor_for(x), None)


class _Residual(Halves):
    """Factors of the residual form, y = W_p x + s B A x, where the base weight holds W_p = W - s B0 A0.

    Forward and merge use the trained half alone. The anchor stays for saving: a state dict holds the joined factor, so
    the saved adapter is again one of rank 2r for the unchanged base model.
    """

    @property
    def weight(self) -> Tensor:
        """Return the trained half, which is all that PEFT merges here. It is read-only, see `Joined`."""
        return self.trained if torch.compiler.is_compiling() else self.trained.as_subclass(Joined)

    def forward(self, x: Tensor) -> Tensor:
        """Return A x or B h: (..., in) -> (..., r), (..., r) -> (..., out)."""
        return F.linear(x, self.trained)


class ResidualA(_Residual, LinearA):  # type: ignore[misc,override]
    """A (r, in) of the residual form; A0 (r, in) is kept for saving."""


class ResidualB(_Residual, LinearB):  # type: ignore[misc,override]
    """B (out, r) of the residual form; B0 (out, r) is kept for saving."""


ANCHOR_SUFFIX = "_anchor"


class EmbeddingHalves(nn.ParameterDict):
    """PEFT's `lora_embedding_A` or `lora_embedding_B`, where some adapters have a trained half and an anchor.

    `axis` 0 is A' = [A; A0] (2r, tokens), `axis` 1 is B' = [B, -B0] (dim, 2r). PEFT multiplies `factors[adapter]`, so
    indexing returns the joined factor. It sets `requires_grad` through `values()`, so iteration returns the trained
    halves. An anchor is a buffer named `<adapter>_anchor`.
    """

    axis: int

    @classmethod
    def take_over(cls, factors: nn.ParameterDict, axis: int) -> EmbeddingHalves:
        """Change the class of PEFT's ParameterDict. All adapters keep their stock factors until `set_halves`."""
        factors.__class__ = cls
        assert isinstance(factors, cls)
        factors.axis = axis
        return factors

    def set_halves(self, adapter: str, trained: Tensor, anchor: Tensor) -> None:
        """Replace the stock factor of an adapter by its two halves, each of rank r."""
        requires_grad = self.get_parameter(adapter).requires_grad
        self.register_buffer(adapter + ANCHOR_SUFFIX, anchor)
        super().__setitem__(adapter, nn.Parameter(trained, requires_grad=requires_grad))

    def anchor_of(self, adapter: str) -> Tensor | None:
        """Return the anchor of an adapter, or None if the adapter has a stock factor."""
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
        # A checkpoint without this adapter lacks one stock key, so report one missing key and not two.
        missing_keys.extend(key for key in missing if not key.endswith(ANCHOR_SUFFIX))


def multiply_down(x: Tensor, trained: Tensor, anchor: Tensor) -> Tensor:
    """Return [A x, A0 x], (..., in) -> (..., 2r), in the dtype of autocast, or of `trained` without it.

    >>> x, A, A0 = torch.eye(3), torch.ones(2, 3), torch.zeros(2, 3)
    >>> multiply_down(x, A, A0).shape
    torch.Size([3, 4])
    """
    return _Down.apply(x, trained, anchor, _dtype(x, trained))  # type: ignore[no-any-return,no-untyped-call]


def multiply_up(hidden: Tensor, trained: Tensor, anchor: Tensor) -> Tensor:
    """Return B h - B0 h0 for `hidden` = [h, h0], (..., 2r) -> (..., out), in the dtype of `multiply_down`.

    Equal halves cancel exactly, so a new adapter changes no output:

    >>> hidden, B = torch.randn(5, 2).repeat(1, 2), torch.randn(4, 2)
    >>> bool((multiply_up(hidden, B, B) == 0).all())
    True
    """
    return _Up.apply(hidden, trained, anchor, _dtype(hidden, trained))  # type: ignore[no-any-return,no-untyped-call]


def _dtype(x: Tensor, trained: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else trained.dtype


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


# The two functions below replace four autograd nodes per factor by one. They cast the input once for both halves, and
# they keep no gradient for the anchor. In backward nothing must cancel, so one product with the joined factor gives the
# gradient of the input.


class _Down(torch.autograd.Function):
    """[A x, A0 x] with gradients for x and A: dx = g [A; A0], dA = g_A' x, where g_A is the first half of g."""

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
    """B h - B0 h0 with gradients for [h, h0] and B: d[h, h0] = g [B, -B0], dB = g' h."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, trained: Tensor, anchor: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtypes = hidden.dtype, trained.dtype
        hidden, trained, anchor = hidden.to(dtype), trained.to(dtype), anchor.to(dtype)
        ctx.save_for_backward(hidden, trained, anchor)
        # Some CPU libraries round differently for differently aligned memory, and equal halves would no longer cancel.
        # Copies are aligned equally. `contiguous` is not enough: it does not copy the halves of a single row.
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
