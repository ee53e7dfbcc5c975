"""The readers of files that may come from strangers, each with a strategy for its input. `TARGETS` lists them.

A reader gets a folder and one drawn input; it may raise the listed errors and nothing else. `fuzz_guard` watches it.
"""

from __future__ import annotations

import io
import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

from milora_vl.base.errors import UserError
from support.hostile import PATHS, TEXTS, json_bytes, mangled, spoiled, values

Read = Callable[[Path, Any], object]
TURNS = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A disc."}]
RECORDS = [
    {"id": "a", "image": "0.png", "conversations": TURNS},
    {"id": "b", "conversations": [{"from": "human", "value": "1 + 1?"}, {"from": "gpt", "value": "2"}]},
]
MESSAGES = [
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "image", "image": "0.png"}, {"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": "A disc."},
        ]
    },
    {"prompt": "1 + 1?", "completion": "2"},
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}], "images": ["0.png"]},
]
PREDICTION = {
    "id": "1", "benchmark": "gqa", "type": "query", "question": "What colour?", "image": "0.png",
    "image_file": "0.png", "prediction": "red", "answers": ["red"], "correct": 1.0, "baseline": None, "group": "0",
    "key": "k1", "meta": {"question_id": "1"}, "context": [["user", "a"], ["assistant", "b"]],
}  # fmt: skip
RESULTS = {
    "suite": "gqa",
    "which": "base",
    "benchmarks": [{"name": "gqa", "reference": "gqa", "num": 1, "metrics": []}],
}
TRAINER_STATE = {
    "global_step": 2, "max_steps": 6, "epoch": 0.5, "best_model_checkpoint": None,
    "log_history": [{"step": 1, "loss": 2.5, "epoch": 0.2, "learning_rate": 1e-4}, {"step": 2, "eval_loss": 2.0}],
}  # fmt: skip
ENVIRONMENT = {
    "command": ["python"], "versions": {"torch": "2"}, "git": {"commit": "a", "changed": False}, "device": "cpu",
    "processes": 1, "dtype": "float32", "started": "2026-11-27T10:00:00+00:00", "finished": None, "seconds": 1.5,
    "seed": 42, "model": "tiny", "base": "tiny", "data": {"train": 2}, "records": "x", "resumed": [],
}  # fmt: skip
RECIPE = """\
model: tiny
form: anchored
policy:
  - {modules: language, method: milora, rank: 8, alpha: 16}
  - &one {modules: "model.layers.*.q_proj", method: lora, rank: 4, learning_rate: 2e-4}
  - {modules: projector, method: full}
data: {path: [{path: train.json, weight: 0.5}], image_folder: images, max_length: 512}
train: {learning_rate: 2e-5, max_steps: 6, bf16: false, output_dir: out}
eval: {suites: [emoji]}
"""
YAML_BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 60))
MERGE_BOMB = "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}\n" for n in range(1, 40))
YAML_TRICKS = (
    YAML_BOMB,
    MERGE_BOMB,
    "&a [*a]",
    "a: &a {b: *a}",
    "[" * 3000,
    "{a: " * 3000,
    "- " * 3000,
    "a: !!python/object/apply:os.system ['id']",
    "a: !!python/name:os.system",
    "!!binary x",
    "a: !!timestamp 99999-99-99",
    "a: !!int abc",
    "a: !!float abc",
    "a: !!bool abc",
    "a: " + "9" * 5000,
    "? [a, b]\n: c",
    "? {a: b}\n: c",
    "a: 1:60:60",
    "a: 0x",
    "%YAML 9.9\n---\na: 1",
    "a: 1\n---\nb: 2",
    "!<tag:a> b",
    "\x00",
    "\ufeffa: 1",
    "a: \ud800",
    "weight: .inf",
    "a: .nan",
)


