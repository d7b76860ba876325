"""The public names and their signatures, compared with `public_api.txt`. A difference is a decision.

To accept one: `python -m store.test_public_api > tests/store/public_api.txt`, with `tests` on PYTHONPATH.
"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

import public_names

import opd_store
import opd_store.testing
from opd_store import __all__ as public

RECORDED = Path(__file__).with_name("public_api.txt")


def describe() -> str:
    """One line a constant, function, class, field, property and method."""
    # Caches and writers come from `open`, `create` and `append`.
    text = public_names.describe(opd_store, without_init=("Cache", "Writer"))
    functions = inspect.getmembers(opd_store.testing, inspect.isfunction)
    ours = [(name, item) for name, item in functions if item.__module__ == "opd_store.testing"]
    return text + "".join(f"testing.{line}\n" for pair in ours for line in public_names.describe_name(*pair))


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
    assert not public_names.undocumented(opd_store)


if __name__ == "__main__":
    sys.stdout.write(describe())
