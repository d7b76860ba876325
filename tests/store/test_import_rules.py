"""Who may import what."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from store.caches import ROOT, run_python

import opd_store

STORE = sorted((ROOT / "opd_store").rglob("*.py"))
TRAIN = sorted((ROOT / "opd_train").rglob("*.py"))
# Nothing read from a cache may ever reach one of these.
CODE_RUNNERS = {"pickle", "marshal", "shelve", "yaml", "subprocess", "ctypes", "importlib", "code", "socket"}


def imports(path: Path) -> list[tuple[str, str]]:
    """(module, name) of every import of a file; the name is empty for `import module`."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found += [(str(node.module), alias.name) for alias in node.names]
    return found


def test_a_fresh_interpreter_loads_nothing_heavy():
    code = "import sys, opd_store, opd_store.testing; print(*sys.modules)"
    loaded = {name.partition(".")[0] for name in run_python(code).split()}
    assert {"opd_store", "numpy", "pyarrow"} <= loaded
    assert not loaded & {"torch", "transformers", "tokenizers", "pandas", "hypothesis", "fsspec", "pytest"}
    assert not loaded & {"opd_train", "opd_tools"}


@pytest.mark.parametrize("path", STORE, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_store_imports_neither_torch_nor_what_runs_code(path):
    modules = {module.partition(".")[0] for module, _ in imports(path)}
    assert not modules & {"torch", "transformers", "tokenizers", "opd_train", "opd_tools"}
    assert not modules & CODE_RUNNERS
    names = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
    assert not names & {"eval", "exec", "compile", "__import__"}


@pytest.mark.parametrize("path", TRAIN, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_trainer_uses_public_names_only(path):
    for module, name in imports(path):
        if module.partition(".")[0] == "opd_store":
            assert module == "opd_store", f"{path.name} imports {module}"
            assert name in ("", *opd_store.__all__), f"{path.name} imports {name}, which is not public"
    tree = ast.parse(path.read_text())
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "opd_store"
    }
    allowed = {*opd_store.__all__, "__version__"}
    assert used <= allowed, f"{path.name} uses {used - allowed}"


def test_the_contracts_of_the_import_linter_hold():
    """The layers written down in pyproject.toml."""
    missing = [
        name for name in ("opd_train", "tools/opd_tools") if not (ROOT / name / "__init__.py").exists()
    ]
    assert not missing, f"packages without __init__.py: {missing}"
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tools")])},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_rules_are_able_to_fail(tmp_path):
    (tmp_path / "bad.py").write_text("import torch.nn\nfrom opd_store.cache import Cache\n")
    assert imports(tmp_path / "bad.py") == [("torch.nn", ""), ("opd_store.cache", "Cache")]
    with pytest.raises(AssertionError):
        test_the_trainer_uses_public_names_only(tmp_path / "bad.py")
    with pytest.raises(AssertionError):
        test_the_store_imports_neither_torch_nor_what_runs_code(tmp_path / "bad.py")
