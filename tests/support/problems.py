"""What an error says as data: its code and its place."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from milora_vl.common.errors import UserError


@contextmanager
def raises_problem(
    where: str = "", message: str = "", hint: str = "", says: str = "", kind: type[UserError] = UserError
) -> Iterator[pytest.ExceptionInfo[UserError]]:
    """Expect an error with one problem; `where`, `message`, `hint` and `says` are as in `raises_code`."""
    with pytest.raises(kind) as error:
        yield error
    (problem,) = error.value.problems
    assert where in str(problem.where)
    assert message in problem.message
    assert hint in problem.hint
    assert re.search(says, str(error.value)), str(error.value)


@contextmanager
def raises_code(
    code: str,
    where: str = "",
    message: str = "",
    hint: str = "",
    says: str = "",
    kind: type[UserError] = UserError,
) -> Iterator[pytest.ExceptionInfo[UserError]]:
    """Expect an error with one problem of this code; `where`, `message` and `hint` are parts of it.

    `says` is a pattern in the whole text, for values that several of its parts show.
    """
    with raises_problem(where, message, hint, says, kind) as error:
        yield error
    assert error.value.problems[0].code == code, str(error.value)
