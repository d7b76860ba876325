"""Positions of different lengths, ids that somebody else chose, and ids that were drawn."""

from __future__ import annotations

import math
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from store import supports
from store.caches import VOCAB, add, assert_holds, assert_same, some_rollouts, write
from store.supports import naive_tail

import opd_store
from opd_store import ENCODINGS, Cut, build_id_table, layout
from opd_store.encodings import Band
from opd_store.testing import example_meta, rollouts

NO_ID = layout.NO_ID


def bands_of(rollout: opd_store.Rollout) -> dict[str, Band]:
    return {
        "topk": Band(rollout.topk_ids, rollout.topk_logprob, rollout.log_tail),
        "chosen": Band(rollout.chosen_ids, rollout.chosen_logprob, rollout.chosen_log_tail),
        "sampled": Band(
            rollout.sampled_ids, rollout.sampled_logprob, rollout.sampled_log_tail, rollout.sampled_draws
        ),
    }


def padded(rollout: opd_store.Rollout, **sizes: int) -> opd_store.Rollout:
    """Arrays as wide as the cache stores them."""
    fields = {}
    for kind, size in sizes.items():
        for name, value in (("ids", NO_ID), ("logprob", -np.inf), ("draws", 0)):
            array = getattr(rollout, f"{kind}_{name}", None)
            if array is not None:
                room = ((0, 0), (0, size - array.shape[1]))
                fields[f"{kind}_{name}"] = np.pad(array, room, constant_values=value)
    return replace(rollout, **fields)


# Whole caches of every encoding.


@pytest.mark.parametrize("encoding", ENCODINGS)
@settings(deadline=None, max_examples=6)
@given(data=st.data(), cut=st.booleans(), table=st.booleans())
def test_everything_comes_back_from_a_cache(encoding, data, cut, table):
    sizes = {"topk": 9, "chosen": 4, "sampled": 5}
    value = data.draw(rollouts(vocab_size=VOCAB, ragged=cut, **sizes))
    bands = data.draw(supports.band_ends(9))
    options = {"encoding": encoding, "bands": bands, **sizes}
    if cut:
        options["cut"] = Cut("given")
    if table and encoding != "plain":
        ids = some_rollouts(1, topk=9, response_len=40)[0].topk_ids
        options["id_table"] = build_id_table([ids], vocab_size=VOCAB)
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "cache"
        write(path, [value], **options)
        assert opd_store.verify(path).problems == []
        cache = opd_store.open(path)
        found = cache[0]
        for kind, given_band in bands_of(value).items():
            supports.assert_decoded(bands_of(found)[kind], given_band, encoding)
        if encoding in ("plain", "f32"):
            assert_same(found, value)
            assert cache.max_error == 0
        for ranks in range(1, 10):
            part = cache.rollout(0, ranks=ranks, columns=["topk_ids", "chosen_ids"])
            assert part.topk_ids.tobytes() == np.ascontiguousarray(found.topk_ids[:, :ranks]).tobytes()
            assert (
                part.topk_logprob.tobytes() == np.ascontiguousarray(found.topk_logprob[:, :ranks]).tobytes()
            )
            assert part.chosen_ids.tobytes() == found.chosen_ids.tobytes()
            assert part.sampled_ids is None
            tail = naive_tail(bands_of(found)["topk"], ranks)
            np.testing.assert_allclose(part.log_tail, tail, rtol=0, atol=2 * cache.max_error + 1e-5)


# Rules that cut the top-k.


(DOZEN,) = some_rollouts(1, topk=12)


def slow_cut(rollout: opd_store.Rollout, cut: Cut) -> list[tuple[list[int], float]]:
    """Kept ids and tail of every position, in float64 and one rank after the other."""
    rows = []
    for ids, logprobs, log_tail in zip(
        rollout.topk_ids.tolist(), rollout.topk_logprob.tolist(), rollout.log_tail.tolist(), strict=True
    ):
        kept, mass, outside = [], 0.0, [log_tail]
        for rank, (token, logprob) in enumerate(zip(ids, logprobs, strict=True)):
            if token == NO_ID:
                continue
            enough = math.exp(logprob) >= cut.value if cut.rule == "probability" else mass < cut.value
            if rank == 0 or enough:
                kept.append(token)
            else:
                outside.append(logprob)
            mass += math.exp(logprob)
        total = math.fsum(map(math.exp, outside))
        rows.append((kept, min(math.log(total), 0.0) if total else -math.inf))
    return rows


