"""Parse YAML of unknown origin: plain data only, and no small text that expands without end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import yaml

LARGEST = 200_000
"""Values that a YAML text may have after its aliases (`*name`) are replaced by what they mean."""


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
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        require_small(node)
        return loader.construct_document(node)


@contextmanager
def errors_as_one() -> Iterator[None]:
    """Turn the errors of PyYAML into YamlTextError. It raises a dozen types for tags that do not fit their values."""
    try:
        yield
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise YamlTextError(str(error.problem or error.context), mark.line + 1 if mark else None) from None
    except yaml.YAMLError as error:  # an invalid character
        raise YamlTextError(str(error).splitlines()[0]) from None
    except RecursionError:
        raise YamlTextError("nested too deeply") from None
    except YamlTextError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError) as error:
        raise YamlTextError(f"a value does not fit its tag ({type(error).__name__}: {error})") from None


def require_small(node: yaml.Node) -> None:
    """Raise YamlTextError if aliases lead in a circle, or if the text means more than LARGEST values.

    PyYAML shares what an alias names, but every later walk over the value would visit all of it.
    """
    sizes: dict[int, int] = {}
    opened: set[int] = set()

    def size(inner: yaml.Node) -> int:
        key = id(inner)
        if key in opened:
            raise YamlTextError("an alias contains itself", inner.start_mark.line + 1)
        if key not in sizes:
            opened.add(key)
            children = [] if isinstance(inner, yaml.ScalarNode) else inner.value
            if isinstance(inner, yaml.MappingNode):
                children = [part for pair in children for part in pair]
            sizes[key] = 1 + sum(size(child) for child in children)
            opened.discard(key)
            if sizes[key] > LARGEST:
                raise YamlTextError(
                    f"more than {LARGEST:,} values, with those that aliases repeat", inner.start_mark.line + 1
                )
        return sizes[key]

    size(node)
