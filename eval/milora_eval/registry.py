"""Names of benchmarks and suites (`llava-paper`, `text`), protocols (`gqa@official`), plugins.

`module:Class` or a file names a benchmark that is not in the table. A name may carry a protocol: `gqa@official`.
"""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from milora_data.keys import digest
from milora_eval.benchmark import Benchmark
from milora_eval.benchmarks.own_data import OwnData
from milora_eval.data_files import existing, other_questions
from milora_vl.common.atomic_write import read_json
from milora_vl.common.errors import MALFORMED, UserError, did_you_mean, suggest

SEE = "see: python -m milora_eval ls"

_HERE = "milora_eval.benchmarks"
BENCHMARKS: dict[str, str] = {
    "vqav2": f"{_HERE}.vqa:VQAv2",
    "vqav2-testdev": f"{_HERE}.vqa:VQAv2TestDev",
    "gqa": f"{_HERE}.gqa:GQA",
    "vizwiz": f"{_HERE}.vqa:VizWiz",
    "vizwiz-test": f"{_HERE}.vqa:VizWizTest",
    "scienceqa": f"{_HERE}.scienceqa:ScienceQAImages",
    "scienceqa-all": f"{_HERE}.scienceqa:ScienceQA",
    "textvqa": f"{_HERE}.textvqa:TextVQA",
    "textvqa-no-ocr": f"{_HERE}.textvqa:TextVQAWithoutOCR",
    "pope": f"{_HERE}.pope:POPE",
    "mmbench": f"{_HERE}.mmbench:MMBench",
    "mmbench-cn": f"{_HERE}.mmbench:MMBenchCN",
    "mmbench-test": f"{_HERE}.mmbench:MMBenchTest",
    "mme": f"{_HERE}.mme:MME",
    "seed-bench": f"{_HERE}.seed_bench:SEEDBench",
    "mm-vet": f"{_HERE}.free_form:MMVet",
    "llava-bench": f"{_HERE}.free_form:LLaVABench",
    "mmmu": f"{_HERE}.mmmu:MMMU",
    "chartqa": f"{_HERE}.plain_sets:ChartQA",
    "docvqa": f"{_HERE}.plain_sets:DocVQA",
    "infovqa": f"{_HERE}.plain_sets:InfoVQA",
    "okvqa": f"{_HERE}.vqa:OKVQA",
    "ai2d": f"{_HERE}.plain_sets:AI2D",
    "realworldqa": f"{_HERE}.plain_sets:RealWorldQA",
    "mmstar": f"{_HERE}.plain_sets:MMStar",
    "pathvqa": f"{_HERE}.plain_sets:PathVQA",
    "cub200": f"{_HERE}.plain_sets:CUB200",
    "boolq": f"{_HERE}.commonsense:BoolQ",
    "piqa": f"{_HERE}.commonsense:PIQA",
    "siqa": f"{_HERE}.commonsense:SIQA",
    "hellaswag": f"{_HERE}.commonsense:HellaSwag",
    "winogrande": f"{_HERE}.commonsense:WinoGrande",
    "arc-e": f"{_HERE}.commonsense:ARCEasy",
    "arc-c": f"{_HERE}.commonsense:ARCChallenge",
    "obqa": f"{_HERE}.commonsense:OBQA",
    "gsm8k": f"{_HERE}.mathematics:GSM8K",
    "math": f"{_HERE}.mathematics:MATH",
    "emoji": f"{_HERE}.emoji:EmojiBenchmark",
}
ELSEWHERE = ("refcoco", "refcoco+", "refcocog", "coco-captions", "nocaps")
LLAVA_PAPER = ("vqav2", "gqa", "vizwiz", "scienceqa", "textvqa", "pope", "mmbench")
MATHEMATICS = ("gsm8k", "math")
HELD_OUT = ("ai2d", "chartqa", "docvqa", "infovqa", "realworldqa", "seed-bench", "scienceqa", "mmstar")
COMMONSENSE = ("boolq", "piqa", "siqa", "hellaswag", "winogrande", "arc-e", "arc-c", "obqa")


