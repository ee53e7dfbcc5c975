"""The key `base_kl`: the model also reads texts of the base, and the KL from the base on them is a part of the loss."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from torch.nn.functional import kl_div
from transformers import LlavaForConditionalGeneration

from milora_vl import apply_milora
from milora_vl.core.adapter.lora import base_model_of
from milora_vl.interop.base_kl import BaseKL, BaseKLCallback, add_base_kl, with_positions
from milora_vl.models.tiny import tiny_llava
from milora_vl.train.__main__ import main
from support.calibrated import llava_batches, text_batches
from support.launched import KINDS, needs_deepspeed, results_of_two, train_in_two
from support.problems import raises_code
from support.train_runs import losses, read_json, training

FULL = {"modules": "projector", "method": "full"}
RULES: dict[str, list[dict[str, Any]]] = {
    "anchored": [{"modules": "language", "method": "milora", "protect": 0, "rank": 3}, FULL],
    "fixed": [{"modules": "language", "method": "milora", "rank": 3, "protect": 0.5}, FULL],
    "lora": [
        {"modules": "language", "method": "lora", "rank": 3},
        {"modules": "projector", "method": "lora", "rank": 2},
    ],
}
LORA = ["--policy", json.dumps(RULES["lora"]), "--dropout", "0"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("milora_vl.core.adapter.fixed_a.LEAST_HELD_OUT", 0.0)


def recipe_of(folder: Path, every: int, **calibration: Any) -> list[str]:
    """Flags of a recipe with the term in one step of `every`."""
    (folder / f"every{every}.json").write_text(json.dumps({"base_kl": {"every": every}, "calibration": calibration}))
    return ["--recipe", str(folder / f"every{every}.json")]


def terms(run: Path) -> list[tuple[int, float]]:
    """Steps and terms of the log of a run."""
    log = read_json(run, "trainer_state.json")["log_history"]
    return [(entry["step"], entry["base_kl"]) for entry in log if "base_kl" in entry]


@pytest.mark.parametrize("rules", RULES)
def test_the_term_is_the_kl_from_the_base_and_leaves_the_model_as_it_is(rules: str) -> None:
    base, batches = tiny_llava()[0], llava_batches(tiny_llava()[0])
    calibration = batches if rules == "fixed" else None
    model = apply_milora(tiny_llava()[0], RULES[rules], calibration=calibration)
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    add_base_kl(model)
    ids, texts = batches[0]["input_ids"], with_positions(batches[0], base.config.image_token_id)
    assert model(**batches[0], base_kl=texts)["base_kl"] == 0, "at the start the model is the base"
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(0.02 * torch.randn_like(parameter))
    alone = model(**batches[0]).logits
    in_head: list[int] = []
    hook = base_model_of(model).lm_head.register_forward_hook(lambda m, inputs, out: in_head.append(out.shape[1]))
    output = model(**batches[0], base_kl=texts)
    hook.remove()
    assert torch.equal(output["logits"], alone)
    real = batches[0]["attention_mask"][:, 1:].bool() & (ids[:, 1:] != base.config.image_token_id)
    assert in_head == [ids.shape[1], *[int(real.any(0).sum())] * 2], "no logits where pictures are"
    before, after = (m(**batches[0]).logits[:, :-1][real].log_softmax(-1) for m in (base, model))
    expected = kl_div(after, before, log_target=True, reduction="batchmean")
    assert float(output["base_kl"]) == pytest.approx(float(expected), rel=1e-4)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trained
    output["base_kl"].backward()
    names = {name for name, p in model.named_parameters() if p.grad is not None}
    assert names <= {name for name, trains in trained.items() if trains}
    assert any("language" in name for name in names)
    assert any("projector" in name for name in names)
    modes: list[bool] = []
    base_model_of(model).model.language_model.register_forward_hook(lambda m, *_: modes.append(m.training))
    model.train()(**batches[0], base_kl=texts)
    assert modes == [True, False, True], "the base has no dropout and no noise"


CALLBACK = """
import json
import torch
from transformers import Trainer, TrainingArguments
from milora_vl import apply_milora
from milora_vl.interop.base_kl import BaseKLCallback, add_base_kl, with_positions
from milora_vl.models.tiny import tiny_llama

def trained():
    torch.manual_seed(0)
    model = apply_milora(tiny_llama()[0], "[{modules: language, method: lora, rank: 3}]")
    for parameter in model.parameters():
        parameter.data += 0.1 * parameter.requires_grad * torch.randn_like(parameter)
    return model

