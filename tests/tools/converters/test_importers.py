"""Good files of every format: told apart, converted, values as they were, losses on record."""

from __future__ import annotations

import numpy as np
import pytest
from opd_tools.converters.core.source import Source
from opd_tools.converters.formats import all_formats, detect
from tools.converters.converting import converted
from tools.converters.samples import SAMPLES, good_rollouts

import opd_store
from opd_store import NO_ID

READ = [how for how in all_formats() if how.read is not None]


def test_every_format_has_a_sample():
    assert {how.name for how in READ} == set(SAMPLES)


@pytest.mark.parametrize("name", SAMPLES)
def test_exactly_one_format_recognises_a_file(tmp_path, name):
    source = Source(str(SAMPLES[name].write(tmp_path, good_rollouts())))
    assert [how.name for how in READ if how.detect and how.detect(source)] == [name]
    assert detect(source).name == name


@pytest.mark.parametrize("name", SAMPLES)
def test_values_come_back(tmp_path, name):
    sample = SAMPLES[name]
    rollouts = {r.sample_id: r for r in good_rollouts()}
    result = converted(name, sample.write(tmp_path, list(rollouts.values())), tmp_path / "cache")
    cache = opd_store.open(tmp_path / "cache")
    assert result["format"] == name
    assert len(cache) == len(rollouts)
    opd_store.verify(tmp_path / "cache")
    for at in range(len(cache)):
        found = cache[at]
        expected = rollouts[found.sample_id if sample.named else f"r{at}"]
        np.testing.assert_array_equal(found.token_ids, expected.token_ids)
        if sample.prompt_len:
            assert found.prompt_len == expected.prompt_len
        skip = expected.prompt_len - found.prompt_len
        if sample.own:
            own = found.teacher_logprob[skip:]
            np.testing.assert_allclose(own, expected.teacher_logprob, rtol=0, atol=sample.error)
        if not sample.topk:
            assert found.topk_ids is None
            continue
        ids, logprob, tail = found.topk_ids[skip:], found.topk_logprob[skip:], found.log_tail[skip:]
        np.testing.assert_array_equal(ids[ids != NO_ID].reshape(len(ids), -1), expected.topk_ids)
        logprob = logprob[ids != NO_ID].reshape(len(ids), -1)
        wanted = expected.topk_logprob.astype(np.float64)
        if sample.renormalised:
            wanted -= np.log(np.exp(wanted).sum(axis=1, keepdims=True))
            assert (tail == -np.inf).all()
        else:
            # 1 - sum of float32 entries is off by their rounding.
            np.testing.assert_allclose(np.exp(tail), np.exp(expected.log_tail), atol=1e-6 + 6 * sample.error)
        np.testing.assert_allclose(logprob, wanted, rtol=0, atol=sample.error + 1e-6)


@pytest.mark.parametrize("name", SAMPLES)
def test_losses_are_printed_and_kept(tmp_path, name):
    result = converted(name, SAMPLES[name].write(tmp_path, good_rollouts()), tmp_path / "cache")
    kept = opd_store.open(tmp_path / "cache").meta.extra
    assert kept["converted_from"]
    for what, count in result["lost"].items():
        assert (f"{count:,} {what}" if count else what) in kept["lost"]
    assert (SAMPLES[name].own and SAMPLES[name].topk) or result["lost"]


@pytest.mark.parametrize("name", SAMPLES)
def test_the_same_command_again_changes_nothing(tmp_path, name):
    path = SAMPLES[name].write(tmp_path, good_rollouts())
    converted(name, path, tmp_path / "cache")
    before = opd_store.open(tmp_path / "cache").digest
    assert converted(name, path, tmp_path / "cache")["existed"]
    assert opd_store.open(tmp_path / "cache").digest == before
    converted(name, path, tmp_path / "other")
    assert opd_store.open(tmp_path / "other").digest == before
