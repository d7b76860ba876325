"""Batches from caches in a shuffled order that is a pure function of what is in them, seed and epoch."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from enum import StrEnum
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from opd_store import Cache, InvalidArgumentError
from opd_train.data.ahead import BuildAhead, announced, batches_to_announce
from opd_train.data.assemble import BatchAssembler
from opd_train.data.batches import TeacherBatch
from opd_train.data.order import Integers, Shuffle
from opd_train.data.plan import Planner, Stage, Step
from opd_train.data.position import STATE_VERSION, Position, State, resume
from opd_train.data.selection import Rows, TooLong, check_alike, exact_weights, select_rollouts
from opd_train.data.transfer import DeviceFeed, in_shared_memory

_Choice = TypeVar("_Choice", bound=StrEnum)


class CacheStream(IterableDataset[TeacherBatch]):
    """Iterates over caches in packed batches; stops and goes on exactly where its state says.

    Every rollout comes once an epoch over all ranks (or as often as `weights` says). Who gets what, and when,
    is in `opd_train.data.order`; how batches are filled, and how ranks come to equally many, in
    `opd_train.data.plan.plan_batches`. Batches do not span epochs.

    The state counts the batches that the caller was given, not those built ahead. At another world size
    `load_state_dict` takes the list of the states of all old ranks: what none of them was given of the epoch
    is dealt anew, so that nothing comes twice and nothing is left out.

    In `DataLoader(stream, batch_size=None, num_workers=k)` worker w builds batches w, w + k, ... in its
    process, on the CPU and without threads, so the order is the same for every k. Such a loader works on
    copies: this object does not move. `CacheLoader` and torchdata's `StatefulDataLoader` know what was
    delivered.

    Pickling passes the caches' addresses and the position, and no batch that was built ahead. After a fork
    the child starts threads of its own.
    """

    _ahead: BuildAhead | None
    _feed: DeviceFeed | None

    def __init__(
        self,
        cache: Cache | Sequence[Cache],
        *,
        batch_tokens: int = 16384,
        batch_rollouts: int | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        ranks: int | None = None,
        epochs: int | None = 1,
        device: torch.device | str = "cpu",
        device_decode: bool = False,
        vocab_size: int | None = None,
        context: int | None = None,
        workers: int = 1,
        shuffle: Shuffle | str = Shuffle.BLOCK,
        window: int = 32,
        too_long: TooLong | str = TooLong.ERROR,
        multiple_of: int = 1,
        rows: Rows | Sequence[Rows | None] | None = None,
        weights: Sequence[float] | None = None,
        joined: Sequence[tuple[Cache, Integers]] = (),
        draws: bool = False,
        chosen: bool = False,
    ) -> None:
        """
        Args:
            cache: one cache, or several that share tokenizer, vocabulary and number of ranks.
            batch_tokens: most tokens in a batch, prompts and padding included.
            batch_rollouts: most rollouts in a batch; None for no such limit.
            rank, world_size: this process is one of `world_size` that divide the rollouts among them.
            ranks: how many of the cached top-k ranks to read; None means all.
            epochs: passes over the caches; None means without end.
            device: where batches are delivered.
            device_decode: put packed top-k together on the device, with the same bits, where it can be; see
                `BatchAssembler`. Worker processes decode by themselves.
            vocab_size: logits of the student, if fewer than the teacher's; every id is proven below it.
            context: longest rollout the student takes; None for no limit.
            workers: threads that build batches ahead, each one batch; 0 builds when asked.
            shuffle: "block", "global" or "none", see `Shuffle`.
            window: record batches whose rollouts are mixed, for "block".
            too_long: what becomes of rollouts longer than `context` or `batch_tokens`: "error", "truncate" or
                "skip", see `TooLong`. `n_skipped` and `n_truncated` count them.
            multiple_of: tokens of a batch are padded to a multiple of this.
            rows: row numbers that take part, such as those of `opd_store.select`; for several caches a list
                with one array (or None for all) each.
            weights: for several caches, how often rollouts of each come in an epoch. 2 is twice, 0.5 half of
                them, the other half in the next epoch; 1.5 is once and a half.
            joined: other teachers' caches, each with the row there of every row of the first cache, int64
                [rows], -1 where it has none (see `opd_store.join`).
            draws, chosen: whether batches carry ids drawn from the teacher, and ids another model chose.

        Raises:
            InvalidArgumentError: an argument out of range, nothing to stream, fewer rollouts in an epoch than
            ranks, or a rollout longer than `batch_tokens`.
            InvalidRolloutError: a rollout longer than `context`.
            MismatchError: caches that cannot be mixed.
        """
        one = isinstance(cache, Cache)
        caches: list[Cache] = [cache] if isinstance(cache, Cache) else list(cache)
        order, cut = _choice(Shuffle, "shuffle", shuffle), _choice(TooLong, "too_long", too_long)
        if not 0 <= rank < world_size:
            raise InvalidArgumentError(f"rank: expected 0..{world_size - 1}, found {rank}")
        least = {
            "batch_tokens": (batch_tokens, 2),
            "batch_rollouts": (batch_rollouts, 1),
            "window": (window, 1),
        }
        least |= {"context": (context, 2), "workers": (workers, 0), "multiple_of": (multiple_of, 1)}
        for name, (value, limit) in (least | {"epochs": (epochs, 0)}).items():
            if value is not None and value < limit:
                raise InvalidArgumentError(f"{name}: expected {limit} or more, found {value}")
        room = batch_tokens // multiple_of * multiple_of
        if room < 2:
            raise InvalidArgumentError(
                f"multiple_of: expected at most batch_tokens {batch_tokens}, found {multiple_of}"
            )
        check_alike(caches, ranks)
        exact = exact_weights(weights, len(caches))
        selection = select_rollouts(
            caches,
            [rows] if one else [None] * len(caches) if rows is None else rows,  # type: ignore[arg-type, list-item]
            weights=exact,
            context=context,
            batch_tokens=room,
            too_long=cut,
        )
        self.n_skipped, self.n_truncated = selection.n_skipped, selection.n_truncated
        rollouts = selection.rollouts
        counts = [int((rollouts.source == number).sum()) for number in range(len(caches))]
        # The fewest that an epoch can have.
        n_entries = sum(int(count * weight) for count, weight in zip(counts, exact, strict=True))
        if n_entries < world_size:
            where = ", ".join(cache.uri for cache in caches)
            raise InvalidArgumentError(
                f"{where}: {n_entries} rollouts an epoch cannot feed {world_size} ranks"
            )
        self._planner = Planner(
            rollouts=rollouts,
            seed=seed,
            shuffle=order,
            window=window,
            batch_tokens=room,
            batch_rollouts=batch_rollouts,
        )
        self._caches = caches
        self._rank, self._world_size, self._epochs = rank, world_size, epochs
        self._workers, self._device = workers, torch.device(device)
        self.assembler = BatchAssembler(
            caches,
            ranks=ranks,
            vocab_size=vocab_size,
            max_tokens=min(room, context or room) if self.n_truncated else None,
            multiple_of=multiple_of,
            joined=joined,
            draws=draws,
            chosen=chosen,
            device=self._device,
            device_decode=device_decode,
        )
        """Builds batches. Internal to the package."""
        self._identity: dict[str, Any] = {
            "cache": " ".join(cache.digest for cache in caches),
            "seed": seed,
            "batch_tokens": batch_tokens,
            "batch_rollouts": batch_rollouts,
            "ranks": ranks,
            "context": context,
            "too_long": cut.value,
            "multiple_of": multiple_of,
            "shuffle": order.value,
            "window": window,
            "weights": [str(weight) for weight in exact],
            "rollouts": rollouts.digest,
            "joined": [f"{cache.digest} {_digest_of(rows)}" for cache, rows in joined],
        }
        self.prefetch_batches = batches_to_announce(caches, batch_tokens)
        """How many batches ahead to announce. Internal to the package."""
        self._position = Position()
        self._length: tuple[tuple[int, tuple[Stage, ...]], int] | None = None
        self._reset()

    def __iter__(self) -> Iterator[TeacherBatch]:
        """Batches from the present position on; closing the iterator stops the threads."""
        if (worker := get_worker_info()) is not None:
            yield from self._share(worker.id, worker.num_workers)
            return
        try:
            while (batch := self.next_batch()) is not None:
                yield batch
        finally:
            self.close()

    def __len__(self) -> int:
        """Batches of this rank in the present epoch, or in what a change of world size left of it.

        With `epochs` above 1 an iteration gives more; a DataLoader that was asked for its length warns then.
        """
        key = self._position.epoch, self._position.stages
        if self._length is None or self._length[0] != key:
            plan = self._planner.plan(key[0], self._world_size, key[1])
            self._length = key, plan.n_batches(self._rank)
        return self._length[1]

    def next_batch(self) -> TeacherBatch | None:
        """The next batch, or None after the last epoch.

        After an error the position is that of before: another call tries the same batch again.

        Raises:
            InvalidRolloutError: an id outside the vocabulary.
            IntegrityError, FormatError: a shard is damaged.
        """
        if self._pid != os.getpid():
            self._reset()  # Threads do not survive a fork.
        try:
            if self._ahead is None:
                steps = announced(self.walk(), self.assembler, self.prefetch_batches)
                self._ahead = BuildAhead(steps, self.assembler, self._workers)
            built = self._ahead.next()
            # Last, since what fails after a batch was counted would lose it.
            return None if built is None else self.deliver(*built)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Stop the threads and drop what they built ahead. The stream remains usable, from where it is."""
        if self._ahead is not None and self._pid == os.getpid():
            self._ahead.close()
        self._reset()

    def identity(self) -> dict[str, Any]:
        """What a state that is loaded has to agree in: everything but rank, world size and position."""
        return {"version": STATE_VERSION, **self._identity}

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is, as JSON values; the next batch is not part of it yet."""
        own = {"rank": self._rank, "world_size": self._world_size}
        return {**self.identity(), **own, **self._position.to_json()}

    def load_state_dict(self, state: State | Sequence[State]) -> None:
        """Go on where `state` was taken.

        Args:
            state: of this rank; or the states of all ranks, in any order, which may have been more or fewer.

        Raises:
            MismatchError: other caches, rollouts, seed or batch settings, ranks that are missing or come
            twice, or states that are not of one moment, with both values. Nothing changes then.
        """
        info = get_worker_info()
        position = resume(
            state,
            identity=self._identity,
            rank=self._rank,
            world_size=self._world_size,
            planner=self._planner,
            worker=None if info is None else (info.id, info.num_workers),
        )
        self.close()
        self._position = position

    def walk(self) -> Iterator[Step]:
        """What comes next, not built. Internal to the package."""
        position = self._position
        return self._planner.walk(
            self._rank,
            self._world_size,
            epoch=position.epoch,
            index=position.batches,
            epochs=self._epochs,
            stages=position.stages,
        )

    def deliver(self, step: Step, batch: TeacherBatch) -> TeacherBatch:
        """Move a batch to its device and count it. Internal to the package."""
        self._feed = self._feed or DeviceFeed(self._device)
        sent = self._feed.send(batch)
        self._move_to(step)
        return sent

    def shards_of(self, step: Step) -> list[str]:
        """The files that hold the rollouts of a step. Internal to the package."""
        found = set()
        for source, row in zip(step.source.tolist(), step.rows.tolist(), strict=True):
            cache = self._caches[source]
            found.add(f"{cache.uri}/{cache.shard_name(row)}")
        return sorted(found)

    def __getstate__(self) -> dict[str, Any]:
        hidden = ("_ahead", "_feed", "_pid")
        return {name: value for name, value in vars(self).items() if name not in hidden}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._ahead = None
        self._feed = None

    def _move_to(self, step: Step, worker: tuple[int, int] | None = None) -> None:
        self._position = replace(self._position, epoch=step.epoch, batches=step.number + 1, worker=worker)

    def _share(self, number: int, n_workers: int) -> Iterator[TeacherBatch]:
        """Every `n_workers`-th batch: in a worker of a DataLoader."""
        # This is a copy, whose batches go to no device.
        self.assembler.device_decode = False
        begun = self._position.worker is not None
        steps = itertools.islice(self.walk(), n_workers - 1 if begun else number, None, n_workers)
        for step in announced(steps, self.assembler, self.prefetch_batches):
            batch = in_shared_memory(self.assembler.assemble(step.source, step.rows))
            self._move_to(step, (number, n_workers))
            yield batch


def _digest_of(rows: Integers) -> str:
    return hashlib.sha256(np.asarray(rows).astype("<i8").tobytes()).hexdigest()


def _choice(kind: type[_Choice], name: str, value: str) -> _Choice:
    try:
        return kind(value)
    except ValueError:
        choices = ", ".join(kind)
        raise InvalidArgumentError(f"{name}: expected one of {choices}; found {value!r}") from None
