"""JSON and YAML that somebody else may have written: whatever is wrong with a text is a `ValueError`."""

from __future__ import annotations

import json
import re
from collections.abc import Hashable
from typing import Any

import yaml

LARGEST = 10_000_000
"""Values in a YAML file once its aliases are unfolded; a few lines of them can stand for more than any memory holds."""

_ENDLESS = "brackets in brackets without end"


class YamlMistake(ValueError):
    """A text is not YAML as we read it.

    Args:
        problem: what is wrong.
        line, column: where, from 1; `None` if it is nowhere in particular.
    """

    def __init__(self, problem: str, line: int | None = None, column: int | None = None) -> None:
        self.problem = problem
        self.place = "" if line is None else f", line {line}, column {column}"
        super().__init__(problem + self.place)


class _Loader(yaml.SafeLoader):
    """YAML as people write it: `2e-3` is a number (in YAML 1.1 it is text), and a key that is given twice is a mistake, where
    YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # `<<`, whose keys may be given again
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable):
                if key in keys:
                    problem = f"the key {key!r} is given twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
                keys.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def parse_json(text: str | bytes, **options: Any) -> Any:
    """Returns what a JSON text says.

    Args:
        options: of `json.loads`.

    Raises:
        ValueError: it is not JSON.
    """
    try:
        return json.loads(text, **options)
    except RecursionError as error:
        raise ValueError(_ENDLESS) from error


def parse_yaml(text: str) -> Any:
    """Returns what a YAML text says: plain values only, every key once.

    Raises:
        YamlMistake: it is not YAML, or its aliases unfold without end.
    """
    try:
        content = yaml.load(text, _Loader)  # a SafeLoader
        _unfolded(content, {})
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = (mark.line + 1, mark.column + 1) if mark else ()
        raise YamlMistake(error.problem or error.context or "broken", *place) from error
    except yaml.YAMLError as error:
        raise YamlMistake(str(error)) from error
    except RecursionError as error:
        raise YamlMistake(_ENDLESS) from error
    return content


def _unfolded(value: Any, known: dict[int, int]) -> int:
    """How many values there are, counting what an alias stands for each time; `known` holds sizes by identity."""
    if not isinstance(value, (dict, list)):
        return 1
    if id(value) not in known:
        known[id(value)] = LARGEST  # until it is known: a value that is inside of itself has no end
        inner = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_unfolded(item, known) for item in inner)
    if known[id(value)] > LARGEST:
        raise YamlMistake(f"its aliases unfold to more than {LARGEST} values")
    return known[id(value)]
