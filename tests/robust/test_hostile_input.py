"""Files from strangers: fuzzed inputs of every reader, and bombs that a few kilobytes can hold."""

from __future__ import annotations

import io
import json
import pickle
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from PIL import Image

from milora_data.formats.plain_pickle import read_plain_pickle
from milora_data.pictures.files import ImageError, load_image
from milora_eval.benchmarks.xlsx import read_xlsx
from milora_eval.commands.score import main as score
from milora_vl.adapter.files import load_adapter
from milora_vl.base.errors import DataError, UserError
from milora_vl.base.yaml_text import YamlTextError, parse_yaml
from milora_vl.weights.torch_files import UNREAD, read_pickled
from support.fuzz_guard import Fault, guarded, peak
from support.fuzz_targets import (
    PREDICTION,
    YAML_BOMB,
    YAML_TRICKS,
    Command,
    Target,
    adapter_files,
    run_case,
    small_base,
    targets,
    torch_file,
    xlsx,
    zip_with_pickle,
)
from support.problems import raises_code

SLOW = ("run folders", "check and stats", "adapter folders")  # left to the script
LIMIT = 300 << 20  # bytes that a bomb may take


@pytest.mark.filterwarnings("ignore")
def test_a_fixed_part_of_the_fuzzing_finds_no_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MILORA_CACHE", str(tmp_path / "scratch" / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    faults = {}
    for target in targets():
        if target.name not in SLOW:
            faults |= _faults(target, tmp_path, cases=target.share)
    capsys.readouterr()
    assert faults == {}


