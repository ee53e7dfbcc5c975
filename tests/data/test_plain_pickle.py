"""A pickle can run any code when it is read: ours takes data alone."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest

from milora_data.formats.jsonfile import read_plain_pickle
from milora_vl.common.errors import DataError
from support.problems import raises_code


class Hostile:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("echo harm > harmed",)


def test_plain_data_comes_back(tmp_path: Path) -> None:
    data = [{"ref_id": 3, "box": [0.5, 1.0], "names": ("a", "b"), "split": "val", "none": None}]
    (tmp_path / "refs.p").write_bytes(pickle.dumps(data, protocol=2))
    assert read_plain_pickle(tmp_path / "refs.p") == data


def test_code_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("refs.p").write_bytes(pickle.dumps([Hostile()]))
    with raises_code("", message="posix.system, not data alone", kind=DataError):
        read_plain_pickle(Path("refs.p"))
    assert not Path("harmed").exists()


@pytest.mark.parametrize("content", [b"", b"not a pickle", b"\x80\x02]q", b"\x80\x02."])
def test_what_is_no_pickle_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "refs.p").write_bytes(content)
    with raises_code("", where="refs.p", message="cannot be read", kind=DataError):
        read_plain_pickle(tmp_path / "refs.p")
