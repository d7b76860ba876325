"""Reading executes nothing that a file brings along: no code, no process, no connection."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from store.caches import ROOT, run_python

SOURCES = sorted(path for package in ("opd_store", "opd_train") for path in (ROOT / package).rglob("*.py"))
FORBIDDEN_MODULES = {
    "pickle", "cPickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "yaml", "runpy",
    "code", "codeop", "imp", "ctypes", "cffi", "subprocess", "pty", "socket", "ssl", "urllib", "http",
    "ftplib", "smtplib", "telnetlib", "xmlrpc", "requests", "httpx", "aiohttp", "webbrowser", "jinja2",
}  # fmt: skip
# Taking addresses apart makes no connection; one module alone makes some, to the place that the user named.
ALLOWED = {"urllib.parse": None, "aiohttp": "opd_store/storage/transport.py"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "breakpoint", "input"}
FORBIDDEN_ATTRIBUTES = {
    ("os", "system"), ("os", "popen"), ("os", "execv"), ("os", "execve"), ("os", "spawnv"),
    ("os", "posix_spawn"),
    ("torch", "load"), ("torch", "hub"), ("np", "load"), ("numpy", "load"), ("importlib", "import_module"),
}  # fmt: skip
FORBIDDEN_KEYWORDS = {"allow_pickle", "weights_only", "trust_remote_code", "shell"}


def forbidden(tree: ast.AST, path: str = "") -> list[str]:
    """What of a module could run code that came with data."""
    found = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        names = [name for name in names if name not in ALLOWED or ALLOWED[name] not in (None, path)]
        found += [f"{node.lineno}: import {n}" for n in names if n.split(".")[0] in FORBIDDEN_MODULES]
        if isinstance(node, ast.Name) and node.id in FORBIDDEN_CALLS:
            found.append(f"{node.lineno}: {node.id}")
        if isinstance(node, ast.Attribute):
            owner = node.value.id if isinstance(node.value, ast.Name) else None
            if (owner, node.attr) in FORBIDDEN_ATTRIBUTES:
                found.append(f"{node.lineno}: {owner}.{node.attr}")
        if isinstance(node, ast.keyword) and node.arg in FORBIDDEN_KEYWORDS:
            found.append(f"{node.value.lineno}: {node.arg}=")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_can(path: Path):
    assert forbidden(ast.parse(path.read_text(), str(path)), str(path.relative_to(ROOT))) == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "def f():\n    import marshal",
        "import urllib.request",
        "import urllib",
        "import aiohttp",
        "eval('1')",
        "f = exec",
        "torch.load('x')",
        "torch.load('x', weights_only=True)",
        "read('x', allow_pickle=False)",
        "os.system('x')",
    ],
)
def test_the_lint_sees(code):
    assert forbidden(ast.parse(code))


WATCHED = """
import sys
import numpy as np
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from faults import corpus
from faults.poisons import IN_SUPPORT
from fuzz.structure import pieces_of, seal_cache
import opd_store

FORBIDDEN = ("exec", "compile", "import", "marshal.", "pickle.", "subprocess.", "os.system", "os.exec",
             "os.posix_spawn", "os.spawn", "os.fork", "os.putenv", "socket.", "urllib.", "http.", "ftplib.",
             "smtplib.", "webbrowser.", "ctypes.", "code.", "cpython.run", "builtins.breakpoint",
             "os.remove", "os.rename", "os.link", "os.symlink", "os.mkdir", "os.truncate", "os.chmod")
root = Path(sys.argv[1])
watching = False
events = []
opened = []

def hook(event, arguments):
    if not watching:
        return
    if event.startswith(FORBIDDEN):
        events.append((event, repr(arguments)[:200]))
    if event == "open":
        opened.append(arguments)

def use(path):
    outcome = "read"
    for check_values in (True, False):
        try:
            cache = opd_store.open(path, check_values=check_values)
            for rollout in cache:
                repr(rollout)
            cache.find(bytes(32))
            cache.to_arrow()
            repr(cache)
        except opd_store.OpdError as error:
            str(error)
            outcome = "refused"
    try:
        str(opd_store.verify(path).problems)
    except opd_store.OpdError as error:
        str(error)
    return outcome

paths = []
for number, variant in enumerate(corpus.VARIANTS):
    intact = root / f"intact-{number}"
    corpus.write(intact, variant, corpus.rollouts(variant))
    # Once unwatched, so that whatever is imported late has been.
    use(intact)
    paths.append(intact)
    for name in sorted(p for p in intact.rglob("*") if p.is_file()):
        data = name.read_bytes()
        for bit in range(0, 8 * len(data), 1999):
            path = root / f"damaged-{number}-{len(paths)}"
            for other in (p for p in intact.rglob("*") if p.is_file()):
                target = path / other.relative_to(intact)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(other.read_bytes())
            damaged = bytearray(data)
            damaged[bit // 8] ^= 1 << bit % 8
            (path / name.relative_to(intact)).write_bytes(bytes(damaged))
            paths.append(path)
    head, batch, footer = pieces_of(intact)
    for bit in range(0, 8 * len(batch), 797):
        changed = bytearray(batch)
        changed[bit // 8] ^= 1 << bit % 8
        path = root / f"sealed-{number}-{bit}"
        seal_cache(path, intact, pieces=[head, bytes(changed), footer])
        paths.append(path)

# What errors need is imported by the first of each kind; afterwards nothing more may be.
for path in paths:
    use(path)
sys.addaudithook(hook)
watching = True
outcomes = [use(path) for path in paths]
watching = False
assert not events, events[:10]
modes = {arguments[1] for arguments in opened}
assert modes <= {"r", "rb", None}, modes
outside = {str(a[0]) for a in opened if not str(a[0]).startswith(str(root))}
assert not outside, outside
assert outcomes.count("read") >= len(corpus.VARIANTS)
assert outcomes.count("refused") >= 300, outcomes.count("refused")
# The hook itself works.
watching = True
compile("1", "x", "eval")
open("/dev/null").close()
watching = False
assert events[0][0] == "compile"
print(len(paths), len(opened))
"""


def test_no_event_while_reading(tmp_path):
    """Python reports what it is about to do; hundreds of caches, most of them damaged, cause none."""
    n_caches, n_opened = map(int, run_python(WATCHED, tmp_path, ROOT).split())
    assert n_caches > 350
    assert n_opened > n_caches
