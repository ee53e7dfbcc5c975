"""Write the files of a finished run (design section 8) without training anything: for the tests of the report."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from milora_data.keys import file_key
from milora_eval.scores.results import numbers
from milora_eval.scores.table import write_tables

TYPES = ("naming", "category", "colour", "yes_no", "choice", "choice_letter", "multi_turn", "text_only")
ACCURACY = {  # of each type: base, tuned
    "naming": (0.04, 0.31),
    "category": (0.07, 0.59),
    "colour": (0.15, 0.74),
    "yes_no": (0.48, 0.81),
    "choice": (0.22, 0.63),
    "choice_letter": (0.26, 0.30),
    "multi_turn": (0.11, 0.56),
    "text_only": (0.30, 0.70),
}
SHAPES = {
    "self_attn.q_proj": (576, 576),
    "self_attn.k_proj": (192, 576),
    "self_attn.v_proj": (192, 576),
    "self_attn.o_proj": (576, 576),
    "mlp.gate_proj": (1536, 576),
    "mlp.up_proj": (1536, 576),
    "mlp.down_proj": (576, 1536),
}
Json = dict[str, Any]


def make_run(folder: Path, *, num_questions: int = 216) -> Path:
    """Fill `folder` with a run and its evaluation."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(
        "model: smol-llava\ntemplate: vicuna_v1\nform: anchored\n"
        "data: {path: data/emoji/train.json, image_folder: data/emoji/images, eval_path: data/emoji/val.json}\n"
        "policy:\n  - {modules: language, method: milora, protect: 0, rank: 32, alpha: 32, learning_rate: 2.0e-4}\n"
        "  - {modules: projector, method: full, learning_rate: 2.0e-5}\ntrain: {max_steps: 100, seed: 42}\n"
    )
    dump(folder / "environment.json", environment())
    dump(folder / "policy.json", policy())
    dump(folder / "trainer_state.json", {"global_step": 100, "max_steps": 100, "log_history": log_history()})
    images = drawn_pictures(folder.parent / "images")
    for which in ("base", "final"):
        evaluate(folder / "eval" / "emoji" / which, which, images, num_questions)
    return folder


def dump(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1))


def environment() -> Json:
    return {
        "command": ["python", "-m", "milora_vl.train", "--recipe", "smol-llava-demo", "--output_dir", "runs/demo"],
        "versions": {"milora_vl": "0.1.0", "python": "3.11.9", "torch": "2.13.0", "transformers": "5.24.0"},
        "git": "1f0c2d9",
        "device": "cpu, 2 threads",
        "started": "2026-11-25T10:55:00+00:00",
        "finished": "2026-11-25T10:59:21+00:00",
        "seconds": 261.4,
        "seed": 42,
        "model": "smol-llava",
        "base": "smol-llava",
        "data": {"train": 1600, "eval": 160, "skipped": 0},
    }


def policy() -> Json:
    targets, layers = [], []
    for block in range(30):
        for leaf, shape in SHAPES.items():
            path = f"model.language_model.layers.{block}.{leaf}"
            common = {"path": path, "shape": shape, "tower": "language", "rank": 32}
            targets.append(
                common | {"method": "milora", "protect": 0, "alpha": 32.0, "dropout": 0.05, "learning_rate": 2e-4}
            )
            low = 0.02 + 0.001 * block
            measured = {
                "sigma_min": low,
                "sigma_max": low * 9,
                "sigma_top": 6.0,
                "energy": 0.003 + 0.0001 * block,
            }
            layers.append(common | measured | {"method": "milora", "protect": 0, "excess": 4e-7, "svd": "exact"})
    for leaf, shape in (("linear_1", (576, 320)), ("linear_2", (576, 576))):
        path = f"model.multi_modal_projector.{leaf}"
        common = {"path": path, "shape": shape, "tower": "projector", "rank": None}
        targets.append(common | {"method": "full", "alpha": None, "dropout": 0.0, "learning_rate": 2e-5})
    return {"targets": targets, "layers": layers, "trainable": 10_284_928, "total": 139_104_320}


