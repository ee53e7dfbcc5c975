"""Write the measured numbers of README.md, docs/choose.md and docs/continue.md: `python -m studies.figures`.

A page has each table between two comments, <!-- figures: NAME --> and <!-- end -->. All numbers come from the CSV files
in docs/studies, read as the pages of the studies read them.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from milora_vl.common.atomic_write import write_text
from milora_vl.common.cli.table import Table
from milora_vl.sweep.cells import Cell, CellNumbers
from milora_vl.sweep.curves import Ratio, about_pictures, at_common_loss, curves_of
from milora_vl.sweep.results import mean_of
from studies.page import cells_of
from studies.study import read_study

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs" / "studies"
PAGES = (ROOT / "README.md", ROOT / "docs" / "choose.md", ROOT / "docs" / "continue.md")
BLOCK = re.compile(r"(<!-- figures: (.*?) -->).*?(<!-- end -->)", re.DOTALL)
# Arms of the studies: the default, the same with base_kl as it is on pictures, and the first form with shorter rows.
DEFAULT, WITH_KL, SHORT = "gradient", "kl-4", "short-gradient"


@dataclass(frozen=True, slots=True)
class Row:
    """One arm of a study, compared with the LoRA that is its reference."""

    task: str
    study: str
    arm: str = DEFAULT


# What the default keeps and what it costs, with the study's first form of it where the default has not run.
KEPT = (
    Row("SmolLM2: topics of names", "fixed-a.smollm2"),
    Row("SmolLM2: topics of names", "fixed-a.smollm2-300"),
    Row("MiniLM-L6: topics of names (shorter rows of A)", "fixed-a.minilm", SHORT),
    Row("smol-llava: easy-VQA", "pictures.easy-vqa", WITH_KL),
    Row("the same without `base_kl`", "pictures.easy-vqa"),
    Row("smol-llava: emoji", "pictures.smol-llava", WITH_KL),
    Row("the same without `base_kl`", "pictures.smol-llava"),
    Row("smol-llava: emoji", "pictures.smol-llava-300", WITH_KL),
    Row("the same without `base_kl`", "pictures.smol-llava-300"),
)
# Setting -> its arm of each study. The arms of `curves` have an earlier form of protection.
OTHERS = {
    "the default (MiniLM-L6: shorter rows of A)": {
        "fixed-a.smollm2": DEFAULT,
        "fixed-a.minilm": SHORT,
        "pictures.smol-llava": WITH_KL,
    },
    "`protect` 0.98, shorter rows of A": {"fixed-a.smollm2": f"{SHORT}-0.98"},
    "`protect` 0.9, shorter rows of A": {"fixed-a.smollm2": f"{SHORT}-0.9", "fixed-a.minilm": f"{SHORT}-0.9"},
    "`protect` 0.8, an earlier form": {
        "curves.smollm2": "milora-inputs-0.8",
        "curves.smol-llava": "milora-inputs-0.8",
    },
    "`--method full`": {"curves.smollm2": "full", "curves.minilm": "full", "curves.smol-llava": "full"},
    "`--method milora`": {"curves.smollm2": "milora", "curves.minilm": "milora", "curves.smol-llava": "milora"},
    "`--method pissa`": {"curves.smollm2": "pissa"},
    "`--method dora`": {"curves.smollm2": "dora"},
}


# How to train one task after the other -> its arm of the study `sequence`.
SEQUENCE = "sequence.smollm2"
WAYS = {
    "`--method lora`, then `--adapter`": "lora",
    "the default, then `--adapter`": "gradient-further",
    "the default, merged, then the default": "gradient",
    "the default, then `--after`": "after",
    "the same with `--base_kl_weight 1`": "after-kl",
    "LoRA with 10 % of the earlier records": "lora-replay",
    "LoRA on all data at once": "lora-joint",
    "the default on all data at once": "gradient-joint",
}


def kept() -> str:
    """Return the table of README: what the default forgets, where LoRA forgets 1, and the losses that both reach."""
    rows = []
    for row in KEPT:
        study = read_study(row.study)
        cells = cells_of(row.study, study, DOCS)
        curves = curves_of(cells)
        ends = [(front[0].loss, curves[study.reference][seed][0].loss) for seed, front in curves[row.arm].items()]
        of_arm, of_lora = (mean_of(losses).value for losses in zip(*ends, strict=True))
        reached = sum(arm <= lora for arm, lora in ends)
        rows.append((
            row.task, str(study.steps), _text(_ratio(cells, row.arm, study.reference)),
            _text(_ratio(about_pictures(cells), row.arm, study.reference)),
            f"{of_arm:.2f} ({of_lora:.2f})", f"{reached} of {len(ends)}", f"`{row.study}`",
        ))  # fmt: skip
    header = (
        "task", "steps", "forgets text", "about pictures", "lowest loss (LoRA’s)", "seeds that reach LoRA’s", "study",
    )  # fmt: skip
    return Table(header, tuple(rows)).markdown()


def others() -> str:
    """Return the table of choose.md: what each setting forgets over LoRA on three tasks."""
    tasks = {"smollm2": "SmolLM2", "minilm": "MiniLM-L6", "smol-llava": "smol-llava, text"}
    rows = []
    for setting, arms in OTHERS.items():
        studies = {name: read_study(name) for name in arms}
        ratios = {
            name: _ratio(cells_of(name, study, DOCS), arms[name], study.reference) for name, study in studies.items()
        }
        texts = {study.partition(".")[2]: _text(ratio) for study, ratio in ratios.items()}
        rows.append((setting, *(texts.get(task, "") for task in tasks)))
    return Table(("setting", *tasks.values()), tuple(rows)).markdown()


def rates() -> str:
    """Return the table of choose.md: the rates at which the default and LoRA ran, the lowest loss in bold."""
    rows = []
    for row in KEPT:
        study = read_study(row.study)
        cells = cells_of(row.study, study, DOCS)
        rows.append(
            (row.task, f"{study.steps} x {study.batch_size}", _rates(cells, row.arm), _rates(cells, study.reference))
        )
    return Table(("task", "steps x records", "rates of the default", "of LoRA"), tuple(rows)).markdown()


def sequence() -> str:
    """Return the table of continue.md: the scores of three tasks after their own training and at the end."""
    cells = cells_of(SEQUENCE, read_study(SEQUENCE), DOCS)
    keys = ("score_1_1", "score_3_1", "score_2_2", "score_3_2", "score_3_3", "forgetting_3")
    rows = []
    for way, arm in WAYS.items():
        of_arm = [row for cell, row in cells.items() if cell.method == arm]
        columns = [[float(row[key]) for row in of_arm if row.get(key)] for key in keys]
        rows += [(way, str(len(of_arm)), *(mean_of(values).text if values else "–" for values in columns))]
    header = ("", "seeds", "task 1, then", "at the end", "task 2, then", "at the end", "task 3", "text forgotten")
    return Table(header, tuple(row for row in rows if row[1] != "0")).markdown()


FIGURES: dict[str, Callable[[], str]] = {"kept": kept, "others": others, "rates": rates, "sequence": sequence}


def written(page: str) -> str:
    """Return the text of a page with all its tables computed again. Raises KeyError for an unknown name."""
    return BLOCK.sub(lambda found: f"{found[1]}\n{FIGURES[found[2]]()}{found[3]}", page)


def main() -> int:
    """Write the pages."""
    for page in PAGES:
        write_text(page, written(page.read_text(encoding="utf-8")))
    return 0


def _ratio(cells: Mapping[Cell, CellNumbers], arm: str, reference: str) -> Ratio | None:
    curves = curves_of(cells)
    return at_common_loss(curves[arm], curves[reference]) if curves else None


def _text(ratio: Ratio | None) -> str:
    return ratio.text if ratio else "–"


def _rates(cells: Mapping[Cell, CellNumbers], arm: str) -> str:
    """Return the rates of an arm that ran with its first seed; the one with the lowest loss is bold."""
    losses = {
        c.learning_rate: float(row["validation_loss"]) for c, row in cells.items() if (c.label, c.seed) == (arm, 0)
    }
    best = min(losses, key=losses.__getitem__)
    return ", ".join(f"**{rate:g}**" if rate == best and len(losses) > 1 else f"{rate:g}" for rate in sorted(losses))


if __name__ == "__main__":
    sys.exit(main())
