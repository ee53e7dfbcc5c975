"""The start of a run on several accelerators: where its parts run, and how often."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from milora_vl import apply_milora, calibration_texts
from milora_vl.common.compat.torch import after_operations
from milora_vl.core.adapter.fixed_a import make_A
from milora_vl.core.calibration import activations
from milora_vl.core.calibration.activations import ROOM, _inputs_in_order, _passes, _shares, for_each_input
from milora_vl.core.evaluation_mode import without_caches
from milora_vl.core.policy import Policy
from milora_vl.models.base import Base, config_of, find_base, meta_model
from milora_vl.models.loading import load_weights
from milora_vl.models.memory_plan import _Ledger, memory
from milora_vl.models.tiny import tiny_llama
from milora_vl.train.__main__ import main
from milora_vl.train.counts import A100_MEMORY, Batching, Counts, distinct_inputs, num_parameters, workload_of
from milora_vl.train.launch import Launch
from milora_vl.train.run import require_one_device
from support import simulated_device as simulated
from support.adapter_cases import one_rule
from support.launched import KINDS, needs_deepspeed, needs_zero3
from support.problems import raises_code
from support.simulated_cluster import CACHE_BYTES, trained_on_cluster
from support.simulated_device import simulated_device
from support.train_runs import losses, training
from support.vlm_runs import mixed_records, write_model, write_pictures

pytestmark = [
    needs_deepspeed,
    pytest.mark.filterwarnings("ignore:.* layers protect", "ignore:too little calibration"),  # tiny layers, few texts
]
LLAVA = (10, 16, 10)  # layer inputs and weights of two blocks and the projector, texts and captions
QWEN = (10, 16, 9)  # one batch of texts and one of captions, so that one process writes both
WORDS = ("--rank", "4", "--dropout", "0", "--max_steps", "2")


def started(
    kinds: list[str], model: Path, data: Path, folder: Path, counts: tuple[int, int, int] = LLAVA, **settings: Any
) -> None:
    """Train in one process and on the cluster by each kind of launcher; the start is the same, and shared.

    `counts` are those of layer inputs, weights, and texts with captions. With TF32, one process of a CPU is no measure.
    """
    words = [*WORDS, "--model", str(model), "--factor_cache"]
    with simulated_device(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("milora_vl.core.calibration.texts.CACHE_BYTES", CACHE_BYTES)
        line = training(data, folder / "one", *words, str(folder / "cache-one"))
        assert main([word for word in line if word != "--use_cpu"]) == 0
    more = ["--per_device_train_batch_size", "2"]
    lines = [training(data, folder / k, *words, str(folder / f"cache-{k}"), *more, *KINDS[k]) for k in kinds]
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    first, tolerance = (folder / kinds[0], 1e-2) if "tf32" in settings else (folder / "one", 1e-4)
    for kind, ranks in zip(kinds, trained_on_cluster(lines, folder, **settings), strict=True):
        for seen in ranks:
            assert not [name for name in seen if name.endswith("on cpu")], (kind, seen)
            assert not seen["left on the CPU"], kind
            assert not seen["waits"], kind  # of ours, in a step
            assert seen["largest object"] < 100_000, kind
            # Of the calibration, and with offload a share of the weights and of the optimizer; never a whole model.
            assert seen["bytes on the CPU"] < 200_000 + size * (1 if "offload" in kind else 0.5), kind
        # Before each collective of the start: no process waits while another does a fifth of all work alone.
        stages = list(zip(*(seen["before"] for seen in ranks), strict=True))
        solo = max(max(stage) - min(stage) for stage in stages)
        assert counts == QWEN or solo < sum(map(max, stages)) / 5, kind
        sums, weights, texts = (
            [seen.get(name, 0) for seen in ranks] for name in ("sum on sim", "weight on sim", "texts")
        )
        assert (sum(sums), sum(weights)) == counts[:2], kind  # each input of a layer and each weight once
        assert max(sums) - min(sums) <= 2, kind
        assert counts == QWEN or 0 < min(texts) <= max(texts) < counts[2], kind
        assert "memory" in settings or sum(texts) == counts[2], kind  # each text and each caption once
        expected, found = (load_file(run / "adapter_model.safetensors") for run in (first, folder / kind))
        assert all(A.equal(found[name]) for name, A in expected.items() if "lora_A" in name), kind
        # Of the start; DeepSpeed also sends the weights, to gather them or as it begins.
        sent = expected if kind in ("ddp", "fsdp") else load_file(model / "model.safetensors")
        sizes = [x.nbytes for name, x in sent.items() if "lora_A" in name or sent is not expected]
        sizes += [seen["largest object"] for seen in ranks]
        assert all(0 < seen["largest tensor"] <= max(sizes) for seen in ranks), kind
        assert dict(losses(folder / kind)) == pytest.approx(dict(losses(folder / "one")), abs=tolerance), kind


@needs_zero3
def test_zero3_shares_the_start_on_the_accelerators(tiny_data: Path, tiny_folder: Path, tmp_path: Path) -> None:
    started(["zero3"], tiny_folder, tiny_data, tmp_path)


@needs_zero3
@pytest.mark.slow
def test_a_model_that_fits_no_device_is_gathered_in_each_forward(
    tiny_data: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    started(["zero3", "zero3_offload"], tiny_folder, tiny_data, tmp_path, memory=0)


@pytest.mark.slow
def test_every_launcher_shares_the_start_on_the_accelerators(
    tiny_data: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    started(list(KINDS), tiny_folder, tiny_data, tmp_path)


@pytest.mark.slow
def test_qwen_shares_the_start(tiny_data: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    shutil.rmtree(tiny_data / "images")
    write_pictures(tiny_data / "images")
    (tiny_data / "train.json").write_text(json.dumps(mixed_records() * 2))  # whole batches
    started(list(KINDS), write_model("qwen2_5_vl", tmp_path / "model"), tiny_data, tmp_path, QWEN)


@pytest.mark.slow
def test_a_text_model_shares_the_start_with_products_in_tf32(tiny_data: Path, tmp_path: Path) -> None:
    records = [record for record in json.loads((tiny_data / "train.json").read_text()) if "image" not in record]
    (tiny_data / "train.json").write_text(json.dumps(records))
    for part in tiny_llama():
        part.save_pretrained(tmp_path / "model")
    started(list(KINDS), tmp_path / "model", tiny_data, tmp_path, (8, 14, 6), tf32=True)


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="the system does not list what a process maps")
def test_weights_go_from_the_file_to_the_device(
    tiny_llava: Any, sim: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not through memory of the process, also in another dtype: eight of them share the system's cache of the file."""
    tiny_llava()[0].half().save_pretrained(tmp_path)
    run, from_file, from_memory = simulated._run, [0], [0]

    def counts(func: Any, args: Any, kwargs: Any) -> Any:
        if str(func) == "aten.copy_.default" and args[1].is_cpu:
            lines = (line for line in Path("/proc/self/maps").read_text().splitlines() if "safetensors" in line)
            ranges = [[int(address, 16) for address in line.split()[0].split("-")] for line in lines]
            is_mapped = any(first <= args[1].data_ptr() < last for first, last in ranges)
            (from_file if is_mapped else from_memory)[0] += args[1].nbytes
        return run(func, args, kwargs)

    monkeypatch.setattr(simulated, "_run", counts)
    model = load_weights(tmp_path, torch.float32, device=sim)
    assert from_file[0] > 0.99 * sum(2 * parameter.numel() for parameter in model.parameters())
    assert from_memory[0] < 10_000
    assert not [name for name, parameter in model.named_parameters() if parameter.device != sim]


