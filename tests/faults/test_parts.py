"""Readers use the parts of a record batch that they asked for, and nothing of the others."""

from __future__ import annotations

import os
import random
import signal
import threading
import warnings
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from faults import corpus
from store.caches import add, assert_same, some_rollouts, write

import opd_store
from fuzz.structure import PartialShard
from opd_store import record_batches
from opd_store import shard as shard_module
from opd_store.shard import part_slices

VARIANT = "plain, ragged, chosen, sampled"
SELECTIONS = [
    # ranks, columns, parts of (scalars, lists, topk_0_2, topk_2_5, chosen, sampled)
    (None, None, {0, 1, 2, 3, 4, 5}),
    (0, (), {0, 1}),
    (0, ("topk_ids", "reward"), {0, 1}),
    (2, ("topk_ids",), {0, 1, 2}),
    (1, ("log_tail", "loss_mask"), {0, 1, 2}),
    (3, ("topk_logprob",), {0, 1, 2, 3}),
    (None, ("chosen_ids",), {0, 1, 4}),
    (2, ("sampled_draws", "topk_ids"), {0, 1, 2, 5}),
]


@pytest.fixture(scope="module")
def path():
    with corpus.memory_folder() as folder:
        corpus.write(folder / "cache", VARIANT, corpus.rollouts(VARIANT, 5), batch_bytes=600)
        yield folder / "cache"


class Recorder(PartialShard):
    """Notes what was asked for."""

    asked: set[int]

    def batch(self, number, parts):
        assert parts[0] == 0
        assert list(parts) == sorted(set(parts))
        self.asked |= set(parts)
        return super().batch(number, parts)


def recorded(path) -> tuple[opd_store.Cache, Recorder]:
    """A cache that gets no more than it asks for."""
    cache = opd_store.open(path)
    (info,) = cache.shards
    source = Recorder((path / info.path).read_bytes(), info)
    source.asked = set()
    cache.shard_reader(0).source = source
    return cache, source


@pytest.mark.parametrize(("ranks", "columns", "parts"), SELECTIONS)
def test_a_selection_needs_its_parts_only(path, ranks, columns, parts):
    intact = opd_store.open(path)
    cache, source = recorded(path)
    assert cache.schema.n_parts == 6
    assert len(cache.batch_rows) > 1
    for row in range(len(cache)):
        found = cache.rollout(row, ranks=ranks, columns=columns)
        assert_same(found, intact.rollout(row, ranks=ranks, columns=columns))
    assert source.asked == parts


def test_a_view_grows_by_what_is_asked_for(path):
    """In any order, with every value checked at its first use."""
    intact = opd_store.open(path)
    for seed in range(20):
        cache, _ = recorded(path)
        for ranks, columns, _ in random.Random(seed).sample(SELECTIONS, len(SELECTIONS)):
            for row in range(len(cache)):
                found = cache.rollout(row, ranks=ranks, columns=columns)
                assert_same(found, intact.rollout(row, ranks=ranks, columns=columns))


@pytest.mark.parametrize("name", ["rollout_hash", "sample_id", "prompt_len", "reward", "finish_reason"])
def test_a_scalar_column_needs_the_first_part_only(path, name):
    cache, source = recorded(path)
    expected = pa.ipc.open_file(path / cache.shards[0].path).read_all().column(name)
    assert cache.column(name) == expected
    assert cache.column(name).num_chunks == len(cache.batch_rows)
    assert source.asked == {0}


def test_only_scalars_are_columns(path):
    cache = opd_store.open(path)
    for name in ("token_ids", "topk_0_2", "topk_ids", "x_a", ""):
        with pytest.raises(opd_store.InvalidArgumentError, match="is not one of rollout_hash"):
            cache.column(name)


def test_columns_of_an_empty_cache(tmp_path):
    write(tmp_path / "cache", [], user_columns={"x_a": "int64"})
    cache = opd_store.open(tmp_path / "cache")
    assert cache.column("x_a").type == pa.int64()
    for array in (cache.column("reward"), cache.row_tokens, cache.row_response_tokens, cache.batch_rows):
        assert len(array) == 0
    cache.prefetch([])


def test_lengths_come_from_the_index(path, monkeypatch):
    values = list(opd_store.open(path))
    monkeypatch.setattr(
        record_batches.LocalStorage, "map_pages", guarded(record_batches.LocalStorage.map_pages)
    )
    cache = opd_store.open(path)
    assert cache.row_tokens.tolist() == [len(value.token_ids) for value in values]
    assert cache.row_response_tokens.tolist() == [value.response_len for value in values]
    assert cache.batch_rows.sum() == len(cache)
    with pytest.raises(ValueError, match="read-only"):
        cache.row_tokens[0] = 1


def guarded(load):
    def map_index(self, name):
        assert name.startswith("index/")
        return load(self, name)

    return map_index


