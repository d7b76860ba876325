"""The Triton kernels in their interpreter, which has to be on before they are imported: another process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
HERE = Path(__file__).parent
POINTERS = {"raw": "*bf16", "ids": "*i64"}
SCALARS = {"n_columns": "i32", "n_ids": "i32", "scale": "fp32", "softcap": "fp32"}
CONSTANTS = {"COLUMNS": 4096, "IDS": 64}


KERNELS = "head_kernels or every_curve and float32 and all or repeated_ids and not function"


def test_interpreted_on_the_cpu():
    files = [HERE / name for name in ("head_kernels.py", "test_head.py")]
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *files, "-k", KERNELS],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.parametrize("capped", [False, True])
@pytest.mark.parametrize("name", ["statistics_kernel", "softmax_kernel", "scatter_kernel"])
def test_compiles_for_hopper(name, capped, tmp_path, monkeypatch):
    # Needs no GPU. The interpreter takes much that the compiler does not.
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from opd_train.head import triton_kernels

    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    kernel, constants = getattr(triton_kernels, name), CONSTANTS | {"CAPPED": capped}
    types = {argument: "*fp32" for argument in kernel.arg_names} | POINTERS | SCALARS
    types |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(
        kernel,
        {argument: types[argument] for argument in kernel.arg_names},
        {
            (place,): constants[argument]
            for place, argument in enumerate(kernel.arg_names)
            if argument in constants
        },
    )
    options = {"num_warps": 8, "enable_fp_fusion": True}
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["cubin"]
