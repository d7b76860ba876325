"""Runs `opd` commands in forked processes, so that each starts in milliseconds and can really be killed.

Reads one JSON request a line from standard input and answers each with one line: exit status (negative for
a signal), both outputs, and how many events were counted. Events are the moments at which a kill can matter:
every change to the file system, every fsync, and every pass through a model. Never imported by a test.
"""

from __future__ import annotations

import json
import os
import resource
import runpy
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from opd_tools.main import main
from torch.utils.checkpoint import checkpoint

import opd_train

_CHANGES = {"os.rename", "os.link", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}
_WRITE_FLAGS = os.O_WRONLY | os.O_RDWR


def count_events(kill_at: int | None, report: Path) -> None:
    """Count events from now on, and kill this process just before number `kill_at`."""
    seen = 0
    ours = os.getpid()

    def event() -> None:
        nonlocal seen
        seen += 1
        if seen == kill_at:
            os.kill(ours, signal.SIGKILL)

    def hook(name: str, arguments: tuple[Any, ...]) -> None:
        opened = name == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITE_FLAGS
        if name in _CHANGES or opened:
            event()

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            event()
            found = function(*args, **kwargs)
            event()
            return found

        return call

    os.fsync = counted(os.fsync)
    opd_train.CausalLM.hidden = counted(opd_train.CausalLM.hidden)  # type: ignore[method-assign]
    sys.addaudithook(hook)

    def finish(code: int) -> None:
        report.write_text(str(seen))
        leave(code)

    leave, os._exit = os._exit, finish  # type: ignore[assignment]


def child(request: dict[str, Any], out: int, err: int, report: Path) -> None:
    """Run one command and leave the process, whatever happens."""
    code = 70
    try:
        os.dup2(out, 1)
        os.dup2(err, 2)
        os.environ.update(request.get("environment", {}))
        os.chdir(request.get("directory", "."))
        if "file_bytes" in request:
            resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_bytes"], request["file_bytes"]))
        if "kill_after_s" in request:
            timer = threading.Timer(request["kill_after_s"], os.kill, (os.getpid(), signal.SIGKILL))
            timer.daemon = True
            timer.start()
        if request.get("count_events"):
            count_events(request.get("kill_at"), report)
        try:
            if request.get("script"):
                sys.argv = request["args"]
                sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))
                runpy.run_path(sys.argv[0], run_name="__main__")
            else:
                main(request["args"], prog_name="opd")
            code = 0
        except SystemExit as leaving:
            code = leaving.code if isinstance(leaving.code, int) else 1
        except BaseException:
            # What an interpreter does with an error that nobody caught.
            sys.excepthook(*sys.exc_info())
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def import_lazy_modules() -> None:
    """Load here what torch and transformers load at first use, so that no child spends seconds on it."""
    for name in ("GPT2LMHeadModel", "LlamaForCausalLM", "PreTrainedTokenizerFast", "AutoTokenizer"):
        getattr(transformers, name)
    config = transformers.GPT2Config(n_layer=1, n_embd=2, n_head=1, vocab_size=4, n_positions=4)
    with tempfile.TemporaryDirectory() as directory:
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(directory)
        model = transformers.AutoModelForCausalLM.from_pretrained(directory, local_files_only=True)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ids = torch.zeros(1, 2, dtype=torch.int64)
    checkpoint(lambda x: x, model(input_ids=ids).logits, use_reentrant=False).sum().backward()
    optimizer.step()


def serve() -> None:
    """Answer requests until standard input ends."""
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    import_lazy_modules()
    for line in sys.stdin:
        request = json.loads(line)
        with tempfile.TemporaryDirectory() as directory:
            paths = [Path(directory) / name for name in ("out", "err", "events")]
            for path in paths:
                path.touch()
            with paths[0].open("wb") as out, paths[1].open("wb") as err:
                pid = os.fork()
                if pid == 0:
                    child(request, out.fileno(), err.fileno(), paths[2])
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            answer = {
                "status": status,
                "out": paths[0].read_text("utf-8", "surrogateescape"),
                "err": paths[1].read_text("utf-8", "surrogateescape"),
                "events": int(paths[2].read_text() or 0),
            }
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
