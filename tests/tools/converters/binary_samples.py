"""Writers of samples in binary formats, and of tables."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
import zstandard
from opd_tools.converters.trainers.distillkit_codec import packed
from opd_tools.converters.trainers.distillkit_config import Codec
from tools.converters.sizes import TOPK, VOCAB

from opd_store import NO_ID, Rollout


def entries(rollout: Rollout) -> tuple[list[list[int]], list[list[float]]]:
    """Ids and log-probs of each row, padding left out."""
    kept = rollout.topk_ids != NO_ID
    rows = range(len(kept))
    ids = [rollout.topk_ids[row][kept[row]].tolist() for row in rows]
    return ids, [rollout.topk_logprob[row][kept[row]].tolist() for row in rows]


def about_next(rollout: Rollout, pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and log-probs of rows about tokens 1, 2, ..., those of the prompt all but sure of their tokens."""
    before = rollout.token_ids[1 : rollout.prompt_len].astype(np.int64)
    width = rollout.topk_ids.shape[1]
    ids = (before[:, None] + np.arange(width)) % VOCAB
    logprob = np.full(ids.shape, -20.0, np.float32)
    logprob[:, :1] = -1e-6
    ids = np.concatenate([ids, np.where(rollout.topk_ids == NO_ID, pad, rollout.topk_ids.astype(np.int64))])
    return ids, np.concatenate([logprob, rollout.topk_logprob])


def _folder(directory: Path) -> Path:
    """A directory that holds nothing else."""
    (directory / "files").mkdir()
    return directory / "files"


def distillkit(directory: Path, rollouts: list[Rollout]) -> Path:
    """As `opd convert --to distillkit` writes it, the values as they are given."""
    directory = _folder(directory)
    codec = Codec(d=VOCAB, k=TOPK, exact_k=TOPK, delta_encoding=False)
    config = {"d": VOCAB, "k": TOPK, "exact_k": TOPK, "residual_bins": [], "delta_encoding": False}
    (directory / "compression_config.yaml").write_text(yaml.safe_dump(config))
    rows = []
    for r in rollouts:
        ids, logprob = about_next(r, 0)
        rows.append(
            {
                "input_ids": r.token_ids.tolist(),
                "compressed_logprobs": logprob.view(np.uint8).reshape(len(ids), -1).tolist(),
                "bytepacked_indices": packed(ids, codec.id_bits).tolist(),
                "labels": [-100] * r.prompt_len + r.response_ids.tolist(),
            }
        )
    pq.write_table(pa.Table.from_pylist(rows), directory / "data_0.parquet")
    return directory


def _varint(value: int) -> bytes:
    out = b""
    value &= (1 << 64) - 1
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def _field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def tf_example(features: dict[str, np.ndarray]) -> bytes:
    """A serialised tf.train.Example."""
    found = b""
    for name, values in features.items():
        if values.dtype.kind == "f":
            feature = _field(2, _field(1, values.astype("<f4").tobytes()))
        else:
            feature = _field(3, _field(1, b"".join(map(_varint, values.ravel().tolist()))))
        found += _field(1, _field(1, name.encode()) + _field(2, feature))
    return _field(1, found)


def maxtext(directory: Path, rollouts: list[Rollout]) -> Path:
    """`save_top_k_teacher_logits.py`: logits, here log-probs and 3, for every token."""
    from array_record.python.array_record_module import ArrayRecordWriter

    path = directory / "teacher_top_k_part_00000_host_000.array_record"
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for r in rollouts:
        ids, logprob = about_next(r, 0)
        size = len(r.token_ids)
        trained = np.arange(1, size + 1) >= r.prompt_len
        trained[-1] = False
        features = {
            "inputs": r.token_ids.astype(np.int64),
            "top_k_logits": np.concatenate([logprob + 3, np.zeros((1, TOPK), np.float32)]),
            "top_k_indices": np.concatenate([ids, [np.arange(TOPK)]]),
            "sequence_hash": np.array([-12345]),
            "inputs_segmentation": np.ones(size, np.int64),
            "targets_segmentation": trained.astype(np.int64),
            "targets": np.append(r.token_ids[1:], 0).astype(np.int64),
        }
        writer.write(tf_example(features))
    writer.close()
    return path


