"""The public names of a package as text, for the tests that compare them with what was agreed."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable, Iterator
from types import ModuleType

DUNDERS = {"__contains__", "__enter__", "__exit__", "__getitem__", "__iter__", "__len__"}


def describe(package: ModuleType, *, without_init: tuple[str, ...] = ()) -> str:
    """One line a constant, function, class, field, property and method.

    Args:
        without_init: classes that are not made by calling them.
    """
    names = package.__all__
    lines = [line for name in names for line in describe_name(name, getattr(package, name), without_init)]
    return "\n".join(lines) + "\n"


def undocumented(package: ModuleType) -> list[str]:
    """Public names, methods and properties without a docstring."""
    found = []
    for name in package.__all__:
        item = getattr(package, name)
        if callable(item) and not inspect.getdoc(item):
            found.append(name)
        for member, value in vars(item).items() if inspect.isclass(item) else ():
            is_code = inspect.isfunction(value) or isinstance(value, property)
            if not member.startswith("_") and is_code and not inspect.getdoc(value):
                found.append(f"{name}.{member}")
    return found


def describe_name(name: str, item: object, without_init: tuple[str, ...] = ()) -> Iterator[str]:
    if not callable(item):
        yield f"{name} = {item!r}"
        return
    if not inspect.isclass(item):
        yield f"{name}{_signature(item)}"
        return
    yield f"class {name}({', '.join(base.__name__ for base in item.__bases__)})"
    if "__init__" in vars(item) and name not in without_init:
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
