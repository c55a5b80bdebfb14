"""`mllm-cl methods [NAME]`: the catalogue, and the options of one method."""

from __future__ import annotations

import inspect
import sys
from dataclasses import astuple
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer

if TYPE_CHECKING:
    from mllm_cl.methods import Method

NEEDS_NOTHING = "nothing"


def methods(
    name: Annotated[str | None, typer.Argument(help="A method, or module:Class.", show_default=False)] = None,
) -> None:
    """List the methods with what they need and support, or show one of them with its options."""
    if name is None:
        show_catalogue()
    else:
        show_method(name)


def show_catalogue() -> None:
    """Prints one line per method."""
    from mllm_cl.cli.display import show_table
    from mllm_cl.methods import METHODS, method_class

    rows = [["method", "what it does", "needs", "supports", "adapters"]]
    for name in METHODS:
        found = method_class(name)
        rows.append([name, found.summary, _needs(found), ", ".join(sorted(found.supports)), found.adapters or "any"])
    show_table(rows)


def show_method(name: str) -> None:
    """Prints the module's summary, what the method declares, and its options as a recipe writes them."""
    from mllm_cl.cli.display import say, show_table
    from mllm_cl.methods import method_class

    found = method_class(name)
    say((sys.modules[found.__module__].__doc__ or found.summary).strip() + "\n")
    supports = ", ".join(sorted(found.supports))
    say(f"needs: {_needs(found)}\nsupports: {supports}\nadapters: {found.adapters or 'any'}")
    options = method_options(found)
    if not options:
        say(f"no options; in a recipe: `- {name}`")
        return
    show_table([["option", "type", "default", "what it is"], *options], "options")
    first = options[0]
    say(f"in a recipe: `- {name}: {{{first[0]}: {first[2]}}}`")


def method_options(method: type[Method]) -> list[list[str]]:
    """Returns name, type, default and description of every option of a method."""
    from pydantic.fields import FieldInfo

    from mllm_cl.reporting.formatting import plain

    hints = get_type_hints(method.__init__, include_extras=True)
    described = _arguments(inspect.getdoc(method) or "")
    rows = []
    for name, parameter in inspect.signature(method.__init__).parameters.items():
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            continue
        default = "required" if parameter.default is inspect.Parameter.empty else plain(parameter.default)
        rows.append([name, _type(hints[name], FieldInfo), default, described.get(name, "")])
    return rows


def _needs(method: type[Method]) -> str:
    return ", ".join(sorted(method.needs)) or NEEDS_NOTHING


def _type(hint: Any, field_info: type) -> str:
    """Returns a type as a person says it: `float, at least 0`, `one of a, b`, `int or null`."""
    if hint is type(None):
        return "null"
    if get_origin(hint) is Annotated:
        inner, *extras = get_args(hint)
        words = {"Ge": "at least", "Gt": "above", "Le": "at most", "Lt": "below"}
        limits = [
            f"{words[type(limit).__name__]} {astuple(limit)[0]}"
            for extra in extras
            if isinstance(extra, field_info)
            for limit in extra.metadata  # type: ignore[attr-defined]
            if type(limit).__name__ in words
        ]
        return ", ".join([_type(inner, field_info), *limits])
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    if get_args(hint) and get_origin(hint) not in (dict, list):
        return " or ".join(_type(part, field_info) for part in get_args(hint))
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)


def _arguments(docstring: str) -> dict[str, str]:
    """Returns the entries of a docstring's `Args:` by name."""
    lines = docstring.partition("Args:\n")[2].splitlines()
    found: dict[str, str] = {}
    name = ""
    for line in lines:
        if not line.strip():
            break
        if line.startswith("    ") and not line.startswith("     "):
            head, _, text = line.strip().partition(":")
            name = head.split(" ")[0]
            found[name] = text.strip()
        elif name:
            found[name] += " " + line.strip()
    return found
