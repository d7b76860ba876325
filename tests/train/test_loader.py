"""Worker processes: the order of the stream, exact resumption, and what is said of a worker that dies."""

from __future__ import annotations

import gc
import os
import pickle
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from store.caches import ROOT, VOCAB, write

import opd_store
from opd_store import FormatError, InvalidArgumentError, OpdError
from opd_store.testing import random_rollout
from opd_train import CacheLoader, CacheStream, WorkerError

# Python 3.12 and later warn of forks in a process that has threads, as one that ran other tests does.
pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
N = 30


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 21, N)
    rollouts = [random_rollout(rng, vocab_size=VOCAB, prompt_len=3, response_len=r, topk=3) for r in lengths]
    path = tmp_path_factory.mktemp("loader") / "cache"
    write(path, rollouts, batch_bytes=1200, shard_bytes=6000)
    return opd_store.open(path)


def stream(cache, **options):
    return CacheStream(cache, **({"batch_tokens": 50, "seed": 3, "window": 2} | options))


def loader(cache, workers=2, method="fork", build=None, timeout_s=30, **options):
    source = stream(cache, **options)
    if build is not None:
        source.assembler = Building(source.assembler, build)
    return CacheLoader(source, num_workers=workers, multiprocessing_context=method, timeout_s=timeout_s)


def rows(batches):
    return [batch.row_ids.tolist() for batch in batches]


class Building:
    """An assembler that does something else first."""

    def __init__(self, inner, build):
        self.inner, self.build = inner, build

    def prefetch(self, source, rows):
        self.inner.prefetch(source, rows)

    def assemble(self, source, rows):
        self.build(rows.tolist())
        return self.inner.assemble(source, rows)


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_the_batches_are_those_of_the_stream(cache, method):
    expected = list(stream(cache, epochs=2))
    made = loader(cache, method=method, epochs=2)
    assert len(made) == len(stream(cache))
    found = list(made)
    assert len(found) == len(expected)
    for left, right in zip(found, expected, strict=True):
        assert left.tensors().keys() == right.tensors().keys()
        for name, tensor in left.tensors().items():
            assert torch.equal(tensor, right.tensors()[name]), name
    assert made.next_batch() is None


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 2)])
def test_it_goes_on_from_every_step_with_other_workers(cache, before, after):
    expected = rows(stream(cache))
    made = loader(cache, before)
    states = [made.state_dict()]
    for batch in made:
        assert batch.row_ids.tolist() == expected[len(states) - 1]
        states.append(made.state_dict())
    assert states[-1] == dict(states[0], batches=len(expected))
    resumed = loader(cache, after)
    for step, state in enumerate(states):
        resumed.load_state_dict(state)
        assert rows(resumed) == expected[step:]
        alone = stream(cache)
        alone.load_state_dict(state)
        assert rows(alone) == expected[step:]


def test_all_states_go_to_another_world_size(cache):
    seen, states = [], []
    for rank in range(2):
        made = loader(cache, rank=rank, world_size=2)
        seen += made.next_batch().row_ids.tolist()
        states.append(made.state_dict())
        made.close()
    made = loader(cache)
    made.load_state_dict(states)
    assert sorted(seen + [row for batch in rows(made) for row in batch]) == list(range(N))


@pytest.mark.parametrize("name", ["SIGKILL", "SIGBUS", "SIGSEGV"])
def test_a_worker_that_dies_is_named_with_what_it_built(cache, name, capfd):
    expected = rows(stream(cache))
    victim = expected[4]
    parent = os.getpid()

    def build(wanted):
        if wanted == victim and os.getpid() != parent:
            os.kill(os.getpid(), getattr(signal, name))

    made = loader(cache, build=build)
    found = []
    started = time.monotonic()
    with pytest.raises(
        WorkerError, match=f"was killed by {name} while it built batch 4 of epoch 0"
    ) as caught:
        found += [made.next_batch().row_ids.tolist() for _ in range(len(expected))]
    assert time.monotonic() - started < 30
    error = caught.value
    assert list(error.rows) == victim
    assert list(error.source) == [0] * len(victim)
    assert error.exit_code == -getattr(signal, name)
    assert f"worker {error.pid} " in str(error)
    assert f"rows {', '.join(map(str, victim))} in " in str(error)
    assert set(error.shards) == {f"{cache.uri}/{cache.shard_name(row)}" for row in victim}
    assert error.shards[0] in str(error)
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.pid, again.rows) == (str(error), error.pid, error.rows)
    # What it wrote on its way down is for a person to read.
    assert ("Fatal Python error" in capfd.readouterr().err) == (name != "SIGKILL")


