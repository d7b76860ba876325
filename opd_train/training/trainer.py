"""The training loop. What differs between offline and live, or between objectives, is passed in."""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opd_store import OpdError
from opd_train.data.batches import TeacherBatch
from opd_train.model_identity import read_provenance
from opd_train.models import CausalLM
from opd_train.objective.step_metrics import summarise
from opd_train.training import lora
from opd_train.training.checkpoint import save_checkpoint
from opd_train.training.config import DistillConfig, LoraConfig
from opd_train.training.distributed import World, shard
from opd_train.training.export import load_trained, save_model
from opd_train.training.failure import not_finite, out_of_memory
from opd_train.training.monitors import Alarm, DriftMonitor
from opd_train.training.optimisation import clip_mean_gradient, learning_rate, make_optimizer
from opd_train.training.passes import StudentPasses
from opd_train.training.provenance import check_ranks_agree, check_same_run
from opd_train.training.replay import check_place, check_replay, read_replay, write_replay
from opd_train.training.resume import resume
from opd_train.training.run_directory import (
    METRICS_FILE,
    append_metrics,
    latest_checkpoint,
    locked,
    read_metrics,
    remove_partial,
    storage_errors,
    trim_metrics,
)
from opd_train.training.stopwatch import Stopwatch
from opd_train.training.supply import BatchSource, Supply

__all__ = [
    "FINAL_DIR",
    "METRICS_FILE",
    "BatchSource",
    "DistillConfig",
    "LoraConfig",
    "Stopwatch",
    "Trainer",
    "learning_rate",
]

FINAL_DIR = "final"