@pytest.mark.parametrize("rule", ["probability", "mass"])
@settings(deadline=None, max_examples=15)
@given(
    encoding=st.sampled_from(["plain", "f32"]),
    rollout=rollouts(vocab_size=VOCAB, topk=12),
    ragged=rollouts(vocab_size=VOCAB, topk=12, ragged=True),
    value=st.floats(1e-6, 1, exclude_max=True),
)
@example(encoding="f32", rollout=DOZEN, ragged=DOZEN, value=0.999999)
@example(encoding="plain", rollout=DOZEN, ragged=DOZEN, value=1e-300)
def test_a_rule_keeps_what_it_says(rule, encoding, rollout, ragged, value):
    cut = Cut(rule, value)
    values = [replace(rollout, sample_id="whole"), replace(ragged, sample_id="ragged")]
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "cache"
        write(path, values, topk=12, bands=(2, 12), encoding=encoding, cut=cut)
        cache = opd_store.open(path)
        assert cache.schema.cut == cut
        assert opd_store.verify(path).problems == []
        for found, given_rollout in zip(cache, values, strict=True):
            ids, logprobs, offsets = found.ragged_topk()
            for at, (kept, tail) in enumerate(slow_cut(given_rollout, cut)):
                row = slice(offsets[at], offsets[at + 1])
                assert ids[row].tolist() == kept
                n = len(kept)
                assert logprobs[row].tobytes() == given_rollout.topk_logprob[at, :n].tobytes()
                assert (found.topk_ids[at, n:] == NO_ID).all()
                assert np.isneginf(found.topk_logprob[at, n:]).all()
                if n == (given_rollout.topk_ids[at] != NO_ID).sum():
                    assert found.log_tail[at] == given_rollout.log_tail[at]
                else:
                    np.testing.assert_allclose(found.log_tail[at], tail, rtol=2.0**-22, atol=2.0**-22)


@pytest.mark.parametrize(("rule", "value"), [("probability", 0.9), ("mass", 1e-9)])
def test_the_first_rank_always_stays(tmp_path, rule, value):
    rollout = replace(
        some_rollouts(1, topk=2)[0],
        topk_logprob=np.full((3, 2), -9, np.float32),
        topk_ids=np.array([[1, 2], [3, 4], [5, 6]], np.uint32),
        log_tail=np.zeros(3, np.float32),
    )
    write(tmp_path / "cache", [rollout], topk=2, cut=Cut(rule, value))
    found = opd_store.open(tmp_path / "cache")[0]
    assert found.topk_ids.tolist() == [[1, NO_ID], [3, NO_ID], [5, NO_ID]]
    assert (found.log_tail <= 0).all()


RULES = [Cut("given"), Cut("probability", 1e-7), Cut("mass", 0.9999999)]


@pytest.mark.parametrize("cut", RULES, ids=lambda cut: cut.rule)
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_shorter_rows_and_narrower_arrays_are_padded(tmp_path, encoding, cut):
    ragged = some_rollouts(2, topk=9, ragged=True, decimals=0)
    narrow = [replace(r, sample_id=f"n{i}") for i, r in enumerate(some_rollouts(2, topk=4, decimals=0))]
    write(tmp_path / "cache", [*ragged, *narrow], topk=9, encoding=encoding, cut=cut, bands=(2, 6, 9))
    cache = opd_store.open(tmp_path / "cache")
    expected = [*ragged, *(padded(value, topk=9) for value in narrow)]
    for found, value in zip(cache, expected, strict=True):
        assert found.topk_ids.shape == (3, 9)
        if cut.rule == "given":
            supports.assert_decoded(bands_of(found)["topk"], bands_of(value)["topk"], encoding)
    assert opd_store.verify(tmp_path / "cache").problems == []


