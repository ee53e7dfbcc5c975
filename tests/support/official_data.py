"""Miniature data sets in the official formats of the benchmarks, with drawn pictures: `write_all(folder)`."""

from __future__ import annotations

import base64
import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.drawn import NAMES, coco, draw, dump, dump_lines, encoded, made, picture, votes


def vqa_files(folder: Path, questions: str, annotations: str) -> None:
    asked, known = [], []
    for i, name in enumerate(NAMES):
        draw(folder / "val2014" / coco(i + 1), name)
        for j, (text, answer, kind) in enumerate(
            [("What color is the disc?", name, "other"), (" Is it  red? ", "yes" if name == "red" else "no", "yes/no")]
        ):
            number = (i + 1) * 1000 + j
            asked.append({"image_id": i + 1, "question": text, "question_id": number})
            known.append(
                {
                    "question_type": text.split()[0].lower(),
                    "multiple_choice_answer": answer,
                    "answers": votes(answer),
                    "image_id": i + 1,
                    "answer_type": kind,
                    "question_id": number,
                }
            )
    about = {"info": {}, "license": {}}
    dump(folder / questions, about | {"questions": asked})
    dump(folder / annotations, about | {"annotations": known})


def vqav2(folder: Path) -> None:
    vqa_files(folder, "v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json")
    asked = [{"image_id": 5, "question": "What is it?", "question_id": 5000}]
    draw(folder / "test2015" / coco(5, "test2015"), "blue")
    dump(folder / "v2_OpenEnded_mscoco_test-dev2015_questions.json", {"questions": asked})
    more = [*asked, {"image_id": 6, "question": "Why?", "question_id": 6000}]
    dump(folder / "v2_OpenEnded_mscoco_test2015_questions.json", {"questions": more})


def okvqa(folder: Path) -> None:
    vqa_files(folder, "OpenEnded_mscoco_val2014_questions.json", "mscoco_val2014_annotations.json")


def gqa(folder: Path) -> None:
    questions = {}
    for i, name in enumerate(NAMES):
        draw(folder / "images" / f"n{i}.jpg", name)
        for j, (text, answer, kind) in enumerate(
            [("What color is it?", name, "query"), ("Is it red?", "no", "verify")]
        ):
            questions[f"0{i}{j}"] = {
                "question": text,
                "imageId": f"n{i}",
                "answer": answer,
                "types": {"structural": kind, "semantic": "attr", "detailed": "x"},
                "groups": {"global": None, "local": None},
                "isBalanced": True,
            }
    questions["099"] = questions["000"] | {"isBalanced": False}
    dump(folder / "testdev_balanced_questions.json", questions)


def vizwiz(folder: Path) -> None:
    entries = []
    for i, name in enumerate(NAMES):
        draw(folder / "val" / f"VizWiz_val_{i:08d}.jpg", name)
        entry = {"image": f"VizWiz_val_{i:08d}.jpg", "question": "What is this? Can I eat it? ", "answers": votes(name)}
        entries.append(entry | {"answer_type": "other" if i else "unanswerable", "answerable": min(i, 1)})
    dump(folder / "val.json", entries)
    draw(folder / "test" / "VizWiz_test_00000000.jpg", "red")
    dump(folder / "test.json", [{"image": "VizWiz_test_00000000.jpg", "question": "Which one?"}])


def scienceqa(folder: Path) -> None:
    problems = {}
    for i, name in enumerate(NAMES):
        has_picture = i < 2
        if has_picture:
            draw(folder / "images" / "test" / str(i) / "image.png", name)
        problems[str(i)] = {
            "question": "Which color?",
            "choices": list(NAMES),
            "answer": i,
            "hint": "Look  at it." if i else "",
            "image": "image.png" if has_picture else None,
            "task": "closed choice",
            "grade": "grade2",
            "subject": "natural science",
            "lecture": "",
            "solution": "",
            "split": "test",
        }
    dump(folder / "problems.json", problems)
    dump(folder / "pid_splits.json", {"train": [], "test": ["0", "1", "2"]})


def textvqa(folder: Path) -> None:
    entries, tokens = [], []
    for i, name in enumerate(NAMES):
        draw(folder / "train_images" / f"img{i}.jpg", name)
        tokens.append({"image_id": f"img{i}", "ocr_tokens": ["STOP", name.upper()] if i else []})
        for j, text in enumerate(["what is written?", "What color is this?"]):
            answers = [name] * 6 + ["stop"] * 4
            entries.append({"question": text, "image_id": f"img{i}", "question_id": 100 * i + j, "answers": answers})
    dump(folder / "TextVQA_0.5.1_val.json", {"data": entries})
    dump(folder / "TextVQA_Rosetta_OCR_v0.2_val.json", {"data": tokens})


