"""Every command explains itself, and every exit code means what the help says."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner
from opd_tools.main import SECTIONS, main
from tools.commands import ENVIRONMENT

import opd_store

VERBS = sorted(main.commands)


def opd(*args):
    return CliRunner().invoke(main, list(args))


def test_the_verbs():
    shown = opd("--help")
    assert shown.exit_code == 0
    assert len(VERBS) == sum(map(len, SECTIONS.values())) > 20
    assert all(len(re.findall(rf"^  {verb} ", shown.output, re.MULTILINE)) == 1 for verb in VERBS)
    assert "Exit codes: 0 ok, 1 data at fault, 2 usage." in shown.output


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_every_command_has_help_and_one_example_that_parses(verb, flag):
    shown = opd(verb, flag)
    assert shown.exit_code == 0
    examples = [line.strip() for line in shown.output.splitlines() if line.strip().startswith("Example:")]
    assert len(examples) == 1
    program, found, *arguments = shlex.split(examples[0].removeprefix("Example:"))
    assert (program, found) == ("opd", verb)
    main.commands[verb].make_context(verb, arguments)


def test_what_batch_tokens_means_live():
    (option,) = [option for option in main.commands["train"].params if option.name == "batch_tokens"]
    assert "with --live, padded tokens of one pass of the teacher" in option.help


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_says_what_it_does_and_its_default(verb):
    for parameter in main.commands[verb].params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name
            assert parameter.help.endswith((".", "...")), parameter.name
            has_default = isinstance(parameter.default, int | float | str) and not parameter.is_flag
            assert not has_default or parameter.show_default, parameter.name


def test_version():
    shown = opd("--version")
    assert shown.exit_code == 0
    assert opd_store.__version__ in shown.output


USAGE = {
    "no such verb": ["frobnicate"],
    "no arguments": ["score"],
    "too many": ["inspect", "a", "b"],
    "no such option": ["verify", "a", "--fast"],
    "not a number": ["score", "a", "b", "c", "--topk", "many"],
    "out of range": ["score", "a", "b", "c", "--topk", "-1"],
    "no rows": ["rollouts", "a", "b", "c", "--batch-rows", "0"],
    "no commits": ["rollouts", "a", "b", "c", "--commit-every", "0"],
    "no prompts": ["eval", "a", "--limit", "0"],
    "negative seed": ["rollouts", "a", "b", "c", "--seed", "-1"],
    "dtype": ["score", "a", "b", "c", "--dtype", "int8"],
    "objective": ["train", "a", "--student", "b", "--out", "c", "--steps", "1", "--objective", "win"],
    "no steps": ["train", "a", "--student", "b", "--out", "c"],
    "neither": ["train", "--student", "b", "--out", "c", "--steps", "1"],
    "both": ["train", "a", "--live", "--student", "b", "--out", "c", "--steps", "1"],
    "nothing to measure": ["eval", "a"],
    "no such model": ["eval", "a", "--cache", "b"],
    "no such cache": ["inspect", "missing"],
}


@pytest.mark.parametrize("name", USAGE)
def test_wrong_usage_is_exit_code_2_without_a_traceback(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = opd(*USAGE[name])
    assert shown.exit_code == 2
    assert shown.stdout == ""
    assert "Traceback" not in shown.stderr
    assert shown.stderr.count("\n") <= 4
    assert list(tmp_path.iterdir()) == []


def test_a_fresh_interpreter_runs_it_and_loads_torch_only_where_needed(cache):
    code = (
        "import sys\nfrom opd_tools.main import main\n"
        "try:\n    main()\n"
        "finally:\n    print('torch' in sys.modules, file=sys.stderr)"
    )
    for args, expected in ((["verify", str(cache)], "False"), (["--help"], "False")):
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", code, *args],
            env={**os.environ, **ENVIRONMENT},
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr.splitlines()[-1] == expected
