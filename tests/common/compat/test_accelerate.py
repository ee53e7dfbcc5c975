"""Private names of accelerate that `milora_vl.common.compat.trainer` uses."""

from __future__ import annotations

from accelerate.state import PartialState


def test_the_processes_share_their_type() -> None:
    PartialState()
    assert "distributed_type" in PartialState._shared_state
