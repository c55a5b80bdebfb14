"""JSON and YAML of strangers: plain values, or one kind of error."""

from __future__ import annotations

import pytest

from mllm_cl.parse import YamlMistake, parse_json, parse_yaml


def test_values_come_back() -> None:
    assert parse_json(b'{"a": [1, 2.5, null, "\xc3\xa4"]}') == {"a": [1, 2.5, None, "ä"]}
    assert parse_yaml("a: [1, 2.5, null, ä]\nb: 2e-3\nc: -1E5\n") == {"a": [1, 2.5, None, "ä"], "b": 0.002, "c": -1e5}


def test_aliases_are_values_like_others() -> None:
    assert parse_yaml("a: &x [1, 2]\nb: *x\n") == {"a": [1, 2], "b": [1, 2]}
    assert parse_yaml("a: &x {c: 1, d: 2}\nb: {<<: *x, d: 3}\n")["b"] == {"c": 1, "d": 3}


@pytest.mark.parametrize("text", ["", "{", "[1,", "nul", "[" * 100_000, '{"a":' * 100_000])
def test_what_is_not_json_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError):
        parse_json(text)


UNFOLDING = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [1\n", "line 2, column 1"),
        ("a: 1\nb: 2\na: 3\n", "the key 'a' is given twice, line 3, column 1"),
        ("- {a: {b: 1, b: 2}}", "the key 'b' is given twice, line 1"),
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("a: \x00", "special characters"),
        ("[" * 3000, "brackets in brackets without end"),
        (UNFOLDING, "its aliases unfold to more than 10000000 values"),
        ("a: &x [1, *x]", "its aliases unfold to more than 10000000 values"),
        ("a: &x {b: {c: *x}}", "its aliases unfold to more than 10000000 values"),
    ],
)
def test_what_is_not_yaml_says_where(text: str, said: str) -> None:
    with pytest.raises(YamlMistake, match=said):
        parse_yaml(text)
