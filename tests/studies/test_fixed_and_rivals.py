"""Arms with a fixed A and rivals: A is off the protected inputs, step 0 is exact, the sketch finds G's directions."""

from __future__ import annotations

from itertools import islice
from math import isfinite
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.osf import OSFLayer
from torch import Tensor

from milora_vl import Policy, apply_milora
from milora_vl.sweep.cells import Cell
from studies import starts
from studies.starts import Spectrum, first_directions_of, install, rows_of
from studies.study import Fixed, Study, parse_study
from studies.tasks.smollm2 import NamedTopics
from studies.train import _osf, run_cell
from support.machine import fastest

ARMS: dict[str, dict[str, Any]] = {
    "gradient": {"fixed": {"start": "gradient"}},
    "sketch": {"fixed": {"start": "gradient", "sketch": True, "batches": 1}},
    "gradient-minor": {"fixed": {"start": "gradient-minor"}},
    "generalized": {"fixed": {"start": "generalized"}},
    "minor": {"fixed": {"start": "minor", "rows": "own"}},
    "unused": {"fixed": {"start": "unused"}},
    "random": {"fixed": {"start": "random"}},
    "both-train": {"fixed": {"start": "minor", "inputs": None, "trains": True}},
    "rest": {"rival": {"kind": "rest", "weight": 1.0}},
    "own": {"rival": {"kind": "own", "weight": 1.0}},
    "mix": {"rival": {"kind": "mix", "weight": 1.0}},
    "osf": {"osf": True},
    "half": {"scale": 0.5},
    "none": {"scale": 0.0},
    "lora": {},
}
HARD = [arm for arm, keys in ARMS.items() if "fixed" in keys and arm != "both-train"]


@pytest.fixture(scope="module")
def task() -> Any:
    return NamedTopics("tiny-text")


@pytest.fixture(scope="module")
def study() -> Study:
    return parse_study(
        {"question": "Which?", "task": "smollm2", "steps": 1, "batch_size": 4, "arms": ARMS, "learning_rates": [1e-2],
         "policy": [{"modules": "language", "method": "lora", "rank": 4}], "reference": "lora"}, "test",
    )  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("factors")


def adapted(task: Any, study: Study, arm: str, cache: Path) -> tuple[Any, dict[str, Tensor]]:
    """Return the model of an arm before its training, and A of each layer."""
    base, rules, fixed = task.model(), study.rules(arm, 1e-2), study.fixed(arm)
    assert fixed is not None
    targets = Policy.parse(rules).resolve(base)
    rows = starts.starts(base, targets, fixed, task, batch_size=4, seed=0, cache=cache)
    model = apply_milora(base, rules)
    install(model, rows, trains=fixed.trains)
    return model.eval(), rows


@pytest.mark.parametrize("arm", HARD)
def test_a_fixed_a_is_off_the_protected_inputs_and_changes_nothing_at_the_start(
    arm: str, task: Any, study: Study, cache: Path
) -> None:
    model, rows = adapted(task, study, arm, cache)
    base = task.model()
    spectra = starts.input_spectra(base, list(rows), task.calibration, cache)
    for path, A in rows.items():
        V = spectra[path].vectors[:, : spectra[path].count(0.95)]
        assert (A @ V).abs().max() < 1e-6
        lengths = A.norm(dim=1)
        assert arm == "minor" or torch.allclose(lengths, torch.full_like(lengths, 3**-0.5), rtol=1e-4)
    batch = task.calibration()[0]
    assert torch.equal(model(**batch).logits, base.eval()(**batch).logits)
    assert all("lora_B" in name for name, p in model.named_parameters() if p.requires_grad), "A does not train"


@pytest.mark.parametrize("arm", ARMS)
def test_every_kind_of_arm_trains_a_step(arm: str, task: Any, study: Study, cache: Path) -> None:
    result, _ = run_cell(task, study, Cell(arm, 1e-2, None, 0), cache)
    assert (result["update"] == 0) == (arm in ("none", "osf")), "a scale of 0 leaves the base; OSF's is not measured"
    assert (result["forgetting"] == 0) == (arm == "none")


@pytest.fixture(scope="module")
def half() -> Any:
    with fastest("bfloat16"):
        made = NamedTopics("tiny-text")
    made.validation, made.test, made.probes["text"] = made.validation[:8], made.test[:8], made.probes["text"][:1]
    return made


