"""The public names and their signatures, compared with `public_api.txt`. A difference is a decision.

To accept one: `python -m store.test_public_api > tests/store/public_api.txt`, with `tests` on PYTHONPATH.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import opd_store
import opd_store.testing
from opd_store import __all__ as public

DUNDERS = {"__contains__", "__enter__", "__exit__", "__getitem__", "__iter__", "__len__"}
RECORDED = Path(__file__).with_name("public_api.txt")


def describe() -> str:
    """One line a constant, function, class, field, property and method."""
    lines = [line for name in public for line in _describe(name, getattr(opd_store, name))]
    functions = inspect.getmembers(opd_store.testing, inspect.isfunction)
    ours = [(name, item) for name, item in functions if item.__module__ == "opd_store.testing"]
    return "\n".join([*lines, *(f"testing.{line}" for pair in ours for line in _describe(*pair))]) + "\n"


def _describe(name: str, item: object) -> Iterator[str]:
    if not callable(item):
        yield f"{name} = {item!r}"
        return
    if not inspect.isclass(item):
        yield f"{name}{_signature(item)}"
        return
    yield f"class {name}({', '.join(base.__name__ for base in item.__bases__)})"
    # Caches and writers come from `open`, `create` and `append`.
    if "__init__" in vars(item) and name not in ("Cache", "Writer"):
        yield f"{name}{_signature(item).removesuffix(' -> None')}"
    fields = {field.name for field in dataclasses.fields(item)} if dataclasses.is_dataclass(item) else set()
    for member, value in sorted(vars(item).items()):
        value = getattr(value, "__func__", value)
        private = member.startswith("_") and member not in DUNDERS
        if private or member in fields or "Internal to the package" in (value.__doc__ or ""):
            continue
        if isinstance(value, property | functools.cached_property):
            getter = value.fget if isinstance(value, property) else value.func
            yield f"{name}.{member} -> {inspect.signature(getter).return_annotation}"
        elif inspect.isfunction(value):
            yield f"{name}.{member}{_signature(value)}"


def _signature(item: Callable[..., object]) -> str:
    """As in the source: annotations are kept as text and would be shown in quotes."""
    return re.sub(r"(: |-> )'([^']*)'", r"\1\2", str(inspect.signature(item)))


def test_names_are_sorted_and_complete():
    # Constants, then classes, then functions.
    assert public == sorted(public, key=lambda name: (not name.isupper(), name))
    modules = {name for name, value in vars(opd_store).items() if inspect.ismodule(value)}
    names = {name for name in vars(opd_store) if not name.startswith("_")}
    # `verify` is a function whose name hides its module; `testing` is public but imported on request.
    assert names - modules == set(public)


def test_signatures_are_the_recorded_ones():
    assert describe() == RECORDED.read_text()


def test_everything_public_is_documented():
    for name in public:
        item = getattr(opd_store, name)
        assert inspect.getdoc(item), name
        for member, value in vars(item).items() if inspect.isclass(item) else ():
            if not member.startswith("_") and (inspect.isfunction(value) or isinstance(value, property)):
                assert inspect.getdoc(value), f"{name}.{member}"


if __name__ == "__main__":
    sys.stdout.write(describe())