def _faults(target: Target, home: Path, cases: int) -> dict[str, str]:
    found: dict[str, str] = {}

    @settings(
        max_examples=cases, derandomize=True, database=None, deadline=None, phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(drawn=target.inputs)
    def each(drawn: Any) -> None:
        fault = run_case(target, drawn, home)
        if fault:
            found[f"{target.name}: {fault}"] = repr(drawn)[:300]

    each()
    return found


def test_the_guard_sees_what_it_forbids(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "planted-outside.txt"
    inside.mkdir()
    outside.write_text("secret")

    acts: list[Callable[[], object]] = [
        lambda: subprocess.run(["true"], check=True),
        outside.read_text,
        lambda: (tmp_path / "b").write_text("x"),
        lambda: {}["a"],
    ]
    for act in acts:
        with pytest.raises(Fault), guarded(inside, allowed=(UserError,)):
            act()
    with guarded(inside, allowed=(UserError,)):
        (inside / "a").write_text("x")


def png_bomb(width: int, height: int) -> bytes:
    """A PNG of one colour: its pixels compress 1,000 times."""
    packer, rows = zlib.compressobj(9), bytes(width + 1)
    data = b"".join(packer.compress(rows) for _ in range(height)) + packer.flush()

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def saved(kind: str, size: tuple[int, int], **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", size).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore:Image size")
@pytest.mark.parametrize(
    "content",
    [
        pytest.param(lambda: png_bomb(7_000, 7_000), id="png"),
        pytest.param(lambda: saved("WEBP", (7_000, 7_000), lossless=True, method=0), id="webp"),
        pytest.param(lambda: saved("TIFF", (7_000, 7_000), compression="tiff_adobe_deflate"), id="tiff"),
        pytest.param(lambda: saved("GIF", (7_000, 7_000)), id="gif"),
    ],
)
def test_a_small_picture_file_takes_little_memory(content: Callable[[], bytes], tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(content())
    before = peak()
    with raises_code("image-unreadable", message="megapixels in a file of", kind=ImageError):
        load_image(tmp_path / "a.png")
    assert peak() - before < LIMIT


def test_a_large_photo_and_a_blank_page_are_still_read(tmp_path: Path) -> None:
    Image.effect_noise((2_000, 1_500), 30).resize((8_000, 6_000), Image.Resampling.NEAREST).save(tmp_path / "photo.jpg")
    assert load_image(tmp_path / "photo.jpg", longest=400).size[0] < 8_000
    (tmp_path / "page.png").write_bytes(png_bomb(6_000, 6_000))
    assert load_image(tmp_path / "page.png").size == (6_000, 6_000)


def test_a_picture_is_never_decoded_by_another_program(tmp_path: Path) -> None:
    saved_eps = io.BytesIO()
    Image.new("L", (8, 8)).save(saved_eps, "EPS")
    (tmp_path / "a.jpg").write_bytes(saved_eps.getvalue())
    with raises_code("image-unreadable", message="not a picture", kind=ImageError):
        load_image(tmp_path / "a.jpg")


TABLE = xlsx([["index", "prediction"], [1, "a"]])


def repacked(content: bytes, change: Callable[[str, bytes], bytes]) -> bytes:
    """A zip file with compressed and perhaps changed members."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return buffer.getvalue()


def test_an_excel_table_that_expands_is_refused(tmp_path: Path) -> None:
    sheet = b"<worksheet><sheetData>" + b'<row><c t="inlineStr"><is><t>a</t></is></c></row>' * 1_000_000
    content = repacked(TABLE, lambda name, text: sheet if name.endswith("sheet1.xml") else text)
    assert len(content) < 200_000
    (tmp_path / "a.xlsx").write_bytes(content)
    before = peak()
    with raises_code("data-unreadable", message="would expand to", kind=DataError):
        read_xlsx(tmp_path / "a.xlsx")
    assert peak() - before < LIMIT


def test_an_excel_table_that_claims_a_million_rows_is_read(tmp_path: Path) -> None:
    content = repacked(TABLE, lambda _, text: text.replace(b'ref="A1:B2"', b'ref="A1:XFD1048576"'))
    (tmp_path / "a.xlsx").write_bytes(content)
    assert read_xlsx(tmp_path / "a.xlsx") == [{"index": 1, "prediction": "a"}]


def test_a_weight_file_that_expands_is_refused(tmp_path: Path) -> None:
    packed = repacked(torch_file({"a": torch.zeros(2_000_000)}), lambda _, text: text)
    (tmp_path / "a.bin").write_bytes(packed)
    with pytest.raises(UNREAD, match="would expand"):
        read_pickled(tmp_path / "a.bin")
    torch.save({"a": torch.zeros(1).expand(1 << 40)}, tmp_path / "b.bin")
    with pytest.raises(UNREAD, match="claims more values"):
        read_pickled(tmp_path / "b.bin")
    allocates = b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\x00\x00\x00\x00\x02\x85R."
    (tmp_path / "c.bin").write_bytes(zip_with_pickle(allocates))
    with pytest.raises(UNREAD, match="fill the memory"):
        read_pickled(tmp_path / "c.bin")


def test_no_pickle_runs_code_or_fills_the_memory(tmp_path: Path) -> None:
    for number, content in enumerate((pickle.dumps([Command()]), b"Nr\xff\xff\xff\x7f.")):
        (tmp_path / f"{number}.p").write_bytes(content)
        before = peak()
        with raises_code("data-unsafe-pickle", kind=DataError):
            read_plain_pickle(tmp_path / f"{number}.p")
        assert peak() - before < LIMIT


@pytest.mark.parametrize("text", [YAML_BOMB, "&a [*a]", "[" * 3000, "a: !!python/object/apply:os.system ['id']"])
def test_yaml_neither_expands_nor_runs_code(text: str) -> None:
    assert text in YAML_TRICKS
    with pytest.raises(YamlTextError, match=r"more than|itself|too deeply|could not determine a constructor"):
        parse_yaml(text)


def test_stored_answers_run_no_code_that_nobody_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = tmp_path / "mine.py"
    own.write_text(
        "from milora_eval import Benchmark\n"
        f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
        "class Mine(Benchmark):\n"
        "    name = 'mine'\n"
        "    def score(self, item, text):\n"
        "        return 1.0\n"
    )
    run = tmp_path / "eval" / "mine" / "final"
    run.mkdir(parents=True)
    (run / "predictions.jsonl").write_text(json.dumps({**PREDICTION, "benchmark": f"{own}:Mine"}) + "\n")
    with pytest.raises(UserError) as raised:
        score([str(run)])
    assert raised.value.first.code == "eval-benchmark-code"
    assert not (tmp_path / "ran").exists()
    assert score([str(run), "--plugin", f"{own}:Mine"]) == 0
    assert (tmp_path / "ran").exists()
    capsys.readouterr()


def test_an_adapter_config_imports_no_module(tmp_path: Path) -> None:
    for name, content in adapter_files().items():
        (tmp_path / name).write_bytes(content)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config |= {"megatron_config": {}, "megatron_core": "antigravity"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with raises_code("adapter-unsupported-kind", message="would be imported"):
        load_adapter(small_base(), tmp_path)
    assert "antigravity" not in sys.modules
