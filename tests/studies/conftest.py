"""The tasks of the studies on a tiny text model, with few test questions."""

from __future__ import annotations

import pytest

from studies.tasks.smollm2 import NamedTopics


def tiny(kind: type[NamedTopics]) -> NamedTopics:
    task = kind("tiny-text")
    task.test, task.validation, task.probes["text"] = task.test[:24], task.validation[:8], task.probes["text"][:2]
    return task


@pytest.fixture(scope="session")
def topics() -> NamedTopics:
    return tiny(NamedTopics)
