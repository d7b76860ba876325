"""Write `files/maxtext/`: records that MaxText's own `create_tf_example` made, in a file of array_record.

    python tests/tools/converters/make_maxtext_files.py CHECKOUT

CHECKOUT is a clone of github.com/AI-Hypercomputer/maxtext; the file there now comes from commit e591f30.
Needs tensorflow-cpu, ml_dtypes and array-record. The function is taken out of its module, which imports JAX.
"""

from __future__ import annotations

import ast
import sys
import types
from pathlib import Path

import ml_dtypes
import numpy as np
import tensorflow as tf
from array_record.python.array_record_module import ArrayRecordWriter

HERE = Path(__file__).parent / "files" / "maxtext"
SOURCE = "src/maxtext/trainers/post_train/distillation/save_top_k_teacher_logits.py"
VOCAB, TOPK = 200, 6


def function(checkout: str, name: str) -> types.FunctionType:
    """A function of MaxText's module, with the modules that it uses."""
    tree = ast.parse((Path(checkout) / SOURCE).read_text())
    body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    names = {"tf": tf, "np": np, "jnp": types.SimpleNamespace(bfloat16=ml_dtypes.bfloat16)}
    exec(compile(ast.Module(body, []), SOURCE, "exec"), names)
    return names[name]


def main(checkout: str) -> None:
    """Three records: a whole sequence, two packed ones with padding, and one cut at its end."""
    create = function(checkout, "create_tf_example")
    rng = np.random.default_rng(0)
    HERE.mkdir(parents=True, exist_ok=True)
    out = HERE / "teacher_top_k_part_00000_host_000.array_record"
    writer = ArrayRecordWriter(str(out), "group_size:1")
    expected = {}
    segments = [[1] * 12, [1] * 5 + [2] * 4 + [0] * 3, [1] * 12]
    for number, segment in enumerate(segments):
        segment = np.array(segment, np.int32)
        tokens = rng.integers(1, VOCAB, 13).astype(np.int32)
        inputs = np.where(segment > 0, tokens[:-1], 0)
        targets, trained = np.append(inputs[1:], 0), np.append(segment[1:], 0)
        if number == 2:
            targets, trained = tokens[1:], segment
        trained = np.where(np.arange(12) < 2, 0, trained)
        logits = rng.normal(0, 3, (12, VOCAB)).astype(ml_dtypes.bfloat16)
        likely = rng.random(12) < 0.8
        logits[likely, targets[likely]] = 12
        ids = np.argsort(-logits.astype(np.float32), axis=1, kind="stable")[:, :TOPK]
        example = {
            "inputs": inputs,
            "top_k_logits": np.take_along_axis(logits, ids, 1),
            "top_k_indices": ids.astype(np.int32),
            "sequence_hash": hash(tokens.tobytes()),
            "inputs_position": np.arange(12, dtype=np.int32),
            "inputs_segmentation": segment,
            "targets_segmentation": trained,
            "targets": targets,
        }
        writer.write(create(example))
        del example["sequence_hash"]
        example["top_k_logits"] = example["top_k_logits"].astype(np.float32)
        expected |= {f"{name}{number}": value for name, value in example.items()}
    writer.close()
    np.savez_compressed(HERE.parent / "maxtext.npz", **expected)


if __name__ == "__main__":
    main(sys.argv[1])
