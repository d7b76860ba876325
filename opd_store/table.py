"""Rollouts as one Arrow table, for any tool that speaks Arrow."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import numpy as np
import pyarrow as pa

from opd_store.rollout import SUPPORTS, Rollout
from opd_store.schema import RESPONSE_LISTS, SCALARS, TOKEN_LISTS, USER_TYPES, CacheSchema


def rollouts_to_arrow(
    rollouts: Iterable[Rollout], schema: CacheSchema, columns: Collection[str] | None
) -> pa.Table:
    """One row a rollout; ids and log-probs are flat lists of R * ranks values, position-major, padded."""
    types = {name: kind for name, (kind, _) in SCALARS.items() if name != "rollout_hash"}
    types |= {name: pa.list_(kind) for name, kind in (TOKEN_LISTS | RESPONSE_LISTS).items()}
    for support, fields in SUPPORTS.items():
        if getattr(schema, support):
            kinds = (pa.uint32(), pa.float32(), pa.float32(), pa.uint32())
            types |= {name: pa.list_(kind) for name, kind in zip(fields, kinds, strict=True) if name}
    users = {name: USER_TYPES[kind] for name, kind in schema.user_columns.items()}
    chosen = {
        name: kind
        for name, kind in (types | users).items()
        if columns is None or name in columns or name in ("token_ids", "prompt_len")
    }
    values: dict[str, list[object]] = {name: [] for name in chosen}
    for rollout in rollouts:
        for name, kind in chosen.items():
            value = rollout.extra.get(name) if name in users else getattr(rollout, name)
            if isinstance(value, np.ndarray):
                value = pa.array(value.ravel(), kind.value_type)
            values[name].append(value)
    return pa.table({name: pa.array(values[name], kind) for name, kind in chosen.items()})
