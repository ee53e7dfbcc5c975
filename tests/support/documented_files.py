"""Write the files that the pages presume: data, pictures, benchmarks, small models, and trained runs."""

from __future__ import annotations

import base64
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from milora_vl.__main__ import main
from support import official_data
from support.drawn import dump, dump_lines, encoded, made, picture, write_tiny_data
from support.eval_questions import write_questions
from support.vlm_runs import write_model

TRAIN = ["train", "--data_path", "train.json", "--max_steps", "2", "--learning_rate", "0.01"]
TINY = [*TRAIN, "--image_folder", "images", "--model", "tiny", "--rank", "2"]
QUESTION = {"query": "1 + 1?", "response": "It is 2.", "input": "", "output": "2", "answer": "2"}
ASKED = ("instructions.json", "LLM-Adapters/ft-training_set/commonsense_170k.json", "data/MetaMathQA-395K.json")


def write_files(folder: Path, records: list[dict[str, Any]]) -> None:
    """Write records, pictures, benchmark files, scripts and parts of models."""
    write_tiny_data(folder, records)
    for name in ("cat.png", "my pictures/cat.jpg", "playground/data/0.png", "a.png"):
        picture("red").save(made((folder / name).parent) / Path(name).name)
    (folder / "my pictures" / "captions.csv").write_text("file,caption\ncat.jpg,A cat.\n")
    for name in ("a-test.json", "b-test.json"):
        shutil.copy(folder / "val.json", folder / name)
    drawn = sorted(path.name for path in (folder / "images").iterdir())
    (folder / "answers.csv").write_text(
        "image,question,answer\n" + "".join(f"{n},What is this?,It is {n}.\n" for n in drawn)
    )
    dump_lines(folder / "mine.jsonl", [record for record in records if "image" not in record or record["id"] == "p0"])
    dump(folder / "llava_v1_5_mix665k.json", [record for record in records if record["id"] in ("p0", "t0", "t1")])
    for rows in ASKED:
        dump(folder / rows, [QUESTION | {"query": f"{n}?", "instruction": f"{n}?"} for n in range(130)])
    write_preferences(folder / "ultrafeedback.parquet")
    write_messages(folder / "chat.jsonl")
    write_benchmarks(folder)
    write_parts(folder)
    (folder / "wikitext-103-test.txt").write_text("It was the best of times. " * 40)


def write_preferences(path: Path) -> None:
    """Write rows like UltraFeedback's."""
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    said = [{"role": "user", "content": "Is it red?"}, {"role": "assistant", "content": "Yes."}]
    parquet.write_table(arrow.Table.from_pylist([{"prompt": "Is it red?", "messages": said}] * 4), path)


def write_messages(path: Path) -> None:
    """Write a record of OpenAI's messages that holds its picture."""
    url = f"data:image/png;base64,{base64.b64encode(encoded('red')).decode()}"
    asked = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is this?"}]
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": "A disc."}]
    dump_lines(path, [{"messages": turns}])


def write_benchmarks(folder: Path) -> None:
    """Write small official benchmark files, and questions like the demo's."""
    official_data.write_all(folder / "playground" / "data" / "eval")
    official_data.write(made(folder / "data"), "mmbench")
    official_data.mathematics(folder / "MetaMath" / "data" / "test")
    official_data.commonsense(folder / "LLM-Adapters" / "dataset")
    questions = write_questions(folder / "data" / "emoji")
    picture("red").save(questions / "images" / "1F694.png")
    for name in ("train.json", "val.json"):
        shutil.copy(questions / "test.json", questions / name)


def write_parts(folder: Path) -> None:
    """Write a small tower, language model, instruct model, vision-language model and stage-1 projector."""
    from transformers import CLIPImageProcessor, CLIPVisionModel

    from milora_vl.models.projector import save_projector
    from milora_vl.models.tiny import tiny_llama, tiny_llava

    write_model("qwen2_5_vl", folder / "qwen-vl")
    whole, _ = tiny_llava()
    CLIPVisionModel(whole.config.vision_config).save_pretrained(folder / "tower")
    small = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    small.save_pretrained(folder / "tower")
    stage1 = "checkpoints/llava-v1.5-mlp2x-336px-pretrain-vicuna-7b-v1.5"
    save_projector(whole, made(folder / stage1))
    for name in ("language", "instruct"):
        model, tokenizer = tiny_llama()
        if name == "language":
            model.resize_token_embeddings(260)  # as Vicuna, which has no <image>
        else:
            tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def call(*words: str) -> None:
    """Run one of our programs, which must succeed."""
    assert main(words) == 0


def composed() -> None:
    call("compose", "--vision", "tower", "--language", "language", "--output_dir", "vicuna-clip")


def llava_lora() -> None:
    """Train a LoRA on the composed base and write it as LLaVA's own code does."""
    call(*TRAIN, "--image_folder", "images", "--model", "vicuna-clip", "--rank", "2", "--output_dir", "lora")
    call("export", "lora", "--to", "llava", "--output_dir", "llava-v1.5-7b-lora", "--vision_tower", "tower")
    shutil.rmtree("lora")


def released_lora() -> None:
    """Make the same for a page that downloads it and composes its base."""
    composed()
    llava_lora()
    shutil.move("llava-v1.5-7b-lora", "checkpoints")
    shutil.rmtree("vicuna-clip")


def demo() -> None:
    call("train", "--recipe", "smol-llava-demo", "--model", "tiny", "--rank", "2", "--max_steps", "2",
         "--output_dir", "runs/demo")  # fmt: skip


def quickstart() -> None:
    shutil.copy("val.json", made(Path("mine")) / "mine-eval.json")
    call(*TINY, "--eval_data_path", "mine/mine-eval.json", "--output_dir", "runs/mine")


# What a page may presume -> the function that makes it, in a folder with the files above.
PRESUMED: dict[str, Callable[[], None]] = {
    "runs/a": lambda: call(*TINY, "--output_dir", "runs/a"),
    "runs/b": lambda: call(*TINY, "--seed", "1", "--output_dir", "runs/b"),
    "runs/demo": demo,
    "runs/mine": quickstart,
    "runs/full": lambda: call(*TINY[:-2], "--method", "full", "--output_dir", "runs/full"),
    "vicuna-clip": composed,
    "llava-v1.5-7b-lora": llava_lora,
    "checkpoints/llava-v1.5-7b-lora": released_lora,
}


def prepare(names: Sequence[str]) -> None:
    """Make what a page presumes in the current folder, which holds the files above."""
    for name in names:
        PRESUMED[name]()
