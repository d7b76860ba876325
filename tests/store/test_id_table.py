"""Id tables: built the same everywhere, kept once beside the shards, the same in every version."""

from __future__ import annotations

import collections
import dataclasses
import inspect
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store.caches import VOCAB, add, assert_holds, files, run_python, some_rollouts, write

import opd_store
from opd_store import IdTable, build_id_table, layout
from opd_store.errors import FormatError
from opd_store.manifest import Manifest, decode_manifest, encode_manifest
from opd_store.testing import example_meta, peaked_topk, random_topk, shortened
from opd_store.writer import table_ref

BIG = 300
PACKED = [name for name in opd_store.ENCODINGS if name != "plain"]


def rows(seed: int = 0, *, positions: int = 40, topk: int = 9, vocab_size: int = BIG) -> np.ndarray:
    return peaked_topk(np.random.default_rng(seed), positions, topk, vocab_size).ids


def same(left: IdTable | None, right: IdTable | None) -> bool:
    assert left is not None
    assert right is not None
    equal = (
        left.by_rank.tobytes() == right.by_rank.tobytes() and left.lists.tobytes() == right.lists.tobytes()
    )
    assert equal == (left.digest == right.digest) == (left.to_bytes() == right.to_bytes())
    return equal


# Building.


@settings(deadline=None, max_examples=15)
@given(
    seed=st.integers(0, 2**32 - 1),
    vocab_size=st.sampled_from([5, 254, 255, 256, 400]),
    n_lists=st.none() | st.integers(0, 5),
    ragged=st.booleans(),
)
def test_a_table_names_every_id_once(seed, vocab_size, n_lists, ragged):
    rng = np.random.default_rng(seed)
    band = random_topk(rng, 30, 5, vocab_size)
    ids = shortened(rng, band).ids if ragged else band.ids
    table = build_id_table([ids[:13], ids[13:]], vocab_size=vocab_size, n_lists=n_lists)
    times = collections.Counter(ids[ids != layout.NO_ID].tolist())
    assert table.by_rank.tolist() == sorted(range(vocab_size), key=lambda token: (-times[token], token))
    assert table.rank_of[table.by_rank].tolist() == list(range(vocab_size))
    expected = 0 if vocab_size < 255 else 16 if n_lists is None else n_lists
    assert table.lists.shape == (expected, 255)
    for ids_of_list in table.lists.tolist():
        assert len(set(ids_of_list)) == 255
        assert max(ids_of_list) < vocab_size
    assert same(table, build_id_table([ids], vocab_size=vocab_size, n_lists=n_lists))
    assert same(table, IdTable.from_bytes(np.frombuffer(table.to_bytes(), np.uint8), where="test"))


def test_padding_teaches_nothing():
    ids = rows()
    padded = np.pad(ids, ((0, 0), (0, 3)), constant_values=layout.NO_ID)
    assert same(build_id_table([padded], vocab_size=BIG), build_id_table([ids], vocab_size=BIG))


def test_rows_without_an_id_teach_nothing():
    """In a process of little memory: an array for every id up to the padding would have 32 GB."""
    code = inspect.cleandoc("""
        import resource, numpy as np, opd_store
        resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
        ids = np.arange(300 * 9, dtype=np.uint32).reshape(300, 9) % 300
        padded = np.vstack([ids, np.full((5, 9), 2**32 - 1, np.uint32)])
        table = opd_store.build_id_table([padded], vocab_size=300)
        print((table.by_rank == opd_store.build_id_table([ids], vocab_size=300).by_rank).all())
    """)
    assert run_python(code) == "True\n"


def test_more_positions_give_more_lists():
    table = build_id_table([rows(positions=128 * 17)], vocab_size=BIG)
    assert len(table.lists) == 17


@pytest.mark.parametrize(
    ("blocks", "options", "message"),
    [
        ([], {}, "expected at least one row"),
        ([np.empty((0, 4), np.uint32)], {}, "expected at least one row"),
        ([rows(topk=3), rows(topk=4)], {}, "all of the same number of ranks"),
        ([np.array([[1, BIG]], np.uint32)], {}, "outside the vocabulary of 300"),
        ([rows()], {"n_lists": -1}, r"n_lists: expected 0\.\.4096, found -1"),
        ([rows()], {"n_lists": 4097}, "found 4097"),
    ],
)
def test_rows_that_no_table_can_be_learnt_from(blocks, options, message):
    with pytest.raises(opd_store.InvalidArgumentError, match=message):
        build_id_table(blocks, vocab_size=BIG, **options)