@dataclass(frozen=True, slots=True)
class Suite:
    """A named list of benchmarks.

    `limit` is the number of items per benchmark. `partial` skips benchmarks whose files are missing. `mean` lists the
    benchmarks whose headline numbers are averaged into the number of the suite.
    """

    benchmarks: tuple[str, ...]
    about: str
    limit: int | None = None
    partial: bool = False
    mean: tuple[str, ...] = ()


SUITES: dict[str, Suite] = {
    "llava-paper": Suite(LLAVA_PAPER, "the MiLoRA paper's seven columns and their plain mean", mean=LLAVA_PAPER),
    "llava-1.5": Suite(
        (*LLAVA_PAPER, "mme", "mmbench-cn", "seed-bench", "llava-bench", "mm-vet"),
        "all benchmarks that LLaVA-1.5 reports",
    ),
    "text": Suite(
        (*COMMONSENSE, *MATHEMATICS),
        "eight commonsense sets (and their mean), GSM8K and MATH, scored as in the MiLoRA paper",
        mean=COMMONSENSE,
    ),
    "commonsense": Suite(COMMONSENSE, "the eight commonsense sets of `text` alone, and their mean", mean=COMMONSENSE),
    "mathematics": Suite(MATHEMATICS, "GSM8K and MATH of `text` alone, and their mean", mean=MATHEMATICS),
    "held-out": Suite(HELD_OUT, "what a new skill should not cost: eight sets of arXiv:2510.08564", mean=HELD_OUT),
    "quick": Suite(
        tuple(name for name in BENCHMARKS if not name.endswith(("-test", "-testdev"))),
        "200 items each of all benchmarks whose files exist",
        limit=200,
        partial=True,
    ),
    "emoji": Suite(("emoji",), "the demo's held-out emoji, eight question types"),
}


@dataclass(frozen=True, slots=True)
class Chosen:
    """The benchmarks of a suite or of a list. `name` is the folder of their results; the rest is as in `Suite`."""

    name: str
    benchmarks: tuple[Benchmark, ...]
    limit: int | None = None
    partial: bool = False


def choose(value: str, protocol: str | None = None, *, data_dir: Path | None = None, run: Path | None = None) -> Chosen:
    """Return the benchmarks of a suite, or of a list with commas: names, FILE.json, FILE.py, module:Class.

    `run` is the folder that the results go to: see `name_apart`. Raises UserError for unknown names, and for a protocol
    that no benchmark has.
    """
    suite = SUITES.get(value) or Suite(_listed(value), "")
    names = suite.benchmarks if protocol is None else with_protocol(suite.benchmarks, protocol)
    benchmarks = tuple(map(find_benchmark, names))
    name_apart(benchmarks, data_dir or Path(), run)
    name = value if value in SUITES else list_name(benchmarks)
    return Chosen(name, benchmarks, suite.limit, suite.partial)


def list_name(benchmarks: Sequence[Benchmark]) -> str:
    """Return the name of the results of a list of benchmarks; it names a folder, so a long one is shortened."""
    names = [benchmark.name for benchmark in benchmarks]
    name = "+".join(names)
    return name if len(name.encode()) <= 200 else f"{names[0][:40]}+{len(names) - 1}-more-{digest(names)[:8]}"


def name_apart(benchmarks: Sequence[Benchmark], data_dir: Path, run: Path | None = None) -> None:
    """Name a file of questions after its folder too (`de-eval`) if another benchmark here, or in a run, has its name.

    A run stores the path and the content of the files that it has answers to; one of them may have changed.
    """
    own = [each for each in benchmarks if isinstance(each, OwnData) and each.path is not None]
    others = {each.name for each in benchmarks if each not in own}
    taken = dict(_files_of(run)) if run is not None else {}
    for level in range(1, max((len(each.path.absolute().parts) for each in own if each.path), default=0) - 1):
        files = {(each.name, each.path.resolve()) for each in own if each.path}
        times = Counter(name for name, _ in files)
        clashes = [
            each
            for each in own
            if times[each.name] > 1
            or each.name in others
            or (each.name in taken and not each.is_one_of(taken[each.name], folder_of(each, data_dir)))
        ]
        for each in clashes:
            each.rename("-".join(each.path.absolute().with_suffix("").parts[1:][-level - 1 :]) if each.path else "")
        if not clashes:
            return


