"""Write `files/megatron/`: tar files by Megatron-LM's own functions, of two data and two context ranks.

    python tests/tools/converters/make_megatron_files.py CHECKOUT

CHECKOUT is a clone of github.com/NVIDIA/Megatron-LM; the files there now come from commit d98e8a6. The
functions are taken out of their modules, which need a GPU build: `_process_single_microbatch` of
`LogitsSaverHooks` with what it calls, `_buffer_iteration`, `_write_batched_tar` and `pack_indices`.
"""

from __future__ import annotations

import ast
import io
import json
import os
import shutil
import sys
import tarfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
import zstandard

HERE = Path(__file__).parent / "files" / "megatron"
FOLDER = "megatron/training/distillation"
VOCAB, TOPK, S, B = 70_000, 7, 8, 2
ITERATIONS, MICROBATCHES, RANKS = (3, 4), 2, 2
METHODS = ("_process_single_microbatch", "_apply_topp_truncation", "_buffer_iteration", "_write_batched_tar")


def saver(checkout: str) -> type:
    """The class with the methods that make files, and nothing that needs a process group."""
    root = Path(checkout) / FOLDER
    tree = ast.parse((root / "logits_saver.py").read_text())
    hooks = next(node for node in tree.body if isinstance(node, ast.ClassDef) and "Hooks" in node.name)
    body = [node for node in hooks.body if getattr(node, "name", "") in METHODS]
    utils = ast.parse((root / "utils_logits.py").read_text())
    functions = [node for node in utils.body if getattr(node, "name", "") == "pack_indices"]
    constants = [
        node
        for part in (utils, tree)
        for node in part.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        if node.targets[0].id.startswith(("CACHED_", "META_", "LOGPROBS_TAR_MEMBER_SUFFIX", "_MAX_VOCAB"))
    ]
    names: dict[str, object] = {
        **{"torch": torch, "io": io, "json": json, "os": os, "tarfile": tarfile, "zstandard": zstandard},
        **{"OrderedDict": OrderedDict, "HAVE_ZSTANDARD": True, "open_logit_file": open},
        "storage_makedirs": os.makedirs,
        "storage_move": os.replace,
        "is_remote_storage_path": lambda path: False,
        "get_current_iteration": lambda: names["iteration"],
    }
    module = ast.Module([*ast.parse("from typing import *").body, *constants, *functions], [])
    exec(compile(module, str(root), "exec"), names)
    hooks.body, hooks.bases = body, []
    exec(compile(ast.Module([hooks], []), str(root), "exec"), names)
    return names[hooks.name]


def main(checkout: str) -> None:
    """Two iterations of two microbatches of two sequences, for each of two data and two context ranks."""
    shutil.rmtree(HERE, ignore_errors=True)
    HERE.mkdir(parents=True)
    kind = saver(checkout)
    globals_ = kind._buffer_iteration.__globals__
    rng = np.random.default_rng(0)
    n_sequences = len(ITERATIONS) * MICROBATCHES * RANKS * B
    tokens = rng.integers(0, VOCAB, (n_sequences, S + 1))
    logits = rng.normal(0, 1, (n_sequences, S, VOCAB)).astype(np.float32)
    logits[np.arange(n_sequences)[:, None], np.arange(S), tokens[:, 1:]] += rng.uniform(
        4, 16, (n_sequences, S)
    )
    # As GPTDataset deals sequences out: microbatch by microbatch, a slice of it for each data rank.
    dealt = np.arange(n_sequences).reshape(len(ITERATIONS), MICROBATCHES, RANKS, B)
    for cp in range(RANKS):
        for dp in range(RANKS):
            one = kind()
            one.k, one.p, one.min_k, one.tp_size, one.tp_rank = TOPK, 0.95, 1, 1, 0
            one._save_dtype, one._topp_kept_counts, one._pending_writes = torch.float16, [], OrderedDict()
            for place, iteration in enumerate(ITERATIONS):
                globals_["iteration"] = iteration
                found = []
                for microbatch in range(MICROBATCHES):
                    batch = logits[dealt[place, microbatch, dp]].transpose(1, 0, 2)
                    # Context parallelism with the load spread: rank g has the parts g and 2G - 1 - g of 2G.
                    parts = np.split(batch, 2 * RANKS)
                    local = np.concatenate([parts[cp], parts[-1 - cp]])
                    found.append(one._process_single_microbatch(torch.from_numpy(local)))
                one._buffer_iteration(*(list(column) for column in zip(*found, strict=True)))
            path = HERE / f"cp{cp}_dp{dp}__{ITERATIONS[-1]}.tar"
            meta = {
                "hash": "0",
                "identifiers": {},
                "saver": {"k": TOPK, "p": 0.95, "min_k": 1, "save_dtype": "fp16"},
            }
            kind._write_batched_tar(str(path), one._pending_writes, json.dumps(meta).encode())
    np.save(HERE / "tokens.npy", tokens.astype(np.int32))
    logits -= np.log(np.exp(logits.astype(np.float64)).sum(axis=2, keepdims=True))
    ids = np.argsort(-logits, axis=2, kind="stable")[:, :, :TOPK]
    np.savez_compressed(
        HERE.parent / "megatron.npz", ids=ids, logprob=np.take_along_axis(logits, ids, 2), tokens=tokens
    )


if __name__ == "__main__":
    main(sys.argv[1])