@pytest.mark.parametrize("shape", ["shorter rows", "narrower arrays"])
def test_without_a_rule_every_position_has_all_ranks(tmp_path, shape):
    good = some_rollouts(1, topk=9)[0]
    ids, logprob = good.topk_ids.copy(), good.topk_logprob.copy()
    ids[1, -1], logprob[1, -1] = NO_ID, -np.inf
    bad = replace(good, topk_ids=ids, topk_logprob=logprob)
    if shape == "narrower arrays":
        bad = replace(good, topk_ids=good.topk_ids[:, :-1], topk_logprob=good.topk_logprob[:, :-1])
    with opd_store.create(tmp_path / "cache", meta=example_meta(VOCAB), topk=9) as writer:
        with pytest.raises(opd_store.InvalidRolloutError) as caught:
            writer.append(bad)
        assert caught.value.field == "topk_ids"
        writer.append(good)
    assert_holds(opd_store.open(tmp_path / "cache"), [good])


@pytest.mark.parametrize(
    ("rule", "value"),
    [
        ("probability", None),
        ("probability", 0.0),
        ("probability", 1.0),
        ("mass", -0.1),
        ("mass", math.nan),
        ("mass", 1),
        ("mass", "0.5"),
        ("given", 0.5),
        ("top_p", 0.5),
        (None, None),
    ],
)
def test_a_rule_that_cannot_work(rule, value):
    with pytest.raises(
        opd_store.InvalidArgumentError, match="cut: expected the rule probability, mass or given"
    ):
        Cut(rule, value)


def test_a_rule_without_ranks(tmp_path):
    with pytest.raises(opd_store.InvalidArgumentError, match="bands, cut: expected none for topk=0"):
        opd_store.create(tmp_path / "cache", meta=example_meta(VOCAB), cut=Cut("given"))


def test_rows_without_padding(tmp_path):
    ids = np.array([[5, 6, NO_ID], [7, NO_ID, NO_ID], [1, 2, 3]], np.uint32)
    logprob = np.array([[-1, -2, -np.inf], [-1, -np.inf, -np.inf], [-1, -2, -3]], np.float32)
    rollout = replace(
        some_rollouts(1, topk=3)[0], topk_ids=ids, topk_logprob=logprob, log_tail=np.full(3, -3, np.float32)
    )
    flat_ids, flat_logprobs, offsets = rollout.ragged_topk()
    assert (flat_ids.tolist(), flat_ids.dtype) == ([5, 6, 7, 1, 2, 3], np.uint32)
    assert (flat_logprobs.tolist(), flat_logprobs.dtype) == ([-1, -2, -1, -1, -2, -3], np.float32)
    assert (offsets.tolist(), offsets.dtype) == ([0, 2, 3, 6], np.int64)
    for missing in ("topk_ids", "topk_logprob"):
        with pytest.raises(opd_store.InvalidArgumentError, match="topk_ids: this rollout has none"):
            replace(rollout, **{missing: None}).ragged_topk()
    # As a table, rows keep their padding: every one has R * K values.
    write(tmp_path / "cache", [rollout], cut=Cut("given"), encoding="f32")
    cache = opd_store.open(tmp_path / "cache")
    table = cache.to_arrow()
    assert table["topk_ids"].to_pylist() == [ids.ravel().tolist()]
    assert table["topk_logprob"].to_pylist() == [logprob.ravel().tolist()]
    two = cache.to_arrow(ranks=2, columns=["topk_ids"])
    assert two["topk_ids"].to_pylist() == [ids[:, :2].ravel().tolist()]
    assert cache.rollout(0, ranks=1).ragged_topk()[2].tolist() == [0, 1, 2, 3]


# Chosen and sampled.

SIZES = {"topk": 3, "chosen": 4, "sampled": 5}


def full(n: int = 1, **options: object) -> list[opd_store.Rollout]:
    return some_rollouts(n, response_len=6, **(SIZES | options))