class Trainer:
    """Trains a student from a source of batches, and resumes from the newest checkpoint in `out`."""

    def __init__(
        self,
        student: CausalLM,
        source: BatchSource,
        config: DistillConfig,
        *,
        out: Path | None = None,
        provenance: dict[str, Any] | None = None,
        stopwatch: Stopwatch | None = None,
        on_step: Callable[[int, dict[str, float]], None] | None = None,
        world: World | None = None,
        monitor: DriftMonitor | None = None,
    ) -> None:
        """
        Args:
            student: trained in place; gets adapters if the config says so, and is sharded over the ranks.
            source: of this rank. Sources of different ranks give equally many batches.
            out: directory for checkpoints, metrics and the final model, which all ranks see; None keeps
                everything in memory.
            provenance: what `opd.json` of the trained model says, beside this run's config.
            on_step: called with (step, metrics) after each step, on every rank.
            world: the ranks that train together; None is this process alone.
            monitor: gets the metrics of every step, on the first rank; alarms whose state changes go into
                the step's row of the metrics.
        """
        self.student, self.config = student, config
        self._source, self._out, self._on_step = source, out, on_step
        self._world = world or World()
        self._monitor = monitor
        described = {
            "student": student.info.to_json(),
            "config": config.to_json(),
            "source": source.identity(),
        }
        self._provenance = json.loads(json.dumps({**(provenance or {}), **described}, allow_nan=False))
        check_ranks_agree(self._provenance, self._world.gather(self._provenance))
        self.stopwatch = stopwatch or Stopwatch()
        self.step = 0
        self._supply = Supply(source, config, self.stopwatch)
        if config.lora is not None:
            lora.add_adapters(student, config.lora, seed=config.seed)
        shard(student, self._world)
        self._passes = StudentPasses(student, config, self._world)
        self._parameters = [p for p in student.model.parameters() if p.requires_grad]
        self._optimizer = make_optimizer(self._parameters, config)
        if config.gradient_checkpointing:
            # transformers 5 renames it; both take these settings first.
            old = student.model.gradient_checkpointing_enable
            getattr(student.model, "activation_checkpointing_enable", old)({"use_reentrant": False})

    @property
    def final_dir(self) -> Path | None:
        """Where the trained model goes."""
        return None if self._out is None else self._out / FINAL_DIR

    def run(self) -> dict[str, float]:
        """Train to the last step and save. Returns the last step's metrics; {} if the run was done already.

        Raises:
            MismatchError: the checkpoint in `out` is of another run.
            OpdError: the loss or the gradient is not finite (with the rows of the step; see `replay`), the
                source ended early, memory ran out, or another process trains in `out`.
            StorageError: the disk refused; earlier checkpoints are intact.
        """
        metrics: dict[str, float] = {}
        with ExitStack() as stack:
            stack.callback(self._close_source)
            if (final := self.final_dir) is not None:
                if not self._exists(final):
                    # Before the first step, so that an unusable place costs no work.
                    stack.enter_context(locked(self._out, self._world))  # type: ignore[arg-type]
                if self._exists(final):
                    check_same_run(final, self._provenance, read_provenance(final))
                    adapters = self.config.lora is not None
                    load_trained(self.student, final, adapters=adapters, world=self._world)
                    self.step = self.config.steps
                    return metrics
            self._begin()
            while self.step < self.config.steps:
                metrics = self._train_step()
                self._report(metrics)
                self._save_checkpoint()
            self.student.model.eval()
            if final is not None:
                adapted = self.config.lora is not None
                export = functools.partial(lora.export_merged, self.student) if adapted else None
                save_model(self.student, final, self._provenance, world=self._world, export=export)
        return metrics

    def replay(self, report: Path) -> list[TeacherBatch]:
        """Go to just before the step that `report` is about, and give its batches of this rank.

        Student, optimizer, source and random state are then what they were. The way there leads from the
        newest checkpoint, or else from the start, through every step again, and writes nothing: without a
        checkpoint this has to be a trainer that has not run. To look at one batch:

            for batch in trainer.replay(Path("out/replay-step-00000042.json")):
                hidden = response_hidden(trainer.student, batch)
                distill_loss(trainer.config.loss, hidden=hidden, lm_head=trainer.student.logits, batch=batch)

        Raises:
            FormatError: not such a file.
            MismatchError: it is of another run, or this run comes to another place.
        """
        content = read_replay(report)
        expected = check_replay(report, content, self._provenance, self._world)
        self._begin(write=False)
        while self.step < content["step"] - 1:
            self._observe(self._train_step())
        batches = [batch for batch, _ in self._supply.of_step(self.step, self._proximal_logprob)]
        self._close_source()
        check_place(report, expected, self._supply.before)
        self.student.model.train()
        return batches

    def _exists(self, path: Path) -> bool:
        return bool(self._world.gather(path.exists())[0])

    def _begin(self, *, write: bool = True) -> None:
        """Seed, and resume if there is something to go on from."""
        # Other dropout on every rank.
        torch.manual_seed(self.config.seed + (self._world.rank << 32))
        if self._out is None:
            return
        if write and self._world.first:
            with storage_errors(self._out):
                remove_partial(self._out)
        found = latest_checkpoint(self._out)
        if (name := self._world.gather(found and found.name)[0]) is not None:
            self.step = resume(
                self._out / name,
                self.student,
                self._optimizer,
                self._source,
                provenance=self._provenance,
                stopwatch=self.stopwatch,
                world=self._world,
            )
            self._supply.clear()
        if write and self._world.first:
            trim_metrics(self._out, self.step)
            if self._monitor is not None:
                self._monitor.replay(read_metrics(self._out))

    def _train_step(self) -> dict[str, float]:
        config = self.config
        lr = learning_rate(config, self.step)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.zero_grad(set_to_none=True)
        started, waited = time.perf_counter(), self.stopwatch.seconds["data"]
        batches: list[TeacherBatch] = []
        sums: dict[str, float] = {"kept_by_all": 0.0, "tokens": 0.0}
        try:
            for batch, proximal in self._supply.of_step(self.step, self._proximal_logprob):
                batches.append(batch)
                with self.stopwatch.measure("student"):
                    result = self._passes.backward(batch, proximal, step=self.step)
                sums["kept_by_all"] += result.n_kept
                sums["tokens"] += batch.n_tokens
                for name, value in result.sums.items():
                    sums[name] = sums.get(name, 0.0) + value
            with self.stopwatch.measure("student"):
                sums = self._world.sum(sums)
                n_kept, n_tokens = sums.pop("kept_by_all"), sums.pop("tokens")
                grad_norm = clip_mean_gradient(self._parameters, n_kept, config.grad_clip)
                # A token whose log-prob is not finite leaves the loss, but not the gradient.
                for what, value in (("loss", sums["loss"]), ("gradient", grad_norm)):
                    if not math.isfinite(value):
                        raise self._not_finite(what, value, sums, batches)
                # No token counts: weight decay and momentum would still move the weights.
                if n_kept:
                    self._optimizer.step()
        except torch.OutOfMemoryError as error:
            raise out_of_memory(self.step + 1, config, self._source.identity(), batches, error) from error
        self.step += 1
        seconds = time.perf_counter() - started
        return {
            "lr": lr,
            "grad_norm": grad_norm,
            "skipped": float(not n_kept),
            **summarise(sums),
            "tokens_per_s": n_tokens / seconds,
            "data_share": (self.stopwatch.seconds["data"] - waited) / seconds,
        }

    def _proximal_logprob(self, batch: TeacherBatch) -> Tensor:
        with self.stopwatch.measure("student"):
            return self._passes.sampled_logprob(batch)

    def _report(self, metrics: dict[str, float]) -> None:
        alarms: list[Alarm] = []
        if self._monitor is not None and self._world.first:
            alarms = self._monitor.update(self.step, metrics)
        if self._out is not None and self._world.first:
            row = {"step": self.step, **metrics, "seconds": dict(self.stopwatch.seconds)}
            if alarms:
                row["alarms"] = [alarm.to_json() for alarm in alarms]
            append_metrics(self._out, row)
        if self._on_step is not None:
            self._on_step(self.step, metrics)
        self._observe(metrics)

    def _observe(self, metrics: dict[str, float]) -> None:
        if (observe := getattr(self._source, "observe", None)) is not None:
            observe(metrics)

    def _close_source(self) -> None:
        if (close := getattr(self._source, "close", None)) is not None:
            close()

    def _not_finite(
        self, what: str, value: float, sums: dict[str, float], batches: list[TeacherBatch]
    ) -> OpdError:
        step, report = self.step + 1, None
        if self._out is not None:
            report = write_replay(
                self._out,
                step,
                reason=f"{what} is {value}",
                provenance=self._provenance,
                sums=sums,
                source=self._supply.before,
                batches=batches,
                tokenizer_fingerprint=self.student.tokenizer_fingerprint,
                world=self._world,
            )
        gathered = self._world.gather([row for batch in batches for row in batch.row_ids.tolist()])
        rows = [row for own in gathered for row in own]
        return not_finite(step, f"{what} is {value}", rows, report)

    def _save_checkpoint(self) -> None:
        every = self.config.save_every
        if self._out is None or not every or self.step % every or self.step == self.config.steps:
            return
        with self.stopwatch.measure("checkpoint"):
            state = {"source": self._source.state_dict(), "seconds": dict(self.stopwatch.seconds)}
            save_checkpoint(
                self.student,
                self._optimizer,
                state,
                self._provenance,
                self._out,
                self.step,
                world=self._world,
            )