@dataclass(frozen=True)
class Target:
    """A reader, what it reads, the errors that it may raise, and its share of the cases of a long run."""

    name: str
    inputs: st.SearchStrategy[Any]
    read: Read
    share: int = 10
    allowed: tuple[type[Exception], ...] = (UserError,)
    files: dict[str, bytes] = field(default_factory=dict)  # that lie in the folder before each case


@cache
def tokenizer() -> Any:
    from milora_vl.tiny import tiny_llama

    return tiny_llama()[1]


def picture(kind: str, mode: str = "RGB", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((40, 24)).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


PICTURES = (
    picture("PNG"), picture("PNG", "P"), picture("PNG", "RGBA"), picture("PNG", "I;16"), picture("JPEG"),
    picture("JPEG", progressive=True), picture("JPEG", "CMYK"), picture("GIF"), picture("WEBP"),
    picture("WEBP", lossless=True), picture("BMP"), picture("TIFF"), picture("TIFF", "F"),
    picture("TIFF", compression="tiff_lzw"), picture("TIFF", compression="jpeg"), picture("TGA"), picture("ICO"),
    picture("PPM"), picture("PCX"), picture("JPEG2000"), picture("EPS"), picture("PDF"), picture("SGI"),
)  # fmt: skip


def _picture(folder: Path, content: bytes) -> None:
    from milora_data.check.pictures import faults
    from milora_data.pictures.files import load_image, picture_size, picture_suffix

    file = folder / "a.png"
    file.write_bytes(content)
    list(faults(file))
    picture_suffix(content)
    try:
        picture_size(file)
    finally:
        load_image(file, longest=32)


def _embedded(_: Path, url: str) -> None:
    from milora_data.pictures.embedded import decoded
    from milora_data.pictures.files import load_image

    load_image(decoded(url))


def _records(folder: Path, content: bytes) -> None:
    from milora_data.encode.labels import encode
    from milora_data.pictures.files import load_image, place_of
    from milora_data.stream.sources import load_records
    from milora_vl.base.errors import DataError

    (folder / "train.json").write_bytes(content)
    for number, record in enumerate(islice(load_records(folder / "train.json"), 50)):
        for name in record.images:
            try:
                load_image(place_of(folder / "images", name))
            except DataError:
                continue
        for template in ("vicuna_v1", "plain", "chat_template"):
            try:
                most = (None, 16)[number % 2]
                encode(record, tokenizer(), template=template, image_token_id=-200, image_tokens=4, max_length=most)
            except DataError:
                continue


def _check(folder: Path, content: bytes) -> None:
    from milora_data.check.command import main as check
    from milora_data.check.stats import main as stats

    (folder / "train.json").write_bytes(content)
    words = [str(folder / "train.json"), "--image_folder", str(folder / "images")]
    check([*words, "--fix", str(folder / "out" / "fixed.json")])
    stats([str(folder / "train.json")])


KINDS: dict[str, tuple[str, Any]] = {
    "llava": ("a.json", RECORDS),
    "messages": ("a.json", MESSAGES),
    "sharegpt": ("a.json", [{"id": "1", "conversations": TURNS}]),
    "alpaca": ("a.json", [{"instruction": "Add.", "input": "1 1", "output": "2", "history": [["a", "b"]]}]),
    "table": ("a.json", [{"image": "0.png", "question": "What?", "answer": "Disc", "system": "s"}]),
    "vqav2": ("a.json", {"questions": [{"image_id": 1, "question": "a?", "question_id": 2}], "annotations": []}),
    "gqa": ("a.json", {"1": {"question": "a?", "imageId": "n1", "answer": "b", "fullAnswer": "c"}}),
    "aokvqa": ("a.json", [{"image_id": 1, "question": "a", "choices": ["b", "c"], "correct_choice_idx": 0,
                           "direct_answers": ["b"], "rationales": ["r"], "question_id": "1", "split": "train"}]),
    "scienceqa": ("a.json", {"1": {"question": "a", "choices": ["b", "c"], "answer": 0, "hint": "h", "image": None,
                                   "lecture": "l", "solution": "s", "split": "train"}}),
    "textvqa": ("a.json", {"data": [{"question_id": 1, "image_id": "i", "question": "q", "answers": ["a"]}]}),
    "ocrvqa": ("a.json", {"1": {"questions": ["q"], "answers": ["a"], "imageURL": "x.jpg", "split": 1}}),
    "vizwiz": ("a.json", [{"image": "a.jpg", "question": "q", "answers": [{"answer": "a"}], "answerable": 1}]),
    "coco": ("a.json", {"images": [{"id": 1, "file_name": "a.jpg"}],
                                 "annotations": [{"id": 1, "image_id": 1, "caption": "c"}]}),
}  # fmt: skip


def _convert(folder: Path, drawn: tuple[str, bytes]) -> None:
    from milora_data.convert.command import main

    kind, content = drawn
    (folder / "a.json").write_bytes(content)
    main(["--from", kind, str(folder / "a.json"), "--output_dir", str(folder / "out")])


TABLE = b'image,question,answer\n0.png,What?,A disc\n1.png,"Which, one?","The ""red"" one"\n'


def _table(folder: Path, drawn: tuple[str, bytes]) -> None:
    from milora_data.convert.command import main

    suffix, content = drawn
    (folder / f"a{suffix}").write_bytes(content)
    main(["--from", "table", str(folder / f"a{suffix}"), "--output_dir", str(folder / "out")])


def _plain_pickle(folder: Path, content: bytes) -> None:
    from milora_data.formats.plain_pickle import read_plain_pickle

    (folder / "refs.p").write_bytes(content)
    read_plain_pickle(folder / "refs.p")


class Command:
    """Its pickle would run a command."""

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.system, ("touch /tmp/planted-outside.txt",)


REFS = pickle.dumps([{"ref_id": 1, "image_id": 5, "sentences": [{"sent": "a", "sent_id": 1}], "split": "val"}] * 3)
PICKLES = (
    pickle.dumps(Command()), pickle.dumps([Command()], 0), b"N" + b"r\xff\xff\xff\x7f.", b"\x80\x04\x8e" + b"\xff" * 7
    + b"\x7f.", b"\x80\x04B\xff\xff\xff\x7f.", b"(" * 50_000 + b"." , b"]" * 50_000 + b"a" * 49_999 + b".",
    b"\x80\x04\x96" + b"\xff" * 7 + b"\x7f.", b"F1e999\n.", b"L" + b"9" * 6000 + b"L\n.", b"cos\nsystem\n(S'id'\ntR.",
    b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\x00\x00\x00\x00\x02\x85R.", b"", b".", b"\x80\xff.", b"}NNNs.",
    b"]q\x00(h\x00e.", b"]}s.", b"I01\nI5\na.", b"X\xff\xff\xff\xffa.",
)  # fmt: skip


