"""What an error says as data: its code and its place."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from milora_vl.common.errors import UserError


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
    with pytest.raises(kind) as error:
        yield error
    assert [problem.code for problem in error.value.problems] == [code], str(error.value)
    assert where in str(error.value.problems[0].where)
    assert message in error.value.problems[0].message
    assert hint in error.value.problems[0].hint
    assert re.search(says, str(error.value)), str(error.value)
