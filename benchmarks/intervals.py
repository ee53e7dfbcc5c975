"""How often the 95 % interval of a paired comparison misses the truth, with the two rules of `too_few` and without.

python benchmarks/intervals.py          prints one JSON line
python benchmarks/intervals.py --docs   also writes benchmarks/intervals.json and the table of docs/evaluation.md

Two models answer the same n questions, right or wrong. Only A answers a question right, or only B, or they agree. The
interval of a comparison depends on the numbers of such questions alone, if the questions are in a fixed order. So the
functions of the package compute it once for each pair of numbers. The probabilities of these pairs then give the miss
rate exactly, for any rates: only the resamples of the bootstrap are random.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import median

import numpy as np

from milora_eval.stats import MIN_GROUPS, _bootstrap, interval, paired_difference

ROOT = Path(__file__).resolve().parent.parent
PAGE, RESULTS = ROOT / "docs" / "evaluation.md", Path(__file__).with_name("intervals.json")
BEGIN, END = "<!-- written by benchmarks/intervals.py --docs -->", "<!-- end -->"
# Rates of questions that only A, or only B, answers right. Exchanging A and B changes nothing.
RATES = (0.0, *(percent / 100 for percent in range(2, 96)))
ROUNDING = 1e-9  # of an end that equals the true difference
Interval = tuple[float, float] | None


@dataclass(frozen=True, slots=True)
class Misses:
    """The probability that a comparison shows an interval without the true difference, over all rates.

    `median` and `largest` are taken over all rates; `only_a` and `only_b` are the rates with the largest probability.
    """

    questions: int
    rules: str
    median: float
    largest: float
    only_a: float
    only_b: float


def both_rules(gaps: list[float]) -> Interval:
    """Return the interval that `compare` shows."""
    found = paired_difference([0.0] * len(gaps), gaps)
    return None if found.low is None or found.high is None else (found.low, found.high)


def first_rule(gaps: list[float]) -> Interval:
    """Return the interval for any MIN_GROUPS questions or more."""
    return no_rule(gaps) if len(gaps) >= MIN_GROUPS else None


def no_rule(gaps: list[float]) -> Interval:
    """Return the bootstrap's interval for any questions."""
    return interval(_bootstrap(gaps, [""] * len(gaps), range(len(gaps)), 1000))


RULES = {"both": both_rules, "the first": first_rule, "neither": no_rule}
CASES = (("both", 30), ("both", 50), ("the first", 30), ("the first", 50), ("neither", 10))


def misses(rules: str, n: int) -> Misses:
    """Return how many comparisons of n questions show an interval that misses the truth."""
    pairs = [(a, b) for a in range(n + 1) for b in range(n + 1 - a)]  # questions that only A, and only B, answers right
    intervals = [RULES[rules]([-1.0] * a + [1.0] * b + [0.0] * (n - a - b)) for a, b in pairs]
    low, high = np.array([ends or (math.nan, math.nan) for ends in intervals]).T
    a, b = np.array(pairs).T
    ways = np.array([math.comb(n, a) * math.comb(n - a, b) for a, b in pairs], dtype=float)
    found: dict[tuple[float, float], float] = {}
    for only_a, only_b in product(RATES, RATES):
        if only_a > only_b or only_b == 0 or only_a + only_b > 1:
            continue
        neither = max(1 - only_a - only_b, 0.0)
        chance = ways * only_a**a * only_b**b * neither ** (n - a - b)  # a multinomial distribution
        truth = only_b - only_a
        missed = (low - ROUNDING > truth) | (truth > high + ROUNDING)  # False where there is no interval (nan)
        found[only_a, only_b] = float(chance[missed].sum())
    worst = max(found, key=lambda rates: round(found[rates], 6))
    return Misses(n, rules, round(median(found.values()), 4), round(found[worst], 4), *worst)


def table(rows: list[Misses]) -> str:
    """Return the miss rates as markdown."""
    lines = ["| questions | rules | misses, median over all rates | largest | at: only A right, only B right |"]
    lines.append("|---|---|---|---|---|")
    for one in rows:
        where = f"{100 * one.only_a:.0f} %, {100 * one.only_b:.0f} %"
        shares = f"{100 * one.median:.1f} % | {100 * one.largest:.1f} %"
        lines.append(f"| {one.questions} | {one.rules} | {shares} | {where} |")
    return "\n".join(lines)


def main() -> None:
    """Compute all cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", action="store_true", help="also write the results and the table of the page")
    options = parser.parse_args()
    rows = [misses(rules, n) for rules, n in CASES]
    content = [asdict(one) for one in rows]
    print(json.dumps(content))
    if options.docs:
        RESULTS.write_text("[\n" + ",\n".join(map(json.dumps, content)) + "\n]\n", encoding="utf-8")
        page = PAGE.read_text(encoding="utf-8")
        before, _, rest = page.partition(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n{table(rows)}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
