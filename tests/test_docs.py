"""The README's code runs, its links lead somewhere, and it lists every verb."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from opd_tools.main import main
from tools.commands import CommandServer

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
PAGES = sorted(path for pattern in ("*.md", "docs/*.md", "spec/*.md") for path in ROOT.glob(pattern))


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def _type_in(lines: list[str], directory: Path) -> dict[str, str]:
    """Run console lines in a directory, as one types them; what each printed."""
    (directory / "examples").symlink_to(ROOT / "examples")
    shown = {}
    with CommandServer() as server:
        for line in lines:
            program, *arguments = shlex.split(line.removeprefix("$ "))
            assert program in ("python", "opd")
            done = server(*arguments, directory=str(directory), script=program == "python")
            shown[line] = done.ok().out
    return shown


def _run(command: list[str], directory: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tools")])
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(
        command, cwd=directory, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.fixture(scope="module")
def first_result(tmp_path_factory):
    """The directory after the README's console block, and what `opd inspect` printed."""
    directory = tmp_path_factory.mktemp("readme")
    lines = [line for block in _blocks("console") for line in block.splitlines() if line.startswith("$ ")]
    assert len(lines) >= 5
    shown = _type_in(lines, directory)
    return directory, next(out for line, out in shown.items() if line.startswith("$ opd inspect"))


def test_console_block_runs(first_result):
    wanted = next(block for block in _blocks("text") if "bytes per position" in block)
    assert _names(first_result[1]) == _names(wanted)


def test_the_console_block_about_drift_runs(tmp_path):
    text = (ROOT / "docs" / "drift.md").read_text("utf-8")
    lines = re.findall(r"^\$ .+$", text, flags=re.MULTILINE)
    assert len(lines) >= 6
    _type_in(lines, tmp_path)
    assert (tmp_path / "runs/tiny/run/report.html").is_file()


def _names(inspected: str) -> list[str]:
    """Sections and field names of `opd inspect`; values differ with versions."""
    return [line[:22].strip() for line in inspected.splitlines()]


def test_python_blocks_run(first_result):
    blocks = _blocks("python")
    assert blocks
    for block in blocks:
        done = _run([sys.executable, "-W", "error", "-c", block], first_result[0])
        assert done.returncode == 0, f"{block}\n{done.stderr}"


def test_readme_lists_every_verb():
    for verb in main.commands:
        assert re.search(rf"`opd {verb}[ `]", README), verb


def test_the_table_of_formats_is_what_the_command_prints():
    shown = CliRunner().invoke(main, ["formats", "--markdown"]).output
    assert shown in (ROOT / "docs" / "formats.md").read_text("utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text("utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_no_placeholder_is_left():
    assert "@@" not in README
