"""The first rollouts of a cache as a small Parquet file, for viewers that know no caches."""

from __future__ import annotations

import io

import pyarrow as pa
import pyarrow.parquet as pq

from opd_store import Cache
from opd_store.batch import ARRAY_FIELDS
from opd_store.schema import SCALARS
from opd_tools.converters.reading.text import TextTokenizer

PREVIEW = "preview/rollouts.parquet"
_MAX_TOKENS = 1 << 20
"""Rollouts after so many tokens are left out, so that the file stays small."""


def preview(cache: Cache, n: int, tokenizer: TextTokenizer | None) -> tuple[bytes, pa.Schema]:
    """A Parquet file, and its schema.

    Native columns, without the top-k. Columns that hold nothing in these rollouts are left out. The same
    cache gives the same bytes under the same releases of pyarrow and tokenizers.

    Args:
        n: rollouts at most.
        tokenizer: adds the columns `prompt` and `response`, as text.

    Raises:
        FormatError, IntegrityError, StorageError: the cache is damaged, or cannot be read.
    """
    rows: list[int] = []
    tokens = 0
    for row, length in enumerate(cache.row_tokens[:n].tolist()):
        tokens += length
        if rows and tokens > _MAX_TOKENS:
            break
        rows.append(row)
    columns = {*SCALARS, *ARRAY_FIELDS, *cache.schema.user_columns} - {"rollout_hash"}
    table = cache.to_arrow(rows=rows, ranks=0, columns=columns)
    empty = [name for name in table.column_names if table[name].null_count == len(table)]
    table = table.drop_columns(empty)
    if tokenizer is not None:
        ids = [row.as_py() for row in table["token_ids"]]
        cuts = table["prompt_len"].to_pylist()
        prompts = [tokenizer.decode(row[:cut]) for row, cut in zip(ids, cuts, strict=True)]
        responses = [tokenizer.decode(row[cut:]) for row, cut in zip(ids, cuts, strict=True)]
        table = table.append_column("prompt", pa.array(prompts, pa.utf8()))
        table = table.append_column("response", pa.array(responses, pa.utf8()))
    out = io.BytesIO()
    pq.write_table(table.replace_schema_metadata(None), out, compression="zstd")
    return out.getvalue(), table.schema
