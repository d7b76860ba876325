"""Packed rows are what the rollouts are, however they lie in the shards."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from store.caches import some_rollouts, write

import opd_store
from opd_store import InvalidArgumentError, kernels

FIELDS = [name for name in opd_store.Packed.__dataclass_fields__ if "lengths" not in name]
RNG = np.random.default_rng(0)
ORDERS = {
    "as stored": np.arange(24),
    "some neighbours": np.array([3, 4, 5, 9, 10, 2, 3, 23]),
    "at random": RNG.permutation(24),
    "one again and again": np.array([7, 7, 7]),
    "one": np.array([23]),
}
VALUES = some_rollouts(24, topk=12, response_len=9)


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    """By encoding, several record batches and shards each; some rows lack lists."""
    made = {}
    values = [
        replace(value, loss_mask=None) if row % 5 == 0 else value
        for row, value in enumerate(
            [*VALUES[:20], *(replace(v, behaviour_logprob=None) for v in VALUES[20:])]
        )
    ]
    for encoding in ("plain", "ladder/128"):
        path = tmp_path_factory.mktemp("gather") / "cache"
        sizes = {"batch_bytes": 5000, "shard_bytes": 12000, "bands": (4, 12)}
        write(path, values, topk=12, encoding=encoding, **sizes)
        made[encoding] = opd_store.open(path)
        assert made[encoding].n_shards > 1
        assert len(made[encoding].batch_rows) > made[encoding].n_shards
    return made


def expected(cache, rows, name, ranks, cut):
    found = [cache.rollout(int(row), ranks=ranks) for row in rows]
    values = [getattr(rollout, name) for rollout in found]
    if name == "loss_mask" and any(value is not None for value in values):
        values = [
            np.ones(r.response_len, bool) if v is None else v for r, v in zip(found, values, strict=True)
        ]
    if any(value is None for value in values):
        return None
    kept = [None if cut is None else cut - (0 if name == "token_ids" else r.prompt_len) for r in found]
    return np.concatenate([value[:n] for value, n in zip(values, kept, strict=True)])


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("cut", [None, 6, 100])
@pytest.mark.parametrize("ranks", [None, 4, 7, 0])
@pytest.mark.parametrize("encoding", ["plain", "ladder/128"])
def test_they_are_the_rollouts(caches, monkeypatch, encoding, ranks, cut, compiled):
    monkeypatch.setattr(kernels, "COMPILED", kernels.COMPILED and compiled)
    cache = caches[encoding]
    for rows in ORDERS.values():
        for _ in range(2):  # first read, and read before
            found = opd_store.gather(cache, rows, ranks=ranks, max_tokens=cut)
            for name in FIELDS:
                wanted, packed = expected(cache, rows, name, ranks, cut), getattr(found, name)
                assert (packed is None) == (wanted is None), name
                if wanted is not None:
                    assert packed.dtype == wanted.dtype, name
                    assert packed.shape == wanted.shape, name
                    assert packed.tobytes() == wanted.tobytes(), name
            assert found.lengths.sum() == len(found.token_ids)


def test_into_memory_of_the_caller(caches):
    made = {}

    def allocate(name, shape, dtype):
        # Rows further apart than they are long, as in a larger array.
        made[name] = (
            np.zeros((*shape[:-1], 2 * shape[-1]), dtype)[..., : shape[-1]] if len(shape) > 1 else None
        )
        if made[name] is None:
            made[name] = np.zeros(shape, dtype)
        return made[name]

    rows = np.array([5, 1, 2])
    for cache in caches.values():
        for _ in range(2):
            found = opd_store.gather(cache, rows, allocate=allocate)
            whole = opd_store.gather(cache, rows)
            for name in FIELDS:
                if getattr(whole, name) is None:
                    continue
                assert getattr(found, name) is made[name]
                assert np.array_equal(made[name], getattr(whole, name)), name


def test_only_some_columns(caches):
    found = opd_store.gather(caches["plain"], [0, 1], columns=("teacher_logprob",))
    assert [name for name in FIELDS if getattr(found, name) is not None] == ["token_ids", "teacher_logprob"]


@pytest.mark.parametrize(
    ("rows", "options", "error", "message"),
    [
        ([], {}, InvalidArgumentError, "rows: expected one or more"),
        ([24], {}, IndexError, "row 24 of 24"),
        ([0, -1], {}, IndexError, "row -1 of 24"),
        ([0], {"ranks": 13}, InvalidArgumentError, r"ranks: expected 0..12 .* found 13"),
        ([0], {"columns": ("reward",)}, InvalidArgumentError, "columns: 'reward' is not one of"),
        (
            [3],
            {"max_tokens": 2},
            InvalidArgumentError,
            "row 3 has a prompt of 2 tokens; max_tokens=2 leaves no response",
        ),
    ],
)
def test_what_is_refused(caches, rows, options, error, message):
    with pytest.raises(error, match=message):
        opd_store.gather(caches["plain"], rows, **options)