def pope(folder: Path) -> None:
    for name in ("random", "popular", "adversarial"):
        rows = []
        for i, colour in enumerate(NAMES):
            draw(folder / "val2014" / coco(i + 1), colour)
            for j, thing in enumerate(["disc", "dog"]):
                text = f"Is there a {thing} in the image?" if name != "popular" else f"Is there a {thing} here?"
                rows.append({"question_id": 2 * i + j + 1, "image": coco(i + 1), "text": text})
                rows[-1]["label"] = "no" if j else "yes"
        dump_lines(folder / f"coco_pope_{name}.json", rows)


def mmbench_rows(chinese: bool, rotations: bool) -> list[dict[str, Any]]:
    rows = []
    for i, name in enumerate(NAMES):
        options = [*NAMES, "None" if i else "yellow, or = none"]
        for turn in range(4 if rotations else 1):
            shown = options[turn:] + options[:turn]
            row = {"index": i + turn * 1_000_000, "question": "哪种颜色?" if chinese else "Which\tcolor?"}
            row |= {"hint": "Look." if i == 0 else "", **dict(zip("ABCD", shown, strict=True))}
            row |= {"answer": "ABCD"[shown.index(name)], "category": "color", "image": str(i)}
            if turn == 0:
                row["image"] = base64.b64encode(encoded(name)).decode()
            rows.append(row | {"source": "s", "l2-category": f"part {i % 2}", "comment": "", "split": "dev"})
    return rows


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)


def mmbench(folder: Path) -> None:
    write_table(folder / "mmbench_dev_20230712.tsv", mmbench_rows(False, rotations=False))
    write_table(folder / "mmbench_dev_cn_20231003.tsv", [r for r in mmbench_rows(True, True) if r["index"] % 10 == 0])
    unanswered = [{key: value for key, value in row.items() if key != "answer"} for row in mmbench_rows(False, False)]
    write_table(folder / "mmbench_test_20230712.tsv", unanswered)


def mme(folder: Path) -> None:
    root = folder / "MME_Benchmark_release_version"
    for task, below in (("existence", ""), ("code_reasoning", ""), ("artwork", "images")):
        for i, name in enumerate(NAMES[:2]):
            draw(root / task / below / f"{i:04d}.png", name)
            text = "Is it red? Please answer yes or no.\tYes\nIs it a dog?  Please answer yes or no.\tNo\n"
            file = root / task / ("questions_answers_YN" if below else "") / f"{i:04d}.txt"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)


def seed_bench(folder: Path) -> None:
    questions = []
    for i, name in enumerate(NAMES):
        kind = "video" if i == 2 else "image"
        below, file = ("SEED-Bench-video-image", "2.png") if i == 2 else ("SEED-Bench-image", f"p{i}")
        picture(name).save(made(folder / below) / file, "PNG")
        choices = {f"choice_{letter}": option for letter, option in zip("abcd", (*NAMES, "none"), strict=True)}
        entry = {"question_id": str(i), "question": "Which color?", "answer": "ABC"[i], "data_id": f"p{i}"}
        questions.append(entry | choices | {"data_type": kind, "question_type_id": 10 if i == 2 else 1})
    dump(folder / "SEED-Bench.json", {"questions": questions, "question_type": {"Scene": 1, "Action": 10}})


def mm_vet(folder: Path) -> None:
    entries = {}
    for i, name in enumerate(NAMES):
        draw(folder / "images" / f"v1_{i}.png", name)
        entries[f"v1_{i}"] = {"imagename": f"v1_{i}.png", "question": "What is it? ", "answer": f"{name}<OR>a disc"}
        entries[f"v1_{i}"] |= {"imagesource": "x", "capability": ["rec", "ocr"] if i else ["rec"]}
    dump(folder / "mm-vet.json", entries)


def llava_bench(folder: Path) -> None:
    kinds = ("llava_bench_conv", "llava_bench_detail", "llava_bench_complex")
    for i, name in enumerate(NAMES):
        draw(folder / "images" / f"{i:03d}.jpg", name)
    rows = [
        {"question_id": i, "image": f"{i:03d}.jpg", "text": "Describe it.", "category": k} for i, k in enumerate(kinds)
    ]
    dump_lines(folder / "questions.jsonl", rows)
    dump_lines(
        folder / "context.jsonl", [{"id": f"{i:03d}", "image": f"{i:03d}.jpg", "caption": "A disc."} for i in range(3)]
    )
    dump_lines(folder / "answers_gpt4.jsonl", [{"question_id": i, "text": f"A {n} disc."} for i, n in enumerate(NAMES)])