def torch_file(value: Any, *, old: bool = False) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=not old)
    return buffer.getvalue()


STATE = {"model.mm_projector.0.weight": torch.zeros(4, 4), "model.mm_projector.0.bias": torch.zeros(4)}
TORCH_FILES = (torch_file(STATE), torch_file(STATE, old=True), torch_file([1, {"a": torch.zeros(2)}]))


def zip_with_pickle(content: bytes, **more: bytes) -> bytes:
    """A file as torch.save writes it, with a pickle of ours in it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, text in {"data.pkl": content, "version": b"3\n", "byteorder": b"little", **more}.items():
            archive.writestr(f"archive/{name}", text)
    return buffer.getvalue()


def _torch_pickle(folder: Path, content: bytes) -> None:
    from milora_vl.weights.torch_files import UNREAD, read_pickled, unreadable

    file = folder / "a.bin"
    file.write_bytes(content)
    try:
        read_pickled(file)
    except UNREAD as error:
        raise UserError(problems=[unreadable(file, error)]) from None


def _projector(folder: Path, drawn: tuple[str, bytes]) -> None:
    from milora_vl.models.projector import load_projector

    suffix, content = drawn
    file = folder / f"mm_projector{suffix}"
    file.write_bytes(content)
    load_projector(tiny_llava(), file)


@cache
def tiny_llava() -> Any:
    from milora_vl.tiny import tiny_llava as make

    return make()[0]


@cache
def adapter_files() -> dict[str, bytes]:
    """The files of a small adapter with one rule of each kind, on a base of two layers."""
    from tempfile import TemporaryDirectory

    from milora_vl import apply_milora, save_adapter

    with TemporaryDirectory() as name:
        save_adapter(apply_milora(small_base(), ADAPTER_RULES), name)
        return {file.name: file.read_bytes() for file in Path(name).iterdir()}


ADAPTER_RULES = [
    {"modules": "0", "method": "milora", "rank": 2},
    {"modules": "1", "method": "lora", "rank": 2},
]


def small_base() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 4))


def _adapter(folder: Path, drawn: dict[str, bytes]) -> None:
    from milora_vl.adapter.folders import base_of
    from milora_vl.foreign.load_any import load_any
    from milora_vl.foreign.plain import read_plain
    from milora_vl.foreign.source import find_source

    for name, content in drawn.items():
        (folder / name).write_bytes(content)
    problems = []
    find_source(folder)  # every command asks it first
    for read in (lambda: base_of(folder), lambda: read_plain(folder), lambda: load_any(small_base(), folder)):
        try:
            read()
        except UserError as error:
            problems.append(error)
    if problems:
        raise problems[0]


def _adapter_inputs() -> st.SearchStrategy[dict[str, bytes]]:
    files = adapter_files()
    texts = {name: json.loads(content) for name, content in files.items() if name.endswith(".json")}
    one_json = st.sampled_from(sorted(texts)).flatmap(
        lambda name: json_bytes(texts[name]).map(lambda content: {**files, name: content})
    )
    weights = mangled(files["adapter_model.safetensors"]).map(
        lambda content: {**files, "adapter_model.safetensors": content}
    )
    pickled = torch_pickles().map(
        lambda content: {
            "adapter_model.bin": content,
            **{name: text for name, text in files.items() if not name.endswith(".safetensors")},
        }
    )
    return st.one_of(one_json, one_json, one_json, weights, pickled)


def torch_pickles() -> st.SearchStrategy[bytes]:
    return st.one_of(
        st.sampled_from(TORCH_FILES).flatmap(mangled),
        st.sampled_from(PICKLES).map(zip_with_pickle),
        st.sampled_from(PICKLES),
    )


def _sidecar(folder: Path, content: bytes) -> None:
    from milora_vl.adapter.sidecar import read_sidecar, require_weights

    (folder / "milora.json").write_bytes(content)
    sidecar = read_sidecar(folder)
    assert sidecar is not None
    require_weights(folder, sidecar)
    sidecar.read_anchors(folder)


def safetensors_headers() -> st.SearchStrategy[bytes]:
    valid = save({"a": torch.zeros(4), "b": torch.zeros(2, 2)})
    size = int.from_bytes(valid[:8], "little")
    header = json.loads(valid[8 : 8 + size])

    def framed(text: bytes) -> bytes:
        return len(text).to_bytes(8, "little") + text + valid[8 + size :]

    lengths = st.sampled_from((0, 2**63, 2**64 - 1, 2**40, 10**9)).map(lambda n: n.to_bytes(8, "little") + valid[8:])
    return st.one_of(mangled(valid), json_bytes(header).map(framed), lengths)


def _checkpoint(folder: Path, drawn: dict[str, bytes]) -> None:
    from milora_vl.adapter import checkpoints
    from milora_vl.plan import resuming

    run = folder / "run"
    for name, content in drawn.items():
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_bytes(content)
    newest, _ = checkpoints.latest(run)
    checkpoints.is_finished(run)
    checkpoints.resume_hint(run)
    if newest is not None:
        from milora_vl.recipe.schema import Recipe

        resuming.warnings(newest, processes=1, stage=0)
        resuming.require_same_steps(newest, Recipe(model="tiny"), 6)


def _checkpoint_inputs() -> st.SearchStrategy[dict[str, bytes]]:
    saved = torch_file({"x": torch.zeros(2)})
    files = {
        "checkpoint-2/adapter_model.safetensors": save({"a": torch.zeros(4)}),
        "checkpoint-2/optimizer.pt": saved,
        "checkpoint-2/rng_state.pth": saved,
        "checkpoint-2/trainer_state.json": json.dumps(TRAINER_STATE).encode(),
        "environment.json": json.dumps(ENVIRONMENT).encode(),
    }
    spoiled_file = st.one_of(
        json_bytes(TRAINER_STATE).map(lambda content: ("checkpoint-2/trainer_state.json", content)),
        json_bytes(ENVIRONMENT).map(lambda content: ("environment.json", content)),
        safetensors_headers().map(lambda content: ("checkpoint-2/adapter_model.safetensors", content)),
        mangled(saved).map(lambda content: ("checkpoint-2/optimizer.pt", content)),
    )
    return spoiled_file.map(lambda pair: {**files, pair[0]: pair[1]})


def _run_folder(folder: Path, drawn: tuple[str, bytes]) -> None:
    from milora_vl.report.command import main

    run = folder / "run"
    run.mkdir()
    for name, value in RUN_FILES.items():
        (run / name).write_bytes(value)
    (run / drawn[0]).write_bytes(drawn[1])
    main([str(run)])


RUN_FILES = {
    "environment.json": json.dumps(ENVIRONMENT).encode(),
    "trainer_state.json": json.dumps(TRAINER_STATE).encode(),
    "recipe.yaml": RECIPE.encode(),
    "policy.json": json.dumps([{"path": "a", "method": "milora", "rank": 2, "tower": "language"}]).encode(),
}


def _run_folder_inputs() -> st.SearchStrategy[tuple[str, bytes]]:
    texts = {name: json.loads(content) for name, content in RUN_FILES.items() if name.endswith(".json")}
    of_json = st.sampled_from(sorted(texts)).flatmap(
        lambda name: json_bytes(texts[name]).map(lambda content: (name, content))
    )
    return st.one_of(of_json, yaml_texts(RECIPE).map(lambda text: ("recipe.yaml", text)))


def yaml_texts(valid: str) -> st.SearchStrategy[bytes]:
    import yaml

    structure = yaml.safe_load(valid)
    dumped = spoiled(structure).map(
        lambda value: yaml.safe_dump(value, allow_unicode=True).encode("utf-8", "surrogatepass")
    )
    tricks = st.sampled_from(YAML_TRICKS).map(lambda text: text.encode("utf-8", "surrogatepass"))
    return st.one_of(mangled(valid.encode()), dumped, dumped, tricks)


def _recipe(folder: Path, content: bytes) -> None:
    from milora_vl.policy import Policy
    from milora_vl.recipe import schema

    (folder / "recipe.yaml").write_bytes(content)
    recipe = schema.load(folder / "recipe.yaml")
    if recipe.policy:
        Policy.parse(recipe.policy)
    recipe.to_yaml()


def _policy(_: Path, content: bytes) -> None:
    from milora_vl.policy import Policy

    Policy.parse(content.decode("utf-8", "replace"))


MIXTURE = "seed: 1\nsources:\n  - {path: train.json, weight: 2, image_folder: images}\n  - {path: train.json}\n"


def _mixture(folder: Path, content: bytes) -> None:
    from milora_data.stream.sources import load_records

    (folder / "mix.yaml").write_bytes(content)
    (folder / "train.json").write_text(json.dumps(RECORDS))
    for _ in islice(load_records(folder / "mix.yaml"), 100):
        pass


def _answers_file(folder: Path, drawn: tuple[str, bytes]) -> None:
    from milora_eval.commands.score import main

    name, content = drawn
    (folder / name).write_bytes(content)
    main([str(folder / name), "--benchmark", "gqa", "--data", str(folder)])


def _stored(folder: Path, drawn: tuple[bytes, bytes, bytes]) -> None:
    from milora_eval.scores.results import score

    run = folder / "eval" / "gqa" / "final"
    run.mkdir(parents=True)
    for name, content in zip(("predictions.jsonl", "results.json", "judgements.jsonl"), drawn, strict=True):
        (run / name).write_bytes(content)
    score(run)


def gqa_files() -> dict[str, bytes]:
    questions = {"1": {"question": "What colour?", "imageId": "0", "answer": "red", "isBalanced": True,
                       "types": {"structural": "query", "semantic": "attr", "detailed": "x"},
                       "groups": {"global": None, "local": None}}}  # fmt: skip
    return {"testdev_balanced_questions.json": json.dumps(questions).encode(), "images/0.jpg": picture("JPEG")}


def xlsx(rows: list[list[Any]]) -> bytes:
    from openpyxl import Workbook

    book, buffer = Workbook(), io.BytesIO()
    for row in rows:
        book.active.append(row)
    book.save(buffer)
    return buffer.getvalue()


ANSWER = {"question_id": "1", "prompt": "What colour?", "text": "red", "answer_id": "x", "model_id": "m"}


def _answer_inputs() -> st.SearchStrategy[tuple[str, bytes]]:
    table = b"index\tquestion\tprediction\n1\tWhat colour?\tred\n"
    sheet = xlsx([["index", "question", "prediction"], [1, "What colour?", "red"]])
    return st.one_of(
        json_bytes([ANSWER], lines=True).map(lambda content: ("a.jsonl", content)),
        mangled(table).map(lambda content: ("a.tsv", content)),
        mangled(sheet).map(lambda content: ("a.xlsx", content)),
        inside_zip(sheet, "xl/worksheets/sheet1.xml").map(lambda content: ("a.xlsx", content)),
    )


@st.composite
def inside_zip(draw: Any, valid: bytes, member: str) -> bytes:
    """A zip file with spoiled bytes in one member, which is packed again: its check sum is right."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(valid)) as old, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, draw(mangled(content)) if name == member else content)
    return buffer.getvalue()


