"""The other end of `command_server`, and what tests of the command line share."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tools"))),
    "OMP_NUM_THREADS": "1",
    "PYTHONUTF8": "1",
    # As on a laptop without a network, and without a terminal.
    "HF_HUB_OFFLINE": "1",
}


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    status: int
    """Exit code, or minus the signal that ended it."""
    out: str
    err: str
    events: int = 0

    @property
    def killed(self) -> bool:
        """Whether SIGKILL ended it."""
        return self.status == -signal.SIGKILL

    def ok(self) -> Self:
        """The same, if it succeeded."""
        assert self.status == 0, f"exit {self.status}\n{self.out}\n{self.err}"
        return self

    def refused(self, code: int, *parts: object) -> str:
        """The one line that it wrote before it ended with this exit code; it names all the parts."""
        assert self.status == code, f"exit {self.status}\n{self.out}\n{self.err}"
        assert self.out == ""
        lines = [line for line in self.err.splitlines() if not line.startswith(("sampling:", "scoring:"))]
        lines = [line for line in lines if not line.startswith(("training:", "verifying:", "opd: note:"))]
        assert len(lines) == 1, self.err
        assert lines[0].startswith("opd: ")
        for part in parts:
            assert str(part) in lines[0], f"{part!r} not in {lines[0]!r}"
        return lines[0]


class CommandServer:
    """`opd` in a fresh process for each call, forked from one that has imported everything."""

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("command_server.py"))],
            env={**os.environ, **ENVIRONMENT},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()

    def __call__(self, *args: object, **request: Any) -> Done:
        """Run a command.

        Args:
            args: of the command.
            request: `script` (the first of `args` is a Python script instead), `directory` to run in,
                `file_bytes` (no file may grow beyond), `count_events`, `kill_at` (event number to be
                killed at), `kill_after_s` (seconds to be killed after) and `environment`.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        line = json.dumps({"args": [str(arg) for arg in args], **request})
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return Done(**json.loads(self._process.stdout.readline()))


def snapshot(path: Path) -> dict[str, bytes]:
    """Every file below a path, by relative name."""
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}
