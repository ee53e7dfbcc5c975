"""Run every benchmark, one at a time, each in its own process: `make bench-full`.

python benchmarks/all.py [--full] [--only NAME ...] [--quick] [--page]

Each result is written to benchmarks/results.json with a description of the machine; docs/performance.md shows them.
Without --full, the parts that take an hour are left out (`make bench`): a training on text, the start, the demo, a 7B
at full size. --only measures some parts again and keeps the others; --quick measures the headline rows
(`make bench-quick`); --page only writes the page.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from benchmarks import gpu
from benchmarks.timing import ROOT, apart, timed
from milora_vl.sweep.runner import usable_cores

RESULTS, PAGE = ROOT / "benchmarks" / "results.json", ROOT / "docs" / "performance.md"
GPU = ROOT / "benchmarks" / "gpu.json"
PARTS = {
    "svd": "svd.py headline",
    "svd_llama": "svd.py llama",
    "smollm2": "svd.py model",
    "cache_7b": "svd.py model --model 7b-block --rank 128 --alone",
    "step": "step.py",
    "loss": "step.py --loss",
    "whole_training": "whole_training.py --data pictures --way milora hf hf-tuned trl",
    "whole_training_text": "whole_training.py --data text --steps 10",
    "start": "start.py",
    "base_kl": "start.py --base_kl",
    "data": "data.py",
    "eval": "eval.py",
    "plan": "plan.py",
    "full_size": "plan.py --full_size",
    "demo": "demo.py",
}
LONG = ("whole_training_text", "start", "demo", "full_size")  # an hour
QUICK = ("smollm2", "step", "loss", "whole_training")
SETS = {"bench": [name for name in PARTS if name not in LONG], "bench-quick": QUICK}


@dataclass(frozen=True, slots=True)
class Goal:
    """One figure, measured by `part`: at least (with `at_most`: at most) `goal`."""

    what: str
    against: str
    part: str
    value: Callable[[Any], float]
    goal: float
    unit: str = "x"
    at_most: bool = False

    def is_met(self, value: float) -> bool:
        return value <= self.goal if self.at_most else value >= self.goal


def _row(column: str, shape: str, spectrum: str, rank: int) -> Callable[[Any], float]:
    wanted = {"shape": shape, "spectrum": spectrum, "rank": rank, "part": "minor"}
    return lambda rows: next(float(row[column]) for row in rows if wanted.items() <= row.items())


def _way(rows: Any, way: str) -> float:
    return next(float(row["seconds"]) for row in rows if row["way"] == way)


def _cached(rows: Any) -> float:
    return _way(rows, "milora_vl, from its cache") / _way(rows, "milora_vl")


def _time(pair: str) -> Callable[[Any], float]:
    return lambda result: float(result["time"][pair])


def _full(column: str) -> Callable[[Any], float]:
    return lambda result: max(result["runs"], key=lambda run: int(run["supervised"]))[column]  # type: ignore[no-any-return]


def _highest(result: Any) -> float:
    return max(float(result[stage]["peak_gb"]) for stage in ("write", "load", "factors", "step", "save"))


def _off(result: Any) -> float:
    return abs(float(result["planned_over_measured"]) - 1)


LORA = "PEFT LoRA of rank r"
GOALS = (
    Goal(
        "minor factors, 4096 x 4096, r = 128, Gaussian", "one product W Wᵀ", "svd",
        _row("products", "4096x4096", "gaussian", 128), 3, at_most=True,
    ),
    Goal(
        "minor factors, 4096 x 11008, r = 128, strong part of rank 64", "one product W Wᵀ", "svd",
        _row("products", "4096x11008", "low-rank", 128), 3, at_most=True,
    ),
    Goal("factors from the cache, 7B shapes, float32", "the first time", "cache_7b", _cached, 1 / 20, at_most=True),
    Goal("factors of SmolLM2, 210 layers, r = 32", "", "smollm2", lambda r: _way(r, "milora_vl"), 8, " s", True),
    Goal("the same from the cache", "", "smollm2", lambda r: _way(r, "milora_vl, from its cache"), 1, " s", True),
    *(
        Goal(f"training step of {of}, 4096², r = 128, float32", against, "step", _time(pair), goal, at_most=True)
        for of, against, pair, goal in (
            ("MiLoRA", LORA, "milora_over_lora", 1.089),
            ("protected MiLoRA", LORA, "default_over_lora", 1.03),
            ("protected MiLoRA", "PEFT LoRA with as many trained numbers", "default_over_lora_of_equal_size", 1.06),
        )
    ),
    Goal("activations of protected MiLoRA in a layer of Llama", LORA, "step", lambda r: r["memory"], 1, at_most=True),
    Goal("the loss with all tokens, time", "the model's own loss", "loss", _full("time"), 1, at_most=True),
    Goal("the loss with all tokens, memory", "the model's own loss", "loss", _full("memory"), 0.4, at_most=True),
    Goal(
        "samples a second of a training, smol-llava", "HF Trainer + PEFT LoRA", "whole_training",
        lambda r: r["pictures"]["milora_over_hf"], 1.5,
    ),
    Goal(
        "the same", "TRL's SFTTrainer", "whole_training",
        lambda r: r["pictures"]["milora_over_trl"], 1.5,
    ),
    Goal(
        "samples a second of a training, SmolLM2 with text", "HF Trainer + PEFT LoRA", "whole_training_text",
        lambda r: r["text"]["milora_over_hf"], 1.5,
    ),
    Goal(
        "the same", "TRL's SFTTrainer", "whole_training_text",
        lambda r: r["text"]["milora_over_trl"], 1.5,
    ),
    Goal("`make demo`, with pictures and model there", "", "demo", lambda r: r["seconds"] / 60, 6, " min", True),
    Goal("encode and mask, VQA records", "LLaVA's `preprocess_v1`", "data", lambda r: r["encode_VQA"]["ratio"], 4),
    Goal("encode and mask, captions", "LLaVA's `preprocess_v1`", "data", lambda r: r["encode_captions"]["ratio"], 4),
    Goal(
        "encode and mask, conversations", "LLaVA's `preprocess_v1`", "data",
        lambda r: r["encode_conversations"]["ratio"], 4,
    ),
    Goal("JPEG 640x480 to pixel values", "LLaVA's path", "data", lambda r: r["jpeg_640x480"]["ratio"], 1.5),
    Goal("positions of packed rows that hold a token", "", "data", lambda r: 100 * r["packing"]["packed"], 95, " %"),
    Goal(
        "POPE-like questions, several per picture", "batch-1 generate", "eval", lambda r: r["speedup_over_batch1"], 3
    ),
    Goal("scoring 200 k VQAv2 answers", "the rules in plain Python", "eval", lambda r: r["scoring_speedup"], 5),
    Goal("a 7B in bfloat16, r = 16: factors and one step", "", "full_size", _highest, 24, " GB", True),
    Goal("its step's memory, planned over measured, off by", "", "full_size", _off, 0.1, at_most=True),
)  # fmt: skip


def main() -> int:
    """Measure, write the results and the page; return 1 if a script failed."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--only", nargs="+", choices=PARTS, default=SETS["bench"], metavar="NAME")
    options.add_argument("--full", action="store_const", dest="only", const=list(PARTS), help="all parts")
    options.add_argument("--quick", action="store_const", dest="only", const=QUICK, help="the headline rows")
    options.add_argument("--page", action="store_true", help="write docs/performance.md from the stored results")
    chosen = options.parse_args()
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    failed = []
    for name in [] if chosen.page else chosen.only:
        print(f"{name}: python benchmarks/{PARTS[name]}", file=sys.stderr)
        script, *words = PARTS[name].split()
        seconds, measured = timed(lambda s=script, w=words: apart(s, *w))
        if measured is None:
            failed.append(name)
            continue
        results[name] = {
            "command": f"python benchmarks/{PARTS[name]}",
            "date": date.today().isoformat(),
            "seconds": round(seconds, 1),
            "machine": machine(),
            "result": measured,
        }
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    for name in failed:
        print(f"failed: python benchmarks/{PARTS[name]}", file=sys.stderr)
    missing = [name for name in PARTS if name not in results]
    if missing:
        print(f"no page yet, not measured: {', '.join(missing)}", file=sys.stderr)
        return 1
    PAGE.write_text(page(results, SETS), encoding="utf-8")
    return 1 if failed else 0