def _own_data(folder: Path, content: bytes) -> None:
    from milora_eval.benchmarks.own_data import OwnData
    from milora_eval.data_files import load_items

    (folder / "mine.json").write_bytes(content)
    benchmark = OwnData(str(folder / "mine.json"))
    for item in load_items(benchmark, folder):
        benchmark.score(item, "red")


@cache
def official(name: str) -> dict[str, bytes]:
    from tempfile import TemporaryDirectory

    from support import official_data

    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        official_data.WRITERS[name](folder)
        return {
            str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()
        }


# name in official_data -> name of the benchmark
OFFICIAL = {"MME": "mme", "seed_bench": "seed-bench", "llava-bench-in-the-wild": "llava-bench"} | {
    name: name
    for name in (
        "gqa", "vqav2", "okvqa", "pope", "scienceqa", "textvqa", "mmbench", "mm-vet", "refcoco", "chartqa", "docvqa",
        "vizwiz", "nocaps", "coco-captions",
    )
}  # fmt: skip


@st.composite
def _official_inputs(draw: Any) -> tuple[str, str, bytes]:
    name = draw(st.sampled_from(sorted(OFFICIAL)))
    texts = {n: c for n, c in official(name).items() if not n.endswith((".png", ".jpg", ".parquet"))}
    file = draw(st.sampled_from(sorted(texts)))
    content = texts[file]
    if file.endswith(".json") and draw(st.booleans()):
        try:
            return name, file, draw(json_bytes(json.loads(content)))
        except json.JSONDecodeError:  # POPE's lines are in a .json file
            return name, file, draw(json_bytes([json.loads(line) for line in content.splitlines()], lines=True))
    if file.endswith(".jsonl") and draw(st.booleans()):
        return name, file, draw(json_bytes([json.loads(line) for line in content.splitlines()], lines=True))
    if file.endswith(".p"):
        return name, file, draw(st.one_of(mangled(content), st.sampled_from(PICKLES)))
    return name, file, draw(mangled(content))


