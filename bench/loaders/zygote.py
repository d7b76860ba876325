"""A process that has imported one family of formats and forks a fresh child for every measurement.

    python -m loaders.zygote loaders.arrow_files     (started by `Family`, which talks to it in JSON lines)

So every measurement starts from a clean process, imports excluded, and none pays for them twice.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loaders.layout import Layout

Json = Any
"""What json.dumps takes."""
LIMIT_S = {"write": 600}
"""Seconds; any other task has 120."""


class Unavailable(Exception):
    """The packages of a family are not installed."""


class TaskError(Exception):
    """A measurement failed; the message ends the child's traceback."""


class Family:
    """The parent's end."""

    def __init__(self, module: str, log: Path) -> None:
        self.module = module
        self.log = log.open("ab")
        threads = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "ARROW_IO_THREADS")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "loaders.zygote", module],
            cwd=Path(__file__).parents[1],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=threads | {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"} | os.environ,
        )
        hello = self._receive()
        if "missing" in hello:
            self.close()
            raise Unavailable(hello["missing"])
        self.layouts: dict[str, dict[str, Any]] = {item["name"]: item for item in hello["layouts"]}

    def ask(self, task: str, layout: str, *, env: dict[str, str] | None = None, **arguments: Json) -> Json:
        """Run a task of `tasks.TASKS` in a fresh child.

        Raises:
            TaskError: it failed, died or ran past the limit.
        """
        message = {"task": task, "layout": layout, "env": env or {}, "arguments": arguments}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()
        answer = self._receive()
        if "error" in answer:
            raise TaskError(answer["error"])
        return answer["result"]

    def close(self) -> None:
        """End it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)
        self.log.close()

    def _receive(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise TaskError(f"{self.module} died; see {self.log.name}")
        return json.loads(line)


def describe(layout: Layout) -> dict[str, Any]:
    """What the parent has to know."""
    return {
        "name": layout.name,
        "note": layout.note,
        "half": layout.half,
        "checked": layout.checked,
        "shuffled": layout.shuffled is not None,
        "few_ranks": layout.few_ranks is not None,
        "random": layout.random,
        "forks": layout.forks,
        "stores": layout.stores or layout.name,
        "tasks": None if layout.tasks is None else sorted(layout.tasks),
    }


def write_layout(layout: Layout, folder: str, source: str, n_shards: int) -> dict[str, float]:
    """Store the rollouts. Not a table of this benchmark, but worth printing."""
    from loaders import rollouts

    data = rollouts.load(Path(source))
    Path(folder).mkdir(parents=True)
    start, cpu = time.perf_counter(), time.process_time()
    layout.write(data, Path(folder), n_shards)
    n_bytes = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    return {"wall": time.perf_counter() - start, "cpu": time.process_time() - cpu, "bytes": n_bytes}


def child(layouts: dict[str, Layout], message: dict[str, Any]) -> dict[str, Any]:
    """One measurement."""
    import torch

    from loaders.tasks import TASKS

    signal.alarm(LIMIT_S.get(message["task"], 120))
    torch.set_num_threads(1)
    os.environ |= message["env"]
    layout = layouts[message["layout"]]
    work = write_layout if message["task"] == "write" else TASKS[message["task"]]
    try:
        return {"result": work(layout, **message["arguments"])}
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"[:300]}


def serve(module: str) -> None:
    """Answer until the parent closes its end."""
    # Libraries print: what they write to stdout goes to the log.
    answers: IO[str] = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    try:
        found = importlib.import_module(module)
        importlib.import_module("loaders.tasks")
    except ImportError as error:
        traceback.print_exc()
        answer({"missing": str(error)})
        return
    layouts = {layout.name: layout for layout in found.LAYOUTS}
    answer({"layouts": [describe(layout) for layout in found.LAYOUTS]})
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            os.setpgid(0, 0)
            value = child(layouts, json.loads(line))
            answer(value)
            sys.stderr.flush()
            os.killpg(0, signal.SIGKILL)  # with the loader's workers, whose shutdown is not ours to test
        _, status = os.waitpid(pid, 0)
        if os.WTERMSIG(status) != signal.SIGKILL:
            answer({"error": f"the child ended with signal {os.WTERMSIG(status)}"})


if __name__ == "__main__":
    serve(sys.argv[1])
