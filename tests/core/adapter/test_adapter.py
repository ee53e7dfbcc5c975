"""`apply_milora` and `merge`: step 0, stock PEFT, trainers, what they refuse, and what they leave alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from milora_vl import apply_milora, load_adapter, merge, save_adapter
from milora_vl.core.policy import PolicyError
from support.adapter_cases import LLAVA_POLICY, Pictures, Tokens, llava_batch, one_rule, picture_batch, tiny_gpt2
from support.problems import raises_code, raises_problem


@pytest.mark.parametrize("modules", ["projector", "language"])
def test_a_policy_without_adapters_returns_the_model_itself(tiny_llava, modules: str) -> None:
    base, _ = tiny_llava()
    model = apply_milora(base, [{"modules": modules, "method": "full"}, {"modules": "vision", "method": "frozen"}])
    assert model is base
    assert model.milora_report == []
    trained = {name.rsplit(".", 1)[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {target.path for target in model.milora_targets}


def test_faults_leave_the_model_as_it_was(tiny_llama) -> None:
    model, _ = tiny_llama()
    with pytest.raises(PolicyError) as error:
        apply_milora(model, one_rule(rank=1000))
    assert {problem.code for problem in error.value.problems} == {"policy-rank-too-large"}
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with raises_problem(where="model.layers.1.mlp.up_proj", message="the weight contains 1 NaN", kind=ValueError):
        apply_milora(model, one_rule())
    assert not [name for name, _ in model.named_modules() if "lora" in name]
    assert all(p.requires_grad for p in model.parameters())


def test_a_model_with_an_adapter_is_refused(tiny_llama) -> None:
    model = apply_milora(tiny_llama()[0], one_rule())
    for again in (model, model.get_base_model()):
        with raises_problem():
            apply_milora(again, one_rule())


def test_merging_what_cannot_be_merged_is_refused_before_anything_happens() -> None:
    with raises_problem("", "got Linear"):
        merge(nn.Linear(2, 2))
    model = apply_milora(nn.Sequential(nn.Linear(4, 4)), one_rule())
    merge(model)
    with raises_code("", message="no adapter any more"):
        save_adapter(model, "somewhere")


class Endings(nn.Module):
    """A module whose path is the end of another's, which PEFT's rule for lists would take too."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.inner = nn.Sequential()
        self.inner.add_module("fc", nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.inner(x))


def test_a_path_that_ends_another_is_adapted_alone(tmp_path) -> None:
    from peft import PeftModel

    model = apply_milora(Endings(), one_rule(modules="fc"))
    model.save_pretrained(tmp_path)
    for made in (model, PeftModel.from_pretrained(Endings(), tmp_path)):
        assert {name for name, _ in made.named_modules() if name.endswith(".lora_A")} == {"base_model.model.fc.lora_A"}


def test_a_full_module_that_peft_would_confuse_is_refused() -> None:
    rules = [{"modules": "fc", "method": "full"}, {"modules": "inner.fc", "method": "milora", "protect": 0, "rank": 2}]
    with raises_problem("inner.fc"):
        apply_milora(Endings(), rules)


def test_layers_of_both_kinds_in_one_policy() -> None:
    """GPT-2 keeps its weights transposed, its head does not."""
    rules = [*one_rule(), {"modules": "lm_head", "method": "milora", "protect": 0, "rank": 2}]
    base, model = tiny_gpt2(), apply_milora(tiny_gpt2(), rules)
    ids = torch.arange(6)[None]
    assert torch.equal(base(ids).logits, model(ids).logits)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_llava_is_unchanged(tiny_llava, training: bool, dtype: torch.dtype) -> None:
    base = tiny_llava()[0].to(dtype).train(training)
    model = apply_milora(tiny_llava()[0].to(dtype), LLAVA_POLICY).train(training)
    batch = llava_batch(base)
    assert torch.equal(model(**batch).logits, base(**batch).logits)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(**batch).logits, base(**batch).logits)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 70), st.integers(1, 70), st.integers(1, 33), st.data(),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)  # fmt: skip