def _files_of(run: Path) -> Iterator[tuple[str, list[Mapping[str, str]]]]:
    files: dict[str, list[Mapping[str, str]]] = {}
    for path in run.glob("eval/*/*/results.json"):
        with suppress(*MALFORMED):  # whoever reads the file reports it
            results = read_json(path) or {}
            for entry in results["benchmarks"]:
                known = results.get("questions", {}).get(entry["name"])
                files.setdefault(entry["name"], []).extend([known] if known else [])
    yield from files.items()


def _is_file(name: str) -> bool:
    return Path(name).suffix in (".json", ".jsonl", ".py") or ".py:" in name


def _listed(value: str) -> tuple[str, ...]:
    names = tuple(name for part in value.split(",") if (name := part.strip()))
    if not names:
        raise UserError("no benchmark name given", hint=SEE)
    spec = names[0].partition("@")[0]
    if len(names) == 1 and spec not in BENCHMARKS and ":" not in spec and not _is_file(spec):
        near = suggest(value, {**SUITES, **BENCHMARKS})[:1]
        if value in ELSEWHERE or (near and near[0] not in SUITES):
            raise _unknown(value)
        hint = "\n".join(filter(None, [did_you_mean(near), SEE]))
        message = f'no suite or benchmark "{value}"; the suites: {", ".join(SUITES)}'
        raise UserError(message, code="eval-unknown-suite", hint=hint)
    return names


def data_folder(value: str, data: str | Path | None = None) -> Path:
    """Return the folder of the benchmark files: `data`, else the folder of a FILE, else data/NAME of the first name.

    Raises UserError if `data` names a file of questions.

    >>> [str(data_folder(value)) for value in ("llava-1.5", "gqa@official,pope", "my/val.json")]
    ['data/llava-1.5', 'data/gqa', 'my']
    """
    if data is not None:
        if Path(data).suffix in (".json", ".jsonl"):
            hint = f"for the questions of a file:  --benchmarks {data}"
            raise UserError(f"expected a folder, got {data}", code="path-not-a-folder", hint=hint)
        return Path(data)
    first = value.partition(",")[0].strip()
    return Path(first).parent if _is_file(first) else Path("data") / first.partition("@")[0]


def find_benchmark(name: str) -> Benchmark:
    """Return a benchmark by its name in BENCHMARKS, by `module:Class`, or from a file (.json, .jsonl, .py).

    `name@protocol` picks one of its protocols. Raises UserError if the name is unknown or the import fails.
    """
    spec, _, protocol = name.partition("@")
    target = BENCHMARKS.get(spec, spec)
    if target.startswith("data:") or Path(target).suffix in (".json", ".jsonl"):
        return OwnData(target)
    module, _, attribute = target.partition(":")
    if not attribute and not module.endswith(".py"):
        raise _unknown(name)
    try:
        holder = _import_file(Path(module)) if module.endswith(".py") else import_module(module)
        kind = getattr(holder, attribute) if attribute else _only_benchmark(holder)
    except (ImportError, AttributeError, OSError, SyntaxError) as error:
        hint = "expected: module:Class or file.py:Class"
        raise UserError(f'cannot import the benchmark "{target}": {error}', hint=hint) from None
    if not (isinstance(kind, type) and issubclass(kind, Benchmark)):
        hint = "expected: a class that derives from milora_eval.Benchmark"
        raise UserError(f"{target} is not a benchmark", hint=hint)
    benchmark: Benchmark = kind(protocol) if protocol else kind()
    if spec not in BENCHMARKS:
        benchmark.origin = f"{holder.__file__}:{kind.__name__}" if module.endswith(".py") else target
    return benchmark


def stored_benchmark(name: str) -> Benchmark:
    """Return the benchmark that stored answers name, as `find_benchmark` does, without running code that they choose.

    Raises UserError if the name is a module or a file that this process has not imported before.
    """
    spec = name.partition("@")[0]
    module = BENCHMARKS.get(spec, spec).partition(":")[0]
    is_code = spec not in BENCHMARKS and not spec.startswith("data:") and Path(spec).suffix not in (".json", ".jsonl")
    if is_code and (":" in spec or module.endswith(".py")):
        imported = _module_name(Path(module).absolute()) if module.endswith(".py") else module
        if imported not in sys.modules and not module.startswith(f"{__package__}."):
            message, hint = f"the stored answers name code, which was not run: {spec}", "if you trust this code:  "
            raise UserError(message, code="eval-benchmark-code", where="--plugin", hint=f"{hint}--plugin {spec}")
    return find_benchmark(name)