def mmmu(folder: Path) -> None:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    for subject in ("Accounting", "Art_Theory"):
        rows = []
        for i, (name, kind) in enumerate(zip(NAMES, ("multiple-choice", "multiple-choice", "open"), strict=True)):
            row = {
                "id": f"validation_{subject}_{i + 1}",
                "question": "Which color is <image 1>?",
                "question_type": kind,
            }
            row |= {
                "options": str(list(NAMES)) if kind != "open" else "[]",
                "answer": "ABC"[i] if kind != "open" else "['blue', '5']",
            }
            rows.append(row | {"image_1": {"bytes": encoded(name), "path": f"{i}.png"}})
        made(folder / subject)
        parquet.write_table(arrow.Table.from_pylist(rows), folder / subject / "validation-00000-of-00001.parquet")


def chartqa(folder: Path) -> None:
    for half in ("human", "augmented"):
        for i, name in enumerate(NAMES):
            draw(folder / "test" / "png" / f"{i}.png", name)
        rows = [{"imgname": f"{i}.png", "query": "How many?", "label": str(10 * i)} for i in range(3)]
        dump(folder / "test" / f"test_{half}.json", rows)


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as the hub stores them; a text `image` names the colour of a picture."""
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    stored = [row | {"image": {"bytes": encoded(row["image"]), "path": f"{i}.png"}} for i, row in enumerate(rows)]
    parquet.write_table(arrow.Table.from_pylist(stored), made(path.parent) / path.name)


def tabular(name: str) -> str:
    """Return a picture as VLMEvalKit's tables store it."""
    return base64.b64encode(encoded(name)).decode()


ASKED = " Please answer directly with only the letter of the correct option and nothing else."


def ai2d(folder: Path) -> None:
    rows = [{"question": "Which color?", "options": list(NAMES), "answer": str(i)} for i in range(3)]
    write_parquet(folder / "data" / "test-00000-of-00001.parquet", with_pictures(rows))


def ai2d_table(folder: Path) -> None:
    about = dict(zip("ABC", NAMES, strict=True)) | {"category": "colors"}
    rows = [{"index": i, "question": "Which color?", "answer": "ABC"[i]} | about for i in range(3)]
    rows = [row | {"image": tabular(name)} for row, name in zip(rows, NAMES, strict=True)]
    write_table(folder / "AI2D_TEST.tsv", [*rows, rows[0] | {"index": 3, "image": "1", "answer": "B"}])


def realworldqa(folder: Path) -> None:
    rows = [{"question": f"Which color?\n\nA. red\nB. green\n{ASKED}\n", "answer": "AB"[i]} for i in range(2)]
    rows.append({"question": "How many? Please answer directly with a single word or number.", "answer": "1"})
    for i, row in enumerate(with_pictures(rows)):
        write_parquet(folder / "data" / f"test-{i:05d}-of-00003.parquet", [row])


def mmstar(folder: Path) -> None:
    text = "Which color? Please answer yes or no.\nOptions: A: red, B: green, C: blue, D: none"
    rows = [{"index": i, "question": text, "answer": "ABC"[i], "category": "math"} for i in range(3)]
    rows = [row | {"l2_category": ("geometry", "statistical reasoning")[i % 2]} for i, row in enumerate(rows)]
    rows = [row | {"meta_info": {"source": "x", "split": "val", "image_path": "x.jpg"}} for row in rows]
    write_parquet(folder / "mmstar.parquet", with_pictures(rows))


def pathvqa(folder: Path) -> None:
    rows = [{"question": "what is shown?", "answer": "the liver"}, {"question": "is it red?", "answer": "no"}]
    write_parquet(folder / "data" / "test-00000-of-00001.parquet", with_pictures([*rows, rows[0]]))


def cub200(folder: Path) -> None:
    options = "".join(f"\n{letter}. Bird {letter}" for letter in "ABC")
    letter = "Answer with the option's letter from the given choices directly."
    text = f"What species is the bird in this photo?\n{letter}{options}"
    rows = with_pictures([{"question": text, "answer": "ABC"[i]} for i in range(3)])
    write_parquet(folder / "data" / "train-00000-of-00001.parquet", rows)


def with_pictures(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row | {"image": name} for row, name in zip(rows, NAMES, strict=True)]


def chartqa_hub(folder: Path) -> None:
    for i, half in enumerate(("human_test", "augmented_test")):
        rows = [{"type": half, "question": "How many?", "answer": str(10 * j)} for j in range(3)]
        write_parquet(folder / "data" / f"test-{i:05d}-of-00002.parquet", with_pictures(rows))


