"""The difference form of an adapter without protected inputs: a trained difference and an anchor (arXiv:2406.09044).

A layer with weight W computes

    y = W x + s (B A - B0 A0) x          s = alpha / r

A0 and B0 hold the initial factors: s B0 A0 is the part of W that trains, its r last singular triplets for MiLoRA. A
starts at A0 and B at B0, so the layer starts at y = W x. W, A0 and B0 never change. The paper writes W_p + s B A with
W_p = W - s B0 A0, which is the same function; here the base weight stays as the user loaded it.

The layer does not hold A and B, but the differences D = A - A0 and E = B - B0, which train from zero. With them

    B A - B0 A0 = (B0 + E) D + E A0 = B' A'          A' = [D; A0],  B' = [B0 + E, E]

is one LoRA of rank 2r, and this is what stock PEFT sees.

| name      | tensor | shape               | held as                            |
| --------- | ------ | ------------------- | ---------------------------------- |
| W         | weight | (out, in)           | frozen parameter of the base layer |
| D, E      | delta  | (r, in), (out, r)   | parameters, trained                |
| A0, B0    | anchor | (r, in), (out, r)   | buffers, never changed             |
| A', B'    | weight | (2r, in), (out, 2r) | not held: joined at each use       |
| x         | input  | (..., in)           |                                    |
| A' x      | hidden | (..., 2r)           | [D x, A0 x]                        |
| s B' A' x | output | (..., out)          | s ((B0 + E) D x + E A0 x)          |

A convolution with kernel (kh, kw) has A' of shape (2r, in, kh, kw) and B' of shape (out, 2r, 1, 1).

PEFT creates the factor layers; `convert` then changes the class of each one. Names, hooks and the PeftModel stay
PEFT's. State dicts hold the joined factor under its stock name, so that PEFT loads the file without this package.

Four choices need a reason:

- The differences train, not A and B. The difference of two products B A x - B0 A0 x would cancel almost all digits
  that half precision has, and so would A - A0 where DeepSpeed keeps A in bfloat16. D and E keep their own digits, at
  any size. They start at zero, so the output at step 0 is zero in any order of summation, and weight decay pulls
  towards no update.
- The anchor is a buffer, not a parameter, because PEFT sets `requires_grad` on every parameter of an adapter.
- The difference is not called `weight`: `weight` must be the joined factor, which PEFT merges and saves.
- B' holds B0 + E, not B0, because a LoRA is one product. `recover` gets B0 back.

>>> layer = nn.Linear(3, 4, bias=False)  # PEFT's lora_A, in -> 2r with r = 2
>>> A0 = torch.arange(6.0).reshape(2, 3)
>>> factor = DifferenceLinear.convert(layer, 0, torch.zeros(2, 3), A0)
>>> factor.weight.shape, factor(torch.ones(5, 3)).shape
(torch.Size([4, 3]), torch.Size([5, 4]))
>>> sorted(factor.state_dict()), [name for name, _ in factor.named_parameters()]
(['weight'], ['delta'])
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners import lora
from peft.tuners.lora import LoraLayer
from torch import Tensor, autocast, nn
from torch.autograd.function import once_differentiable

from milora_vl.common.compat.peft import ForwardVariant, set_variant
from milora_vl.common.compat.torch import OwnState, call_on_plain_tensors, change_class
from milora_vl.core.adapter.folders import ANCHORS_FILE, EARLIER, PEFT_PREFIX, RESTORE, AdapterError
from milora_vl.core.weights.distributed import is_sharded
from milora_vl.core.weights.matrices import as_rows, factor_dtype

DELTA, ANCHOR = "delta", "anchor"


def join(delta: Tensor, anchor: Tensor, axis: int, dtype: torch.dtype | None = None) -> Tensor:
    """Return [D; A0] for axis 0, [B0 + E, E] for axis 1, in `dtype` or the dtype of the difference."""
    dtype = dtype or delta.dtype
    if axis == 0:
        return torch.cat([delta.to(dtype), anchor.to(dtype)])
    return torch.cat([(anchor + delta).to(dtype), delta.to(dtype)], dim=1)  # the sum is rounded once


def split(joined: Tensor, axis: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Undo `join`: return the difference and the anchor as contiguous copies. The anchor gets `dtype` if that is exact.

    >>> D, A0 = torch.ones(2, 3), torch.zeros(2, 3)
    >>> [torch.equal(*pair) for pair in zip(split(join(D, A0, axis=0), 0, torch.float32), (D, A0))]
    [True, True]
    """
    first, second = joined.detach().chunk(2, dim=axis)
    delta = first if axis == 0 else second
    anchor = lossless(second, dtype) if axis == 0 else recover(first, second, dtype)
    return delta.clone(memory_format=torch.contiguous_format), anchor.clone(memory_format=torch.contiguous_format)