ids = torch.randint(5, 40, (5, 12), generator=torch.Generator().manual_seed(1))
first, second, text, texts = ({"input_ids": i, "attention_mask": torch.ones_like(i)} for i in (*ids.split(2), ids[:4]))
batch = {**text, "labels": text["input_ids"]}
options = {"max_steps": 1, "optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0}
options |= {"use_cpu": True, "ddp_backend": "gloo", "report_to": "none", "logging_steps": 1, "save_strategy": "no"}
arguments = TrainingArguments("run", remove_unused_columns=False, per_device_train_batch_size=1, **options)
model, expected, callback = trained(), trained(), BaseKLCallback([texts], weight=3, every=1)
trainer = Trainer(model, arguments, train_dataset=[batch] * 2, data_collator=lambda rows: rows[0], callbacks=[callback])
trainer.train()
add_base_kl(expected.train())
outputs = [expected(**batch, base_kl=with_positions(one, None)) for one in (first, second)]
(sum(output["loss"] + 3 * output["base_kl"] for output in outputs) / 2).backward()
pairs = [(p - 0.1 * p.grad, q) for p, q in zip(expected.parameters(), model.parameters()) if p.requires_grad]
logged = [entry["base_kl"] for entry in trainer.state.log_history if "base_kl" in entry]
terms = [float(output["base_kl"]) for output in outputs]
print("RESULT" + json.dumps([max(float((p - q).abs().max()) for p, q in pairs), logged, terms]))
"""


def test_a_callback_adds_the_term_to_the_steps_of_another_trainer_under_ddp(tmp_path: Path) -> None:
    """Each process reads two other texts, and the step has the mean of both terms."""
    for rank, (difference, logged, expected) in enumerate(results_of_two(CALLBACK, tmp_path)):
        assert difference < 1e-6
        assert logged == [pytest.approx(expected[rank], rel=1e-4)]
        assert abs(expected[0] - expected[1]) > 0.01 * expected[0] > 0


@pytest.mark.parametrize(("distributed", "precision"), [("DEEPSPEED", "no"), ("FSDP", "bf16"), ("NO", "fp16")])
def test_a_callback_refuses_trainers_that_own_the_backward(distributed: str, precision: str, monkeypatch: Any) -> None:
    found = SimpleNamespace(distributed_type=DistributedType[distributed], mixed_precision=precision)
    monkeypatch.setattr("milora_vl.interop.base_kl.AcceleratorState", lambda: found)
    nothing: Any = None
    with raises_code("", where="BaseKLCallback", hint="python -m milora_vl.train"):
        BaseKLCallback(text_batches()).on_train_begin(nothing, nothing, nothing)


def test_a_model_that_computes_all_logits_has_the_same_term(monkeypatch: pytest.MonkeyPatch) -> None:
    def term() -> float:
        base, _ = tiny_llava()
        batch = llava_batches(base)[0]
        model = apply_milora(base, RULES["anchored"])
        add_base_kl(model)
        with torch.no_grad():
            for parameter in (p for p in model.parameters() if p.requires_grad):
                parameter.add_(0.02)
            return float(model(**batch, base_kl=with_positions(batch, base.config.image_token_id))["base_kl"])

    chosen, stock = term(), LlavaForConditionalGeneration.forward
    monkeypatch.setattr(
        LlavaForConditionalGeneration, "forward", lambda self, *_, logits_to_keep=0, **given: stock(self, **given)
    )
    assert term() == pytest.approx(chosen, rel=1e-4) != 0


def test_a_deep_copy_computes_its_own_term() -> None:
    batches = llava_batches(tiny_llava()[0])
    model = apply_milora(tiny_llava()[0], RULES["anchored"])
    add_base_kl(model)
    copied, texts = copy.deepcopy(model), with_positions(batches[0], None)
    with torch.no_grad():
        for parameter in (p for p in copied.parameters() if p.requires_grad):
            parameter.add_(0.02 * torch.randn_like(parameter))
        own, of_copy = (float(one(**batches[0], base_kl=texts)["base_kl"]) for one in (model, copied))
    assert own == 0 < of_copy


@pytest.mark.parametrize(("every", "accumulation"), [(1, 2), (4, 1), (3, 2)])
def test_texts_and_pictures_take_turns_and_every_process_has_its_own(every: int, accumulation: int) -> None:
    def read(process: int, steps: range) -> list[str]:
        args: Any = SimpleNamespace(gradient_accumulation_steps=accumulation, world_size=2, process_index=process)
        text: list[Any] = [{"name": f"text {i}"} for i in range(3)]
        pictures: list[Any] = [{"name": f"picture {i}", "pixel_values": None} for i in range(2)]
        earlier: list[Any] = [{"name": f"earlier {i}"} for i in range(4)]
        base_kl = BaseKL({"base": [*text, *pictures], "runs/a": earlier}, 1.0, every)
        batches = {step: [base_kl.next_batch(step, args) for _ in range(accumulation)] for step in steps}
        assert [s for s in steps if batches[s][0] is not None] == [s for s in steps if (s + 1) % every == 0]
        assert all(batch is None for found in batches.values() for batch in found[1:]), "once in a step"
        return [str(batch["name"]) for found in batches.values() for batch in found if batch is not None]

    steps = 12 * every
    first, second = read(0, range(steps)), read(1, range(steps))
    kinds = [name.split()[0] for name in first]
    assert kinds == [name.split()[0] for name in second] == ["text", "earlier", "picture", "earlier"] * 3
    assert not any(a == b for a, b in zip(first, second, strict=True))
    assert len(set(first + second)) == 3 + 2 + 4
    assert read(0, range(steps // 2 + every - 1, steps)) == first[6:], "a resumed run continues"


def test_another_method_from_the_recipe_of_a_run_has_its_own_default(
    tiny_data: Path, tmp_path: Path, capsys: Any
) -> None:
    assert main(training(tiny_data, tmp_path / "a", "--rank", "4", "--max_steps", "1")) == 0
    for method, has_term in (("milora", True), ("lora", False)):
        words = ["--recipe", str(tmp_path / "a" / "recipe.yaml"), "--method", method, "--dry-run", "--format", "json"]
        capsys.readouterr()
        assert main(words) == 0
        lines = json.loads(capsys.readouterr().out)["cost"]
        assert any(line.startswith("base_kl") for line in lines) == has_term


def test_a_run_keeps_the_answers_of_the_base_and_resumes(tiny_data: Path, tmp_path: Path) -> None:
    extra = [*LORA, "--learning_rate", "0.02", "--gradient_accumulation_steps", "2", "--max_steps", "6"]
    extra += [*recipe_of(tmp_path, 2, samples=4, pictures=4), "--save_steps", "3"]
    kl = {}
    for weight in ("0.01", "20"):
        assert main(training(tiny_data, tmp_path / weight, *extra, "--base_kl_weight", weight)) == 0
        kl[weight] = dict(terms(tmp_path / weight))
    assert [*kl["20"]] == [2, 4, 6]
    assert 0 < kl["20"][6] < 0.5 * kl["0.01"][6]
    whole = losses(tmp_path / "20")
    (tmp_path / "20" / "adapter_model.safetensors").unlink()
    resume = ["--resume_from_checkpoint", str(tmp_path / "20" / "checkpoint-3")]
    assert main(training(tiny_data, tmp_path / "20", *extra, "--base_kl_weight", "20", *resume)) == 0
    assert losses(tmp_path / "20") == whole
    with raises_code("", message="base_kl.weight"):
        main(training(tiny_data, tmp_path / "20", *extra, "--base_kl_weight", "1", *resume))


@pytest.mark.slow
@needs_deepspeed
def test_every_kind_of_run_has_the_same_loss(tiny_data: Path, tiny_folder: Path, tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "And?"}, {"from": "gpt", "value": "A sentence of one length. " * 9}]
    (tmp_path / "own.json").write_text(json.dumps([{"id": str(i), "conversations": turns} for i in range(8)]))
    policy = ["--policy", json.dumps([{"modules": "language", "method": "lora", "rank": 3}, FULL]), "--dropout", "0"]
    common = [*policy, "--model", str(tiny_folder), *"--max_steps 4 --learning_rate 0.02 --base_kl_weight 5".split()]
    common += ["--gradient_accumulation_steps", "2"]  # of twelve records, the second step of an epoch has one batch
    sources = {"text": f"{{data: {tmp_path / 'own.json'}}}", "pictures": "{samples: 0, pictures: 8}"}

    def words(name: str, source: str, texts: int, more: list[str]) -> list[str]:
        recipe = tmp_path / f"{name}.yaml"
        recipe.write_text(f"calibration: {sources[source]}\nbase_kl: {{texts: {texts}, every: 3}}\n")
        return training(tiny_data, tmp_path / name, *common, "--recipe", str(recipe), *more)

    assert main(words("one", "text", 2, [])) == 0
    two = ["--per_device_train_batch_size", "2"]
    lines = [words(f"{source} {kind}", source, 1, [*two, *KINDS[kind]]) for kind in KINDS for source in sources]
    train_in_two(lines, tmp_path)
    for source, first in (("text", "one"), ("pictures", "pictures ddp")):  # captions differ in length
        expected = torch.tensor(losses(tmp_path / first)), torch.tensor(terms(tmp_path / first))
        for kind in KINDS:
            run = tmp_path / f"{source} {kind}"
            found = torch.tensor(losses(run)), torch.tensor(terms(run))
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_a_training_that_changes_the_base_has_nothing_to_compare_with(tiny_data: Path, tmp_path: Path) -> None:
    with raises_code("base-kl-needs-base", where="--base_kl_weight"):
        main(training(tiny_data, tmp_path / "run", "--method", "full", "--base_kl_weight", "1"))