def import_plugins(names: Sequence[str]) -> None:
    """Import own benchmarks that the user names, so that `stored_benchmark` finds them. Raises what that raises."""
    for name in names:
        find_benchmark(name)


def with_protocol(names: Sequence[str], protocol: str) -> list[str]:
    """Add the protocol to the names whose benchmark has it among others, unless a name has one.

    Raises UserError if no benchmark has it.
    """
    known = {name: find_benchmark(name).protocols for name in names}
    if not any(protocol in protocols for protocols in known.values()):
        every = ", ".join(sorted({each for protocols in known.values() for each in protocols}))
        message, hint = f"none of these benchmarks has the protocol {protocol!r}", f"their protocols are: {every}"
        raise UserError(message, code="eval-unknown-protocol", where="--protocol", hint=hint)
    return [
        f"{name}@{protocol}" if "@" not in name and protocol in protocols and len(protocols) > 1 else name
        for name, protocols in known.items()
    ]


def reference(benchmark: Benchmark) -> str:
    """Return the name with which `find_benchmark` finds this benchmark, with its protocol unless it is the default."""
    path = f"{type(benchmark).__module__}:{type(benchmark).__qualname__}"
    name = benchmark.origin or (benchmark.name if BENCHMARKS.get(benchmark.name) == path else path)
    return name if benchmark.protocol == benchmark.protocols[0] else f"{name}@{benchmark.protocol}"


def folder_of(benchmark: Benchmark, data_dir: Path) -> Path:
    """Return the folder with a benchmark's files: the subfolder with one of its names, else the data folder."""
    for name in (benchmark.name, *benchmark.folders):
        if (data_dir / name).is_dir():
            return data_dir / name
    return data_dir


def has_files(benchmark: Benchmark, data_dir: Path) -> bool:
    """Return whether all files that the benchmark reads exist and have its questions."""
    folder = folder_of(benchmark, data_dir)
    exist = all(existing(folder, names) for names in benchmark.files)
    return exist and other_questions(benchmark, folder) is None


def listing(data_dir: Path | None) -> dict[str, Any]:
    """Return suites and benchmarks as JSON data; `found` is null without a data folder."""
    suites = {name: {"benchmarks": suite.benchmarks, "about": suite.about} for name, suite in SUITES.items()}
    fields = ("name", "version", "protocol", "protocols", "split", "files")
    benchmarks = []
    for benchmark in map(find_benchmark, BENCHMARKS):
        found = None if data_dir is None else has_files(benchmark, data_dir)
        benchmarks.append({field: getattr(benchmark, field) for field in fields} | {"found": found})
    return {"suites": suites, "benchmarks": benchmarks}


def _import_file(path: Path) -> ModuleType:
    path = path.absolute()
    if not path.is_file():
        raise ImportError(f"no file {path}")
    name = _module_name(path)
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[name] = module
    return sys.modules[name]


def _module_name(path: Path) -> str:
    return f"milora_eval_own.{path.stem}_{abs(hash(str(path)))}"


def _only_benchmark(module: ModuleType) -> type[Benchmark]:
    classes = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Benchmark) and value.__module__ == module.__name__
    ]
    if len(classes) != 1:
        names = ", ".join(value.__name__ for value in classes) or "none"
        raise AttributeError(f"expected one class that derives from milora_eval.Benchmark, found: {names}")
    return classes[0]


def _unknown(name: str) -> UserError:
    if name in ELSEWHERE:
        hint = "docs/evaluate.md#other-suites"
        return UserError(f"{name} is not part of this evaluator: use lmms-eval with --model milora", hint=hint)
    near = did_you_mean(suggest(name, BENCHMARKS)[:1])
    message = f'unknown benchmark "{name}"; expected one of: {", ".join(BENCHMARKS)}'
    return UserError(message, code="eval-unknown-benchmark", hint="\n".join(filter(None, [near, SEE])))
