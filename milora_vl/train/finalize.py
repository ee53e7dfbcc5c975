"""The end of a run: write model card and report, print the closing block with all paths and the next command."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from milora_vl.adapter.checkpoints import WEIGHTS
from milora_vl.adapter.folders import has_config, holds_projector_alone, holds_text_model
from milora_vl.cli.command_line import command_line
from milora_vl.plan.run_folder import CARD, RunFolder
from milora_vl.plan.screen import Screen
from milora_vl.recipe.schema import Recipe
from milora_vl.report import model_card
from milora_vl.report.page import try_write_report


def show_results(folder: RunFolder, recipe: Recipe, screen: Screen, style: str = "human") -> None:
    """Write README.md and report.html and print the closing block. A failed report does not fail the run.

    With the style `json`, the last line of stdout is a JSON object with the block and the results of training.
    """
    page = write_pages(folder, recipe, screen)
    weights = next((name for name in WEIGHTS if (folder.path / name).is_file()), "")
    rows = [("weights", str(folder.path / weights))]
    if page is not None:
        rows.append(("report", str(page)))
    rows.append(("recipe", str(folder.path / "recipe.yaml")))
    rows.append(("next", next_command(folder.path, recipe)))
    screen.closing(rows)
    if style == "json":
        content = {"output_dir": str(folder.path), **dict(rows), "results": measured(folder.path)}
        sys.stdout.write(json.dumps(content) + "\n")


def measured(path: Path) -> dict[str, float]:
    """Return the last logged value of each key (losses, speed, time); empty if nothing was logged."""
    file = path / "trainer_state.json"
    entries = json.loads(file.read_text(encoding="utf-8"))["log_history"] if file.is_file() else []
    return {name: value for entry in entries for name, value in entry.items()}


def write_pages(folder: RunFolder, recipe: Recipe, screen: Screen) -> Path | None:
    """Write README.md and report.html. Return the path of report.html, or None if it could not be written."""
    folder.write_text(CARD, model_card.render(folder.path, recipe))
    return try_write_report(folder.path, screen.warn)


def next_command(path: Path, recipe: Recipe) -> str:
    """Return the command that a user most likely needs next."""
    question = ["QUESTION"] if holds_text_model(path) else ["--image", "PICTURE", "What is this?"]
    if has_config(path):
        return command_line("milora_vl.chat", "--model", recipe.model, "--adapter", path, *question)
    if holds_projector_alone(path):
        words = ("--model", recipe.model, "--projector_weights", path, "--data_path", "DATA.json")
        return command_line("milora_vl.train", *words)
    return command_line("milora_vl.chat", "--model", path, *question)