@pytest.mark.parametrize("ragged", [False, True])
def test_every_row_takes_the_list_of_the_shortest_code(ragged):
    table = build_id_table([rows(positions=200)], vocab_size=BIG, n_lists=6)
    band = peaked_topk(np.random.default_rng(8), 50, 12, BIG)
    ids = shortened(np.random.default_rng(9), band).ids if ragged else band.ids
    present = ids != layout.NO_ID
    found = table.choose(ids, present if ragged else None)
    places = [{token: place for place, token in enumerate(row)} for row in table.lists.tolist()]
    for at, row in enumerate(ids.tolist()):
        costs = []
        for place in places:
            codes = [place.get(token, 255) for token in row if token != layout.NO_ID]
            # Tenths of a bit: measured lengths of codes and of the escape.
            costs.append(sum(165 if c == 255 else round(40 + 6 * math.log2(c + 4)) for c in codes))
        assert found[at] == costs.index(min(costs))
    assert len(set(found.tolist())) > 2
    codes = table.codes(ids[present], np.repeat(found, present.sum(axis=1)))
    expected = [
        places[number].get(token, 255)
        for number, row in zip(found, ids.tolist(), strict=True)
        for token in row
        if token != layout.NO_ID
    ]
    assert codes.tolist() == expected
    assert 255 in expected


# The file.

SMALL = build_id_table([random_topk(np.random.default_rng(0), 20, 5, 260).ids], vocab_size=260, n_lists=1)


def read(data: bytes) -> IdTable:
    return IdTable.from_bytes(np.frombuffer(data, np.uint8), where="the file")


def test_a_cut_or_extended_file_is_refused():
    data = SMALL.to_bytes()
    for length in range(len(data)):
        with pytest.raises(FormatError, match="the file"):
            read(data[:length])
    with pytest.raises(FormatError, match="1 bytes after the last stream"):
        read(data + b"\0")


def test_a_changed_byte_is_refused_or_still_a_table():
    """The digest finds every change; this is what keeps a table made by somebody else in bounds."""
    data = SMALL.to_bytes()
    refused = 0
    for position in range(len(data)):
        for bit in (0, 3, 7):
            damaged = bytearray(data)
            damaged[position] ^= 1 << bit
            try:
                table = read(bytes(damaged))
            except FormatError:
                refused += 1
                continue
            assert sorted(table.by_rank.tolist()) == list(range(table.vocab_size))
            assert all(len(set(ids)) == 255 for ids in table.lists.tolist())
    # Most changes name an id twice; the others exchange ids of the list.
    assert refused > 2 * len(data)


# In a cache.


def tables(path: Path) -> dict[str, bytes]:
    return {name: data for name, data in files(path).items() if name.startswith("tables/")}


def uses_table(path: Path) -> list[bool]:
    """Whether the first page of each row refers to an id table, by the flag in its header."""
    cache = opd_store.open(path)
    used = []
    for shard in cache.shards:
        table = pa.ipc.open_file(str(path / shard.path)).read_all()
        pages = table[cache.schema.packed_columns()[0].name].to_pylist()
        used += [bool(page[1] & layout.PAGE_USES_TABLE) for page in pages]
    return used


