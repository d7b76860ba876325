"""The cache that a run makes of what its student sampled, one version each time."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import opd_store
from opd_store import Cache, CacheMeta, CacheNotFoundError, MismatchError, Rollout, SamplerInfo
from opd_train.capture.scoring import score_rollouts, with_teacher
from opd_train.models import CausalLM
from opd_train.training.stopwatch import Stopwatch


class RunCache:
    """Scores and commits the rollouts of a run, and recognises those that it committed before it was killed.

    Nothing is read or made before the first `add` or `go_to`."""

    def __init__(
        self,
        uri: str,
        student: CausalLM,
        teacher: CausalLM,
        sampler: SamplerInfo,
        *,
        topk: int,
        encoding: str,
        teacher_tokens: int,
        stopwatch: Stopwatch,
    ) -> None:
        """
        Args:
            uri: its directory, which is made when rollouts are first added.
            topk, encoding: of the cache; without top-k it is "plain".
            teacher_tokens: padded tokens of one teacher pass.
            stopwatch: gets the seconds of "teacher".
        """
        self._uri, self._student, self._teacher, self._sampler = uri, student, teacher, sampler
        self._topk, self._encoding, self._teacher_tokens = topk, encoding, teacher_tokens
        self._stopwatch = stopwatch
        self.cache: Cache | None = None
        """The version that holds what was added so far; None before the first."""

    def __len__(self) -> int:
        return 0 if self.cache is None else len(self.cache)

    @property
    def digest(self) -> str | None:
        """Of the present version; None before the first."""
        return None if self.cache is None else self.cache.digest

    def go_to(self, digest: str | None) -> None:
        """Be at the version of that digest; None is before the first."""
        self.cache = None if digest is None else opd_store.open(f"{self._uri}@{digest}")

    def add(self, rollouts: Sequence[Rollout]) -> None:
        """Score rollouts and commit them as the next version, unless that was done before.

        Raises:
            MismatchError: the cache holds something else there.
            StorageError: the disk refused.
        """
        found = self._find(rollouts)
        self.cache = self._store(rollouts) if found is None else found

    def _find(self, rollouts: Sequence[Rollout]) -> Cache | None:
        """The version in which these rollouts were committed by a run that was killed before it could note
        it."""
        try:
            cache = opd_store.open(self._uri)
        except CacheNotFoundError:
            return None
        first = len(self)
        end = first + len(rollouts)
        while len(cache) > end and cache.parent is not None:
            cache = opd_store.open(f"{self._uri}@{cache.parent}")
        if len(cache) == first and self.digest in (None, cache.digest):
            return None
        fingerprint = self._student.tokenizer_fingerprint
        same = len(cache) == end and all(
            cache.row_hash(row) == opd_store.rollout_hash(rollout.token_ids, fingerprint)
            and cache.rollout(row, ranks=0, columns=("sample_id",)).sample_id == rollout.sample_id
            for row, rollout in enumerate(rollouts, start=first)
        )
        if not same:
            raise MismatchError(
                f"{self._uri}: expected the {first} rollouts this run stored, found version {cache.version} "
                f"with {len(cache)}, which are not its own; give the run a directory of its own, or delete "
                "this cache",
                field="cache",
                expected=str(first),
                found=str(len(cache)),
            )
        return cache

    def _store(self, rollouts: Sequence[Rollout]) -> Cache:
        with self._stopwatch.measure("teacher"):
            scores = score_rollouts(
                self._teacher, rollouts, topk=self._topk, batch_tokens=self._teacher_tokens
            )
        scored = [with_teacher(rollout, score) for rollout, score in zip(rollouts, scores, strict=True)]
        meta = self._meta()
        if self.cache is None and not _exists(self._uri):
            encoding = self._encoding if self._topk else "plain"
            writer = opd_store.create(self._uri, meta=meta, topk=self._topk, encoding=encoding)
        else:
            writer = opd_store.append(self._uri, meta=meta)
        with writer:
            writer.append_batch(scored)
            version = writer.commit()
        return opd_store.open(version.uri)

    def _meta(self) -> CacheMeta:
        """Its rollouts are of many versions of the student; each row says of which."""
        student = self._student
        name = f"{student.info.name} in training"
        return CacheMeta(
            vocab_size=self._teacher.vocab_size,
            tokenizer_fingerprint=student.tokenizer_fingerprint,
            chat_template_digest=student.chat_template_digest,
            teacher=self._teacher.info,
            sft_teacher=student.sft_teacher,
            behaviour=dataclasses.replace(
                student.info,
                name=name,
                weights_digest=None,
                logprob_temperature=self._sampler.temperature,
                logprob_mode="processed",
            ),
            reference=dataclasses.replace(student.info, name=name, weights_digest=None),
            sampler=self._sampler,
        )


def _exists(uri: str) -> bool:
    try:
        opd_store.open(uri)
    except CacheNotFoundError:
        return False
    return True
