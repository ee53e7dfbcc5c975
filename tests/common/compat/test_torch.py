"""What `milora_vl.common.compat.torch` needs of torch."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from milora_vl.common.compat.torch import (
    OwnState,
    after_operations,
    call_on_plain_tensors,
    change_class,
    extend_forward,
    has_hooks,
    without_data,
)


class Strict(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func.__name__} was intercepted")


def test_operations_run_without_the_subclass() -> None:
    with torch._C.DisableTorchFunctionSubclass():
        value = torch.ones(2).as_subclass(Strict)
    assert call_on_plain_tensors(torch.Tensor.sum, (value,), {}).item() == 2


def test_an_extended_forward_keeps_name_and_signature_and_computes_with_the_weights_of_a_copy() -> None:
    layer = nn.Linear(2, 2)
    extend_forward(layer, lambda module, stock, x, twice=False: stock(x) * (1 + twice))
    copied = copy.deepcopy(layer)
    copied.weight.data.zero_()
    copied.bias.data.fill_(3)
    assert copied(torch.ones(2), twice=True).tolist() == [6, 6]
    assert type(copied).__name__ == "Linear"
    assert isinstance(copied, nn.Linear)
    assert list(inspect.signature(copied.forward).parameters) == ["input"]  # `generate` reads it


def test_ddp_reads_the_names_to_ignore() -> None:
    assert "_ddp_params_and_buffers_to_ignore" in inspect.getsource(DistributedDataParallel)


def test_every_kind_of_hook_is_seen() -> None:
    for name in ("forward_pre", "forward", "full_backward_pre", "full_backward"):
        layer = nn.Linear(2, 2)
        assert not has_hooks(layer)
        getattr(layer, f"register_{name}_hook")(lambda *_: None)
        assert has_hooks(layer), name


def test_an_object_gets_a_subclass_and_stays_the_same_object() -> None:
    class Layer(nn.Linear):
        pass

    layer = nn.Linear(2, 2)
    assert change_class(layer, Layer) is layer
    assert isinstance(layer, Layer)


def test_a_module_writes_and_reads_its_own_names() -> None:
    class Renamed(OwnState):
        def __init__(self) -> None:
            super().__init__()
            self.inside = nn.Parameter(torch.zeros(2))

        def write_state(self, destination: Any, prefix: str, keep_vars: bool) -> None:
            super().write_state(destination, prefix, keep_vars)
            destination[f"{prefix}outside"] = destination.pop(f"{prefix}inside")

        def read_state(self, state_dict: Any, prefix: str, *about: Any) -> None:
            state_dict[f"{prefix}inside"] = state_dict.pop(f"{prefix}outside")
            super().read_state(state_dict, prefix, *about)

    model = nn.Sequential(Renamed())
    assert list(model.state_dict()) == ["0.outside"]
    model.load_state_dict({"0.outside": torch.ones(2)})
    assert model[0].inside.tolist() == [1, 1]


def test_operations_without_data_are_seen_with_their_sizes() -> None:
    shapes: list[tuple[int, ...]] = []
    with without_data(), after_operations(lambda tensor: shapes.append(tuple(tensor.shape))):
        product = torch.ones(3, 4) @ torch.ones(4, 5)
    assert product.device.type == "cpu"
    assert shapes[-1] == (3, 5)