def test_fsdp_refuses_a_base_that_no_device_holds_beside_its_shard(sim: torch.device, monkeypatch) -> None:
    size = 2 * num_parameters(find_base("tiny").meta)
    args: Any = SimpleNamespace(device=sim, world_size=2)
    monkeypatch.setattr("milora_vl.train.run.free_memory", lambda _: 1.6 * size)
    require_one_device(find_base("tiny"), torch.bfloat16, args)
    monkeypatch.setattr("milora_vl.train.run.free_memory", lambda _: 1.4 * size)
    with raises_code("", where="--fsdp", hint="--deepspeed zero3"):
        require_one_device(find_base("tiny"), torch.bfloat16, args)


def test_the_sums_of_a_7b_fit_on_one_card_and_on_eight_as_the_plan_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """On `meta`: one or two passes over the calibration, and shares of about equal work."""
    base: Any = meta_model(config_of("llava-1.5-7b")).to(torch.bfloat16)
    base.set_attn_implementation("eager")  # the others read the mask
    targets = Policy.parse(one_rule(protect=0.95)).resolve(base)
    ids = torch.ones(1, 8, dtype=torch.long, device="meta")
    with torch.no_grad(), without_caches(base):
        inputs = _inputs_in_order(base, {t.path: t for t in targets}, [{"input_ids": ids, "attention_mask": ids}])
    assert sorted(one.size for one in inputs) == sorted(target.shape[1] for target in distinct_inputs(targets))
    room = ROOM * (A100_MEMORY - 2 * num_parameters(base)) / 2
    for processes in (1, 8):
        monkeypatch.setattr("milora_vl.core.calibration.activations.rank_and_world_size", lambda n=processes: (0, n))
        shares = _shares(inputs)
        work = [sum(one.size**3 for one in share) for share in shares]
        assert max(work) < 1.2 * sum(work) / processes
        for passes in (list(_passes(share, room)) for share in shares):
            assert len(passes) <= 2
            assert all(sum(4 * one.size**2 for one in part) <= room for part in passes)