@pytest.mark.parametrize("encoding", ["plain", "f32"])
def test_chosen_and_sampled_come_back(tmp_path, encoding):
    values = full(5)
    path = tmp_path / "cache"
    write(path, values[:3], encoding=encoding, sampled_temperature=1.5, **SIZES)
    add(path, values[3:])
    cache = opd_store.open(path)
    assert (cache.schema.chosen, cache.schema.sampled, cache.schema.sampled_temperature) == (4, 5, 1.5)
    assert_holds(cache, values)
    assert opd_store.verify(path).problems == []
    table = cache.to_arrow()
    for name in ("chosen_ids", "chosen_logprob", "chosen_log_tail", "sampled_ids", "sampled_draws"):
        for row, value in enumerate(values):
            assert table[name][row].values.to_numpy().tobytes() == getattr(value, name).tobytes(), name


@pytest.mark.parametrize(
    ("columns", "kinds"),
    [
        (["chosen_ids"], {"chosen"}),
        (["chosen_log_tail"], {"chosen"}),
        (["sampled_draws"], {"sampled"}),
        (["sampled_logprob", "log_tail"], {"sampled", "topk"}),
        (["reward"], set()),
        (None, {"topk", "chosen", "sampled"}),
    ],
)
def test_supports_are_read_by_column(tmp_path, columns, kinds):
    (value,) = full()
    write(tmp_path / "cache", [value], encoding="f32", **SIZES)
    cache = opd_store.open(tmp_path / "cache")
    for found in (cache.rollout(0, columns=columns), next(cache.scan(columns=columns))):
        for kind, band in bands_of(found).items():
            expected = bands_of(value)[kind] if kind in kinds else Band(None, None, None)
            for left, right in zip(
                (band.ids, band.logprob, band.log_tail, band.draws),
                (expected.ids, expected.logprob, expected.log_tail, expected.draws),
                strict=True,
            ):
                assert (left is None) == (right is None)
                assert left is None or left.tobytes() == right.tobytes()
    # No ranks of the top-k say nothing about the others.
    none = cache.rollout(0, ranks=0, columns=columns)
    assert none.topk_ids is None
    assert (none.chosen_ids is not None) == ("chosen" in kinds)


def test_a_cache_of_one_support_only(tmp_path):
    for kind, size in (("chosen", 4), ("sampled", 5)):
        values = some_rollouts(3, topk=0, **{kind: size})
        for encoding in ENCODINGS:
            path = tmp_path / f"{kind} {encoding.replace('/', ' ')}"
            write(path, values, topk=0, encoding=encoding, **{kind: size})
            cache = opd_store.open(path)
            assert cache[0].topk_ids is None
            for found, value in zip(cache, values, strict=True):
                supports.assert_decoded(bands_of(found)[kind], bands_of(value)[kind], encoding)
            assert opd_store.verify(path).problems == []


def test_narrower_supports_are_padded(tmp_path):
    values = full(2, chosen=1, sampled=2)
    write(tmp_path / "cache", values, encoding="f32", **SIZES)
    assert_holds(opd_store.open(tmp_path / "cache"), [padded(v, chosen=4, sampled=5) for v in values])


(GOOD,) = full()
KIND_FIELDS = [
    *(f"chosen_{name}" for name in ("ids", "logprob", "log_tail")),
    *(f"sampled_{name}" for name in ("ids", "logprob", "log_tail", "draws")),
]


@pytest.mark.parametrize("name", KIND_FIELDS)
def test_declared_and_missing_or_present_and_undeclared(tmp_path, name):
    kind = name.partition("_")[0]
    with opd_store.create(tmp_path / "with", meta=example_meta(VOCAB), **SIZES) as writer:
        with pytest.raises(opd_store.InvalidRolloutError, match=f"created with {kind}=") as caught:
            writer.append(replace(GOOD, **{name: None}))
        assert (caught.value.field, caught.value.position) == (name, -1)
        writer.append(GOOD)
    other = "sampled" if kind == "chosen" else "chosen"
    bare = replace(GOOD, **{field: None for field in KIND_FIELDS if field.startswith(kind)})
    sizes = SIZES | {kind: 0}
    with opd_store.create(tmp_path / "without", meta=example_meta(VOCAB), **sizes) as writer:
        with pytest.raises(opd_store.InvalidRolloutError, match=f"created with {kind}=0") as caught:
            writer.append(replace(bare, **{name: getattr(GOOD, name)}))
        assert caught.value.field == name
        writer.append(bare)
    assert_holds(opd_store.open(tmp_path / "with"), [GOOD])
    assert_holds(opd_store.open(tmp_path / "without"), [bare])
    assert getattr(opd_store.open(tmp_path / "without")[0], f"{other}_ids") is not None


