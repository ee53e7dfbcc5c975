"""The tasks of the studies on a tiny text model, with few test questions."""

from __future__ import annotations

from typing import Any

import pytest

from studies.tasks.smollm2 import NamedTopics


def tiny(kind: type[NamedTopics]) -> NamedTopics:
    task = kind("tiny-text")
    task.test, task.validation, task.probes["text"] = task.test[:24], task.validation[:8], task.probes["text"][:2]
    return task


@pytest.fixture(scope="session")
def topics() -> NamedTopics:
    return tiny(NamedTopics)


@pytest.fixture(scope="session")
def minilm() -> Any:
    from studies.tasks import load_task

    task: Any = load_task("minilm")
    task.test, task.validation = [part[:200] for part in task.test], [part[:48] for part in task.validation]
    return task