def test_a_process_holds_at_each_moment_of_the_start_what_the_plan_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two blocks of a 7B in bfloat16, a quarter as wide: loaded, texts, sums, `eigh`, A made, V dropped, the end."""
    width, rules = 1024, one_rule(protect=0.95, rank=32)
    blocks = {"intermediate_size": 2752, "num_attention_heads": 8, "num_hidden_layers": 2}
    config = LlamaConfig(hidden_size=width, vocab_size=500, **blocks)
    base, batching = Base.of("7b", config), Batching(num_records=None, per_device=1, max_steps=1)
    targets = Policy.parse(rules).resolve(base.meta)
    planned = memory(workload_of(Launch({"bf16": True}), base, targets, Counts(64, 64), batching))
    sums = 8 * sum(target.shape[1] ** 2 for target in distinct_inputs(targets))  # float32, of two kinds of batches
    model, ledger = LlamaForCausalLM(config).to(torch.bfloat16), _Ledger()
    for tensor in (*model.parameters(), *model.buffers()):
        ledger.count(tensor)
    loaded, row = ledger.live, 2 * 2 * 2 * width * 12  # keys and values of a text in two blocks
    monkeypatch.setattr("milora_vl.core.calibration.texts.CACHE_BYTES", 8 * row)
    with after_operations(ledger.count):
        texts = calibration_texts(model, count=16, length=12)
    about = lambda size: pytest.approx(size, abs=40_000)  # noqa: E731
    assert loaded == about(planned["frozen weights"])
    assert 8 * row < ledger.peak - loaded < 12 * row
    seen: list[tuple[int, int, int, int]] = []  # size of an input, bytes of A, bytes in all, and at the peak of `eigh`
    made_bytes, first_directions = [0], activations.first_directions

    def find(C: Tensor, share: float, most: int) -> Any:
        before, ledger.peak = ledger.live - loaded, 0
        found = first_directions(C, share, most)
        seen.append((len(C), made_bytes[0], before, ledger.peak - loaded))
        return found

    def make(target: Any, W: Tensor, inputs: Any) -> Any:
        A, protection = make_A(target, W, inputs)
        made_bytes[0] += A.nbytes
        return A, protection

    monkeypatch.setattr(activations, "first_directions", find)
    for rank in range(2):
        seen.clear()
        made_bytes[0] = 0
        with monkeypatch.context() as patch, after_operations(ledger.count):
            for module in ("core.calibration.activations", "core.weights.matrices"):
                patch.setattr(f"milora_vl.{module}.rank_and_world_size", lambda rank=rank: (rank, 2))
            made = for_each_input(model, targets, texts, make)
        assert seen[0][2] == about(sums / 2)
        for number, (size, of_A, held, peak) in enumerate(seen):
            left = 8 * sum(other**2 for other, *_ in seen[number:])
            assert (held, peak) == (about(left + of_A), about(held + 8 * size**2))
        assert ledger.live - loaded == about(planned["fixed factors"] / 2)
        del made
    with after_operations(ledger.count):
        tuned = apply_milora(model, rules, calibration=texts)
    of_adapter = planned["fixed factors"] + planned["trained weights"]
    assert ledger.live - loaded == pytest.approx(of_adapter, abs=300_000)  # the signs of fingerprints stay
    del tuned