def chartqa_table(folder: Path) -> None:
    halves = [("test_human", j) for j in range(3)] + [("test_augmented", j) for j in range(3)]
    rows = [{"index": i, "question": "How many?", "answer": 10 * j, "split": s} for i, (s, j) in enumerate(halves)]
    write_table(folder / "ChartQA_TEST.tsv", [row | {"image": tabular("red")} for row in rows])


def docvqa_hub(folder: Path, name: str = "DocVQA") -> None:
    about = {"question": "What title?", "data_split": "val"}
    rows = [about | {"questionId": str(i), "answers": [name, name.upper()]} for i, name in enumerate(NAMES)]
    write_parquet(folder / name / "validation-00000-of-00001.parquet", with_pictures(rows))


def docvqa_table(folder: Path, file: str = "DocVQA_VAL.tsv") -> None:
    rows = [{"index": i, "question": "What title?", "answer": str([n, n.upper()])} for i, n in enumerate(NAMES)]
    write_table(folder / file, [row | {"image": tabular(name)} for row, name in zip(rows, NAMES, strict=True)])


def textvqa_hub(folder: Path) -> None:
    rows = []
    for i, name in enumerate(NAMES):
        for j, text in enumerate(["what is written?", "What color is this?"]):
            tokens = ["STOP", name.upper()] if i else []
            row = {"image_id": f"img{i}", "question_id": 100 * i + j, "question": text, "image": name}
            rows.append(row | {"answers": [name] * 6 + ["stop"] * 4, "ocr_tokens": tokens})
    write_parquet(folder / "data" / "validation-00000-of-00001.parquet", rows)


def document_questions(folder: Path, file: str, pictures: str, key: str) -> None:
    rows = []
    for i, name in enumerate(NAMES):
        draw(folder / pictures / f"d{i}.png", name)
        rows.append(
            {"questionId": i, "question": "What title?", key: f"{pictures}/d{i}.png", "answers": [name, name.upper()]}
        )
    dump(folder / file, {"dataset_split": "val", "data": rows})


def commonsense(folder: Path) -> None:
    labels = {"boolq": "true", "piqa": "solution1", "social_i_qa": "answer2", "hellaswag": "ending4"}
    labels |= {"winogrande": "option2", "ARC-Easy": "answer4", "ARC-Challenge": "answer5", "openbookqa": "answer1"}
    for name, label in labels.items():
        row = {"instruction": "Which?\n\nAnswer format: x", "input": "", "output": f"the correct answer is {label}"}
        dump(folder / name / "test.json", [row | {"answer": label}, row | {"answer": label}])


def mathematics(folder: Path) -> None:
    dump_lines(made(folder) / "GSM8K_test.jsonl", [{"query": "1 + 1?", "response": "It is 2.\n#### 1,002"}])
    row = {"instruction": "Half?", "output": "so $\\boxed{\\frac{1}{2}}$", "type": "Algebra"}
    dump_lines(folder / "MATH_test.jsonl", [row])


WRITERS: dict[str, Callable[[Path], None]] = {
    **{writer.__name__: writer for writer in (vqav2, okvqa, gqa, vizwiz, scienceqa, textvqa, pope, mmbench, chartqa)},
    **{writer.__name__: writer for writer in (mmmu, ai2d, realworldqa, mmstar, pathvqa, cub200)},
    "MME": mme,
    "seed_bench": seed_bench,
    "mm-vet": mm_vet,
    "llava-bench-in-the-wild": llava_bench,
    "docvqa": lambda folder: document_questions(folder, "val_v1.0_withQT.json", "documents", "image"),
    "infovqa": lambda folder: document_questions(
        folder, "infographicsVQA_val_v1.0_withQT.json", "infographicsvqa_images", "image_local_name"
    ),
}


# The same questions in the other forms in which users have them.
OTHER_FORMS: dict[str, tuple[Callable[[Path], None], ...]] = {
    "ai2d": (ai2d_table,),
    "chartqa": (chartqa_hub, chartqa_table),
    "docvqa": (docvqa_hub, docvqa_table),
    "infovqa": (lambda f: docvqa_hub(f, "InfographicVQA"), lambda f: docvqa_table(f, "InfoVQA_VAL.tsv")),
    "textvqa": (textvqa_hub,),
    "textvqa-no-ocr": (textvqa_hub,),
}


def write_all(folder: Path) -> Path:
    """Write every data set below `folder`, in the same subfolders as LLaVA."""
    for name in WRITERS:
        write(folder, name)
    commonsense(folder)
    mathematics(folder)
    return folder


def write(folder: Path, name: str) -> Path:
    """Write one data set below `folder`, in its subfolder `name`."""
    WRITERS[name](made(folder / name))
    return folder