def test_after_a_death_it_goes_on_with_the_same_batch(cache, tmp_path):
    expected = rows(stream(cache))

    def build(wanted):
        flag = tmp_path / "died"
        if wanted == expected[2] and not flag.exists():
            flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    made = loader(cache, build=build)
    found = []
    with pytest.raises(WorkerError):
        found.extend(batch.row_ids.tolist() for batch in iter(made.next_batch, None))
    assert made.state_dict()["batches"] == len(found) <= 2
    assert found + rows(made) == expected


def test_a_worker_killed_while_it_is_idle(cache):
    made = loader(cache, workers=1, batch_tokens=400)
    made.next_batch()
    assert made._workers
    time.sleep(0.5)
    made._workers[0].process.kill()
    made._workers[0].process.join()
    with pytest.raises(WorkerError, match="SIGKILL"):
        list(iter(made.next_batch, None))


def test_a_batch_that_was_ready_is_not_lost_with_another_worker(cache):
    expected = rows(stream(cache, epochs=3))
    made = loader(cache, workers=3, epochs=3)
    found = [made.next_batch().row_ids.tolist()]
    for worker in made._workers:
        # The next batch is there; the one after is asked of a worker that is dead.
        if worker is not made._order[0]:
            worker.process.kill()
            worker.process.join()
    with pytest.raises(WorkerError, match="SIGKILL"):
        found.extend(batch.row_ids.tolist() for batch in iter(made.next_batch, None))
    assert found + rows(made) == expected


def test_at_the_end_no_worker_is_started(cache):
    made = loader(cache)
    list(made)
    assert made.next_batch() is None
    assert not made._workers


def test_a_worker_that_hangs(cache):
    expected = rows(stream(cache))

    def build(wanted):
        if wanted == expected[1]:
            time.sleep(600)

    made = loader(cache, build=build, timeout_s=0.5)
    with pytest.raises(
        WorkerError, match=r"gave nothing for 0\.5 s while it built batch 1 of epoch 0"
    ) as caught:
        rows(made)
    assert list(caught.value.rows) == expected[1]
    assert made.state_dict()["batches"] == 1


class Local(Exception):
    """One that cannot be sent to another process."""

    def __init__(self, one, two):
        super().__init__(one)


@pytest.mark.parametrize(
    ("error", "found"),
    [
        (FormatError("row 3 is broken", row=3), FormatError),
        (OSError(5, "Input/output error"), OSError),
        (Local("a", "b"), OpdError),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_an_error_comes_at_its_place(cache, error, found):
    expected = rows(stream(cache))

    def build(wanted):
        if wanted == expected[3]:
            raise error

    made = loader(cache, build=build)
    for step in range(3):
        assert made.next_batch().row_ids.tolist() == expected[step]
    with pytest.raises(found, match=str(error.args[0])) as caught:
        made.next_batch()
    assert getattr(caught.value, "row", 3) == 3
    assert any("in build" in note for note in caught.value.__notes__)
    assert made.state_dict()["batches"] == 3


def test_workers_end_with_the_loader(cache):
    ways = []
    for end in ("close", "break", "garbage"):
        made = loader(cache)
        iterator = iter(made)
        next(iterator)
        workers = [worker.process for worker in made._workers]
        assert all(worker.is_alive() for worker in workers)
        if end == "close":
            made.close()
        elif end == "break":
            iterator.close()
        else:
            del made, iterator
            gc.collect()
        ways.append([worker.exitcode for worker in workers])
    assert ways == [[-signal.SIGKILL] * 2] * 3


@pytest.mark.parametrize("death", ["exit", "kill"])
def test_workers_end_with_their_parent(cache, death):
    code = (
        "import os, signal, sys, opd_store; from opd_train import CacheLoader, CacheStream\n"
        "made = CacheLoader(CacheStream(opd_store.open(sys.argv[1]), batch_tokens=50), num_workers=2,\n"
        "    multiprocessing_context='fork')\n"
        "made.next_batch(); print(*[w.process.pid for w in made._workers], flush=True)\n"
        "if sys.argv[2] == 'kill': os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "error",
            "-W",
            "ignore:This process:DeprecationWarning",
            "-c",
            code,
            cache.uri,
            death,
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.stderr == ""
    for pid in map(int, done.stdout.split()):
        for _ in range(1000):
            if not alive(pid):
                break
            time.sleep(0.01)
        assert not alive(pid)


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_workers": 0}, "num_workers"),
        ({"timeout_s": 0}, "timeout_s"),
        ({"timeout_s": float("nan")}, "timeout_s"),
        ({"multiprocessing_context": "thread"}, "multiprocessing_context: expected one of"),
    ],
    ids=str,
)
def test_arguments_out_of_range(cache, options, message):
    with pytest.raises(InvalidArgumentError, match=message):
        CacheLoader(stream(cache), **options)
