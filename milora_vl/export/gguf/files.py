"""Write one GGUF file, tensor by tensor, and choose its number types (`--outtype`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from milora_vl.base.errors import UserError

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

OutType = Literal["f32", "f16", "bf16", "q8_0"]


def writer_of(path: Path, architecture: str) -> GGUFWriter:
    """Return the writer of a new file. Raises UserError if the package gguf is not installed."""
    try:
        import gguf
    except ModuleNotFoundError:
        raise UserError(
            "GGUF needs the package gguf, which is not installed",
            code="package-missing",
            where="--to",
            hint="pip install 'milora-vl[demo]'   (or pip install gguf)",
        ) from None
    return gguf.GGUFWriter(path, architecture)


def renamed(state: Mapping[str, Tensor], name_of: Callable[[str], str | None]) -> dict[str, Tensor]:
    """Return the weights by the names that `name_of` gives them, without those that it gives none."""
    return {new: tensor for name, tensor in state.items() if (new := name_of(name)) is not None}


def write(writer: GGUFWriter, tensors: Mapping[str, Tensor], outtype: OutType) -> None:
    """Write the settings of `writer`, then the tensors, and close it. Matrices get the type, vectors stay float32.

    A matrix whose rows are no multiple of 32 is stored as f16 instead of q8_0. Raises UserError for values beyond f16.
    """
    import gguf

    types = {name: _type_of(tensor, outtype) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        shape = gguf.quant_shape_to_byte_shape(tuple(tensor.shape), types[name])
        size = int(np.prod(shape))
        writer.add_tensor_info(name, shape, np.dtype(np.uint8), size, types[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, tensor in tensors.items():
        writer.write_tensor_data(_stored(name, tensor, types[name]))
    writer.close()


def _type_of(tensor: Tensor, outtype: OutType) -> GGMLQuantizationType:
    import gguf

    kinds = gguf.GGMLQuantizationType
    if tensor.dim() < 2 or outtype == "f32":
        return kinds.F32
    if outtype == "q8_0" and tensor.shape[-1] % 32:
        return kinds.F16
    return kinds[outtype.upper()]


def _stored(name: str, tensor: Tensor, kind: GGMLQuantizationType) -> np.ndarray[Any, Any]:
    """Return the bytes of a tensor in its type. A kernel of a convolution is quantised by rows like a matrix."""
    import gguf

    values = tensor.detach().float().contiguous()
    if kind == gguf.GGMLQuantizationType.F16 and bool((values.abs() > torch.finfo(torch.float16).max).any()):
        raise UserError(
            "the weight has values that f16 cannot hold",
            code="export-gguf-overflow",
            where=name,
            hint="use:  --outtype bf16",
        )
    array: np.ndarray[Any, Any] = gguf.quants.quantize(values.numpy(), kind)
    return array