def logits_tar(path: Path, meta: dict, iterations: dict[int, dict]) -> None:
    """A tar file as Megatron-LM's `_write_batched_tar` writes it."""
    with tarfile.open(path, "w") as tar:
        for name, content in {"_meta.json": meta, **iterations}.items():
            if isinstance(name, int):
                buffer = io.BytesIO()
                torch.save(content, buffer)
                data = zstandard.ZstdCompressor(level=3).compress(buffer.getvalue())
                info = tarfile.TarInfo(f"{name}.pt.zst")
            else:
                data, info = json.dumps(content).encode(), tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def microbatches(found: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, list[torch.Tensor]]:
    """What an iteration holds, for ids and log-probs [S, B, k] of each microbatch."""
    return {
        "values": [torch.from_numpy(logprob) for _, logprob in found],
        "indices_low": [torch.from_numpy((ids & 0xFFFF).astype(np.uint16)) for ids, _ in found],
        "bit_17": [torch.from_numpy(ids >> 16 != 0) for ids, _ in found],
    }


def megatron(directory: Path, rollouts: list[Rollout]) -> Path:
    """One rank, two iterations, a sequence a microbatch; and the tokens beside."""
    directory = _folder(directory)
    found = [(ids[:, None], logprob[:, None]) for ids, logprob in (about_next(r, -1) for r in rollouts)]
    half = len(found) // 2
    iterations = {1: microbatches(found[:half]), 2: microbatches(found[half:])}
    logits_tar(directory / "cp0_dp0__2.tar", {"hash": "0", "saver": {"k": TOPK}}, iterations)
    pq.write_table(
        pa.table({"input_ids": [r.token_ids.tolist() for r in rollouts]}), directory / "tokens.parquet"
    )
    return directory


def torch_pile(directory: Path, rollouts: list[Rollout]) -> Path:
    """A list of dicts of tensors."""
    items = [
        {
            "input_ids": torch.from_numpy(r.token_ids.astype(np.int64)),
            "prompt_len": r.prompt_len,
            "topk_logprobs": torch.from_numpy(r.topk_logprob.copy()),
            "indices": torch.from_numpy(np.where(r.topk_ids == NO_ID, -1, r.topk_ids.astype(np.int64))),
            "logprobs": torch.from_numpy(r.teacher_logprob.copy()),
            "sample_id": r.sample_id,
        }
        for r in rollouts
    ]
    path = directory / "pile.pt"
    torch.save(items, path)
    return path


def table(directory: Path, rollouts: list[Rollout]) -> Path:
    """Parquet with names that need no --column."""
    rows = []
    for r in rollouts:
        ids, logprob = entries(r)
        rows.append(
            {
                "id": r.sample_id,
                "input_ids": r.token_ids.tolist(),
                "prompt_len": r.prompt_len,
                "topk_indices": ids,
                "topk_logprobs": logprob,
                "teacher_logprobs": r.teacher_logprob.tolist(),
            }
        )
    path = directory / "table.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def jsonl(directory: Path, rollouts: list[Rollout]) -> Path:
    """Lines as `opd convert --to jsonl` writes them."""
    lines = []
    for r in rollouts:
        ids, logprob = entries(r)
        line = {
            "format": "opd-rollout/1",
            "topk": TOPK,
            "sample_id": r.sample_id,
            "token_ids": r.token_ids.tolist(),
            "prompt_len": r.prompt_len,
            "teacher_logprob": r.teacher_logprob.tolist(),
            "topk_ids": ids,
            "topk_logprob": logprob,
        }
        lines.append(json.dumps(line) + "\n")
    path = directory / "rollouts.jsonl"
    path.write_text("".join(lines))
    return path
