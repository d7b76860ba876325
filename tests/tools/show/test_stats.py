"""`opd stats`: bounded sums against slow ones, sampling, groups."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
from click.testing import CliRunner
from opd_tools.main import main
from opd_tools.show.histograms import PER_OCTAVE, Histogram
from opd_tools.show.measures import MAX_GROUPS, OTHER, Collector, measure, summary, supports_of
from opd_tools.show.sampling import collect, spread_rows
from tools.show.caches import VOCAB, some_rollouts, write

import opd_store


def opd(*args):
    return CliRunner().invoke(main, [str(arg) for arg in args])


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return write(tmp_path_factory.mktemp("stats") / "cache", some_rollouts(), batch_bytes=1500)


@pytest.mark.parametrize(
    "values",
    [
        np.random.default_rng(0).lognormal(0, 3, 5000),
        np.random.default_rng(1).integers(1, 30, 1000),
        np.zeros(7),
        np.array([3.0]),
        np.array([0.0, 1e-30, 1e30]),
    ],
    ids=["lognormal", "integers", "zeros", "one", "outside"],
)
def test_histogram(values):
    histogram = Histogram(2.0**-10, 2.0**20)
    for part in np.array_split(values, 3):
        histogram.add(part)
    assert histogram.n == len(values) == histogram.counts.sum()
    assert histogram.mean == pytest.approx(values.mean())
    assert (histogram.least, histogram.greatest) == (values.min(), values.max())
    inside = (values >= 2.0**-10) & (values < 2.0**20)
    if inside.all():
        for share in (0.0, 0.05, 0.5, 0.95, 1.0):
            exact = np.quantile(values, share, method="inverted_cdf")
            assert histogram.quantile(share) == pytest.approx(exact, rel=2 ** (1 / PER_OCTAVE) - 1)
    edges, counts = histogram.coarse(4)
    assert len(edges) == len(counts) + 1
    assert counts.sum() == len(values)
    assert counts[0]
    assert counts[-1]
    assert (np.diff(edges) > 0).all()


def test_a_histogram_of_nothing():
    histogram = Histogram(1.0, 8.0)
    histogram.add(np.empty(0))
    assert math.isnan(histogram.mean)
    assert math.isnan(histogram.quantile(0.5))
    assert len(histogram.coarse(4)[1]) == 0


@pytest.mark.parametrize(
    ("topk", "expected"), [(0, []), (1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (64, [1, 2, 4, 8, 16, 32, 64])]
)
def test_supports(topk, expected):
    assert supports_of(topk) == expected


def test_numbers_are_those_of_a_slow_sum(cache):
    """Every number again from rollouts one at a time, in plain Python and float64."""
    found = collect(opd_store.open(cache), by=(), limit=100).collector.whole
    numbers = summary(found)
    entropies, masses, ratios, first, outside = [], {1: [], 2: [], 4: []}, [], [], []
    for rollout in opd_store.open(cache):
        for t in range(rollout.response_len):
            p = np.exp(rollout.topk_logprob[t].astype(float))
            tail = math.exp(rollout.log_tail[t])
            known = -(p * np.log(p)).sum()
            low = known - tail * min(math.log(p[-1]), math.log(tail))
            entropies.append((low, max(low, known - tail * math.log(tail / (VOCAB - 4)))))
            for k, values in masses.items():
                values.append(p[:k].sum())
            ratios.append(math.exp(float(rollout.teacher_logprob[t]) - float(rollout.behaviour_logprob[t])))
            first.append(rollout.topk_ids[t, 0] == rollout.response_ids[t])
            outside.append(rollout.response_ids[t] not in rollout.topk_ids[t])
    ratios = np.array(ratios)
    assert numbers["rollouts"] == 12
    assert numbers["response positions"] == len(ratios)
    assert numbers["entropy"]["mean, at least"] == pytest.approx(np.mean([low for low, _ in entropies]))
    assert numbers["entropy"]["mean, at most"] == pytest.approx(np.mean([high for _, high in entropies]))
    for k, values in masses.items():
        # What is stored sums to 1 up to float32.
        assert numbers["mass of k ranks"][str(k)] == pytest.approx(np.mean(values), abs=1e-6)
    assert numbers["ratio, teacher to behaviour"]["mean"] == pytest.approx(ratios.mean())
    ess = ratios.sum() ** 2 / (ratios**2).sum() / len(ratios)
    assert numbers["effective sample size"]["of all tokens"] == pytest.approx(ess)
    assert numbers["sampled token"] == pytest.approx(
        {"is rank 1": np.mean(first), "is outside the top-k": np.mean(outside)}
    )
    assert numbers["teacher log-prob against top-k"]["largest difference"] == 0
    surprise = [-value for rollout in opd_store.open(cache) for value in rollout.teacher_logprob.tolist()]
    assert numbers["teacher log-prob"]["mean"] == pytest.approx(-np.mean(surprise))
    assert numbers["tokens a rollout"]["greatest"] == 13


def test_bounds_hold_the_entropy_of_the_whole_vocabulary():
    """A distribution over everything, of which the top-k and the tail are stored."""
    rng = np.random.default_rng(3)
    (template,) = some_rollouts(1)
    for sharpness in (0.1, 1.0, 5.0, 30.0):
        logits = rng.normal(size=(template.response_len, VOCAB)) * sharpness
        logprobs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
        ids = np.argsort(-logprobs, axis=1)
        ordered = np.take_along_axis(logprobs, ids, axis=1)
        rollout = dataclasses.replace(
            template,
            topk_ids=ids[:, :4].astype(np.uint32),
            topk_logprob=ordered[:, :4].astype(np.float32),
            log_tail=np.logaddexp.reduce(ordered[:, 4:], axis=1).astype(np.float32),
        )
        chunk = measure([rollout], vocab_size=VOCAB, labels=())
        exact = -(np.exp(logprobs) * logprobs).sum(axis=1)
        assert (chunk.positions["entropy_least"] <= exact + 1e-5).all()
        assert (chunk.positions["entropy_most"] >= exact - 1e-5).all()


def test_what_is_not_there_is_left_out():
    (rollout,) = some_rollouts(1, topk=0)
    bare = opd_store.Rollout(token_ids=rollout.token_ids, prompt_len=rollout.prompt_len)
    collector = Collector(())
    collector.add(measure([bare, bare], vocab_size=VOCAB, labels=()))
    assert list(summary(collector.whole)) == [
        "rollouts",
        "response positions",
        "tokens a rollout",
        "response tokens a rollout",
    ]
    # Some rollouts with, some without.
    collector.add(measure([bare, rollout], vocab_size=VOCAB, labels=()))
    assert collector.whole.histograms["teacher_surprise"].n == rollout.response_len


def test_groups_add_up_and_are_limited():
    rollouts = some_rollouts(40)
    rollouts = [dataclasses.replace(r, extra={"x_level": n}) for n, r in enumerate(rollouts)]
    collector = Collector(("x_level", "finish_reason"))
    for start in range(0, 40, 7):
        collector.add(
            measure(rollouts[start : start + 7], vocab_size=VOCAB, labels=("x_level", "finish_reason"))
        )
    levels = collector.groups["x_level"]
    assert len(levels) == MAX_GROUPS + 1
    assert levels[OTHER].rollouts == 40 - MAX_GROUPS
    for groups in collector.groups.values():
        assert sum(group.rollouts for group in groups.values()) == 40
        for name, whole in collector.whole.histograms.items():
            np.testing.assert_array_equal(
                sum(group.histograms[name].counts for group in groups.values()), whole.counts
            )


@pytest.mark.parametrize("batches", [[5], [1] * 300, [1000, 1, 1, 1000], [3] * 70, [10_000] * 100])
@pytest.mark.parametrize("limit", [1, 2, 63, 64, 65, 1000, 10**9])
def test_rows_are_spread(batches, limit):
    sizes = np.array(batches)
    rows = spread_rows(sizes, limit)
    assert len(rows) == min(limit, sizes.sum())
    assert (np.diff(rows) > 0).all()
    assert 0 <= rows[0] <= rows[-1] < sizes.sum()
    if 64 <= limit < sizes.sum() and len(batches) >= 64:
        assert len(np.unique(np.searchsorted(np.cumsum(sizes), rows, side="right"))) >= 64


def test_the_command(cache):
    shown = opd("stats", cache, "--by", "x_domain", "--by", "x_level", "--by", "x_domain")
    assert shown.exit_code == 0, shown.output
    assert shown.stdout.startswith("read all 12 rollouts\n")
    for part in (
        "by x_domain",
        "by x_level",
        "finish reasons",
        "length 4, stop 8",
        "maths",
        "mass of k ranks",
    ):
        assert part in shown.output, part
    document = json.loads(opd("stats", cache, "--by", "x_domain", "--json", "--limit", 5).stdout)
    assert document["read"] == "5 of 12 rollouts, evenly spread"
    assert (document["rollouts read"], document["rollouts"]) == (5, 12)
    assert sum(group["rollouts"] for group in document["by"]["x_domain"].values()) == 5
    assert document["all"]["entropy"]["median"] > 0


def test_an_empty_cache(tmp_path):
    cache = write(tmp_path / "cache", [])
    shown = opd("stats", cache, "--json")
    assert shown.exit_code == 0, shown.output
    assert json.loads(shown.stdout)["rollouts"] == 0


@pytest.mark.parametrize("column", ["reward", "sample_id", "x_other", "\x1b[31m"])
def test_columns_that_make_no_groups(cache, column):
    shown = opd("stats", cache, "--by", column)
    assert shown.exit_code == 2
    assert "--by" in shown.stderr
    assert "\x1b" not in shown.stderr
