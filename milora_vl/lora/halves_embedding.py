"""The two halves of an embedding's adapter. PEFT keeps its factors in two ParameterDicts, which get the class below."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import Any

from torch import Tensor, nn

from milora_vl.lora.halves import join, lossless, rank_message, split

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