def poke(name: str, *index_and_value: object) -> opd_store.Rollout:
    *index, value = index_and_value
    array = np.array(getattr(BASE, name))
    array[tuple(index)] = value
    return replace(BASE, **{name: array})


# Position 2 has two of four chosen and two of five drawn ids.
BASE = replace(
    GOOD,
    chosen_ids=np.tile(np.array([7, 8, NO_ID, NO_ID], np.uint32), (6, 1)),
    chosen_logprob=np.tile(np.array([-2, -3, -np.inf, -np.inf], np.float32), (6, 1)),
    chosen_log_tail=np.full(6, -0.5, np.float32),
    sampled_ids=np.tile(np.array([7, 8, NO_ID, NO_ID, NO_ID], np.uint32), (6, 1)),
    sampled_logprob=np.tile(np.array([-2, -3, -np.inf, -np.inf, -np.inf], np.float32), (6, 1)),
    sampled_log_tail=np.full(6, -0.5, np.float32),
    sampled_draws=np.tile(np.array([3, 1, 0, 0, 0], np.uint32), (6, 1)),
)
BAD = {
    "draws of nothing": (poke("sampled_draws", 2, 1, 0), "sampled_draws", 2),
    "draws at padding": (poke("sampled_draws", 2, 3, 1), "sampled_draws", 2),
    "draws negative": (
        replace(BASE, sampled_draws=BASE.sampled_draws.astype(np.int64) - 1),
        "sampled_draws",
        0,
    ),
    "draws floats": (replace(BASE, sampled_draws=BASE.sampled_draws.astype(float)), "sampled_draws", -1),
    "draws shape": (replace(BASE, sampled_draws=BASE.sampled_draws[:, :3]), "sampled_draws", -1),
}
for support in ("chosen", "sampled"):
    ids, logprob, tail = f"{support}_ids", f"{support}_logprob", f"{support}_log_tail"
    wide = {
        name: np.pad(getattr(BASE, name), ((0, 0), (0, 1)), constant_values=padding)
        for name, padding in ((ids, NO_ID), (logprob, -np.inf), ("sampled_draws", 0))
    }
    BAD |= {
        f"{support} wider": (replace(BASE, **wide), ids, -1),
        f"{support} of no width": (replace(BASE, **{ids: np.empty((6, 0), np.uint32)}), ids, -1),
        f"{support} of another width": (
            replace(BASE, **{logprob: getattr(BASE, logprob)[:, :3]}),
            logprob,
            -1,
        ),
        f"{support} vocabulary": (poke(ids, 2, 1, VOCAB), ids, 2),
        f"{support} twice": (poke(ids, 2, 1, 7), ids, 2),
        f"{support} after padding": (poke(ids, 2, 0, NO_ID), logprob, 2),
        f"{support} without id": (poke(logprob, 2, 2, -4.0), logprob, 2),
        f"{support} without log-prob": (poke(logprob, 2, 1, -np.inf), logprob, 2),
        f"{support} rising": (poke(logprob, 2, 0, -4.0), logprob, 2),
        f"{support} above zero": (poke(logprob, 2, 0, 0.5), logprob, 2),
        f"{support} nan": (poke(logprob, 2, 1, np.nan), logprob, 2),
        f"{support} sum": (poke(tail, 2, 0.0), logprob, 2),
        f"{support} tail nan": (poke(tail, 2, np.nan), tail, 2),
        f"{support} tail above zero": (poke(tail, 2, 0.1), tail, 2),
        f"{support} tail shape": (replace(BASE, **{tail: np.zeros(5, np.float32)}), tail, -1),
    }
