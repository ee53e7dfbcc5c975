from __future__ import annotations

import json
import re
import shutil
import threading
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from filelock import FileLock
from huggingface_hub import ModelCard

from milora_eval.scores.results import numbers
from milora_eval.scores.table import write_tables
from milora_vl.common.errors import UserError
from milora_vl.common.evaluator_protocol import QuestionSet
from milora_vl.report import model_card
from milora_vl.report.__main__ import main as report_main
from milora_vl.report.page import credits_of, questions, regenerate_report, summary, write_report
from milora_vl.report.read_run import read_run
from milora_vl.report.repeat import commands, questions_of
from milora_vl.report.tables import number
from milora_vl.train.settings import Recipe
from support.fake_run import dump, make_run

OPTIONAL = ("recipe.yaml", "environment.json", "policy.json", "trainer_state.json", "eval")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with its report."""
    run = make_run(tmp_path_factory.mktemp("report") / "run")
    write_report(run)
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy to change, without the file whose plots take seconds to draw."""
    skip = shutil.ignore_patterns("trainer_state.json", "plots")
    return Path(shutil.copytree(finished, tmp_path / "run", ignore=skip))


class Page(HTMLParser):
    """The parts of a page that a test asks about."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img", "source", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


def page_of(run: Path) -> Page:
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert page.open == []
    page.text = re.sub(r"\s+", " ", page.text)
    return page


def test_the_page_tells_the_result_in_words(finished: Path) -> None:
    page = Page((finished / "report.html").read_text(encoding="utf-8"))
    text = re.sub(r"\s+", " ", page.text)
    results = json.loads((finished / "eval/emoji/final/results.json").read_text())
    mean = results["benchmarks"][0]["metrics"][0]
    assert f"correctly answers {100 * mean['value']:.1f} % (±{100 * mean['stderr']:.1f}) of the questions" in text
    assert "0.220 ± 0.010" in text
    assert "small models rarely learn to answer with a letter" in text
    assert "0.310 ± 0.010" in text[text.index("answers about drawn shapes") :]


def test_the_page_needs_nothing_outside_and_no_script(finished: Path) -> None:
    html = (finished / "report.html").read_text(encoding="utf-8")
    tags = Page(html).tags
    fetched = [v for tag, at in tags for k, v in at.items() if k in ("src", "srcset", "data", "poster") and v]
    fetched += [str(at["href"]) for tag, at in tags if tag == "link"]
    assert len(fetched) > 20
    assert all(value.startswith("data:") for value in fetched)
    assert not [tag for tag, at in tags if tag == "script" or any(name.startswith("on") for name in at)]
    assert "url(" not in html
    assert "@import" not in html
    assert len(html) < 2_000_000
    assert all(at.get("alt") for tag, at in tags if tag == "img")


def test_what_the_files_say_is_escaped(run: Path) -> None:
    evil = "<script>alert(1)</script>&\"'"
    edit(run / "environment.json", lambda content: content.update(model=evil, device=evil))
    dump(run / "policy.json", {"targets": [{"path": evil, "tower": evil, "method": evil}]})
    for which in ("base", "final"):
        file = run / "eval" / "emoji" / which / "predictions.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        changed = [line | {"question": evil, "prediction": evil, "answers": [evil], "type": evil} for line in lines]
        file.write_text("".join(json.dumps(line) + "\n" for line in changed))
    page = page_of(run)
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.text.count("<script>alert(1)</script>") > 24


def test_without_an_evaluation_the_page_says_how_to_make_one(run: Path) -> None:
    shutil.rmtree(run / "eval")
    page = page_of(run)
    assert "Trained on 1,600 records; not evaluated yet." in page.text
    assert "python -m milora_eval run --model smol-llava" in page.text


def test_a_run_that_was_stopped_says_so(run: Path) -> None:
    shutil.rmtree(run / "eval")
    environment = json.loads((run / "environment.json").read_text()) | {"finished": None}
    (run / "environment.json").write_text(json.dumps(environment))
    (run / "trainer_state.json").write_text(json.dumps({"log_history": [{"step": 10, "loss": 2.0}]}))
    assert "Not finished: 10 steps so far; not evaluated yet." in page_of(run).text


@pytest.mark.parametrize("only", OPTIONAL)
def test_one_file_alone_makes_a_page(finished: Path, tmp_path: Path, only: str) -> None:
    run, source = tmp_path / "young", finished / only
    run.mkdir()
    shutil.copytree(source, run / only) if source.is_dir() else shutil.copy(source, run)
    assert "Before and after" in page_of(run).text


@pytest.mark.parametrize("which", ["base", "final"])
def test_one_evaluation_alone_says_how_to_make_the_other(run: Path, which: str) -> None:
    shutil.rmtree(run / "eval" / "emoji" / which)
    page = page_of(run)
    assert "has not been evaluated" in page.text
    assert "--with_base" in page.text


def test_credits_come_from_the_data(run: Path) -> None:
    data = run.parent / "data"
    data.mkdir()
    (data / "README.md").write_text(
        "# Emoji\n\nPictures: OpenMoji (openmoji.org), licence CC BY-SA 4.0.\nOther words.\n"
    )
    (run / "recipe.yaml").write_text(f"model: smol-llava\ndata: {{path: {data}/train.json}}\n")
    assert credits_of(read_run(run)) == ["Pictures: OpenMoji (openmoji.org), licence CC BY-SA 4.0."]
    page = page_of(run)
    assert "licence CC BY-SA 4.0" in page.text
    mixture = f"model: smol-llava\ndata: {{path: [{{path: other.json}}, {{path: {data}/train.json, weight: 2.0}}]}}\n"
    (run / "recipe.yaml").write_text(mixture)
    assert credits_of(read_run(run)) == ["Pictures: OpenMoji (openmoji.org), licence CC BY-SA 4.0."]
    assert any(tag == "a" and "openmoji.org" in str(at["href"]) for tag, at in page.tags)


def test_a_report_that_cannot_be_drawn_ends_no_measurement(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    regenerate_report(run)
    assert capsys.readouterr().err == f"report:  {run / 'report.html'}\n"
    (run / "policy.json").write_text('{"targets": [{}]}')
    regenerate_report(run)
    assert f"no report; run python -m milora_vl.report {run} to see why" in capsys.readouterr().err
    regenerate_report(run.parent)  # no run's folder
    assert capsys.readouterr().err == ""


def test_an_evaluation_on_data_of_ones_own_is_repeated_by_its_file(run: Path) -> None:
    own = [{"name": "my val", "reference": "data:my val", "metrics": []}]
    own.append({"name": "de-eval", "reference": "data:de-eval", "metrics": []})  # named after its folder
    files = {"de-eval": {"file": "/there/de/eval.json", "hash": "a"}}
    (run / "recipe.yaml").write_text("model: tiny\ndata: {path: ll/train.json, eval_path: ll/de-eval.json}\n")
    for results in run.glob("eval/*/*/results.json"):
        edit(results, lambda content: content.update(benchmarks=own, questions=files))
    assert "--benchmarks 'my val.json,/there/de/eval.json'" in commands(read_run(run)).evaluate
    assert "--suite" not in commands(read_run(run)).evaluate


def test_commands_of_an_unfinished_run_use_its_newest_checkpoint(run: Path) -> None:
    newest = run / "checkpoint-10"
    for folder in (run / "checkpoint-9", newest):
        folder.mkdir()
        (folder / "adapter_config.json").write_text("{}")
        (folder / "adapter_model.safetensors").touch()
    (run / "checkpoint-11").mkdir()  # killed while it was written
    (run / "adapter_model.safetensors").unlink(missing_ok=True)
    typed = commands(read_run(run))
    for command in (typed.chat, typed.evaluate, typed.forgetting):
        assert f"--model smol-llava --adapter {newest}" in command
    assert typed.analyze.endswith(f"{newest} --output_dir {run / 'analysis'}")
    assert typed.forgetting.endswith(f"--output_dir {run}")
    assert f"--output_dir {run}" in typed.evaluate.replace(str(newest), "")
    (run / "adapter_model.safetensors").touch()
    assert f"--adapter {run} " in commands(read_run(run)).chat


def test_the_command_prints_the_page_and_what_comes_next(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "report.html").write_text("old")
    assert report_main([str(run)]) == 0
    out, err = capsys.readouterr()
    assert out == f"{run}/report.html\n"
    assert summary(read_run(run)) in err
    assert "next: python -m milora_vl.chat" in err
    assert (run / "report.html").read_text() != "old"
    assert not list(run.glob(".*partial"))


@pytest.mark.parametrize("kind", ["missing", "empty", "broken"])
def test_what_is_no_run_is_said_in_a_few_lines(run: Path, tmp_path: Path, kind: str) -> None:
    folder = {"missing": tmp_path / "none", "empty": tmp_path / "empty", "broken": run}[kind]
    (tmp_path / "empty").mkdir()
    (run / "policy.json").write_text('{"targets": [')
    with pytest.raises(UserError) as caught:
        report_main([str(folder)])
    assert str(run / "policy.json" if kind == "broken" else folder) in str(caught.value)
    assert caught.value.exit_code == 2
    assert len(str(caught.value).splitlines()) <= 5


def edit(path: Path, change: Any) -> None:
    content = json.loads(path.read_text())
    change(content)
    dump(path, content)


def own_answers(run: Path, num_cut: int) -> None:
    """Replace the evaluation of a run: the base gets nothing, the most frequent answer a third, the run a half.

    A third of the base's answers mention the right one; its first `num_cut` answers were cut.
    """
    shutil.rmtree(run / "eval")
    metas = {"meta": {"metric": "exact"}, "image": None, "image_file": None, "key": "k"}
    for which in ("base", "final"):
        lines = []
        for index in range(120):
            answer = "red" if index % 3 == 0 else f"colour {index}"
            said = answer if which == "final" and index % 2 else ""
            said = "It seems to be red, or a similar one" if which == "base" else said
            lines.append(metas | {
                "id": str(index), "benchmark": "data:own", "type": "", "question": "Which?", "prediction": said,
                "answers": [answer], "correct": float(said == answer), "group": str(index // 2),
                "baseline": float(answer == "red"), "question_key": f"{index:03}",
                **({"truncated": True} if which == "base" and index < num_cut else {}),
            })  # fmt: skip
        folder = run / "eval" / "own" / which
        folder.mkdir(parents=True)
        (folder / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        generation = {"max_new_tokens": {"own": 128}}
        dump(
            folder / "results.json", {"suite": "own", "which": which, "generation": generation} | numbers(folder, "own")
        )
    write_tables(run / "eval" / "own" / "final")


def test_own_questions_are_compared_with_the_better_of_base_and_majority(run: Path) -> None:
    own_answers(run, num_cut=40)
    content = read_run(run)
    (comparison,), found = content.comparisons, content.gain
    assert found is not None
    assert (found["over"], found["value"]) == ("majority", pytest.approx(0.5 - 1 / 3))
    assert found["low"] < found["value"] < found["high"]
    assert [score.any["name"] for score in comparison.scores()] == ["accuracy", "answer in first line"]
    text = page_of(run).text
    assert "16.7 points more than the most frequent answer, 33.3 % (95 % interval" in text
    assert "gain over the majority answer+16.7 points95 % interval" in text
    assert text.count("40 of the 120 answers of the base model were cut at 128 tokens.") == 1


def test_where_most_answers_of_the_base_were_cut_the_lenient_score_comes_first(run: Path) -> None:
    own_answers(run, num_cut=61)
    text = page_of(run).text
    assert "reaches 50.0 % (±0.4) (answer in first line) on the own questions; the base model 33.3 %" in text
    assert "That is 16.7 points more than the base model (95 % interval" in text


@pytest.mark.parametrize(
    ("recipe", "questions"),
    [
        (
            {"data": {"path": "a/train.json", "eval_path": "a/val.json", "image_folder": "a/b"}},
            QuestionSet(benchmarks="a/val.json", data="a/b"),
        ),
        (
            {"data": {"path": "a.json", "image_folder": "a/b"}, "eval": {"suites": ["mine.json"]}},
            QuestionSet("mine.json", "a/b"),
        ),
        ({"data": {"path": "emoji/train.json", "eval_path": "emoji/val.json"}}, QuestionSet("emoji", "emoji")),
        ({"data": {"path": "a.json", "eval_path": "hub:a/b"}}, None),
    ],
)
def test_a_run_is_asked_the_questions_that_its_recipe_names(
    recipe: dict[str, Any], questions: QuestionSet | None
) -> None:
    assert questions_of(recipe) == questions


def test_scores_of_earlier_tasks_stand_beside_those_after_their_own_run(run: Path, finished: Path) -> None:
    first = {"run": str(finished), "data": {"path": "data/emoji/train.json"}, "records": 8, "rules": []}
    dump(run / "milora.json", {"tasks": [first, {**first, "run": str(run)}]})
    ((folder, score),) = read_run(run).earlier
    assert (folder, score.benchmark, score.before == score.after) == (finished, "emoji", True)
    assert "Earlier runs" in page_of(run).text
    assert commands(read_run(run)).earlier == ()

    for each in (run, finished):  # the same questions again, with others
        shutil.copytree(each / "eval" / "emoji", each / "eval" / "emoji+other", dirs_exist_ok=True)
    assert len(read_run(run).earlier) == 1
    shutil.rmtree(run / "eval" / "emoji+other")
    shutil.rmtree(finished / "eval" / "emoji+other")

    answers = run / "eval" / "emoji" / "final" / "predictions.jsonl"
    answers.write_text(answers.read_text().replace('"benchmark": "', '"benchmark": "other '))
    assert read_run(run).earlier == ((folder, score),)  # the same questions under another name
    answers.write_text(answers.read_text().replace('"question_key": "', '"question_key": "other '))
    ((_, score),) = read_run(run).earlier
    assert (score.before is not None, score.after) == (True, None)
    (command,) = commands(read_run(run)).earlier
    assert "--suite emoji --data data/emoji" in command
    assert "--with_base" not in command


def test_the_headline_of_a_run_after_another_is_of_its_own_task(run: Path, finished: Path) -> None:
    task = {"run": str(finished), "data": {"path": "data/emoji/train.json"}, "records": 8, "rules": []}
    dump(run / "milora.json", {"tasks": [task, {**task, "run": str(run)}]})
    for which in ("base", "final"):
        folder = run / "eval" / "emoji" / which
        lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
        more: dict[str, Any] = {
            "benchmark": "data:mine",
            "correct": float(which == "final"),
            "meta": {"metric": "equal"},
        }
        lines += [line | more | {"baseline": None} for line in lines]
        (folder / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        new = numbers(folder, "emoji")
        edit(folder / "results.json", lambda content, new=new: content.update(new))
    write_tables(run / "eval" / "emoji" / "final")
    content = read_run(run)
    (_, old), old_score = content.earlier[0], json.loads((finished / "eval/emoji/final/results.json").read_text())
    assert old.after == old_score["benchmarks"][0]["metrics"][0]
    mine, emoji = summary(content).split(". On ")
    base = "base model 0.0 %. That is 100.0 points more than the base model (95 % interval +100.0 to +100.0)"
    assert mine == f"The fine-tuned model correctly answers 100.0 % of the mine questions; the {base}"
    assert emoji.startswith(f"emoji it has {number(old.after)}, and had {number(old.before)} after {finished}")
    # The last column of the table of tasks wraps, so that the table is not cut at the right.
    assert '<th scope="col" class="left">what trained</th>' in write_report(run).read_text(encoding="utf-8")
    for name in ("results.json", "predictions.jsonl"):  # the earlier run was asked both
        shutil.copy(run / "eval" / "emoji" / "base" / name, finished / "eval" / "emoji" / "final")
    assert summary(read_run(run)).startswith(mine)


RECIPE = Recipe.parse(
    {"model": "tiny", "policy": [{"modules": "language", "method": "milora", "protect": 0, "rank": 4}]}
)


def test_the_front_matter_names_base_and_method(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    front = yaml.safe_load(model_card.render(tmp_path, RECIPE.model_dump()).split("---")[1])
    assert front["base_model"] == "tiny"
    assert front["library_name"] == "peft"
    assert front["tags"] == ["milora", "milora-vl"], "protect: 0 is the paper's MiLoRA"
    policy = [{"modules": "language", "method": "milora", "rank": 4}]
    card = model_card.render(tmp_path, RECIPE.model_dump() | {"policy": policy})
    assert "- protected-milora\n" in card
    assert "- `language`: protected MiLoRA (new directions only; " in card


def test_the_front_matter_has_the_schema_of_the_hub(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "environment.json").write_text(json.dumps({"base": "llava-hf/llava-1.5-7b-hf"}))
    data = {"path": [{"path": "train.json"}, {"path": "hub:owner/set:train"}]}
    card = tmp_path / "README.md"
    card.write_text(model_card.render(tmp_path, {**RECIPE.model_dump(), "data": data}))
    front = ModelCard.load(card).data
    assert (front.base_model, front.license, front.datasets) == ("llava-hf/llava-1.5-7b-hf", "other", ["owner/set"])
    assert front.license_link == "https://huggingface.co/llava-hf/llava-1.5-7b-hf"
    assert front.eval_results is None
    results = tmp_path / "eval" / "emoji" / "final" / "results.json"
    results.parent.mkdir(parents=True)
    for value in (0.5, 0.537):
        score = {"name": "mean F1", "value": value, "unit": "fraction"}
        results.write_text(json.dumps({"benchmarks": [{"name": "emoji", "metrics": [score]}]}))
        model_card.update_scores(tmp_path)
    (found,) = ModelCard.load(card).data.eval_results or []
    assert (found.dataset_name, found.metric_type, found.metric_value) == ("emoji", "mean F1", 53.7)
    assert card.read_text().count("model-index") == 1
    pair = {"a": score, "b": score | {"value": 0.25, "detail": False}}  # over the questions that its base has too
    paired = {"benchmark": "emoji", "headline": "mean F1", "pairs": [pair]}
    results.write_text(json.dumps(json.loads(results.read_text()) | {"comparison": {"benchmarks": [paired]}}))
    model_card.update_scores(tmp_path)
    assert [each.metric_value for each in ModelCard.load(card).data.eval_results or []] == [25.0]


def test_the_card_names_layers_that_protect_less_than_their_rule(tmp_path: Path) -> None:
    for energy, is_named in ((0.96, False), (0.9123, True)):
        policy = {"targets": [{"path": "q", "protect": 0.95}], "protection": {"q": {"energy": energy}}}
        (tmp_path / "policy.json").write_text(json.dumps({**policy, "trainable": 1, "total": 9}))
        assert ("91.2 %" in model_card.render(tmp_path, RECIPE.model_dump())) is is_named


def test_scores_come_in_and_an_edited_card_stays_edited(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    card.write_text(model_card.render(tmp_path, RECIPE.model_dump()) + "\nMy own words.\n")
    assert "## Scores" not in card.read_text()
    table = tmp_path / "eval" / "emoji" / "final" / "table.md"
    table.parent.mkdir(parents=True)
    for value in ("61.2", "63.4"):
        table.write_text(f"| mean | {value} |")
        model_card.update_scores(tmp_path)
        assert card.read_text().count("## Scores") == 1
        assert f"| mean | {value} |" in card.read_text()
    assert card.read_text().endswith("\nMy own words.\n")
    base = tmp_path / "eval" / "emoji" / "base" / "table.md"
    base.parent.mkdir()
    base.write_text("| mean | 1.0 |")
    model_card.update_scores(tmp_path)
    assert "1.0" not in card.read_text()  # the tuned model's table tells the base's numbers too
    table.unlink()
    model_card.update_scores(tmp_path)
    assert "1.0" in card.read_text()


def test_two_evaluations_that_end_together_lose_no_score(tmp_path: Path) -> None:
    """The card waits for the other's update, and then reads all tables."""
    card, table = tmp_path / "README.md", tmp_path / "eval" / "emoji" / "final" / "table.md"
    card.write_text(model_card.render(tmp_path, RECIPE.model_dump()))
    table.parent.mkdir(parents=True)
    with FileLock(tmp_path / "eval" / ".lock"):
        update = threading.Thread(target=model_card.update_scores, args=[tmp_path])
        update.start()
        update.join(0.3)
        assert update.is_alive()
        table.write_text("| mean | 2.0 |")
    update.join()
    assert "| mean | 2.0 |" in card.read_text()


def test_answers_of_both_models_meet_at_their_question(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", num_questions=16)
    file = run / "eval/emoji/base/predictions.jsonl"
    file.write_text("".join(reversed(file.read_text().splitlines(keepends=True)[:-1])))
    items = questions(read_run(run).comparisons[0])
    assert [after["id"] for _, after in items if after] == [f"q{i}" for i in range(16)]
    assert [after["id"] for before, after in items if after and before is None] == ["q15"]


def test_a_card_shows_earlier_turns_and_a_score_between_right_and_wrong(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", num_questions=8)
    file = run / "eval/emoji/final/predictions.jsonl"
    file.write_text(re.sub(r'"correct": [01].0', '"correct": 0.6', file.read_text()))
    text = write_report(run).read_text(encoding="utf-8")
    assert "&lt;image&gt;" not in text
    assert "user: What is this?\n" in text
    assert text.count("60 % right") == 8
