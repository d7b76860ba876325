"""The same for `opd_train`; `python -m train.test_public_api` prints what is to be recorded."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

import public_names

import opd_train

RECORDED = Path(__file__).with_name("public_api.txt")


def test_names_are_complete():
    modules = {name for name, value in vars(opd_train).items() if inspect.ismodule(value)}
    names = {name for name in vars(opd_train) if not name.startswith("_")}
    assert names - modules == set(opd_train.__all__)


def test_signatures_are_the_recorded_ones():
    assert public_names.describe(opd_train) == RECORDED.read_text()


def test_everything_public_is_documented():
    assert not public_names.undocumented(opd_train)


if __name__ == "__main__":
    sys.stdout.write(public_names.describe(opd_train))
