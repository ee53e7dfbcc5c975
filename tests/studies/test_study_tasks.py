"""The tasks of the studies on small networks: training, measurements, and no forgetting at step 0."""

from __future__ import annotations

from functools import cache
from itertools import islice
from typing import Any

import pytest
import torch
from torch import nn

from milora_data.emoji.catalogue import catalogue
from milora_vl import Policy, apply_milora
from milora_vl.models import loading
from milora_vl.models.loading import meta_model
from milora_vl.sweep.cells import Cell
from studies.linear_gru import LinearGru
from studies.study import Study, read_study, study_names
from studies.task import Task
from studies.tasks import TASKS, load_task, pictures
from studies.tasks.digits import DigitsCnn, DigitsRnn, DigitsVit
from studies.tasks.smollm2 import NamedTopics
from studies.train import rules_on, run_cell
from support.versions import PEFT

STUDIES = {
    "smollm2": "components.smollm2",
    "minilm": "components.minilm",
    "lite0": "components.lite0",
    "digits-cnn": "elsewhere.digits-cnn",
    "digits-rnn": "elsewhere.digits-rnn",
    "digits-vit": "elsewhere.digits-vit",
}
DIGITS = {"digits-cnn": DigitsCnn, "digits-rnn": DigitsRnn, "digits-vit": DigitsVit}
small = pytest.mark.parametrize("name", STUDIES)


@cache
def task(name: str) -> Any:
    if name == "smollm2":
        return NamedTopics("tiny-text")  # the same task on a tiny network
    with pytest.MonkeyPatch.context() as patch:  # a third of the emoji
        patch.setattr(pictures, "catalogue", lambda: catalogue()[::3])
        made: Any = DIGITS[name](base_steps=60) if name in DIGITS else load_task(name)
    if name == "lite0":  # fewer pictures in four rotations, to save time
        count = len(made.test)
        made.test, made.validation = made.test[:50], made.validation[:20]
        made.names = [item for place, item in enumerate(made.names) if place % count < 50]
    if name == "minilm":
        made.test, made.validation = [part[:200] for part in made.test], [part[:48] for part in made.validation]
    return made


def study_of(name: str) -> Study:
    study = read_study(STUDIES[name])
    if name == "smollm2":
        study.policy[0]["rank"] = 4
    return study


def flat(batch: Any) -> list[torch.Tensor]:
    if isinstance(batch, dict):
        return list(batch.values())
    first, labels = batch
    return [*(first.values() if isinstance(first, dict) else [first]), labels]


def test_every_task_but_those_of_smol_llava_and_of_chains_is_tried_here():
    assert set(STUDIES) == set(TASKS) - {"smol-llava", "easy-vqa", "smollm2-groups", "smollm2-hues"}


@small
def test_a_seed_decides_the_batches(name):
    made: Task = task(name)

    def first(seed: int) -> list[torch.Tensor]:
        return [tensor for batch in islice(made.batches(8, seed), 2) for tensor in flat(batch)]

    assert all(torch.equal(a, b) for a, b in zip(first(1), first(1), strict=True))
    assert not all(map(torch.equal, first(1), first(2)))  # torch.equal: shape and numbers


@small
def test_an_adapter_has_forgotten_nothing_before_training(name):
    made = task(name)
    model = apply_milora(made.model(), study_of(name).rules("milora", 1e-3)).eval()
    with torch.no_grad():
        found = made.measure(model)
    assert found.forgetting == 0
    assert len(found.items) >= 200
    assert set(found.items.values()) <= {0.0, 1.0}
    assert sum(found.items.values()) / len(found.items) == pytest.approx(found.score)


@small
def test_training_learns_the_task_and_forgets_something(name, tmp_path):
    made = task(name)
    study = study_of(name).model_copy(update={"steps": 12, "batch_size": 16})
    with torch.no_grad():
        before = made.measure(made.model().eval())
    result, items = run_cell(made, study, Cell("milora", study.learning_rates[1], None, 0), tmp_path)
    assert result["validation_loss"] < before.validation_loss
    assert result["forgetting"] != 0
    assert result["update"] > 0
    assert items.keys() == before.items.keys()


def test_small_steps_are_not_lost_on_a_base_in_half_precision(tmp_path):
    study = study_of("smollm2").model_copy(update={"steps": 1, "batch_size": 4, "arms": {"full": {"method": "full"}}})
    study.policy[0].pop("rank")
    one, two = (run_cell(task("smollm2"), study, Cell("full", rate, None, 0), tmp_path)[0] for rate in (1e-6, 2e-6))
    assert two["update"] == pytest.approx(2 * one["update"], rel=0.01)


SMALL = [name for name in study_names() if name.endswith((".minilm", ".lite0"))]


@pytest.fixture(scope="module")
def factors(tmp_path_factory):
    """The arms of all studies decompose the same matrices."""
    return tmp_path_factory.mktemp("factors")


@pytest.mark.parametrize("study", SMALL)
def test_every_arm_of_a_study_fits_the_network(study, factors):
    """The rules of every arm select matrices that are large enough; the study with all methods also applies them."""
    name = study.partition(".")[2]
    read = read_study(study)
    for arm in read.arms:
        if arm == "mica" and PEFT < (0, 20):
            continue
        model = task(name).model()
        rules = rules_on(model, read, Cell(arm, 1e-3, None, 0), factors)
        if study.startswith("methods."):
            assert apply_milora(model, rules, cache_dir=factors)
        else:
            assert Policy.parse(rules).resolve(model)


@pytest.mark.parametrize("study", [n for n in study_names() if n.endswith(".smollm2")])
def test_the_rules_of_every_arm_name_layers_of_the_language_model(study):
    read, base = read_study(study), meta_model(loading.config_of("smollm2"))
    for arm in read.arms:
        assert len(Policy.parse(read.rules(arm, 1e-3)).resolve(base)) >= 90  # three matrices in each of 30 blocks


def test_a_gru_of_linear_layers_computes_what_torchs_does():
    torch.manual_seed(0)
    gru, rows = nn.GRU(8, 16, batch_first=True), torch.randn(4, 7, 8)
    for own, theirs in zip(LinearGru.of(gru)(rows), gru(rows), strict=True):
        torch.testing.assert_close(own, theirs)


def test_the_recurrent_weights_themselves_are_adapted():
    made = task("digits-rnn")
    model: Any = apply_milora(made.model(), read_study("elsewhere.digits-rnn").rules("milora", 1e-3))
    assert [target.path for target in model.milora_targets] == ["gru.input", "gru.hidden"]


def test_batch_norms_keep_their_statistics_in_training():
    made = task("lite0")
    model = made.model().train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    made.loss(model, next(made.batches(4, 0)))
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_both_heads_of_the_picture_network_see_the_same_features():
    made = task("lite0")
    known, new = made.base(made.photographs[:2])
    assert known.shape == (2, 1000)
    assert new.shape == (2, made.base.turns.out_features)
    assert torch.equal(known, made.base.network(made.photographs[:2]))


@pytest.mark.parametrize("name", ["minilm"])
def test_the_calibration_of_a_task_shares_nothing_with_its_measurement(name: str) -> None:
    task: Any = load_task(name)
    assert len(task.other_sentences) > 200
    assert not set(task.sentences) & set(task.other_sentences)
    model = apply_milora(
        task.model(),
        [{"modules": "encoder.encoder.layer.0.*", "method": "milora", "rank": 4, "protect": 0.8}],
        calibration=task.calibration(),
    )
    shares = [protection.held_out for protection in model.milora_protection.values()]
    assert min(shares) > 0.6