def _official(folder: Path, drawn: tuple[str, str, bytes]) -> None:
    from milora_eval.data_files import load_items
    from milora_eval.suites import find_benchmark

    name, spoiled_file, content = drawn
    for file, valid in official(name).items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(content if file == spoiled_file else valid)
    list(load_items(find_benchmark(OFFICIAL[name]), folder))


def _judgements(folder: Path, content: bytes) -> None:
    from milora_eval.judge import judge_from_file

    run = folder / "run"
    run.mkdir()
    (run / "predictions.jsonl").write_text(json.dumps({**PREDICTION, "benchmark": "mm-vet"}) + "\n")
    (folder / "judgements.json").write_bytes(content)
    judge_from_file(folder / "judgements.json", run)


def _chat_template(_: Path, template: str) -> None:
    from milora_data.encode.conversation import own_segments
    from milora_data.records.record import Turn

    own = tokenizer()
    before, own.chat_template = own.chat_template, template
    try:
        own_segments([Turn("user", "Hi"), Turn("assistant", "Hello")], own)
    finally:
        own.chat_template = before


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TEMPLATES = (
    "{{ cycler.__init__.__globals__.os.system('id') }}",
    "{{ self.__init__.__globals__ }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.append(1) }}",
    "{{ namespace.__init__.__globals__['os'].popen('id').read() }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{% extends '/etc/passwd' %}",
    "{{ (1).__class__.__base__ }}",
    "{{ range(999999999999) | list }}",
    "{{ 1 / 0 }}",
    "{{ [] [5].a }}",
    "{{ undefined.a.b }}",
    "{{ messages | map(attribute='__class__') | list }}",
    "{{ '%s' % messages.__class__ }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "{{ lipsum(n=2) }}",
    "{% for a in range(3) recursive %}{{ loop([1]) }}{% endfor %}",
    "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "{{ raise_exception('no') }}",
    "{{ strftime_now('%Y') }}",
    "{{ messages[0] }}{{ messages[9] }}",
    "{{ tools.a }}",
    "{{ messages[0]['content'] | tojson(indent=messages) }}",
    "{{ int }}",
    "{%",
    "{{ }}",
    "",
)


