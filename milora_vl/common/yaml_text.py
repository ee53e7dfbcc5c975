"""Parse YAML of plain data; all errors of PyYAML become one class, with the line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import yaml


class YamlTextError(ValueError):
    """The text is not valid YAML. `line` is the number of its line from 1, if it is known."""

    def __init__(self, message: str, line: int | None = None) -> None:
        super().__init__(message)
        self.line = line


def parse_yaml(text: str) -> Any:
    """Return the value of a YAML text, None if it is empty. Raises YamlTextError.

    >>> parse_yaml("a: [1, 2]")
    {'a': [1, 2]}
    """
    with errors_as_one():
        return yaml.safe_load(text)


@contextmanager
def errors_as_one() -> Iterator[None]:
    """Turn the errors of PyYAML into YamlTextError."""
    try:
        yield
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise YamlTextError(str(error.problem or error.context), mark.line + 1 if mark else None) from None
    except yaml.YAMLError as error:  # an invalid character
        raise YamlTextError(str(error).splitlines()[0]) from None
    except YamlTextError:
        raise
    except ValueError as error:  # a value that does not fit its tag, such as a date
        raise YamlTextError(str(error)) from None