def log_history() -> list[Json]:
    rng, history = random.Random(0), []
    for step in range(1, 101):
        rate = 2e-4 * (step / 5 if step < 5 else 0.5 * (1 + math.cos(math.pi * (step - 5) / 95)))
        loss = 0.85 + 2.2 * math.exp(-step / 18) + rng.gauss(0, 0.09)
        history.append({"step": step, "epoch": step / 100, "loss": loss, "learning_rate": rate, "grad_norm": 1.0})
        if step % 20 == 0:
            history.append({"step": step, "epoch": step / 100, "eval_loss": 0.92 + 2.1 * math.exp(-step / 18)})
    history.append({"step": 100, "train_loss": 1.2, "train_runtime": 231.0, "train_samples_per_second": 6.9})
    return history


def drawn_pictures(folder: Path) -> list[Json]:
    """Nine coloured shapes on white as PNG files."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = []
    for index, (name, colour) in enumerate((n, c) for n in ("circle", "square", "bar") for c in ("red", "blue", "tan")):
        image = Image.new("RGB", (224, 224), "white")
        draw = ImageDraw.Draw(image)
        box = (30, 30 if name != "bar" else 90, 194, 194 if name != "bar" else 134)
        (draw.ellipse if name == "circle" else draw.rectangle)(box, fill=colour)
        path = folder / f"{index}.png"
        image.save(path)
        pictures.append({"file": path, "name": f"{colour} {name}", "category": "shapes"})
    return pictures


def question(kind: str, truth: Json, other: Json) -> tuple[str, list[str], str]:
    """A question of that type: its text, the accepted answers, a wrong answer."""
    options = f"{other['name']}\n{truth['name']}\n"
    return {
        "naming": ("What is this?", [truth["name"]], other["name"]),
        "category": ("Which category does it belong to?", [truth["category"]], "symbols"),
        "colour": ("What is its main colour?", ["yellow"], "orange"),
        "yes_no": (f"Is this a {truth['name']}? Answer yes or no.", ["yes"], "no"),
        "choice": (f"Which one is shown?\n{options}", [truth["name"]], other["name"]),
        "choice_letter": (f"Which one is shown?\nA. {other['name']}\nB. {truth['name']}", ["B"], "A"),
        "multi_turn": (f"And is it {truth['category']} or food?", [truth["category"]], "food"),
        "text_only": ("Which is bigger, an ant or a whale?", ["a whale", "whale"], "an ant"),
    }[kind]


def evaluate(folder: Path, which: str, images: list[Json], num_questions: int) -> None:
    rng, lines = random.Random(which), []
    for index in range(num_questions):
        kind = TYPES[index % len(TYPES)]
        truth, other = images[(index * 7) % len(images)], images[(index * 7 + 3) % len(images)]
        text, answers, wrong = question(kind, truth, other)
        text = text if kind in ("multi_turn", "text_only") else f"<image>\n{text}"
        correct = rng.random() < ACCURACY[kind][which == "final"]
        fallback = wrong if which == "final" else f"The image shows a {wrong} with a lot of details in it."
        picture = str(truth["file"]) if kind != "text_only" else None
        lines.append({
            "id": f"q{index}", "benchmark": "emoji", "type": kind, "question": text,
            "image": picture and truth["file"].name, "image_file": picture,
            "content": [file_key(picture)] if picture else [],
            "prediction": answers[0] if correct else fallback, "answers": answers, "correct": float(correct),
            "key": "k", "question_key": f"{index:03}", "group": picture or f"q{index}",
            "baseline": float(index % 4 == 0),
        })  # fmt: skip
        if kind == "multi_turn":
            lines[-1]["context"] = [["user", "<image>\nWhat is this?"], ["assistant", "a thing"]]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    forgetting: Json = {"cross_entropy": 2.93, "stderr": 0.03, "base_entropy": 2.71, "kl": 0.22, "kl_stderr": 0.01}
    forgetting |= {"n_tokens": 8192, "n_documents": 2, "text": "alice_in_wonderland + news_from_nowhere"}
    forgetting |= {"loss_change": 0.2, "loss_change_stderr": 0.01}
    forgetting["pictures"] = forgetting | {"kl": 0.31, "n_documents": 20, "text": "answers about drawn shapes"}
    dump(folder / "results.json", {
        "suite": "emoji", "which": which, "model": "smol-llava", "template": "vicuna_v1", "seconds": 31.0,
        "adapter": "runs/demo" if which == "final" else None, "forgetting": forgetting if which == "final" else None,
        "generation": {"max_new_tokens": {"emoji": 16}}, **numbers(folder, "emoji"),
    })  # fmt: skip
    write_tables(folder)
