"""`opd verify` with several workers says what it says with one."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from opd_tools.main import main
from tools.show.caches import some_rollouts, write

import opd_store
from opd_store import InvalidArgumentError


@pytest.fixture
def cache(tmp_path):
    return write(tmp_path / "cache", some_rollouts(60), batch_bytes=1500, shard_bytes=3000)


def verified(cache, *args, code):
    shown = CliRunner().invoke(main, ["verify", str(cache), "--json", *map(str, args)])
    assert shown.exit_code == code, shown.output
    return json.loads(shown.stdout)


def reports(cache):
    return [opd_store.verify(cache, workers=workers) for workers in (1, 2, 7)]


def test_workers_agree_on_an_intact_cache(cache):
    found = reports(cache)
    assert found[0] == found[1] == found[2]
    assert found[0].ok
    assert found[0].rollouts == 60
    assert found[0].shards == opd_store.open(cache).n_shards > 4
    assert verified(cache, "--workers", 3, code=0)["rollouts"] == 60


def test_workers_agree_on_damage_and_its_order(cache):
    shards = [cache / opd_store.open(cache).shard_name(row) for row in (0, 30, 59)]
    for shard in shards[:2]:
        data = bytearray(shard.read_bytes())
        data[len(data) // 2] ^= 4
        shard.write_bytes(bytes(data))
    shards[2].unlink()
    texts = [[(type(p), str(p)) for p in report.problems] for report in reports(cache)]
    assert texts[0] == texts[1] == texts[2]
    named = [next(n for n, shard in enumerate(shards) if shard.name in text) for _, text in texts[0]]
    assert named == sorted(named)
    assert set(named) == {0, 1, 2}
    document = verified(cache, "--workers", 2, code=1)
    assert [problem["message"] for problem in document["problems"]] == [text for _, text in texts[0]]
    assert document["ok"] is False


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("is_damaged", [False, True])
def test_progress_counts_every_rollout_once(cache, workers, is_damaged):
    if is_damaged:
        (cache / opd_store.open(cache).shard_name(20)).write_bytes(b"")
    seen = []
    opd_store.verify(cache, workers=workers, on_progress=lambda done, total: seen.append((done, total)))
    assert [total for _, total in seen] == [60] * len(seen)
    counts = [done for done, _ in seen]
    assert counts == sorted(set(counts))
    assert counts[-1] == 60
    assert len(counts) > 5


def test_an_error_of_the_caller_ends_it(cache):
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        opd_store.verify(cache, workers=2, on_progress=stop)


def test_no_worker(cache):
    with pytest.raises(InvalidArgumentError, match="workers"):
        opd_store.verify(cache, workers=0)
    assert CliRunner().invoke(main, ["verify", str(cache), "--workers", "0"]).exit_code == 2