def machine() -> dict[str, Any]:
    """Return a description of this machine, on which the figures depend."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine()
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = {name: version(name) for name in ("torch", "transformers", "peft")}
    return {
        "cpu": model,
        "cores": usable_cores(),
        "memory_gib": round(memory),
        "python": platform.python_version(),
    } | versions


def page(results: dict[str, Any], sets: dict[str, Iterable[str]]) -> str:
    """Return the text of docs/performance.md. Raises SystemExit if the results come from several machines.

    `sets` holds the parts of `make bench` and of `make bench-quick`.
    """
    described = [entry["machine"] for entry in results.values()]
    if any(other != described[0] for other in described):
        raise SystemExit("the results come from different machines or versions: measure all of them again")
    dates = sorted({entry["date"] for entry in results.values()})
    loader = FileSystemLoader(Path(__file__).resolve().parent)
    environment = Environment(loader=loader, undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)
    environment.filters.update(figure=figure, time=duration, steps_until_even=steps_until_even)
    return environment.get_template("performance.md.j2").render(
        results=results,
        machine=described[0],
        dates=" to ".join(dict.fromkeys((dates[0], dates[-1]))),
        goals=GOALS,
        minutes={name: sum(results[part]["seconds"] for part in parts) for name, parts in sets.items()},
        **of_a_card(json.loads(GPU.read_text()) if GPU.is_file() else {}),
    )


def of_a_card(measured: dict[str, Any]) -> dict[str, Any]:
    """Return the rows of `make gpu` and the card's name; none of a run that tried it on a CPU."""
    found = {name: entry for name, entry in measured.items() if entry["machine"]["card"] != gpu.NO_CARD}
    return {"gpu": list(gpu.rows(found)), "card": next((entry["machine"]["card"] for entry in found.values()), "")}


def steps_until_even(found: dict[str, Any]) -> str:
    """Return after how many steps our whole training and HF's Trainer take equally long."""
    ours, peer = found["ways"]["milora"], found["ways"]["hf"]
    later = ours["first_step_s"] - peer["first_step_s"]
    return f"{max(1, later / (peer['seconds_per_step'] - ours['seconds_per_step'])):,.0f}"


def figure(value: float) -> str:
    """Return three significant digits; whole numbers from a hundred on."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """Return seconds, or minutes and seconds."""
    minutes, left = divmod(round(seconds), 60)
    return f"{minutes} min {left} s" if minutes else f"{seconds:.3g} s"


if __name__ == "__main__":
    sys.exit(main())
