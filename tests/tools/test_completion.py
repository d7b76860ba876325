"""`opd completion`: the script that it prints completes."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
from click.testing import CliRunner
from opd_tools.main import main
from tools.commands import ENVIRONMENT


@pytest.mark.parametrize(
    ("shell", "line"),
    [
        ("bash", 'eval "$(opd completion bash)"'),
        ("zsh", 'eval "$(opd completion zsh)"'),
        ("fish", "| source"),
    ],
)
def test_it_prints_a_script_and_where_it_goes(shell, line):
    shown = CliRunner().invoke(main, ["completion", shell])
    assert shown.exit_code == 0, shown.output
    first, *script = shown.stdout.splitlines()
    assert first.startswith("# ")
    assert line in first
    assert any("_OPD_COMPLETE" in text for text in script)


def test_bash_completes_verbs_and_options(tmp_path):
    bash = shutil.which("bash")
    assert bash is not None
    script = CliRunner().invoke(main, ["completion", "bash"]).stdout
    (tmp_path / "opd").write_text(f'#!{bash}\nexec "{sys.executable}" -m opd_tools.main "$@"\n')
    (tmp_path / "opd").chmod(0o755)
    (tmp_path / "script").write_text(script)
    for words, expected in ((("opd", "publ"), "publish"), (("opd", "pull", "--lim"), "--limit")):
        code = (
            f'source "{tmp_path}/script"; COMP_WORDS=({" ".join(words)}); COMP_CWORD={len(words) - 1}; '
            'PATH="$1:$PATH"; _opd_completion "$1/opd"; echo "${COMPREPLY[@]}"'
        )
        done = subprocess.run(
            [bash, "-c", code, "bash", tmp_path],
            env={**ENVIRONMENT, "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert expected in done.stdout.split(), (done.stdout, done.stderr)


def test_another_shell_is_refused():
    shown = CliRunner().invoke(main, ["completion", "csh"])
    assert shown.exit_code == 2
    assert "'csh'" in shown.stderr