@pytest.mark.parametrize("damaged", range(6))
def test_damage_is_of_one_part(path, tmp_path, damaged):
    """What does not need the damaged bytes is read; what needs them is refused."""
    cache = opd_store.open(path)
    (info,) = cache.shards
    data = bytearray((path / info.path).read_bytes())
    offset, length, _ = part_slices(info, 0)[damaged]
    data[offset + length // 2] ^= 1
    for ranks, columns, parts in SELECTIONS:
        reader = opd_store.open(path).shard_reader(0)
        reader.source._buffer = pa.py_buffer(bytes(data))
        wanted = cache.schema.parts(ranks, columns)
        assert set(wanted) == parts
        if damaged in parts:
            with pytest.raises(opd_store.IntegrityError, match=rf"bytes \[{offset}, {offset + length}\)"):
                reader.batch(0, wanted)
        else:
            assert reader.batch(0, wanted).num_rows == cache.batch_rows[0]
        assert reader.batch(1, wanted).num_rows == cache.batch_rows[1]


def test_part_slices_cover_the_record_batches(path):
    (info,) = opd_store.open(path).shards
    position = info.regions[0].length
    for number in range(info.n_batches):
        for offset, length, _ in part_slices(info, number):
            assert offset == position
            position += length
    assert position == info.regions[-1].offset


@pytest.fixture
def many(tmp_path):
    """Six shards in as many versions."""
    values = some_rollouts(6)
    write(tmp_path / "cache", values[:1])
    for value in values[1:]:
        add(tmp_path / "cache", [value])
    assert opd_store.open(tmp_path / "cache").n_shards == 6
    return tmp_path / "cache", values


def test_closed_shards_stay_proven(many, monkeypatch):
    path, values = many
    monkeypatch.setattr(record_batches, "_OPEN_SHARDS", 2)
    monkeypatch.setattr(record_batches, "_OPEN_BATCHES", 1)
    counts: Counter[str] = Counter()

    def counted(name, call):
        def run(*args, **more):
            counts[name] += 1
            return call(*args, **more)

        return run

    monkeypatch.setattr(shard_module, "crc32c", counted("crc", shard_module.crc32c))
    monkeypatch.setattr(shard_module, "require_in_place", counted("parse", shard_module.require_in_place))
    monkeypatch.setattr(
        record_batches.LocalStorage, "map_pages", counted("map", record_batches.LocalStorage.map_pages)
    )
    cache = opd_store.open(path)
    for _ in range(3):
        for found, value in zip(cache, values, strict=True):
            assert_same(found, value)
        assert len(cache._batches._open) == 2
    n_tables = len(cache.manifest.segments)
    # Head, footer and three parts of each; mapped anew in each round.
    assert counts == {"crc": 6 * 5, "parse": 6, "map": 3 * 6 + n_tables}


def test_another_file_under_the_name_is_checked_anew(many, monkeypatch):
    path, values = many
    monkeypatch.setattr(record_batches, "_OPEN_SHARDS", 1)
    monkeypatch.setattr(record_batches, "_OPEN_BATCHES", 1)
    cache = opd_store.open(path)
    for row, value in enumerate(values):
        assert_same(cache[row], value)
    shard = path / cache.shards[0].path
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    (path / "other").write_bytes(data)
    os.replace(path / "other", shard)
    with pytest.raises(opd_store.IntegrityError, match="crc32c"):
        cache[0]
    assert_same(cache[1], values[1])


def test_many_threads(many, monkeypatch):
    path, values = many
    monkeypatch.setattr(record_batches, "_OPEN_SHARDS", 2)
    monkeypatch.setattr(record_batches, "_OPEN_BATCHES", 2)
    cache = opd_store.open(path)
    errors = []

    def read(seed: int) -> None:
        rng = random.Random(seed)
        try:
            for _ in range(200):
                row = rng.randrange(len(values))
                ranks = rng.choice((0, 1, None))
                found = cache.rollout(row, ranks=ranks)
                assert found.token_ids.tobytes() == values[row].token_ids.tobytes()
                if ranks is None:
                    assert_same(found, values[row])
                assert cache.find(cache.row_hash(row)) == row
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_a_child_forked_while_a_thread_reads(many):
    path, _ = many
    cache = opd_store.open(path)
    with warnings.catch_warnings():
        # Later releases of Python warn of any fork beside threads.
        warnings.simplefilter("ignore", DeprecationWarning)
        with cache._batches._lock:
            child = os.fork()
            if not child:
                signal.alarm(20)
                os._exit(0 if cache[3].sample_id == "r3" else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_prefetch_of_what_is_not_there(path):
    cache = opd_store.open(path)
    cache.prefetch(np.arange(len(cache)), ranks=2)
    for rows in ([len(cache)], [-1], [0, 99]):
        with pytest.raises(IndexError, match="of 5"):
            cache.prefetch(rows)
    with pytest.raises(opd_store.InvalidArgumentError, match="ranks"):
        cache.prefetch([0], ranks=99)
    with pytest.raises(opd_store.InvalidArgumentError, match="columns"):
        cache.prefetch([0], columns=("colour",))
