"""Write `files/distillkit/`: tables that DistillKit's own compressor made, and what its own decoder reads.

    python tests/tools/converters/make_distillkit_files.py CHECKOUT

CHECKOUT is a clone of github.com/arcee-ai/DistillKit; the files there now come from commit a61c2e7. Run it
only to add a case. Each case is a directory as `distillkit.sample_logits_vllm` leaves it, and `expected.npz`.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml

HERE = Path(__file__).parent / "files" / "distillkit"
VOCAB = 500
ROWS = (7, 24, 12)
"""Tokens of each sequence."""
NEW = {
    "exact-float32": {"k": 6, "exact_k": 6, "delta_encoding": False},
    "exact-bfloat16-delta": {"k": 6, "exact_k": 6, "exact_dtype": "bfloat16"},
    "exact-float16": {"k": 5, "exact_k": 5, "exact_dtype": "float16", "delta_encoding": False},
    "exact-float64-delta": {"k": 5, "exact_k": 5, "exact_dtype": "float64"},
    "published": {"k": 24, "exact_k": 8, "polynomial_terms": [0, 1, 2]},
    "recommended": {
        **{"k": 24, "exact_k": 4, "exact_dtype": "bfloat16", "delta_encoding": False},
        "polynomial_terms": [0, 1, 2, 3, 4, "sqrt"],
    },
    "normalised": {
        **{"k": 20, "exact_k": 2, "term_dtype": "float64", "delta_encoding": False, "normalize_t": True},
        "polynomial_terms": [0, 1, "sqrt", "exp"],
    },
    "bins": {
        **{
            "k": 20,
            "exact_k": 4,
            "polynomial_terms": [0, 1],
            "delta_encoding": False,
            "error_diffusion": True,
        },
        "residual_bins": [
            {"scale_dtype": "float32", "element_bits": 8, "num_elements": 5},
            {"scale_dtype": "bfloat16", "element_bits": 5, "num_elements": 7},
            {"scale_dtype": "float16", "element_bits": 1, "num_elements": 3},
        ],
    },
    "bins-only": {
        **{"k": 9, "exact_k": 3, "delta_encoding": True},
        "residual_bins": [{"scale_dtype": "float32", "element_bits": 12, "num_elements": 6}],
    },
}
LEGACY = {
    "legacy": {"k": 16, "exact_k": 5, "polynomial_degree": 3},
    "legacy-sqrt": {
        **{"k": 12, "exact_k": 4, "polynomial_degree": 2, "invert_polynomial": False, "with_sqrt_term": True},
    },
    "legacy-exact": {"k": 6, "exact_k": 6, "polynomial_degree": 0},
}


def teacher(rng: np.random.Generator, n_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """[N, VOCAB] log-probs that fall smoothly with the rank, and the tokens that were sampled from them."""
    gaps = rng.gamma(1.0, 1.0, (n_rows, VOCAB)) / np.arange(1, VOCAB + 1) * 2
    ranked = -np.cumsum(gaps, axis=1)
    ranked -= np.log(np.exp(ranked).sum(axis=1, keepdims=True))
    ids = rng.permuted(np.tile(np.arange(VOCAB), (n_rows, 1)), axis=1)
    logprob = np.empty_like(ranked)
    np.put_along_axis(logprob, ids, ranked, axis=1)
    rank = (rng.random(n_rows) > 0.8).astype(int)
    return logprob, ids[np.arange(n_rows), rank]


def main(checkout: str) -> None:
    """Write every case."""
    sys.path.insert(0, checkout)
    from distillkit.compression.compressor import LogprobCompressor
    from distillkit.compression.config import DistributionQuantizationConfig, LegacyLogitCompressionConfig
    from distillkit.sample_common import compressed_logit_schema, legacy_compressed_logit_schema

    shutil.rmtree(HERE, ignore_errors=True)
    for number, (name, case) in enumerate({**NEW, **LEGACY}.items()):
        rng = np.random.default_rng(number)
        out = HERE / name
        out.mkdir(parents=True)
        if name in NEW:
            config = DistributionQuantizationConfig.model_validate({"d": VOCAB, "residual_bins": [], **case})
            compressor = LogprobCompressor(config=config)
            schema = compressed_logit_schema()
        else:
            config = LegacyLogitCompressionConfig.model_validate({"vocab_size": VOCAB, **case})
            compressor = LogprobCompressor(legacy_config=config)
            schema = legacy_compressed_logit_schema()
        (out / "compression_config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
        columns: dict[str, list[object]] = {field: [] for field in schema.names}
        expected = {}
        for row, size in enumerate(ROWS):
            logprob, tokens = teacher(rng, size - 1)
            columns["input_ids"].append([3, *tokens.tolist()])
            values, ids = torch.topk(torch.from_numpy(logprob).float(), config.k)
            packed = compressor.compress_from_sparse(ids[None], values[None])
            for field, value in packed.items():
                columns[field].append(value[0].tolist())
            found_ids, found = compressor.decompress_to_sparse(packed)
            expected[f"ids{row}"], expected[f"logprob{row}"] = found_ids[0].numpy(), found[0].double().numpy()
            expected[f"teacher{row}"] = values.numpy()
        arrays = [pa.array(columns[field], schema.field(field).type) for field in schema.names]
        pq.write_table(pa.Table.from_arrays(arrays, schema=schema), out / "data_0.parquet")
        np.savez_compressed(out / "expected.npz", **expected)
    _pack(HERE / "exact-float32", HERE / "packed")


def _pack(source: Path, out: Path) -> None:
    """What `distillkit-pack-logits` makes of a case: three sequences in a row of 40 tokens at most."""
    from distillkit.pack_logits import _truncate_row, pack_pass

    out.mkdir()
    rows = pq.read_table(source / "data_0.parquet").to_pylist()
    found = []
    for row in rows:
        size = len(_truncate_row(row)["input_ids"])
        found.append({name: value[:size] for name, value in row.items()})
    packed = pack_pass({name: [row[name] for row in found] for name in rows[0]}, 40)
    pq.write_table(pa.table(packed), out / "data_0.parquet")
    for name in ("compression_config.yaml", "expected.npz"):
        shutil.copy(source / name, out / name)


if __name__ == "__main__":
    main(sys.argv[1])