def lossless(anchor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the anchor in `dtype` if that changes no value, else in float32."""
    narrow = anchor.to(dtype)
    return narrow if torch.equal(narrow.to(anchor.dtype), anchor) else anchor.float()


def recover(B: Tensor, E: Tensor, dtype: torch.dtype) -> Tensor:
    """Return B0 from B = B0 + E and E, in `dtype` if B0 + E then gives B again, else in float32.

    The sum was rounded. For a B0 in half precision and E in float32 that is undone by rounding, except where an entry
    of E is thousands of times larger than B0's. `unrecoverable` finds the anchors that are not undone.
    """
    wide = torch.promote_types(B.dtype, torch.float32)
    difference = B.to(wide) - E.to(wide)
    narrow = difference.to(dtype)
    return narrow if torch.equal((narrow + E).to(B.dtype), B) else difference


def _rank_message(path: str, got: torch.Size, expected: torch.Size, axis: int) -> str:
    """Return the message for a saved factor that does not fit: its rank differs, or its shape does."""
    if got[1 - axis] == expected[1 - axis] and len(got) == len(expected):
        return f"{path}: the saved adapter has rank {got[axis] / 2:g}, this model's has rank {expected[axis] // 2}"
    return f"{path}: the saved factor has shape {tuple(got)}, expected {tuple(expected)}"


class ReadOnlyFactor(Tensor):
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
        is_in_place = name == "__setitem__" or (name.endswith("_") and not name.startswith("__"))  # add_, copy_, fill_
        if args and isinstance(args[0], ReadOnlyFactor) and is_in_place:
            raise _write_error()
        out = call_on_plain_tensors(func, args, kwargs or {})
        is_view = name in ("__get__", "__getitem__", "detach") and isinstance(out, Tensor)
        return out.as_subclass(ReadOnlyFactor) if is_view else out

    def __setattr__(self, name: str, value: Any) -> None:
        raise _write_error()


def _write_error() -> AdapterError:
    return AdapterError(
        "writing into the joined factor [D; A0] or [B0 + E, E] would change a copy and nothing else",
        hint="to load another adapter:  model.load_adapter(folder, name); to change D or E, write into their `delta`",
    )


def _read(joined: Tensor, anchor: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Return the difference and the anchor of a saved factor. The present anchor stays if it gives the same factor."""
    delta = joined.detach().chunk(2, dim=axis)[axis].clone(memory_format=torch.contiguous_format)
    here = anchor.to(joined.device)
    if torch.equal(join(delta, here, axis), joined):
        return delta, lossless(here, anchor.dtype)
    return split(joined, axis, anchor.dtype)


def _join_in(state: MutableMapping[str, Any], prefix: str, axis: int) -> None:
    """Replace the difference and the anchor of a factor in a state dict by the joined weight."""
    delta, anchor = state.pop(prefix + DELTA), state.pop(prefix + ANCHOR)
    state[prefix + "weight"] = join(delta, anchor.to(delta.device), axis)


def joined_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a gathered state dict (ZeRO-3, FSDP2) with differences and anchors joined under their stock names.

    `...lora_A.default.delta` and `.anchor` become `...lora_A.default.weight`. Other entries are unchanged.

    >>> raw = {"l.lora_A.x.delta": torch.ones(1, 2), "l.lora_A.x.anchor": torch.zeros(1, 2)}
    >>> {name: tuple(t.shape) for name, t in joined_state(raw).items()}
    {'l.lora_A.x.weight': (2, 2)}
    """
    out = dict(state)
    for key in state:
        prefix, _, name = key.rpartition(".")
        if name == DELTA and f"{prefix}.{ANCHOR}" in state:
            _join_in(out, f"{prefix}.", int(".lora_B." in key))
    return out


class DifferenceFactor(OwnState):
    """PEFT's `lora_A[name]` or `lora_B[name]` with a trained difference and an anchor in the place of its weight.

    `axis` is the dimension that the rank runs along: 0 for A' = [D; A0], 1 for B' = [B0 + E, E]. A state dict holds the
    joined factor under the name and in the shape of stock PEFT.
    """

    axis: int
    delta: nn.Parameter
    anchor: Tensor

    @classmethod
    def convert(cls, layer: nn.Module, axis: int, delta: Tensor, anchor: Tensor) -> DifferenceFactor:
        """Change the class of PEFT's factor layer and give it a difference and an anchor. Hooks, name and bias stay.

        Both have rank r: (r, in) for A, (out, r) for B. `layer.weight` of rank 2r is removed.
        """
        requires_grad = layer.get_parameter("weight").requires_grad
        del layer.weight
        factor = change_class(layer, cls)
        factor.axis = axis
        factor.register_parameter(DELTA, nn.Parameter(delta, requires_grad=requires_grad))
        factor.register_buffer(ANCHOR, anchor)
        return factor

    @property
    def joined(self) -> Tensor:
        """The factor of rank 2r, (2r, in) or (out, 2r), as a new tensor."""
        if is_sharded(self.delta):  # PEFT reads the dtype alone
            return self.delta
        return join(self.delta, self.anchor, self.axis)

    @property
    def weight(self) -> Tensor:
        """The factor of rank 2r that PEFT merges and saves. It is read-only, see `ReadOnlyFactor`."""
        joined = self.joined
        is_plain = type(joined) in (Tensor, nn.Parameter)  # torch's fake tensors keep their class
        return joined.as_subclass(ReadOnlyFactor) if is_plain and not torch.compiler.is_compiling() else joined

    def write_state(self, destination: MutableMapping[str, Any], prefix: str, keep_vars: bool) -> None:
        super().write_state(destination, prefix, keep_vars)
        if not is_sharded(self.delta):  # the raw names are gathered later, see `joined_state`
            _join_in(destination, prefix, self.axis)

    def read_state(
        self,
        state_dict: MutableMapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Read the joined factor, or the raw names of difference and anchor. Both together set B0 exactly."""
        delta, anchor, stock = prefix + DELTA, prefix + ANCHOR, prefix + "weight"
        joined = state_dict.get(stock)
        if joined is not None:
            if joined.shape != (expected := torch.cat([self.anchor, self.anchor], dim=self.axis).shape):
                path = prefix.removeprefix(PEFT_PREFIX).split(".lora_")[0]
                error_msgs.append(_rank_message(path, joined.shape, expected, self.axis))
                return
            del state_dict[stock]
            state_dict[delta], read = _read(joined, self.anchor, self.axis)
            state_dict.setdefault(anchor, read)
        if anchor in state_dict:
            self.register_buffer(ANCHOR, self.anchor.to(state_dict[anchor].dtype))
        missing: list[str] = []
        super().read_state(state_dict, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs)
        missing_keys.extend(dict.fromkeys(stock if key in (delta, anchor) else key for key in missing))


class DifferenceLinear(DifferenceFactor, nn.Linear):  # type: ignore[misc,override]
    """A' = [D; A0] or B' = [B0 + E, E] of a linear layer."""

    def forward(self, x: Tensor) -> Tensor:
        """Return [D x, A0 x], (..., in) -> (..., 2r), or (B0 + E) h + E h0, (..., 2r) -> (..., out)."""
        if self.axis == 0:
            return multiply_down(x, self.delta, self.anchor)
        out = multiply_up(x, self.delta, self.anchor)
        return out if self.bias is None else out + self.bias


class DifferenceConv2d(DifferenceFactor, nn.Conv2d):  # type: ignore[misc,override]
    """A' = [D; A0] (2r, in, kh, kw) or B' = [B0 + E, E] (out, 2r, 1, 1) of a convolution, along the channels."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution with the joined factor: (n, in, h, w) -> (n, 2r, h', w') -> (n, out, h', w')."""
        return F.conv2d(x, self.joined, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Difference(ForwardVariant):
    """The forward pass of PEFT's LoRA layer with the products of this file; the second one adds to W x."""

    def update(self, down: Any, up: Any, x: Tensor, onto: Tensor, scaling: float, drops: bool) -> Tensor:
        """Return y = W x + s ((B0 + E) D x + E A0 x) for `onto`, the output W x of the base layer."""
        if not isinstance(up, DifferenceFactor):  # other code has replaced the factors
            return onto + up(down(x)) * scaling
        return multiply_up(down(x), up.delta, up.anchor, onto, scaling)


def multiply_down(x: Tensor, delta: Tensor, anchor: Tensor) -> Tensor:
    """Return [D x, A0 x], (..., in) -> (..., 2r), in the dtype of the products, see `_dtype`.

    >>> x, D, A0 = torch.eye(3), torch.zeros(2, 3), torch.ones(2, 3)
    >>> multiply_down(x, D, A0).shape
    torch.Size([3, 4])
    """
    return _Down.apply(x, delta, anchor, _dtype(x, delta, anchor))  # type: ignore[no-any-return,no-untyped-call]


def multiply_up(
    hidden: Tensor, delta: Tensor, anchor: Tensor, onto: Tensor | None = None, scaling: float = 1.0
) -> Tensor:
    """Return s ((B0 + E) h + E h0) for `hidden` = [h, h0], (..., 2r) -> (..., out), in the dtype of `multiply_down`.

    With `onto` (..., out), return the sum of both in its dtype.

    A new adapter has D = 0 and E = 0, so it changes no output:

    >>> hidden = multiply_down(torch.randn(5, 3), torch.zeros(2, 3), torch.randn(2, 3))
    >>> bool((multiply_up(hidden, torch.zeros(4, 2), torch.randn(4, 2)) == 0).all())
    True
    """
    dtype = _dtype(hidden, delta, anchor)
    if onto is None or onto.dtype != dtype:
        update: Tensor = _Up.apply(hidden, delta, anchor, dtype, scaling, None)  # type: ignore[no-untyped-call]
        return update if onto is None else (onto + update).to(onto.dtype)
    # A function must not return a view: autograd refuses to change one in place, as models with `+=` do.
    out: Tensor = _Up.apply(as_rows(hidden), delta, anchor, dtype, scaling, as_rows(onto))  # type: ignore[no-untyped-call]
    return out.view(onto.shape)


def _dtype(x: Tensor, delta: Tensor, anchor: Tensor) -> torch.dtype:
    """Return the dtype of the products: autocast's, without it bfloat16 if the base is bfloat16, else `delta`'s.

    PEFT trains float32 adapters on a bfloat16 base, and would multiply in float32. The sum with W x is rounded to
    bfloat16 anyway, so the products round no more than autocast does.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return anchor.dtype if anchor.dtype == torch.bfloat16 else delta.dtype


# The two functions below compute no gradient for the anchor, and they keep no joined factor between forward and
# backward: joining twice costs less than 2r (in + out) numbers of memory per layer.


class _Down(torch.autograd.Function):
    """[D x, A0 x] with gradients for x and D: dx = g [D; A0], dD = g_D' x, where g_D is the first half of g."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor, anchor: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtypes = x.dtype, dtype
        x = x.to(dtype)
        ctx.save_for_backward(x, delta, anchor)
        with autocast(x.device.type, enabled=False):
            return F.linear(x, join(delta, anchor, 0, dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, delta, anchor = ctx.saved_tensors
        of_x = of_delta = None
        with autocast(grad.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                of_x = (grad @ join(delta, anchor, 0, ctx.dtypes[1])).to(ctx.dtypes[0])
            if ctx.needs_input_grad[1]:
                of_delta = (as_rows(grad[..., : len(delta)]).T @ as_rows(x)).to(delta.dtype)
        return of_x, of_delta, None, None


class _Up(torch.autograd.Function):
    """s ((B0 + E) h + E h0) + y with gradients for [h, h0], E and y: d[h, h0] = s g [B0 + E, E], dE = s g' (h + h0)."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, delta: Tensor, anchor: Tensor, dtype: torch.dtype, scaling: float, onto: Tensor | None
    ) -> Tensor:
        ctx.dtypes, ctx.scaling = (hidden.dtype, dtype), scaling
        hidden = hidden.to(dtype)
        ctx.save_for_backward(hidden, delta, anchor)
        with autocast(hidden.device.type, enabled=False):
            joined = join(delta, anchor, 1, dtype)
            if onto is None:
                out = F.linear(hidden, joined)
                return out if scaling == 1 else out * scaling
            return torch.addmm(onto, hidden, joined.T, alpha=scaling)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, Tensor | None]:
        hidden, delta, anchor = ctx.saved_tensors
        of_hidden = of_delta = None
        with autocast(grad.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                of_hidden = _scaled(grad @ join(delta, anchor, 1, ctx.dtypes[1]), ctx.scaling).to(ctx.dtypes[0])
            if ctx.needs_input_grad[1]:
                first, second = hidden.chunk(2, dim=-1)
                of_delta = _scaled(as_rows(grad).T @ as_rows(first + second), ctx.scaling).to(delta.dtype)
        return of_hidden, of_delta, None, None, None, grad if ctx.needs_input_grad[5] else None


def _scaled(product: Tensor, scaling: float) -> Tensor:
    return product if scaling == 1 else product.mul_(scaling)


_CLASSES: dict[type[nn.Module], type[DifferenceFactor]] = {nn.Linear: DifferenceLinear, nn.Conv2d: DifferenceConv2d}


def install_factors(layer: LoraLayer, adapter: str, A0: Tensor, B0: Tensor) -> None:
    """Initialize an adapter of a layer: the differences are zero, the anchors A0 (r, in) and B0 (out, r)."""
    pairs = []
    for axis, (anchor, stock) in enumerate(zip((A0, B0), factors(layer, adapter), strict=True)):
        shape = list(stock.shape)  # (2r, in, kh, kw) and (out, 2r, 1, 1) for a convolution
        shape[axis] //= 2
        anchor = anchor.to(stock.device).reshape(shape).contiguous()
        pairs.append((torch.zeros_like(anchor, dtype=stock.dtype), anchor))
    _put(layer, adapter, pairs)


def install_loaded(layer: LoraLayer, adapter: str, B0: Tensor | None) -> None:
    """Split the stock factors [D; A0] and [B0 + E, E] of a loaded adapter into differences and anchors.

    `B0` is the exact anchor (out, r) where the file has it. Anchors get the dtype of the base weight where that changes
    no value. A layer that was loaded over differences and anchors only gets B0.
    Raises AdapterError if B0 does not belong to the factors.
    """
    dtype = factor_dtype(layer.get_base_layer())
    if not has_anchor(layer, adapter):
        _put(layer, adapter, [split(joined, axis, dtype) for axis, joined in enumerate(factors(layer, adapter))])
    if B0 is not None:
        B, E = (half.float() for half in factors(layer, adapter)[1].detach().chunk(2, dim=1))
        B0 = B0.to(E.device).reshape(E.shape)
        if torch.linalg.vector_norm(B0.float() + E - B) > 0.01 * torch.linalg.vector_norm(B):
            message, hint = "the anchor does not belong to the factors: B0 + E is not B", RESTORE
            raise AdapterError(message, code="adapter-wrong-anchor", where=ANCHORS_FILE, hint=hint)
        layer.lora_B[adapter].register_buffer(ANCHOR, lossless(B0, dtype))


def install_copy(layer: LoraLayer, adapter: str, source: str) -> None:
    """Initialize an adapter at a copy of the anchor of `source`, with differences of the same dtype."""
    both = (layer.lora_A[source], layer.lora_B[source])
    pairs = zip((factor.get_parameter(DELTA) for factor in both), anchors_of(layer, source), strict=True)
    _put(layer, adapter, [(torch.zeros_like(delta), anchor.clone()) for delta, anchor in pairs])


def unrecoverable(layer: LoraLayer, adapter: str, joined: Tensor | None = None) -> Tensor | None:
    """Return B0 of an adapter if a reader of [B0 + E, E] would not get it back bit for bit, else None.

    `joined` is the factor that is saved, if it is not the one in the layer.
    """
    joined = factors(layer, adapter)[1] if joined is None else joined
    B0 = anchors_of(layer, adapter)[1]
    B, E = joined.detach().to(B0.device).chunk(2, dim=1)
    read = recover(B, E, factor_dtype(layer.get_base_layer()))
    return None if torch.equal(read.to(B0.dtype), B0) and torch.equal(B0.to(read.dtype), read) else B0


def _put(layer: LoraLayer, adapter: str, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Replace the stock factors of `adapter`; `pairs` is (difference, anchor) for A, then for B."""
    for axis, stock in enumerate((layer.lora_A[adapter], layer.lora_B[adapter])):
        _CLASSES[type(stock)].convert(stock, axis, *pairs[axis])
    if type(layer) is lora.Linear:  # a quantized layer or a subclass keeps its own forward
        set_variant(layer, adapter, Difference())


def factors(layer: LoraLayer, adapter: str) -> tuple[Tensor, Tensor]:
    """Return the factors of an adapter as stock PEFT stores them: A' (2r, in) and B' (out, 2r)."""
    if adapter in layer.lora_embedding_A:
        return layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
    both: Any = layer.lora_A[adapter], layer.lora_B[adapter]
    A, B = (factor.joined if isinstance(factor, DifferenceFactor) else factor.weight for factor in both)
    return A, B


def anchors_of(layer: LoraLayer, adapter: str) -> tuple[Tensor, Tensor]:
    first, second = layer.lora_A[adapter], layer.lora_B[adapter]
    return first.get_buffer(ANCHOR), second.get_buffer(ANCHOR)


def has_anchor(layer: LoraLayer, adapter: str) -> bool:
    return adapter in layer.lora_A and isinstance(layer.lora_A[adapter], DifferenceFactor)


def fixed_names(model: nn.Module) -> Iterator[str]:
    """Yield the names of the buffers of a model that never change: anchors, each fixed A, updates of earlier runs."""
    for name, module in model.named_modules():
        is_factor = isinstance(module, DifferenceFactor) or ".lora_A." in name
        yield from (f"{name}.{key}" for key, _ in module.named_buffers(recurse=False) if is_factor or key in EARLIER)
