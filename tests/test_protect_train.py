"""Protected directions in a run of `milora_vl.train` and in two processes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from launched import launched
from safetensors.torch import load_file
from test_protect import FORMS, HARD, TOP, overlaps
from test_train import content, losses, words

from milora_data.errors import UserError
from milora_vl import load_adapter
from milora_vl.policy import Policy
from milora_vl.reporting.run_page import read_run
from milora_vl.reporting.tables import policy_table
from milora_vl.tiny import tiny_llava
from milora_vl.train import main
from milora_vl.training.estimate import protected_bytes
from milora_vl.training.screen import policy_rows


def rules(form: Any, method: str = "milora") -> str:
    rule = {"modules": "language", "method": method, "rank": 3, "dropout": 0.1, "protect": form}
    return json.dumps([rule, {"modules": "projector", "method": "full"}])


@pytest.mark.parametrize(("form", "method"), [(FORMS[0], "milora"), (FORMS[1], "lora"), (FORMS[2], "lora")])
def test_a_run_protects_and_resumes_with_the_losses_of_an_uninterrupted_one(
    form: Any, method: str, tiny_data: Path, tmp_path: Path
) -> None:
    whole, part = tmp_path / "whole", tmp_path / "part"
    extra = ["--policy", rules(form, method), "--save_steps", "3"]
    assert main(words(tiny_data, whole, *extra)) == 0
    shutil.copytree(whole, part)
    shutil.rmtree(part / "checkpoint-6")
    (part / "adapter_model.safetensors").unlink()
    assert main(words(tiny_data, part, *extra, "--resume_from_checkpoint", "true")) == 0
    assert losses(part) == losses(whole)
    before, after = (load_file(run / "adapter_model.safetensors") for run in (whole, part))
    assert all(tensor.equal(after[key]) for key, tensor in before.items())
    if form in HARD:
        assert max(overlaps(load_adapter(tiny_llava()[0], whole))) < 1e-5


def test_the_run_folder_tells_of_it(tiny_data: Path, tmp_path: Path, capfd: Any) -> None:
    run, form = tmp_path / "run", FORMS[2]
    assert main(words(tiny_data, run, "--policy", rules(form), "--max_steps", "1")) == 0
    shown = capfd.readouterr().err
    assert "outside top 4" in shown
    assert "penalty 30" in shown
    policy = content(run, "policy.json")
    assert policy["targets"][0]["protect"] == form
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


def test_the_plan_counts_its_memory(tiny_llama, capsys: Any) -> None:
    policy = [{"modules": "language", "method": "milora", "rank": 4, "protect": {"top": 8}}]
    target = Policy.parse(policy).resolve(tiny_llama()[0])[0]
    assert protected_bytes(target, 4.0) == 8 * 4 * (64 + 64)
    assert protected_bytes(target, 2.0) == (8 * 4 + 4 * 2) * (64 + 64)  # the anchor is float32
    soft = [policy[0] | {"protect": {"top": 8, "by": "penalty", "weight": 1.0}}]
    assert protected_bytes(Policy.parse(soft).resolve(tiny_llama()[0])[0], 2.0) == 8 * 4 * (64 + 64)
    big = [{"modules": "language", "method": "milora", "rank": 128, "protect": {"top": 64}}]
    assert main(["--model", "llava-1.5-7b", "--bf16", "--dry-run", "--policy", json.dumps(big)]) == 0
    assert "protected directions 1.2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flag", "engine"), [(["--deepspeed", "zero2"], "DeepSpeed"), (["--fsdp", "full_shard"], "FSDP")]
)
def test_shards_are_refused_before_anything_is_written(
    flag: list[str], engine: str, tiny_data: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=f"protect does not work with {engine}"):
        main(words(tiny_data, tmp_path / "run", "--policy", rules(FORMS[0]), *flag))
    assert not (tmp_path / "run").exists()


def test_flags_keep_it_where_the_method_can_use_it(tiny_data: Path, tmp_path: Path, capsys: Any) -> None:
    extra = ["--policy", rules(FORMS[0]), "--dry-run"]
    assert main(words(tiny_data, tmp_path / "run", *extra, "--method", "lora")) == 0
    assert "outside top 4" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"policy\[0\]\.protect: method dora cannot use it"):
        main(words(tiny_data, tmp_path / "run", *extra, "--method", "dora"))
    assert main(words(tiny_data, tmp_path / "run", *extra, "--method", "full")) == 0
    assert "outside" not in capsys.readouterr().out


WORKER = """
import json
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from milora_vl import apply_milora, keep_protected

dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 8))
if rank == 1:  # another machine rounds otherwise
    for parameter in model.parameters():
        parameter.data *= 1 + 1e-3 * torch.rand(parameter.shape)
rules = [{"modules": "language", "method": "milora", "rank": 3, "protect": {"top": 2, "by": "basis"}}]
wrapped = DistributedDataParallel(apply_milora(model, rules))
optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=0.01)
keep_protected(wrapped, optimizer)
x = torch.randn(4, 12, generator=torch.Generator().manual_seed(rank))
for _ in range(3):
    wrapped(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
found = wrapped.module.protections["default"]
sums = [t.double().sum().item() for p in found.values() for t in (p.U, p.V)]
sums += [p.detach().double().sum().item() for p in wrapped.parameters() if p.requires_grad]
from milora_vl.lora.install import lora_layer, trained_factors
inside = max(p.overlap(trained_factors(lora_layer(wrapped.module, path), "default")) for path, p in found.items())
print("RESULT" + json.dumps([sums, inside]), flush=True)
dist.barrier()
"""


def test_two_processes_protect_the_same_directions(tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    printed = launched([str(tmp_path / "worker.py")], tmp_path).stdout
    results = [json.loads(text.splitlines()[0]) for text in printed.split("RESULT")[1:]]
    assert len(results) == 2
    assert results[0] == results[1]
    assert results[0][1] < 1e-5
