"""One dial between offline and live: batches from a cache, and new rollouts when they have grown too old.

At `every=0` nothing is sampled: a plain `CacheStream`. At `every=1` every step trains on rollouts that the
student sampled just before it: live distillation, which leaves its rollouts in a cache. What is sampled goes
into a cache of the run's own, one version each time, so that the cache at the start may be remote, shared and
pinned."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from opd_store import Cache, InvalidArgumentError, MismatchError, Rollout, SamplerInfo
from opd_train.capture.sampling import Prompt, sample_rollouts
from opd_train.data.batches import TeacherBatch
from opd_train.data.stream import CacheStream
from opd_train.models import CausalLM
from opd_train.training.live import check_pair, draw_prompts, prompts_digest
from opd_train.training.monitors import DriftConfig, DriftMonitor
from opd_train.training.parts import Part, StreamConfig, policy_versions, stream_parts
from opd_train.training.run_cache import RunCache
from opd_train.training.stopwatch import Stopwatch

__all__ = ["RefreshConfig", "RefreshingSource", "StreamConfig"]

_STATE_VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class RefreshConfig:
    """When new rollouts are sampled, and how many."""

    rollouts: int
    """New rollouts each time."""
    every: int = 0
    """Steps between refreshes; 0 for never. 1 is live distillation."""
    on_drift: bool = False
    """Also refresh when an alarm of kind DRIFT is raised (ESS, chi-square, mean ratio)."""
    drift: DriftConfig = field(default_factory=DriftConfig)
    """Thresholds for `on_drift`."""
    keep: int = 1
    """Versions of the policy whose rollouts are streamed, the newest; the cache at the start counts as
    one."""

    def __post_init__(self) -> None:
        for name, least in (("rollouts", 1), ("every", 0), ("keep", 1)):
            if getattr(self, name) < least:
                raise InvalidArgumentError(f"{name}: expected {least} or more, found {getattr(self, name)}")


class RefreshingSource:
    """Batches of a cache that is extended with rollouts of the student as it becomes. A `BatchSource`.

    Batches carry `policy_version`: the number of steps that the student had been trained for when it sampled,
    0 for the cache at the start. One process: the student is not sharded.

    A run that is killed and started again repeats the same batches: what was committed and is not in the
    state is sampled again and recognised, not stored twice."""

    def __init__(
        self,
        student: CausalLM,
        teacher: CausalLM,
        prompts: Sequence[Prompt],
        sampler: SamplerInfo,
        uri: str | os.PathLike[str],
        config: RefreshConfig,
        *,
        start: Cache | None = None,
        stream: StreamConfig | None = None,
        topk: int = 0,
        encoding: str = "plain",
        teacher_tokens: int = 16384,
        stopwatch: Stopwatch | None = None,
    ) -> None:
        """
        Args:
            student: sampled from as it is when a refresh is due.
            teacher: scores what was sampled; has to be the one of `start`.
            prompts: taken over and over, in an order that the sampler's seed shuffles.
            sampler: `max_new_tokens` and `seed` have to be set.
            uri: directory of the run's own cache, which is made at the first refresh.
            start: what the first steps train on; None samples before the first.
            topk: K to score, as `start` has it; 0 for the sampled token only.
            encoding: of the run's cache; only "plain" keeps the teacher's log-probs bit for bit.
            teacher_tokens: padded tokens of one teacher pass.
            stopwatch: gets the seconds of "sampling" and "teacher".

        Raises:
            MismatchError: student, teacher and `start` do not belong together.
            InvalidArgumentError: no prompts, nothing to start from, or settings out of range.
        """
        check_pair(student, teacher)
        if not prompts:
            raise InvalidArgumentError("prompts: none to sample from")
        if start is None and not config.every:
            raise InvalidArgumentError(
                "start: expected a cache, since every=0 samples none before the first step"
            )
        if start is not None:
            _check_start(start, teacher, topk)
        self._student, self._prompts, self._sampler = student, prompts, sampler
        self._config, self._start = config, start
        self._stream_config = stream or StreamConfig()
        self._stopwatch = stopwatch or Stopwatch()
        self._own = RunCache(
            os.fspath(uri),
            student,
            teacher,
            sampler,
            topk=topk,
            encoding=encoding,
            teacher_tokens=teacher_tokens,
            stopwatch=self._stopwatch,
        )
        self._monitor = DriftMonitor(config.drift)
        self._step = self._drawn = 0
        self._refreshed_at = 0
        self._parts: list[Part] = [] if start is None else [Part(0, is_start=True)]
        self._stream: CacheStream | None = None
        batching = dataclasses.asdict(self._stream_config)
        del batching["workers"]
        described = {
            "cache": None if start is None else start.digest,
            "teacher": teacher.info.weights_digest,
            "prompts": prompts_digest(prompts),
            "sampler": dataclasses.asdict(sampler),
            "refresh": dataclasses.asdict(config),
            "stream": batching,
            "topk": topk,
            "encoding": encoding,
        }
        self._identity: dict[str, Any] = json.loads(json.dumps(described))

    @property
    def n_refreshes(self) -> int:
        """How often new rollouts were sampled."""
        return self._drawn // self._config.rollouts

    def next_batch(self) -> TeacherBatch | None:
        """The next batch, with new rollouts first if they are due.

        Raises:
            MismatchError: the run's cache holds something else than this run put there.
            InvalidRolloutError: a prompt that leaves no room, or logits that are not finite.
            StorageError: the disk refused.
        """
        if not self._parts or self._is_due():
            self._refresh()
        if self._stream is None:
            self._stream = self._stream_parts()
        batch = self._stream.next_batch()
        if batch is None:
            return None
        return dataclasses.replace(batch, policy_version=policy_versions(self._parts, batch))

    def observe(self, metrics: Mapping[str, float]) -> None:
        """Take note of a step that was made; called by the trainer."""
        self._step += 1
        self._monitor.update(self._step, metrics)

    def close(self) -> None:
        """Stop the threads that build batches ahead. The source remains usable, from where it is."""
        if self._stream is not None:
            self._stream.close()

    def identity(self) -> dict[str, Any]:
        """What a run that goes on has to agree in, as JSON values."""
        return self._identity

    def state_dict(self) -> dict[str, Any]:
        """Where the source is, as JSON values: steps, draws, the pinned cache and the place in its stream."""
        return {
            "version": _STATE_VERSION,
            "identity": self.identity(),
            "step": self._step,
            "drawn": self._drawn,
            "refreshed_at": self._refreshed_at,
            "digest": self._own.digest,
            "parts": [dataclasses.asdict(part) for part in self._parts],
            "stream": None if self._stream is None else self._stream.state_dict(),
            "monitor": self._monitor.state_dict(),
        }

    def load_state_dict(self, state: Any) -> None:  # noqa: ANN401
        """Go on where the state was taken. Raises MismatchError for the state of another run."""
        if isinstance(state, list):
            raise MismatchError(
                f"refresh: expected the state of one process, found those of {len(state)}; run as many as "
                "before",
                field="world_size",
                expected="1",
                found=str(len(state)),
            )
        own = {"version": _STATE_VERSION, "identity": self.identity()}
        for name, value in own.items():
            if state[name] != value:
                raise MismatchError(
                    f"refresh state: {name} is {state[name]!r:.300}, this run has {value!r:.300}",
                    field=name,
                    expected=str(value),
                    found=str(state[name]),
                )
        self.close()
        self._step, self._drawn = int(state["step"]), int(state["drawn"])
        self._refreshed_at = int(state["refreshed_at"])
        self._parts = [Part(**part) for part in state["parts"]]
        self._monitor.load_state_dict(state["monitor"])
        self._own.go_to(state["digest"])
        self._stream = None
        if state["stream"] is not None:
            self._stream = self._stream_parts()
            self._stream.load_state_dict(state["stream"])

    def _stream_parts(self) -> CacheStream:
        return stream_parts(self._parts, self._start, self._own.cache, self._stream_config, self._student)

    def _is_due(self) -> bool:
        if self._step == self._refreshed_at:
            return False
        config = self._config
        by_steps = config.every > 0 and self._step - self._refreshed_at >= config.every
        return by_steps or (config.on_drift and self._monitor.has_drifted)

    def _refresh(self) -> None:
        n = self._config.rollouts
        first = len(self._own)
        self._own.add(self._sample(n))
        self.close()
        self._stream = None
        self._drawn += n
        self._refreshed_at = self._step
        self._parts = [*self._parts, Part(self._step, first, first + n)][-self._config.keep :]
        # What was measured on the old rollouts says nothing of the new ones.
        self._monitor.reset()

    def _sample(self, n: int) -> list[Rollout]:
        chosen = draw_prompts(self._prompts, self._sampler.seed or 0, self._drawn, n)
        self._student.model.eval()
        with self._stopwatch.measure("sampling"):
            drawn = sample_rollouts(
                self._student, chosen, self._sampler, first_stream=self._drawn, batch_rows=n
            )
        # A prompt comes again, and may be answered in the same words: another draw, not the same rollout.
        return [
            dataclasses.replace(rollout, sample_id=f"{rollout.sample_id}@{number}", policy_version=self._step)
            for number, rollout in enumerate(drawn, start=self._drawn)
        ]


def _check_start(start: Cache, teacher: CausalLM, topk: int) -> None:
    stored = start.meta.teacher and start.meta.teacher.weights_digest
    if stored not in (None, teacher.info.weights_digest):
        raise MismatchError(
            f"teacher: {start.uri} was scored by {stored}, {teacher.path} is {teacher.info.weights_digest}; "
            "new rollouts have to be scored by the same teacher",
            field="teacher",
            expected=str(stored),
            found=str(teacher.info.weights_digest),
        )
    if start.topk != topk:
        raise MismatchError(
            f"topk: {start.uri} has {start.topk}, new rollouts would have {topk}; give the same number",
            field="topk",
            expected=str(start.topk),
            found=str(topk),
        )
