"""A GRU that can hold adapters: the same arithmetic as nn.GRU (Cho et al., arXiv:1406.1078), with two Linear layers.

nn.GRU stores its matrices as direct parameters (`weight_ih_l0`, `weight_hh_l0`) and passes them to one fused kernel.
It contains no layer that PEFT could replace, so an adapter would have no effect. As Linear layers, the matrices can be
adapted, merged and decomposed like any others. The cost is the fused kernel: each step of a sequence becomes about ten
small operations. Merged weights can be copied back into an nn.GRU unchanged.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LinearGru(nn.Module):
    """One layer, one direction, batch first. Each Linear stacks the rows of the gates reset, update and new."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.input = nn.Linear(input_size, 3 * hidden_size)
        self.hidden = nn.Linear(hidden_size, 3 * hidden_size)

    @classmethod
    def of(cls, gru: nn.GRU) -> LinearGru:
        """Return the same network with the weights of `gru`. Raises ValueError for several layers or directions."""
        if gru.num_layers > 1 or gru.bidirectional or not gru.bias or not gru.batch_first:
            raise ValueError("expected an nn.GRU of one layer and direction, with biases and the batch first")
        network = cls(gru.input_size, gru.hidden_size)
        weights = {
            "input.weight": gru.weight_ih_l0, "input.bias": gru.bias_ih_l0,
            "hidden.weight": gru.weight_hh_l0, "hidden.bias": gru.bias_hh_l0,
        }  # fmt: skip
        network.load_state_dict(weights)
        return network

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Map sequences (batch, steps, in) to all states (batch, steps, hidden) and the last one (1, batch, hidden)."""
        state = rows.new_zeros(len(rows), self.hidden_size)
        states = []
        for step in self.input(rows).unbind(1):
            reset_x, update_x, new_x = step.chunk(3, dim=-1)
            reset_h, update_h, new_h = self.hidden(state).chunk(3, dim=-1)
            update = torch.sigmoid(update_x + update_h)
            new = torch.tanh(new_x + torch.sigmoid(reset_x + reset_h) * new_h)
            state = (1 - update) * new + update * state
            states.append(state)
        return torch.stack(states, dim=1), state[None]
