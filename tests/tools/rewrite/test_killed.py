"""SIGKILL at any moment: the same command again ends in the same bytes, and leaves nothing else."""

from __future__ import annotations

import random
import shutil

import pytest
from store.caches import files
from tools.rewrite.making import make, rich_rollouts

COMMANDS = {
    "recode": ["recode", "SOURCE", "OUT", "--encoding", "ladder/32", "--shard-mib", 1],
    "filter": ["filter", "SOURCE", "OUT", "--where", "x_level>3"],
    "split": ["split", "SOURCE", "OUT", "OUT-2", "--held-out", 0.3],
    "merge": ["merge", "SOURCE", "OTHER", "OUT"],
    "join": ["join", "SOURCE", "SOURCE", "OUT"],
}


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Rollouts that make four shards of 1 MiB."""
    path = tmp_path_factory.mktemp("large") / "large"
    make(path, rich_rollouts(11, response_len=12000), encoding="plain", bands=(12,))
    return path


def everything(path):
    return {str(p.relative_to(path)): files(p) for p in sorted(path.iterdir())}


@pytest.mark.parametrize("name", COMMANDS)
def test_killed_anywhere(name, opd, source, large, tmp_path):
    make(tmp_path / "other", rich_rollouts(3, seed=4))

    def run(root, **request):
        root.mkdir(exist_ok=True)
        places = {"SOURCE": large if name == "recode" else source, "OTHER": tmp_path / "other"}
        places |= {"OUT": root / "out", "OUT-2": root / "out-2"}
        arguments = [places.get(str(argument), argument) for argument in COMMANDS[name]]
        return opd(*arguments, count_events=True, **request)

    run(tmp_path / "expected").ok()
    # Once more, since the first one may compile modules.
    shutil.rmtree(tmp_path / "expected")
    events = run(tmp_path / "expected").ok().events
    expected = everything(tmp_path / "expected")
    assert events > 20
    rng = random.Random(name)
    moments = sorted({1, 2, events - 1, events, *rng.sample(range(1, events + 1), 6)})
    for moment in moments:
        root = tmp_path / "killed"
        assert run(root, kill_at=moment).killed
        run(root).ok()
        assert everything(root) == expected, moment
        shutil.rmtree(root)
    # Killed again and again, a little later each time.
    kills = 0
    while run(tmp_path / "often", kill_at=events // 4 + kills * events // 6).killed:
        kills += 1
    assert kills > 1
    run(tmp_path / "often").ok()
    assert everything(tmp_path / "often") == expected