@pytest.mark.parametrize("arm", ["gradient", "own", "osf", "lora"])
def test_arms_train_a_step_on_a_base_in_bfloat16(arm: str, half: Any, study: Study, tmp_path: Path) -> None:
    assert {parameter.dtype for parameter in half.base.parameters()} == {torch.bfloat16}
    result, _ = run_cell(half, study, Cell(arm, 1e-2, None, 0), tmp_path)
    assert result["forgetting"] > 0
    assert isfinite(result["validation_loss"])


@pytest.mark.parametrize("precision", ["task", "half"])
def test_osf_starts_as_its_base_and_trains_off_the_first_directions(
    precision: str, study: Study, request: pytest.FixtureRequest
) -> None:
    task = request.getfixturevalue(precision)
    batch, base, model = next(task.batches(4, 0)), task.model(), _osf(task.model(), study.rules("osf", 1e-2))
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    assert {parameter.dtype for parameter in frozen} == {parameter.dtype for parameter in base.parameters()}
    loss = task.loss(model, batch)
    assert loss.item() == pytest.approx(task.loss(base, batch).item(), rel=1e-3)
    loss.backward()
    for layer in (module for module in model.modules() if isinstance(module, OSFLayer)):
        U, _, Vh = torch.linalg.svd(layer.base_layer.weight.float(), full_matrices=False)
        low, rank = layer.osf_svd_params["default"], layer.effective_rank["default"]
        for part, first in ((low["U_low"].grad, U[:, :rank].T), (low["V_low"].grad.T, Vh[:rank])):
            assert (first @ part).abs().max() < 1e-4 * part.abs().max()


def test_a_scaled_adapter_is_that_of_lora_and_a_term_changes_the_training(task: Any, study: Study, cache: Path) -> None:
    updates = {arm: run_cell(task, study, Cell(arm, 1e-2, None, 0), cache)[0] for arm in ("lora", "half", "mix")}
    assert updates["half"]["update"] == pytest.approx(updates["lora"]["update"] / 2)
    assert updates["mix"]["validation_loss"] != updates["lora"]["validation_loss"]


def test_the_sketch_has_the_gradient_in_it(task: Any) -> None:
    base = task.model()
    paths = {path: 4 for path, module in base.named_modules() if path.endswith(("q_proj", "down_proj"))}
    batches = list(islice(task.batches(4, 0), 2))
    exact = starts.gradients(base, paths, task.loss, batches, None)
    sketches = starts.gradients(base, paths, task.loss, batches, 0)
    base.requires_grad_(True)
    for batch in batches:
        task.loss(base, batch).backward()
    for path in paths:
        own = base.get_submodule(path).weight.grad.float()
        assert torch.nn.functional.cosine_similarity(exact[path].flatten(), own.flatten(), dim=0) > 0.999
        assert sketches[path].shape == (12, own.shape[1])
        inside = torch.linalg.lstsq(exact[path].T, sketches[path].T).solution
        assert torch.allclose(exact[path].T @ inside, sketches[path].T, atol=1e-3 * float(sketches[path].abs().max()))


def test_a_sketch_finds_the_row_space_of_a_low_rank_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    G = torch.randn(40, 5, generator=generator) @ torch.randn(5, 30, generator=generator)
    sketch = torch.randn(13, 40, generator=generator) @ G
    exact, found = (first_directions_of(part, 5) for part in (G, sketch))
    assert torch.linalg.svdvals(exact @ found.T).min() > 0.999


def test_the_soft_cut_damps_by_the_energy(tmp_path: Path) -> None:
    spectrum = Spectrum.of(torch.diag(torch.tensor([8.0, 1.0, 1.0, 0.0])))
    damped = spectrum.cut(torch.eye(4), Fixed(start="minor", inputs=0.7, soft=1.0))
    assert torch.allclose(damped.diagonal(), torch.tensor([1 / 2, 8 / 9, 8 / 9, 1.0]), atol=1e-5)
    G = torch.diag(torch.tensor([9.0, 2.0, 1.0, 1.0]))
    rows = rows_of(Fixed(start="gradient", inputs=0.7), G, 1, spectrum, G, path="x", cache=tmp_path)
    assert rows.abs() == pytest.approx(torch.tensor([[0, 3**-0.5, 0, 0]]), abs=1e-5), "the most gradient off V"