def test_any_linear_layer_is_unchanged(rows: int, columns: int, batch: int, data, dtype: torch.dtype) -> None:
    rank = data.draw(st.integers(1, min(rows, columns)))
    torch.manual_seed(rows)
    base = nn.Sequential(nn.Linear(columns, rows)).to(dtype)
    x = torch.randn(batch, columns).to(dtype)
    expected = base(x)
    model = apply_milora(base, one_rule(rank=rank, dropout=0.3, alpha=3)).train()
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_convolutions_and_embeddings_are_unchanged(dtype: torch.dtype) -> None:
    pixels, words = picture_batch()
    rules = [{"modules": "*", "method": "milora", "protect": 0, "rank": 3}, {"modules": "words", "method": "lora"}]
    model = apply_milora(Pictures().to(dtype), rules)
    assert torch.equal(model(pixels.to(dtype), words), Pictures().to(dtype)(pixels.to(dtype), words))


RULES = [*one_rule(dropout=0.1), {"modules": "language.mlp", "rank": 3}, {"modules": "model.norm", "method": "full"}]


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            control.should_training_stop = True


def trainer(model: Any, folder: Path, *callbacks: TrainerCallback, **options: Any) -> Trainer:
    settings: dict[str, Any] = {
        "output_dir": str(folder), "max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 3e-2,
        "logging_steps": 1, "save_steps": 3, "report_to": "none", "use_cpu": True, "disable_tqdm": True, "seed": 1,
        "weight_decay": 0.1,
    }  # fmt: skip
    args = TrainingArguments(**{**settings, **options})
    rounds = iter(range(99))  # a metric whose best value is the first
    return Trainer(
        model, args, train_dataset=Tokens(), eval_dataset=Tokens(), callbacks=list(callbacks),
        compute_metrics=lambda _: {"age": next(rounds)},
    )  # fmt: skip


def losses(run: Trainer) -> dict[int, float]:
    found = {entry["step"]: entry["loss"] for entry in run.state.log_history if "loss" in entry}
    assert found
    return found


@pytest.fixture(scope="module")
def whole(tiny_llama, tmp_path_factory) -> tuple[Trainer, Path]:
    folder = tmp_path_factory.mktemp("whole")
    run = trainer(apply_milora(tiny_llama()[0], RULES), folder)
    run.train()
    return run, folder


@pytest.mark.parametrize("way", ["load_adapter", "fresh model"])
def test_a_resumed_run_repeats_the_losses_of_an_uninterrupted_one(whole, tiny_llama, tmp_path: Path, way: str) -> None:
    first = trainer(apply_milora(tiny_llama()[0], RULES), tmp_path, StopAt(3))
    first.train()
    checkpoint = tmp_path / "checkpoint-3"
    if way == "load_adapter":
        model = load_adapter(tiny_llama()[0], checkpoint, is_trainable=True)
    else:
        model = apply_milora(tiny_llama()[0], RULES)
    second = trainer(model, tmp_path)
    second.train(resume_from_checkpoint=str(checkpoint))
    assert losses(second) == losses(whole[0])


def test_the_best_checkpoint_is_loaded_at_the_end(tiny_llama, tmp_path: Path) -> None:
    run = trainer(
        apply_milora(tiny_llama()[0], RULES), tmp_path,
        max_steps=4, save_steps=2, eval_steps=2, eval_strategy="steps",
        load_best_model_at_end=True, metric_for_best_model="age", greater_is_better=False,
    )  # fmt: skip
    run.train()
    best = Path(run.state.best_model_checkpoint)
    assert best.name == "checkpoint-2"
    expected = load_adapter(tiny_llama()[0], best)
    ids = Tokens().rows[:2]
    assert torch.allclose(run.model.eval()(ids).logits, expected(ids).logits, atol=1e-6)
    assert {n.split(".")[-1] for n, p in run.model.named_parameters() if p.requires_grad} == {"delta", "weight"}
