"""The training loop. What differs between offline and live, or between objectives, is passed in."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from opd_store import IntegrityError, InvalidArgumentError, MismatchError, OpdError
from opd_train.batches import TeacherBatch
from opd_train.checkpoint import (
    latest_checkpoint,
    load_tensors,
    read_state,
    remove_partial,
    save_checkpoint,
    save_model,
    storage_errors,
)
from opd_train.forward import response_hidden
from opd_train.models import CausalLM, load_causal_lm, read_provenance
from opd_train.objectives import LossConfig, distill_loss, summarise

METRICS_FILE = "metrics.jsonl"
FINAL_DIR = "final"


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillConfig:
    """One training run. Two runs with equal configs, students and sources end in equal weights."""

    loss: LossConfig
    steps: int
    """Optimizer steps."""
    lr: float = 2e-6
    """Peak learning rate (arXiv 2604.13010, table 6, which keeps it constant)."""
    warmup_steps: int = 0
    final_lr_share: float = 1.0
    """After warm-up the rate falls linearly to this share of its peak at the end; 1 keeps it constant."""
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.98)
    grad_clip: float = 1.0
    """Largest gradient norm; 0 turns clipping off."""
    accumulate: int = 1
    """Batches per step; their tokens share one denominator."""
    head_chunk: int = 1024
    """Positions whose logits exist at a time."""
    gradient_checkpointing: bool = False
    autocast: bool = False
    """bfloat16 forward and backward over float32 weights; for GPUs."""
    save_every: int = 0
    """Steps between checkpoints; 0 saves only the end. A rerun may change it."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "lr", "accumulate", "head_chunk"):
            if not 0 < getattr(self, name) < math.inf:
                raise InvalidArgumentError(f"{name}: expected more than 0, found {getattr(self, name)}")
        for name in ("warmup_steps", "weight_decay", "grad_clip", "save_every"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InvalidArgumentError(f"{name}: expected 0 or more, found {getattr(self, name)}")
        if not all(0 <= share <= 1 for share in (self.final_lr_share, *self.betas)):
            raise InvalidArgumentError(
                f"final_lr_share and betas: expected 0..1, found {self.final_lr_share} and {self.betas}"
            )


class BatchSource(Protocol):
    """Where batches come from: a cache stream, or a live teacher."""

    def next_batch(self) -> TeacherBatch | None: ...

    def identity(self) -> dict[str, Any]:
        """What a run that goes on from a checkpoint of another has to agree in, as JSON values."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Stopwatch:
    """Seconds by activity: "student" is forward, backward and optimizer, "data" waiting for batches."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._stack: list[str] = []
        self._since = 0.0

    @contextmanager
    def measure(self, activity: str) -> Iterator[None]:
        """Count the time inside towards an activity, and not towards the one around it."""
        now = time.perf_counter()
        if self._stack:
            self.seconds[self._stack[-1]] += now - self._since
        self._stack.append(activity)
        self._since = now
        try:
            yield
        finally:
            now = time.perf_counter()
            self.seconds[self._stack.pop()] += now - self._since
            self._since = now


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
    ) -> None:
        """
        Args:
            student: trained in place.
            out: directory for checkpoints, metrics and the final model; None keeps everything in memory.
            provenance: what `opd.json` of the trained model says, beside this run's config.
            on_step: called with (step, metrics) after each step.
        """
        self.student, self.config = student, config
        self._source, self._out, self._on_step = source, out, on_step
        described = {
            "student": student.info.to_json(),
            "config": {k: v for k, v in dataclasses.asdict(config).items() if k != "save_every"},
            "source": source.identity(),
        }
        self._provenance = json.loads(json.dumps({**(provenance or {}), **described}, allow_nan=False))
        self.stopwatch = stopwatch or Stopwatch()
        self.step = 0
        self._parameters = [p for p in student.model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(
            self._parameters, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True
        )
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
            OpdError: the loss is not finite (with the rows of the step), or the source ended early.
            StorageError: the disk refused; earlier checkpoints are intact.
        """
        torch.manual_seed(self.config.seed)
        metrics: dict[str, float] = {}
        if self._out is not None:
            if (self._out / FINAL_DIR).exists():
                self._check_same_run(self._out / FINAL_DIR)
                trained = load_causal_lm(self._out / FINAL_DIR, device=str(self.student.device))
                self.student.model.load_state_dict(trained.model.state_dict())
                self.step = self.config.steps
                return metrics
            # Before the first step, so that an unusable place costs no work.
            with storage_errors(self._out):
                self._out.mkdir(parents=True, exist_ok=True)
                remove_partial(self._out)
            if (checkpoint := latest_checkpoint(self._out)) is not None:
                self._resume(checkpoint)
            self._trim_metrics()
        while self.step < self.config.steps:
            metrics = self._train_step()
            self._log(metrics)
            every = self.config.save_every
            if self._out is not None and every and self.step % every == 0 and self.step < self.config.steps:
                with self.stopwatch.measure("checkpoint"):
                    state = {
                        "source": self._source.state_dict(),
                        "seconds": dict(self.stopwatch.seconds),
                    }
                    save_checkpoint(
                        self.student, self._optimizer, state, self._provenance, self._out, self.step
                    )
        self.student.model.eval()
        if self._out is not None:
            save_model(self.student, self._out / FINAL_DIR, self._provenance)
        return metrics

    def _train_step(self) -> dict[str, float]:
        config = self.config
        self.student.model.train()
        lr = learning_rate(config, self.step)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.zero_grad(set_to_none=True)
        sums: dict[str, float] = defaultdict(float)
        n_kept = n_tokens = 0
        rows: list[int] = []
        started = time.perf_counter()
        for _ in range(config.accumulate):
            with self.stopwatch.measure("data"):
                batch = self._source.next_batch()
            if batch is None:
                raise OpdError(f"step {self.step + 1}: the source has no more batches; give it more epochs")
            rows += batch.row_ids.tolist()
            with self.stopwatch.measure("student"):
                self.student.model.train()
                with self._autocast(batch):
                    result = distill_loss(
                        config.loss,
                        hidden=response_hidden(self.student, batch),
                        lm_head=self.student.logits,
                        batch=batch,
                        chunk=config.head_chunk,
                    )
                if not math.isfinite(result.sums["loss"]):
                    raise OpdError(
                        f"step {self.step + 1}: loss is {result.sums['loss']} on cache rows {rows[:32]}; "
                        "lower the learning rate, or inspect these rows"
                    )
                result.loss.backward()
            n_kept += result.n_kept
            n_tokens += batch.n_tokens
            for name, value in result.sums.items():
                sums[name] += value
        with self.stopwatch.measure("student"):
            # One denominator for the whole step, so that accumulation equals one large batch.
            for parameter in self._parameters:
                if parameter.grad is not None:
                    parameter.grad.div_(max(n_kept, 1))
            limit = config.grad_clip or math.inf
            grad_norm = torch.nn.utils.clip_grad_norm_(self._parameters, limit).item()
            if not math.isfinite(grad_norm):
                # A token whose log-prob is not finite leaves the loss, but not the gradient.
                raise OpdError(
                    f"step {self.step + 1}: the gradient is {grad_norm} on cache rows {rows[:32]}; "
                    "lower the learning rate, or inspect these rows and the student's weights"
                )
            self._optimizer.step()
        self.step += 1
        seconds = time.perf_counter() - started
        return {"lr": lr, "grad_norm": grad_norm, **summarise(sums), "tokens_per_s": n_tokens / seconds}

    def _autocast(self, batch: TeacherBatch) -> Any:  # noqa: ANN401
        if not self.config.autocast:
            return nullcontext()
        return torch.autocast(batch.input_ids.device.type, dtype=torch.bfloat16)

    def _log(self, metrics: dict[str, float]) -> None:
        if self._out is not None:
            row = {"step": self.step, **metrics, "seconds": dict(self.stopwatch.seconds)}
            path = self._out / METRICS_FILE
            with storage_errors(path), path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        if self._on_step is not None:
            self._on_step(self.step, metrics)

    def _trim_metrics(self) -> None:
        """Drop the lines of steps that will be run again, and a line cut short by a kill."""
        assert self._out is not None
        path = self._out / METRICS_FILE
        if not path.exists():
            return
        kept = []
        with storage_errors(path):
            lines = path.read_text("utf-8", errors="replace").splitlines()
        for line in lines:
            try:
                if json.loads(line)["step"] <= self.step:
                    kept.append(line)
            except (ValueError, KeyError, TypeError):
                break
        with storage_errors(path):
            temp = path.with_name(f".{METRICS_FILE}.partial")
            temp.write_text("".join(line + "\n" for line in kept), "utf-8")
            temp.replace(path)

    def _resume(self, checkpoint: Path) -> None:
        self._check_same_run(checkpoint)
        state = read_state(checkpoint)
        try:
            self._source.load_state_dict(state["source"])
            self.stopwatch.seconds.update(state["seconds"])
            self.step = int(state["step"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, OpdError):
                raise
            raise IntegrityError(
                f"{checkpoint}: its state lacks {error!s:.200}; delete it to start again"
            ) from error
        load_tensors(self.student, self._optimizer, checkpoint, state)

    def _check_same_run(self, directory: Path) -> None:
        found = read_provenance(directory)
        for name, expected, other in _differences("", self._provenance, found):
            raise MismatchError(
                f"{directory}: belongs to another run: {name} is {other!r:.200} there, "
                f"{expected!r:.200} here. Choose another output directory, or delete this one.",
                field=name,
                expected=repr(expected),
                found=repr(other),
            )


def learning_rate(config: DistillConfig, step: int) -> float:
    """The rate of step `step`, counted from 0."""
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    left = (config.steps - step) / max(1, config.steps - config.warmup_steps)
    return config.lr * warm * (config.final_lr_share + (1 - config.final_lr_share) * min(1.0, left))


def _differences(prefix: str, expected: object, found: object) -> Iterator[tuple[str, object, object]]:
    if isinstance(expected, dict) and isinstance(found, dict):
        for name in sorted(expected.keys() | found.keys()):
            yield from _differences(
                f"{prefix}.{name}" if prefix else name, expected.get(name), found.get(name)
            )
    elif expected != found:
        yield prefix, expected, found