def _command_line(_: Path, words: list[str]) -> None:
    from milora_vl.recipe import command_line

    command_line.parse(words)


@cache
def _flags() -> tuple[str, ...]:
    from milora_vl.recipe.command_line import RECIPE_FLAGS

    others = ("rank", "alpha", "method", "learning_rate", "bf16")
    return tuple(f"--{name}" for name in (*RECIPE_FLAGS, *others))


def _protected(folder: Path, content: bytes) -> None:
    from milora_vl.calibration.files import file_name, read_inputs

    (folder / file_name("abc")).write_bytes(content)
    read_inputs(folder, "abc", {"a": "a"})


def _protected_inputs() -> st.SearchStrategy[bytes]:
    base = {"size": 4, "share": 0.9, "held_out": 0.8, "num_positions": 10}
    content = {"numbers": {"a": 0}, "bases": [base]}

    def file(text: bytes) -> bytes:
        return save({"0": torch.eye(4)[:, :2].contiguous()}, {"content": text.decode("utf-8", "replace")})

    return st.one_of(mangled(file(json.dumps(content).encode())), json_bytes(content).map(file), safetensors_headers())


def targets() -> list[Target]:
    """All readers. The first call loads the tiny models."""
    images = {"images/0.png": picture("PNG"), "../planted-outside.txt": b"secret"}
    urls = st.one_of(
        st.sampled_from(TEXTS + PATHS),
        st.sampled_from(PICTURES).map(lambda c: "data:image/png;base64," + __import__("base64").b64encode(c).decode()),
        st.text(max_size=40).map(lambda text: "data:" + text),
        st.text(max_size=40).map(lambda text: "data:image/png;base64," + text),
    )
    kinds = st.sampled_from(sorted(KINDS)).flatmap(
        lambda kind: json_bytes(KINDS[kind][1]).map(lambda content: (kind, content))
    )
    tables = st.tuples(st.sampled_from((".csv", ".tsv")), mangled(TABLE))
    stored = st.tuples(
        json_bytes([PREDICTION], lines=True),
        json_bytes(RESULTS),
        json_bytes([{**PREDICTION, "judgement": "1", "judge": "j"}], lines=True),
    )
    templates = st.one_of(
        st.sampled_from(TEMPLATES), mangled(CHATML.encode()).map(lambda b: b.decode("utf-8", "replace"))
    )
    words = st.lists(
        st.one_of(st.sampled_from(_flags()), values.map(str).filter(lambda t: "\x00" not in t)), max_size=6
    )
    projector = st.one_of(
        torch_pickles().map(lambda content: (".bin", content)),
        safetensors_headers().map(lambda content: (".safetensors", content)),
    )
    return [
        Target("pictures", st.sampled_from(PICTURES).flatmap(mangled), _picture, share=30),
        Target("embedded pictures", urls, _embedded, share=5),
        Target("LLaVA JSON", json_bytes(RECORDS), _records, share=30, files=images),
        Target("messages", json_bytes(MESSAGES), _records, share=20, files=images),
        Target("check and stats", json_bytes(RECORDS), _check, share=4, files=images),
        Target("convert", kinds, _convert, share=20),
        Target("tables", tables, _table, share=8),
        Target("recipe YAML", yaml_texts(RECIPE), _recipe, share=20),
        Target("policy YAML", yaml_texts(json.dumps(ADAPTER_RULES)), _policy, share=10),
        Target("mixture YAML", yaml_texts(MIXTURE), _mixture, share=10),
        Target("command line", words, _command_line, share=5),
        Target("plain pickles", st.one_of(mangled(REFS), st.sampled_from(PICKLES)), _plain_pickle, share=15),
        Target("torch pickles", torch_pickles(), _torch_pickle, share=15),
        Target("projector files", projector, _projector, share=5),
        Target("milora.json", json_bytes(json.loads(adapter_files()["milora.json"])), _sidecar, share=20,
               files=adapter_files()),
        Target("adapter folders", _adapter_inputs(), _adapter, share=10),
        Target("protected inputs", _protected_inputs(), _protected, share=8),
        Target("checkpoints", _checkpoint_inputs(), _checkpoint, share=20),
        Target("run folders", _run_folder_inputs(), _run_folder, share=2),
        Target("predictions files", _answer_inputs(), _answers_file, share=10, files=gqa_files()),
        Target("stored answers", stored, _stored, share=10),
        Target("judgements", json_bytes([{"question_id": "1", "content": "0.5"}]), _judgements, share=5),
        Target("own benchmarks", json_bytes([{"image": "0.png", "question": "a?", "answer": "b", "metric": "vqa"}]),
               _own_data, share=8, files=images),
        Target("official benchmark files", _official_inputs(), _official, share=20),
        Target("chat templates", templates, _chat_template, share=8),
    ]  # fmt: skip


def run_case(target: Target, drawn: Any, home: Path) -> str | None:
    """Read one input in a fresh folder below `home`; returns the fault, or None."""
    from support.fuzz_guard import outcome

    root = home / "case"
    shutil.rmtree(root, ignore_errors=True)
    folder = root / "inside"
    folder.mkdir(parents=True)
    for name, content in target.files.items():
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)
    return outcome(lambda: target.read(folder, drawn), folder, home / "scratch", allowed=target.allowed)
