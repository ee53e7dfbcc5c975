"""Protected directions in a run of `milora_vl.train`: its losses, its files, its plan, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from milora_vl import load_adapter
from milora_vl.forecast.cost import workload_of
from milora_vl.forecast.estimate import memory, protected_bytes
from milora_vl.plan.batching import Batching
from milora_vl.plan.first_batch import Counts
from milora_vl.plan.screen import policy_rows
from milora_vl.policy import Policy, PolicyError
from milora_vl.recipe.policy_edits import PolicyEdits, edited
from milora_vl.report.run_page import read_run
from milora_vl.report.tables import policy_table
from milora_vl.tiny import tiny_llava
from milora_vl.train.command import main
from support.launched import KINDS, needs_deepspeed, train_in_two
from support.problems import raises_code
from support.protected import FORMS, HARD, TOP, overlaps
from support.train_runs import losses, read_json, training


def rules(form: Any, method: str = "milora") -> str:
    rule = {"modules": "language", "method": method, "rank": 3, "dropout": 0.1, "protect": form}
    return json.dumps([rule, {"modules": "projector", "method": "full"}])


@pytest.mark.parametrize(("form", "method"), [(FORMS[0], "milora"), (FORMS[2], "lora")])
def test_a_run_protects_and_resumes_with_the_losses_of_an_uninterrupted_one(
    form: Any, method: str, tiny_data: Path, tmp_path: Path
) -> None:
    whole, part = tmp_path / "whole", tmp_path / "part"
    extra = ["--policy", rules(form, method), "--save_steps", "3"]
    assert main(training(tiny_data, whole, *extra)) == 0
    shutil.copytree(whole, part)
    shutil.rmtree(part / "checkpoint-6")
    (part / "adapter_model.safetensors").unlink()
    assert main(training(tiny_data, part, *extra, "--resume_from_checkpoint", "true")) == 0
    assert losses(part) == losses(whole)
    before, after = (load_file(run / "adapter_model.safetensors") for run in (whole, part))
    assert all(tensor.equal(after[key]) for key, tensor in before.items())
    if form in HARD:
        assert max(overlaps(load_adapter(tiny_llava()[0], whole))) < 1e-5


def test_the_run_folder_tells_of_it(
    tiny_data: Path, tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")  # the table of the policy on one line a rule
    run, form = tmp_path / "run", FORMS[2]
    assert main(training(tiny_data, run, "--policy", rules(form), "--max_steps", "1")) == 0
    shown = capfd.readouterr().err
    assert "outside top 4" in shown
    assert "penalty 30" in shown
    policy = read_json(run, "policy.json")
    assert [target["protect"] for target in policy["targets"] if target["rank"]] == [form | {"offload": False}] * 14
    assert len(policy["protected"]) == 14
    assert policy["protected"][0]["bytes"] == 4 * TOP * (64 + 64)
    assert 0 < policy["protected"][0]["energy"] < 1
    methods = [row[2] for row in policy_table(read_run(run)).rows]
    assert any(method.endswith("outside the top 4 by penalty 30") for method in methods)


def test_the_policy_table_has_a_row_for_each_treatment(tiny_llava) -> None:
    policy = [
        {"modules": "language", "method": "milora", "rank": 4, "protect": {"top": 8}},
        {"modules": "language.mlp", "protect": {"top": 8, "by": "basis"}},
    ]
    targets = Policy.parse(policy).resolve(tiny_llava()[0])
    methods = [row[2] for row in policy_rows(targets, {target.path: 1 for target in targets})]
    assert methods == ["milora\noutside top 8\nbasis", "milora\noutside top 8\nprojection"]


def test_the_plan_counts_its_memory(tiny_llama) -> None:
    policy = [{"modules": "language", "method": "milora", "rank": 4, "protect": {"top": 8}}]
    target = Policy.parse(policy).resolve(tiny_llama()[0])[0]
    assert protected_bytes(target, 4.0) == 8 * 4 * (64 + 64)
    assert protected_bytes(target, 2.0) == (8 * 4 + 4 * 2) * (64 + 64)  # the anchor is float32
    soft = [policy[0] | {"protect": {"top": 8, "by": "penalty", "weight": 1.0}}]
    assert protected_bytes(Policy.parse(soft).resolve(tiny_llama()[0])[0], 2.0) == 8 * 4 * (64 + 64)
    base, once = tiny_llama()[0], Batching(num_records=1, per_device=1)
    targets = Policy.parse(policy).resolve(base)
    plan = workload_of({"bf16": True}, base.config, base, targets, Counts(20, 5, False), once, None)
    assert memory(plan)["protected directions"] == sum(protected_bytes(target, 2.0) for target in targets)


@pytest.mark.parametrize(
    ("form", "flag", "message"),
    [
        (FORMS[1], ["--fsdp", "full_shard"], r"by: basis\) does not work with FSDP"),
        (FORMS[1], ["--deepspeed", "zero2"], r"by: basis\) does not work with DeepSpeed"),
        (FORMS[2], ["--deepspeed", "zero3"], r"by: penalty\) does not work with DeepSpeed"),
    ],
)
def test_shards_are_refused_before_anything_is_written(
    form: Any, flag: list[str], message: str, tiny_data: Path, tmp_path: Path
) -> None:
    with raises_code("protect-sharded", says=message):
        main(training(tiny_data, tmp_path / "run", "--policy", rules(form), *flag))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@needs_deepspeed
def test_shards_are_protected_by_projection_and_resume(tiny_data: Path, tiny_folder: Path, tmp_path: Path) -> None:
    extra = ["--policy", rules(FORMS[0]).replace("0.1", "0.0"), "--model", str(tiny_folder)]
    assert main(training(tiny_data, tmp_path / "one", *extra)) == 0
    lines = []
    for kind in ("fsdp", "zero2", "zero3"):  # DeepSpeed leaves a variable in the process, which FSDP refuses
        line = training(tiny_data, tmp_path / kind, *extra, *KINDS[kind], "--per_device_train_batch_size", "2")
        lines += [line, ["cut", str(tmp_path / kind)], [*line, "--resume_from_checkpoint", "true"]]
    train_in_two(lines, tmp_path)
    for kind in ("zero2", "zero3", "fsdp"):
        pairs = zip(losses(tmp_path / "one"), losses(tmp_path / kind), strict=True)
        assert max(abs(one - other) for (_, one), (_, other) in pairs) <= 1e-4
        assert max(overlaps(load_adapter(tiny_llava()[0], tmp_path / kind))) < 1e-5, kind


def test_flags_keep_it_where_the_method_can_use_it(tiny_llava) -> None:
    given = json.loads(rules(FORMS[0]))
    changed = {method: edited(given, PolicyEdits(method=method)) for method in ("lora", "dora", "full")}
    assert changed["lora"][0]["protect"] == FORMS[0]
    assert "protect" not in changed["full"][0]
    with raises_code(
        "policy-unused-field", where="policy[0].protect", message="method dora cannot use it", kind=PolicyError
    ):
        Policy.parse_and_resolve(changed["dora"], tiny_llava()[0])