@pytest.mark.parametrize("n_lists", [0, 3])
@pytest.mark.parametrize("encoding", PACKED)
def test_a_given_table_is_kept_once_and_reused(tmp_path, encoding, n_lists):
    values = some_rollouts(6, topk=9, vocab_size=BIG, chosen=3, sampled=2, peaked=True)
    table = build_id_table([rows()], vocab_size=BIG, n_lists=n_lists)
    options = {"meta": example_meta(BIG), "topk": 9, "chosen": 3, "sampled": 2, "encoding": encoding}
    path = tmp_path / "one"
    write(path, values[:2], id_table=table, **options)
    name = f"tables/{table.digest.hex()}.ids"
    assert tables(path) == {name: table.to_bytes()}
    before = (path / name).stat()
    add(path, values[2:4])
    add(path, values[4:])
    after = (path / name).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert tables(path) == {name: table.to_bytes()}
    cache = opd_store.open(path)
    assert same(cache.id_table, table)
    assert cache.schema.id_table == "given"
    assert uses_table(path) == [True] * 6
    stored = sum(len(data) for name, data in files(path).items() if not name.startswith("manifests/"))
    old_index = stored - cache.n_bytes
    assert old_index == sum(len(data) for name, data in files(path).items() if is_old_index(cache, name))
    # Another cache of the same teacher.
    write(tmp_path / "two", values, id_table=cache.id_table, **options)
    assert tables(tmp_path / "two") == tables(path)
    other = opd_store.open(tmp_path / "two")
    for left, right in zip(cache, other, strict=True):
        assert left.topk_ids.tobytes() == right.topk_ids.tobytes()
        assert left.chosen_logprob.tobytes() == right.chosen_logprob.tobytes()
    for where in (path, tmp_path / "two"):
        assert opd_store.verify(where).problems == []
    if encoding == "f32":
        assert_holds(cache, values)


def is_old_index(cache: opd_store.Cache, name: str) -> bool:
    """An index file of an earlier version."""
    refs = [ref.path for segment in cache.manifest.segments for ref in (segment.shards, segment.rollouts)]
    return name.startswith("index/") and name not in refs


@pytest.mark.parametrize("encoding", PACKED)
def test_a_table_is_learnt_once_enough_positions_are_there(tmp_path, monkeypatch, encoding):
    monkeypatch.setattr("opd_store.writer.TABLE_POSITIONS", 10)
    values = some_rollouts(8, topk=9, vocab_size=BIG, chosen=3)
    options = {"meta": example_meta(BIG), "topk": 9, "chosen": 3, "encoding": encoding}
    path = tmp_path / "cache"
    with opd_store.create(path, **options) as writer:
        # Three positions each: the fifth is the first that finds ten.
        for number, value in enumerate(values[:4]):
            writer.append(value)
            writer.append(values[0])
            if number < 3:
                writer.commit()
        writer.commit()
        assert opd_store.open(path).id_table is None
        assert tables(path) == {}
        writer.append(values[4])
        writer.commit()
        (name,) = tables(path)
        writer.append_batch(values[5:])
    cache = opd_store.open(path)
    assert cache.schema.id_table == "auto"
    assert list(tables(path)) == [name]
    assert uses_table(path) == [False] * 4 + [True] * 4
    learnt = build_id_table([value.topk_ids for value in values[:4]], vocab_size=BIG)
    assert same(cache.id_table, learnt)
    assert opd_store.verify(path).problems == []
    for found, value in zip(cache, values, strict=True):
        assert np.sort(found.topk_ids, axis=1).tolist() == np.sort(value.topk_ids, axis=1).tolist()
    if encoding == "f32":
        assert_holds(cache, values)
    # Versions from before the table stay readable.
    first = decode_manifest((path / "manifests/00000003.json").read_bytes(), where="test")
    assert first.id_table is None


CONTINUED = {
    "exact": {"encoding": "f32"},
    "small vocabulary": {"encoding": "f32", "meta": example_meta(200)},
    "rounded": {"encoding": "ladder/128"},
    "ties": {"encoding": "ladder/32"},
    "ties of float16": {"encoding": "ladder16"},
    "cut": {"encoding": "f32", "cut": opd_store.Cut("probability", 0.05)},
    "given": {"encoding": "f32", "cut": opd_store.Cut("given")},
}
# Stored otherwise than given; the table has to be learnt from what is stored.
STORED_OTHERWISE = ("ties", "cut", "rounded", "ties of float16")


