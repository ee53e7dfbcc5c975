"""`python benchmarks/difference_form.py`, small: the errors that docs/train.md shows."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"


def test_the_difference_form_keeps_its_digits_where_the_other_forms_do_not(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import difference_form

    words = ["difference_form.py", "--width", "256", "--rank", "16", "--tokens", "64", "--repeats", "1"]
    monkeypatch.setattr(sys, "argv", words)
    difference_form.main()
    result = json.loads(capsys.readouterr().out)
    assert result["seconds"].keys() == {"difference", "halves", "residual"}
    for share, errors in result["error"].items():
        assert max(errors["difference"].values()) <= 0.005
        if float(share) <= 0.1:
            assert min(errors["halves"].values()) > 5 * max(errors["difference"].values())
        assert min(errors["residual"].values()) > 0.1