BAD["chosen after padding"] = (
    replace(
        poke("chosen_ids", 2, slice(0, 2), [NO_ID, 7]),
        chosen_logprob=poke("chosen_logprob", 2, 0, -np.inf).chosen_logprob,
    ),
    "chosen_ids",
    2,
)


@pytest.mark.parametrize("case", BAD)
def test_a_bad_support_is_refused(tmp_path, case):
    bad, field, position = BAD[case]
    writer = opd_store.create(tmp_path / "cache", meta=example_meta(VOCAB), encoding="f32", **SIZES)
    with pytest.raises(opd_store.InvalidRolloutError) as caught:
        writer.append(replace(bad, sample_id="bad"))
    assert (caught.value.sample_id, caught.value.field, caught.value.position) == ("bad", field, position)
    assert len(str(caught.value)) < 500
    assert writer.append(BASE)
    writer.close()


def test_the_top_k_has_at_least_one_rank(tmp_path):
    ids, logprob = GOOD.topk_ids.copy(), GOOD.topk_logprob.copy()
    ids[3], logprob[3] = NO_ID, -np.inf
    writer = opd_store.create(tmp_path / "cache", meta=example_meta(VOCAB), cut=Cut("given"), **SIZES)
    with pytest.raises(opd_store.InvalidRolloutError, match="at least one rank, found none") as caught:
        writer.append(replace(GOOD, topk_ids=ids, topk_logprob=logprob))
    assert (caught.value.field, caught.value.position) == ("topk_ids", 3)
    writer.close()


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_positions_where_nothing_was_chosen(tmp_path, encoding):
    rollout = replace(
        BASE,
        chosen_ids=np.full((6, 4), NO_ID, np.uint32),
        chosen_logprob=np.full((6, 4), -np.inf, np.float32),
        chosen_log_tail=np.zeros(6, np.float32),
        sampled_ids=np.full((6, 5), NO_ID, np.uint32),
        sampled_logprob=np.full((6, 5), -np.inf, np.float32),
        sampled_log_tail=np.zeros(6, np.float32),
        sampled_draws=np.zeros((6, 5), np.uint32),
    )
    write(tmp_path / "cache", [rollout], encoding=encoding, **SIZES)
    found = opd_store.open(tmp_path / "cache")[0]
    for kind, band in bands_of(rollout).items():
        supports.assert_decoded(bands_of(found)[kind], band, encoding)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chosen": 4097}, r"chosen: expected 0\.\.4096, found 4097"),
        ({"sampled": -1}, r"sampled: expected 0\.\.4096, found -1"),
        ({"chosen": 101}, "101 ids of a vocabulary of 100"),
        ({"sampled": 101}, "101 ids of a vocabulary of 100"),
        ({"sampled_temperature": 0.5}, r"sampled_temperature: .* 1\.0 without draws, found 0\.5"),
        ({"sampled": 3, "sampled_temperature": 0.0}, r"in \(0, 100\]"),
        ({"sampled": 3, "sampled_temperature": 100.5}, "found 100.5"),
        ({"sampled": 3, "sampled_temperature": math.nan}, "found nan"),
        ({"sampled": 3, "sampled_temperature": 1}, "found 1$"),
    ],
)
def test_sizes_that_cannot_work(tmp_path, options, message):
    with pytest.raises(opd_store.InvalidArgumentError, match=message):
        opd_store.create(tmp_path / "cache", meta=example_meta(VOCAB), **options)
    assert not (tmp_path / "cache").exists()


def test_the_reader_knows_what_a_schema_may_hold(tmp_path):
    """A schema goes through the manifest unchanged."""
    write(
        tmp_path / "cache",
        [],
        topk=9,
        chosen=2,
        sampled=3,
        sampled_temperature=0.7,
        cut=Cut("mass", 0.95),
        encoding="ladder/64",
        bands=(1, 9),
    )
    schema = opd_store.open(tmp_path / "cache").schema
    assert schema == opd_store.CacheSchema(
        topk=9,
        chosen=2,
        sampled=3,
        sampled_temperature=0.7,
        cut=Cut("mass", 0.95),
        encoding="ladder/64",
        bands=(1, 9),
        id_table="auto",
    )
