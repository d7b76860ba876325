"""Arrays are views of the mapped file, and nobody can write through them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from store.caches import ARRAYS, some_rollouts, write

import opd_store


def mapped(path: Path) -> list[tuple[int, int]]:
    """Address ranges at which this process maps a file."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    ranges = [line.split()[0] for line in lines if line.endswith(str(path))]
    return [(int(a, 16), int(b, 16)) for a, b in (text.split("-") for text in ranges)]


def is_view_of(array: np.ndarray, path: Path) -> bool:
    start = array.__array_interface__["data"][0]
    return any(a <= start and start + array.nbytes <= b for a, b in mapped(path))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A cache of one shard with bands 4, 8, 20, and its shard file."""
    path = tmp_path_factory.mktemp("zero_copy") / "cache"
    write(path, some_rollouts(7, topk=20), topk=20, bands=(4, 8, 20), batch_bytes=4000)
    (shard,) = (path / "shards").iterdir()
    return path, shard


@pytest.mark.parametrize("row", [0, 3, 6])
def test_native_columns_are_views(place, row):
    path, shard = place
    rollout = opd_store.open(path)[row]
    for name in ("token_ids", "loss_mask", "teacher_logprob", "behaviour_logprob", "reference_logprob"):
        assert is_view_of(getattr(rollout, name), shard), name


@pytest.mark.parametrize("row", [0, 3, 6])
def test_the_first_band_is_a_view(place, row):
    path, shard = place
    rollout = opd_store.open(path).rollout(row, ranks=4)
    for name in ("topk_ids", "topk_logprob", "log_tail"):
        assert is_view_of(getattr(rollout, name), shard), name
        assert getattr(rollout, name).flags.aligned, name


def test_fewer_ranks_than_the_first_band_copy_only_the_tail(place):
    path, shard = place
    rollout = opd_store.open(path).rollout(1, ranks=3)
    assert is_view_of(rollout.topk_ids, shard)
    assert is_view_of(rollout.topk_logprob, shard)
    assert not is_view_of(rollout.log_tail, shard)


def test_a_single_band_is_a_view(tmp_path):
    write(tmp_path / "cache", some_rollouts(3, topk=8), topk=8)
    (shard,) = (tmp_path / "cache/shards").iterdir()
    for rollout in opd_store.open(tmp_path / "cache"):
        assert is_view_of(rollout.topk_logprob, shard)


def test_joined_bands_are_copies(place):
    """The check above is able to say no."""
    path, shard = place
    assert not is_view_of(opd_store.open(path).rollout(0).topk_ids, shard)


def test_views_are_read_only(place):
    path, _ = place
    rollout = opd_store.open(path).rollout(2, ranks=4)
    for name in ARRAYS:
        array = getattr(rollout, name)
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0
        with pytest.raises(ValueError, match="WRITEABLE"):
            array.flags.writeable = True


def test_views_outlive_their_cache(place):
    path, _ = place
    rollout = opd_store.open(path)[5]
    expected = some_rollouts(7, topk=20)[5]
    assert rollout.token_ids.tobytes() == expected.token_ids.tobytes()
    assert rollout.teacher_logprob.tobytes() == expected.teacher_logprob.tobytes()