@pytest.mark.parametrize("name", CONTINUED)
def test_a_stopped_writer_is_continued_to_the_same_cache(tmp_path, monkeypatch, name):
    monkeypatch.setattr("opd_store.writer.TABLE_POSITIONS", 300)
    options = {"meta": example_meta(BIG), "topk": 9} | CONTINUED[name]
    vocab_size = options["meta"].vocab_size
    ragged = name == "given"
    values = some_rollouts(9, topk=9, response_len=60, vocab_size=vocab_size, ragged=ragged)
    if name in STORED_OTHERWISE:
        # Nearly even rows, given in falling order of almost equal values.
        even = [close_rows(np.random.default_rng(i), 60, 9, vocab_size) for i in range(9)]
        values = [dataclasses.replace(v, **fields) for v, fields in zip(values, even, strict=True)]
    one, many = tmp_path / "one", tmp_path / "many"
    with opd_store.create(one, **options) as writer:
        for value in values:
            writer.append(value)
            writer.commit()
    write(many, values[:1], **options)
    for value in values[1:]:
        add(many, [value])
    assert files(many) == files(one)
    assert uses_table(one) == [False] * 5 + [True] * 4


def close_rows(rng: np.random.Generator, positions: int, topk: int, vocab_size: int) -> dict[str, np.ndarray]:
    """Top-k of values so close that most encodings make them equal, in random order of their ids."""
    ids = np.argsort(rng.random((positions, vocab_size)), axis=1)[:, :topk].astype(np.uint32)
    logprob = (-3 - np.arange(topk) * 1e-5 - (np.arange(topk) > 4)).astype(np.float32)
    return {
        "topk_ids": ids,
        "topk_logprob": np.tile(logprob, (positions, 1)),
        "log_tail": np.full(positions, -0.5, np.float32),
    }


@pytest.mark.parametrize("encoding", ["f32", "ladder/64"])
def test_commits_at_other_places_give_the_same_shards(tmp_path, monkeypatch, encoding):
    monkeypatch.setattr("opd_store.writer.TABLE_POSITIONS", 20)
    values = some_rollouts(12, topk=9, vocab_size=BIG)
    options = {"batch_bytes": 1, "shard_bytes": 1}
    found = []
    for number, ends in enumerate([(12,), (1, 2, 3, 12), (6, 7, 8, 12), (5, 12)]):
        path = tmp_path / str(number)
        start = 0
        with opd_store.create(path, meta=example_meta(BIG), topk=9, encoding=encoding, **options) as writer:
            for end in ends:
                writer.append_batch(values[start:end])
                writer.commit()
                start = end
        found.append({name: data for name, data in files(path).items() if name.startswith(("shards", "tab"))})
        assert len(found[-1]) == 13
    assert found[1:] == found[:1] * 3


WRITE = inspect.cleandoc("""
    import sys, opd_store, opd_store.writer
    from opd_store.testing import example_meta
    from store.caches import some_rollouts
    opd_store.writer.TABLE_POSITIONS = 100
    values = some_rollouts(9, topk=9, response_len=40, vocab_size=300, peaked=True, chosen=3, sampled=4)
    for number, encoding in enumerate(opd_store.ENCODINGS):
        options = {"topk": 9, "chosen": 3, "sampled": 4, "encoding": encoding, "bands": (2, 9)}
        with opd_store.create(f"{sys.argv[1]}/{number}", meta=example_meta(300), **options) as writer:
            writer.append_batch(values)
""")


def test_every_process_writes_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr("opd_store.writer.TABLE_POSITIONS", 100)
    environments = [
        {
            "PYTHONHASHSEED": "1",
            "MALLOC_PERTURB_": "165",
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        },
        {"PYTHONHASHSEED": "2", "MALLOC_PERTURB_": "90", "OMP_NUM_THREADS": "3", "OPENBLAS_NUM_THREADS": "3"},
    ]
    for number, environment in enumerate(environments):
        run_python(WRITE, tmp_path / str(number), **environment)
    first = files(tmp_path / "0")
    assert first == files(tmp_path / "1")
    assert sum("/tables/" in name for name in first) == len(PACKED)
    # And so does one that did other work before.
    exec_here(tmp_path / "2")
    assert files(tmp_path / "2") == first


def exec_here(path: Path) -> None:
    values = some_rollouts(9, topk=9, response_len=40, vocab_size=300, peaked=True, chosen=3, sampled=4)
    for number, encoding in enumerate(opd_store.ENCODINGS):
        options = {"topk": 9, "chosen": 3, "sampled": 4, "encoding": encoding, "bands": (2, 9)}
        with opd_store.create(path / str(number), meta=example_meta(300), **options) as writer:
            writer.append_batch(values)


