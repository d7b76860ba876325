"""Impossible values in intact files: every checksum is right, so only the check of values can refuse them.

And the other way round: whatever a teacher can have produced is accepted, in every encoding.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from unittest import mock

import numpy as np
import pytest
from faults import corpus
from faults.poisons import NATIVE, OUTSIDE_VOCAB, TOKENS, DoesNotApply, applicable, poison
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import opd_store
from opd_store import encodings
from opd_store.encodings.ids import write_ids
from opd_store.layout import NO_ID
from opd_store.rollout import SUPPORTS

ROWS, POSITIONS = 3, 5
LAST = POSITIONS - 1
EXAMPLES, POISONS = 58, 8
"""Of each variant, and of each example: more than 5,000 in all."""
VALID_CACHES, VALID_ROWS = 46, 10
NATIVE_IN = ("plain", "ladder/32, by list, ragged, chosen, sampled")

# Failures name what they were given, and are small as they are.
SETTINGS = {"deadline": None, "derandomize": True, "database": None, "phases": (Phase.generate,)}

positions = st.sampled_from((0, POSITIONS // 2, LAST))
# First, both sides of the edge between bands, last.
ranks = st.sampled_from((0, corpus.BANDS[0] - 1, corpus.BANDS[0], corpus.TOPK - 1))


@pytest.fixture(scope="module")
def folder():
    with corpus.memory_folder() as path:
        yield path


@contextlib.contextmanager
def sealed(*, table: bool):
    """Nothing is checked; without a table, pages hold ids that have no code in one."""
    plain_ids = lambda streams, ids, present, _: write_ids(streams, ids, present, None)  # noqa: E731
    with contextlib.ExitStack() as stack:
        stack.enter_context(corpus.unchecked())
        if not table:
            stack.enter_context(mock.patch.object(encodings, "write_ids", plain_ids))
        yield


def poisoned(variant, name, kind, position, rank, seed):
    """A rollout with the poison as it is stored, and one as it would be appended."""
    for number in range(seed, seed + 200):
        given = corpus.rollout(variant, f"s{number}", seed=number, response_len=POSITIONS)
        place = {"variant": variant, "kind": kind, "position": position, "rank": rank}
        with contextlib.suppress(DoesNotApply):
            return poison(corpus.settled(given, variant), name, **place), poison(given, name, **place)
    raise DoesNotApply(variant, name, kind, position, rank, seed)


def assert_refused(cache, bad, row, shard):
    with pytest.raises(opd_store.FormatError) as caught:
        cache.rollout(row)
    error = caught.value
    assert not isinstance(error, opd_store.IntegrityError)
    assert str(shard) in str(error)
    assert error.column in bad.columns, error
    if not bad.always_refused:
        assert (error.row, f"row {row}" in str(error)) == (row, True)
        assert bad.position < 0 or f"position {bad.position}, column" in str(error), error


def assert_not_written(writer, bad):
    with pytest.raises(opd_store.InvalidRolloutError) as caught:
        writer.append(bad.rollout)
    assert caught.value.field in bad.columns
    assert caught.value.position == bad.position


@pytest.mark.parametrize("variant", corpus.VARIANTS)
def test_poisoned_pages(folder, variant):
    """Several a cache, between rollouts that remain readable."""
    numbers = itertools.count()
    base = folder / f"pages-{variant.replace('/', '-')}"
    honest = opd_store.create(base, **corpus.options(variant))
    seen = []
    place = st.tuples(st.sampled_from(applicable(variant)), positions, ranks, st.integers(0, 2**31))

    @settings(max_examples=EXAMPLES, **SETTINGS)
    @given(st.lists(place, min_size=POISONS, max_size=POISONS, unique_by=lambda p: p[3]), st.randoms())
    def check(places, order):
        pairs = [poisoned(variant, *what, *where) for what, *where in places]
        good = [corpus.settled(corpus.rollout(variant, f"g{i}", seed=i), variant) for i in range(1)]
        values = [*good, *(stored for stored, _ in pairs)]
        order.shuffle(values)
        path = base.with_name(f"{base.name}-{next(numbers)}")
        with sealed(table=all(name not in OUTSIDE_VOCAB for (name, _), *_ in places)):
            corpus.write(path, variant, [getattr(value, "rollout", value) for value in values])
        (shard,) = (path / "shards").iterdir()
        cache = opd_store.open(path)
        for row, value in enumerate(values):
            if isinstance(value, opd_store.Rollout):
                assert cache.rollout(row).sample_id == value.sample_id
                continue
            # A refusal is not forgotten.
            for _ in range(2):
                assert_refused(cache, value, row, shard)
        assert [r.sample_id for r in opd_store.open(path, check_values=False)] == [
            getattr(value, "rollout", value).sample_id for value in values
        ]
        for _, appended in pairs:
            assert_not_written(honest, appended)
        seen.extend(places)

    check()
    honest.close()
    assert len(seen) >= EXAMPLES * POISONS
    # None is left out by chance.
    assert {what for what, *_ in seen} == set(applicable(variant))


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize("variant", NATIVE_IN)
def test_poisoned_native_columns(folder, variant, name):
    """These are checked for a whole record batch at once."""
    base = folder / f"native-{name}-{variant.replace('/', '-')}"
    with opd_store.create(base, **corpus.options(variant)) as honest:
        for row, position, rank in itertools.product(range(ROWS), (0, POSITIONS // 2, LAST), (0, 1)):
            if rank and name not in TOKENS:
                continue
            place = {"variant": variant, "kind": "topk", "position": position, "rank": rank}
            given = corpus.rollouts(variant, ROWS, response_len=POSITIONS)
            values = [corpus.settled(value, variant) for value in given]
            bad = poison(values[row], name, **place)
            values[row] = bad.rollout
            path = base.with_name(f"{base.name}-{row}-{position}-{rank}")
            with sealed(table=True):
                corpus.write(path, variant, values)
            (shard,) = (path / "shards").iterdir()
            cache = opd_store.open(path)
            for _ in range(2):
                with pytest.raises(opd_store.FormatError):
                    list(cache)
            assert_refused(cache, bad, row, shard)
            if not bad.always_refused:
                found = opd_store.open(path, check_values=False).rollout(row)
                assert found.token_ids.tobytes() == bad.rollout.token_ids.tobytes()
            assert_not_written(honest, poison(given[row], name, **place))


def test_number_of_poisons(record_testsuite_property, capsys):
    pages = len(corpus.VARIANTS) * EXAMPLES * POISONS
    valid = len(corpus.VARIANTS) * VALID_CACHES * VALID_ROWS
    native = len(NATIVE_IN) * (len(NATIVE) + len(TOKENS)) * ROWS * 3
    record_testsuite_property("poisoned rollouts", pages + native)
    with capsys.disabled():
        print(f"\n{pages + native:,} poisoned rollouts, {valid:,} valid")
    assert pages + native >= 5000
    assert valid >= 5000


INNER = ("plain", "f32")


def with_inner_tail(folder, encoding):
    """A cache whose first band says NaN about what is outside of it; what is outside of all bands is fine."""
    path = folder / f"inner-{encoding}"
    values = corpus.rollouts(encoding, ROWS, response_len=POSITIONS)
    honest = encodings.fold_tail

    def fold(band, ranks):
        tail = honest(band, ranks).copy()
        if ranks < corpus.TOPK:
            tail[2] = np.nan
        return tail

    if not path.exists():
        with corpus.unchecked(), mock.patch.object(encodings, "fold_tail", fold):
            corpus.write(path, encoding, values)
    return path


@pytest.mark.parametrize("encoding", INNER)
def test_the_tail_of_a_band_that_is_read_alone(folder, encoding):
    path = with_inner_tail(folder, encoding)
    with pytest.raises(opd_store.FormatError, match="position 2, column log_tail"):
        opd_store.open(path).rollout(1, ranks=corpus.BANDS[0])


@pytest.mark.parametrize("encoding", INNER)
def test_the_tail_of_a_band_that_is_read_later(folder, encoding):
    """All ranks have the tail of the last band, fewer ranks have another one, which nobody has seen yet."""
    cache = opd_store.open(with_inner_tail(folder, encoding))
    with contextlib.suppress(opd_store.FormatError):
        cache.rollout(1)
    with pytest.raises(opd_store.FormatError, match="position 2, column log_tail"):
        cache.rollout(1, ranks=corpus.BANDS[0])


@pytest.mark.parametrize("encoding", INNER)
def test_verify_looks_at_every_tail(folder, encoding):
    assert not opd_store.verify(with_inner_tail(folder, encoding)).ok


def test_a_refusal_is_not_preceded_by_a_warning(folder):
    """Warnings are errors here, and the poison is in a rank that joins the tail."""
    values = corpus.rollouts("plain", 1)
    values[0].topk_logprob[0, 1] = np.nan
    path = folder / "warning"
    with corpus.unchecked():
        corpus.write(path, "plain", values)
    with pytest.raises(opd_store.FormatError):
        opd_store.open(path).rollout(0, ranks=1)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_reward_that_is_no_number(folder, value):
    path = folder / f"reward-{value}"
    with corpus.unchecked():
        corpus.write(path, "plain", [dataclasses.replace(corpus.rollouts("plain", 1)[0], reward=value)])
    with pytest.raises(opd_store.FormatError, match="row 0, column reward"):
        list(opd_store.open(path))


def test_a_loss_mask_says_where(folder):
    values = corpus.rollouts("plain", ROWS)
    values[1] = poison(values[1], "loss_mask 2", variant="plain", kind="topk", position=2, rank=0).rollout
    path = folder / "mask"
    with corpus.unchecked():
        corpus.write(path, "plain", values)
    with pytest.raises(opd_store.FormatError, match="row 1, position 2, column loss_mask"):
        list(opd_store.open(path))


FORMS = ("float32", "float16 log-probs", "float16 logits", "bfloat16 logits")


def rounded(logprob: np.ndarray, log_tail: np.ndarray, form: str) -> tuple[np.ndarray, np.ndarray]:
    """Log-probs as an engine makes them that computes logits in half precision: many of them are equal."""
    if form == "float32":
        return logprob, log_tail
    values = np.column_stack([logprob, log_tail])
    if form.startswith("float16"):
        values = values.astype(np.float16).astype(np.float32)
    else:
        bits = values.view(np.uint32).astype(np.uint64)
        bits += 0x7FFF + (bits >> np.uint64(16) & np.uint64(1))
        values = (bits & np.uint64(0xFFFF0000)).astype(np.uint32).view(np.float32)
    if form.endswith("logits"):
        total = np.logaddexp.reduce(values.astype(np.float64), axis=1, keepdims=True)
        values = np.minimum(values - np.where(np.isfinite(total), total, 0), 0).astype(np.float32)
    return values[:, :-1], values[:, -1]


def engine_like(rollout: opd_store.Rollout, form: str) -> opd_store.Rollout:
    """The same rollout with rounded log-probs, in order again."""
    fields = {}
    for ids_field, logprob_field, tail_field, draws_field in SUPPORTS.values():
        ids = getattr(rollout, ids_field)
        if ids is None:
            continue
        logprob, fields[tail_field] = rounded(
            getattr(rollout, logprob_field), getattr(rollout, tail_field), form
        )
        order = np.lexsort((ids, -logprob), axis=1)
        fields[ids_field] = np.take_along_axis(ids, order, axis=1)
        fields[logprob_field] = np.take_along_axis(logprob, order, axis=1)
        if draws_field:
            fields[draws_field] = np.take_along_axis(getattr(rollout, draws_field), order, axis=1)
    return dataclasses.replace(rollout, **fields)


@pytest.mark.parametrize("variant", corpus.VARIANTS)
def test_valid_values_are_accepted(folder, variant):
    """Ties, rounding of half precision, probabilities that sum to one, negative zeros, the last id."""
    numbers = itertools.count()
    base = folder / f"valid-{variant.replace('/', '-')}"
    n_rollouts = 0

    @settings(max_examples=VALID_CACHES, **SETTINGS)
    @given(
        st.integers(0, 2**32 - 1),
        st.sampled_from([None, 0, 1, 2]),
        st.sampled_from(FORMS),
        st.sampled_from(["as it is", "certain", "nothing left", "last id"]),
    )
    def check(seed, decimals, form, extreme):
        nonlocal n_rollouts
        path = base.with_name(f"{base.name}-{next(numbers)}")
        values = []
        for i in range(VALID_ROWS):
            rollout = corpus.rollout(
                variant, f"r{i}", seed=seed + i, response_len=1 + i % POSITIONS, decimals=decimals
            )
            values.append(extremes(engine_like(rollout, form), extreme))
        corpus.write(path, variant, values)
        found = list(opd_store.open(path))
        assert [rollout.sample_id for rollout in found] == [rollout.sample_id for rollout in values]
        for left, right in zip(found, values, strict=True):
            if corpus.VARIANTS[variant]["encoding"] in ("plain", "f32"):
                assert left.topk_logprob.tobytes() == right.topk_logprob.tobytes()
        n_rollouts += len(found)

    check()
    assert n_rollouts >= VALID_CACHES * VALID_ROWS


def extremes(rollout: opd_store.Rollout, which: str) -> opd_store.Rollout:
    """Legal values at the edge of what is legal."""
    ids, logprob, tail = rollout.topk_ids.copy(), rollout.topk_logprob.copy(), rollout.log_tail.copy()
    present = ids != NO_ID
    if which == "certain":
        # All probability on the first id: -0.0 there, and the lowest finite log-probs after it.
        logprob[present] = np.where(np.arange(ids.shape[1]) == 0, np.float32(-0.0), np.float32(-80.0))[
            np.nonzero(present)[1]
        ]
        ids = np.where(present, np.sort(np.where(present, ids, NO_ID), axis=1), np.uint32(NO_ID))
        tail[:] = -np.inf
    elif which == "nothing left":
        tail[:] = -np.inf
    elif which == "last id":
        free = ~(ids == corpus.VOCAB - 1).any(axis=1)
        ids[free, 0] = corpus.VOCAB - 1
        level = (logprob[:, 1:] == logprob[:, :-1]) & present[:, 1:]
        if level.any():
            return rollout
    return dataclasses.replace(rollout, topk_ids=ids, topk_logprob=logprob, log_tail=tail)
