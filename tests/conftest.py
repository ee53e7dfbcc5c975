"""Tiny real models and data for all tests: random weights, the real classes, the real layouts."""

from __future__ import annotations

import copy
import functools
import gc
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from support import programs, quick_plots  # machine first: it settles the environment
from support.drawn import write_tiny_data
from support.thorough import is_thorough

if TYPE_CHECKING:
    from milora_vl.core.policy import Target
    from milora_vl.models.memory_plan import Workload

Made = tuple[Any, Any]


def pytest_configure() -> None:
    """One process with imported libraries serves all workers. Garbage is collected rarely."""
    gc.set_threshold(20_000, 10, 10)
    if programs.ADDRESS not in os.environ:
        programs.listen()


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the cases that `make test` leaves to CI."""
    for item in items:
        if is_thorough(item.nodeid):
            item.add_marker(pytest.mark.thorough)


def pytest_collection_finish() -> None:
    """Leave what the imports made out of garbage collections: each training asks for several, of half a second."""
    gc.freeze()


@pytest.fixture(autouse=True)
def no_ranks_left_behind() -> Iterator[None]:
    """A run with DeepSpeed alone names its rank and port in the environment, which later subprocesses would inherit.

    transformers 4 leaves DeepSpeed itself switched on there, for later runs in the process.
    """
    ranks = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    names = (*ranks, "ACCELERATE_USE_DEEPSPEED", "DS_ACCELERATOR")
    before = {name: os.environ.get(name) for name in names}
    yield
    if "deepspeed" in sys.modules:
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)


@pytest.fixture(scope="session", autouse=True)
def no_pictures_of_plots() -> None:
    """Make the figures of reports and do not draw them, except in tests that ask for `real_plots`."""
    quick_plots.replace()


@pytest.fixture
def real_plots() -> Iterator[None]:
    """Draw plots as for a user, at full size."""
    quick_plots.restore()
    yield
    quick_plots.replace()


@pytest.fixture(scope="session", autouse=True)
def known_costs() -> Iterator[None]:
    """Dry runs simulate a step, seconds for each shape of model and batch, and time this machine: once is enough.

    Tests that need no transformers make no dry runs; they do not wait for its import here.
    """
    if "transformers" not in sys.modules:
        yield
        return
    from milora_vl.models import memory_plan
    from milora_vl.train import plan

    simulate, known = memory_plan.simulate, {}

    def remembered(config: Any, targets: Sequence[Target], work: Workload) -> tuple[int, int]:
        key = config.to_json_string(use_diff=False), tuple(targets), work
        if key not in known:
            known[key] = simulate(config, targets, work)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory_plan, "simulate", remembered)
        patch.setattr(plan, "measured_flops", functools.cache(plan.measured_flops))
        yield


@pytest.fixture(scope="session", autouse=True)
def made_once() -> Iterator[None]:
    """The tiny models are copied. PEFT's template of a model card is compiled once, and not for each adapter.

    Nor does each training collect garbage several times, which takes seconds beside the libraries of all tests.
    """
    from accelerate.utils import memory
    from jinja2 import Environment

    from milora_vl.models import tiny

    with pytest.MonkeyPatch.context() as patch:
        for name in ("tiny_llava", "tiny_llama"):
            patch.setattr(tiny, name, functools.partial(_copied, functools.cache(getattr(tiny, name))))
        patch.setattr(Environment, "compile", functools.cache(Environment.compile))
        patch.setattr(memory, "gc", SimpleNamespace(collect=lambda: gc.collect(0)))
        yield


def _copied(make: Callable[[int], Made], seed: int = 0) -> Made:
    return copy.deepcopy(make(seed))


@pytest.fixture
def forked_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs that our code starts (an evaluation, a step of the demo, a cell of a sweep) start without imports."""
    from milora_vl import demo
    from milora_vl.sweep import runner
    from milora_vl.train import output

    for module in (demo, output, runner):
        monkeypatch.setattr(module, "subprocess", programs.ForkedSubprocess)


@pytest.fixture(scope="session")
def tiny_llava() -> Callable[..., Made]:
    """A factory: each call gives a fresh (LlavaForConditionalGeneration, LlavaProcessor), equal for equal seeds."""
    from milora_vl.models.tiny import tiny_llava

    return tiny_llava


@pytest.fixture(scope="session")
def tiny_llama() -> Callable[..., Made]:
    """A factory: each call gives a fresh text-only (LlamaForCausalLM, tokenizer)."""
    from milora_vl.models.tiny import tiny_llama

    return tiny_llama


@pytest.fixture(scope="module")
def picture_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The user's cache, into which pictures of tables are unpacked, in a folder of the test's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MILORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the module with the pictures of `support.vlm_runs`."""
    from support.vlm_runs import write_pictures

    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="session")
def tiny_folder(tiny_llava: Callable[..., Made], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as a folder: HF loads it, under ZeRO-3 in parts."""
    folder = tmp_path_factory.mktemp("tiny")
    for part in tiny_llava():
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_records() -> list[dict[str, Any]]:
    """Twelve LLaVA records: pictures, two turns, text only."""
    colours = ["red", "green", "blue", "white"]
    records: list[dict[str, Any]] = [
        {
            "id": f"p{i}",
            "image": f"{i}.png",
            "conversations": [
                {"from": "human", "value": "<image>\nWhat colour is it?"},
                {"from": "gpt", "value": colours[i % 4]},
            ],
        }
        for i in range(8)
    ]
    for record in records[::3]:
        record["conversations"] += [
            {"from": "human", "value": "Are you sure?"},
            {"from": "gpt", "value": "Yes, it is."},
        ]
    records += [
        {
            "id": f"t{i}",
            "conversations": [{"from": "human", "value": f"What is {i} + 1?"}, {"from": "gpt", "value": f"{i + 1}"}],
        }
        for i in range(4)
    ]
    return records


@pytest.fixture
def tiny_data(tmp_path: Path, tiny_records: list[dict[str, Any]]) -> Path:
    """A folder with train.json, val.json and images/*.png of several sizes."""
    return write_tiny_data(tmp_path / "data", tiny_records)