# What cannot work.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoding": "plain", "id_table": SMALL}, "expected none for plain pages, found 'given'"),
        ({"encoding": "f32", "id_table": SMALL, "topk": 0}, "found 'given'"),
        ({"encoding": "f32", "id_table": SMALL}, "made for a vocabulary of 260, the cache has 300"),
        ({"encoding": "f32", "id_table": "yes"}, "expected an IdTable, \"auto\" or None, found 'yes'"),
    ],
)
def test_a_table_that_cannot_be_used(tmp_path, options, message):
    with pytest.raises(opd_store.InvalidArgumentError, match=message):
        opd_store.create(tmp_path / "cache", meta=example_meta(BIG), **({"topk": 9} | options))
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("options", "policy"),
    [
        ({"topk": 9}, "none"),
        ({"topk": 0, "encoding": "f32"}, "none"),
        ({"topk": 0, "chosen": 3, "encoding": "f32"}, "none"),
        ({"topk": 9, "encoding": "f32", "id_table": None}, "none"),
        ({"topk": 9, "encoding": "f32"}, "auto"),
    ],
)
def test_caches_without_a_table(tmp_path, monkeypatch, options, policy):
    monkeypatch.setattr("opd_store.writer.TABLE_POSITIONS", 1)
    values = some_rollouts(3, topk=options["topk"], chosen=options.get("chosen", 0), vocab_size=BIG)
    write(tmp_path / "cache", values, meta=example_meta(BIG), **options)
    cache = opd_store.open(tmp_path / "cache")
    assert cache.schema.id_table == policy
    assert (cache.id_table is None) == (tables(tmp_path / "cache") == {}) == (policy == "none")
    assert_holds(cache, values)


@pytest.fixture
def written(tmp_path):
    """A cache with a table, and the path of the table's file."""
    table = build_id_table([rows(vocab_size=VOCAB)], vocab_size=VOCAB)
    path = tmp_path / "cache"
    write(path, some_rollouts(4, topk=9), topk=9, encoding="f32", id_table=table)
    (name,) = tables(path)
    return path, path / name


def first_page(path: Path) -> object:
    """The first use of the table."""
    cache = opd_store.open(path)
    assert cache.rollout(0, ranks=0).topk_ids is None
    return cache[0]


def test_a_missing_table_is_found_when_it_is_needed(written):
    path, table = written
    table.unlink()
    for call in (first_page, opd_store.append, opd_store.verify):
        with pytest.raises(opd_store.IntegrityError, match=f"{table}: missing"):
            call(path)


@pytest.mark.parametrize("damage", ["cut", "extended", "changed", "another", "empty"])
def test_a_damaged_table_is_found_when_it_is_needed(written, damage):
    path, table = written
    data = table.read_bytes()
    changed = bytearray(data)
    changed[len(data) // 2] ^= 1
    other = build_id_table([rows(5, vocab_size=VOCAB)], vocab_size=VOCAB).to_bytes()
    table.write_bytes(
        {"cut": data[:-1], "extended": data + b"\0", "changed": changed, "another": other, "empty": b""}[
            damage
        ]
    )
    for call in (first_page, opd_store.append, opd_store.verify):
        with pytest.raises(opd_store.OpdError, match=str(table)) as caught:
            call(path)
        if damage != "empty":
            assert isinstance(caught.value, opd_store.IntegrityError)


def rewrite(path: Path, **changes: object) -> None:
    """The newest manifest with other content and a right checksum, as nobody should write it."""
    name = max((path / "manifests").iterdir())
    manifest = decode_manifest(name.read_bytes(), where="test")
    fields = {field.name: getattr(manifest, field.name) for field in dataclasses.fields(Manifest)}
    name.write_bytes(encode_manifest(Manifest(**(fields | changes))))


def test_pages_of_another_table_fail_verification(written):
    path, _ = written
    other = build_id_table([rows(5, vocab_size=VOCAB)], vocab_size=VOCAB)
    (path / f"tables/{other.digest.hex()}.ids").write_bytes(other.to_bytes())
    rewrite(path, id_table=table_ref(other))
    problems = opd_store.verify(path).problems
    assert len(problems) == 4
    for row, problem in enumerate(problems):
        assert isinstance(problem, opd_store.IntegrityError)
        assert f"row {row}, column topk_0_8: page checksum" in str(problem)


def test_pages_that_refer_to_a_table_that_is_not_there(written):
    path, _ = written
    schema = dataclasses.replace(opd_store.open(path).schema, id_table="none")
    rewrite(path, id_table=None, schema=schema)
    with pytest.raises(FormatError, match=r"row 0, column topk_0_8: .* an id table"):
        opd_store.open(path)[0]
    problems = opd_store.verify(path).problems
    assert len(problems) == 4
    assert all("refers to an id table, and the cache has none" in str(problem) for problem in problems)


def test_a_table_for_another_vocabulary(written):
    path, _ = written
    (path / f"tables/{SMALL.digest.hex()}.ids").write_bytes(SMALL.to_bytes())
    rewrite(path, id_table=table_ref(SMALL))
    with pytest.raises(FormatError, match="id table of 260 ids, the vocabulary has 100"):
        first_page(path)


# Several writers.


def test_two_writers_with_different_tables(tmp_path):
    """Two creators: the slower one's pages refer to a table that the cache will not have."""
    values = some_rollouts(4, topk=9)
    ours, theirs = (build_id_table([rows(i, vocab_size=VOCAB)], vocab_size=VOCAB) for i in (1, 2))
    options = {"meta": example_meta(VOCAB), "topk": 9, "encoding": "f32"}
    path = tmp_path / "cache"
    slow = opd_store.create(path, id_table=ours, **options)
    slow.append(values[0])
    write(path, values[1:2], id_table=theirs, **options)
    with pytest.raises(
        opd_store.CommitConflictError, match="version 1, by another writer, has another id table"
    ):
        slow.commit()
    slow.close()
    # The same table is no conflict.
    slow = opd_store.create(tmp_path / "other", id_table=ours, **options)
    slow.append(values[0])
    write(tmp_path / "other", values[1:2], id_table=ours, **options)
    slow.commit()
    slow.close()
    for where, expected in ((path, values[1:2]), (tmp_path / "other", [values[1], values[0]])):
        assert_holds(opd_store.open(where), expected)
        assert opd_store.verify(where).problems == []


def test_two_writers_that_learnt_different_tables(tmp_path, monkeypatch):
    monkeypatch.setattr("opd_store.writer.TABLE_POSITIONS", 5)
    values = some_rollouts(7, topk=9)
    path = tmp_path / "cache"
    write(path, [], topk=9, encoding="f32")
    slow = opd_store.append(path)
    slow.append_batch(values[:3])
    add(path, values[3:6])
    with pytest.raises(opd_store.CommitConflictError, match="another id table"):
        slow.commit()
    slow.close()
    add(path, [*values[:3], values[6]])
    assert_holds(opd_store.open(path), [*values[3:6], *values[:3], values[6]])
    assert opd_store.verify(path).problems == []


@pytest.mark.parametrize("n_after", [1, 4])
def test_a_writer_goes_on_with_the_table_of_another(tmp_path, monkeypatch, n_after):
    """It had none yet, so both fit together; it does not learn one of its own any more."""
    monkeypatch.setattr("opd_store.writer.TABLE_POSITIONS", 10)
    values = some_rollouts(20, topk=9)
    path = tmp_path / "cache"
    write(path, [], topk=9, encoding="f32")
    slow = opd_store.append(path)
    slow.append(values[0])
    add(path, values[1:8])
    learnt = opd_store.open(path).id_table
    assert learnt is not None
    slow.commit()
    for value in values[8 : 8 + n_after]:
        slow.append(value)
    slow.commit()
    slow.close()
    cache = opd_store.open(path)
    assert same(cache.id_table, learnt)
    assert opd_store.verify(path).problems == []
    assert_holds(cache, [*values[1:8], values[0], *values[8 : 8 + n_after]])
    assert uses_table(path) == [False] * 4 + [True] * 3 + [False] + [True] * n_after
