"""Hugging Face `Trainer`: data from a cache, and this project's losses in its loop."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from opd_store import InvalidArgumentError, InvalidRolloutError, MismatchError, OpdError
from opd_train.adapters.neutral import CacheCollator, CacheDataset, from_padded
from opd_train.data.batches import TeacherBatch
from opd_train.model_identity import PROVENANCE_FILE, read_provenance
from opd_train.models import CausalLM
from opd_train.objective.batch_loss import BatchLoss, distill_loss
from opd_train.objective.loss_config import LossConfig, Objective, default_loss, require_topk
from opd_train.objective.step_metrics import summarise
from opd_train.training.forward import response_hidden
from opd_train.training.identity import check_cache, find_doubts

__all__ = ["CacheCollator", "CacheDataset", "DistillLossMixin", "DistillTrainer"]

_log = logging.getLogger(__name__)


class DistillLossMixin:
    """Gives a subclass of Hugging Face's `Trainer` the loss of a `LossConfig`; first among its bases.

    The student's hidden states go through `distill_loss`, so that `[N, V]` logits never exist, and this runs
    inside what accelerate put around the model, so that gradients are reduced. The sum is divided by
    `num_items_in_batch`, the tokens in the loss of all accumulated batches and processes, so that
    accumulation equals one large batch. Tokens that a correction drops count in it.

    Logged beside the trainer's own: what `summarise` gives, of this process's rows.
    """

    loss_is_scaled_for_ga = True  # read by transformers 5.19 and later
    args: Any
    accelerator: Any
    model: Any
    state: Any

    def __init__(
        self,
        model: CausalLM,
        args: Any,  # noqa: ANN401
        data_collator: CacheCollator,
        *trainer_args: Any,  # noqa: ANN401
        loss: LossConfig | None = None,
        allow_mismatch: Collection[str] = (),
        head_chunk: int = 1024,
        **trainer_options: Any,  # noqa: ANN401
    ) -> None:
        """
        Args:
            model: the student, trained in place.
            args: the trainer's, with `remove_unused_columns=False`.
            data_collator: brings the cache.
            trainer_args, trainer_options: go on to the trainer.
            loss: None means forward KL where the cache has top-k, else the sampled token with truncated
                weights.
            allow_mismatch: fields of `opd_train.training.identity.FIELDS` to ignore.
            head_chunk: positions whose logits exist at a time.

        Raises:
            InvalidArgumentError: an option of the trainer that this loss cannot honour, an objective that the
                collator brings no values for, or a collator that allows ids which the student does not have.
            MismatchError: the cache does not belong to the student.
        """
        _require(model, args, data_collator, trainer_options)
        meta = data_collator.cache.meta
        if loss is None:
            loss = default_loss(topk=data_collator.ranks)
        else:
            _require_values(loss, data_collator)
        teacher_used = loss.objective is not Objective.CROSS_ENTROPY
        allowed = check_cache(
            meta,
            model,
            allow=allow_mismatch,
            teacher_used=teacher_used,
            renormalised=loss.objective.renormalised,
        )
        if data_collator.vocab_size > model.vocab_size:
            raise InvalidArgumentError(
                f"data_collator: allows ids below {data_collator.vocab_size}, but the student has "
                f"{model.vocab_size} logits; pass CacheCollator(..., vocab_size={model.vocab_size})"
            )
        doubts = find_doubts(meta, model)
        for doubt in doubts:
            _log.warning(doubt)
        self.student, self.loss_config, self._head_chunk = model, loss, head_chunk
        self._sums: dict[str, dict[str, float]] = {}
        taught_by = meta.sft_teacher if teacher_used else meta.behaviour
        source = {
            "cache": data_collator.cache.digest,
            "ranks": data_collator.ranks,
            "max_tokens": data_collator.max_tokens,
        }
        described = {
            "student": model.info.to_json(),
            "config": {"loss": dataclasses.asdict(loss)},
            "source": source,
            "allowed_mismatches": [dataclasses.asdict(mismatch) for mismatch in allowed],
            "doubts": doubts,
            "sft_teacher": None if taught_by is None else taught_by.to_json(),
        }
        self._provenance: dict[str, Any] = json.loads(json.dumps(described, allow_nan=False))
        trainer_options.setdefault("processing_class", model.tokenizer)
        super().__init__(model.model, args, data_collator, *trainer_args, **trainer_options)  # type: ignore[call-arg]
        require_whole_weights(self.accelerator)
        # Otherwise nothing is counted for models whose forward takes no further keywords.
        self.model_accepts_loss_kwargs = True

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:  # noqa: ANN401
        """The loss of one batch; without `num_items_in_batch` the mean over its tokens.

        Returns:
            Scalar with gradient; with `return_outputs` also {"loss": it}, since logits never exist.

        Raises:
            InvalidArgumentError: the batch is not from a CacheCollator, or lacks what the correction needs.
            InvalidRolloutError: a rollout longer than the student's context.
            OpdError: the loss is not finite, with the rows.
        """
        batch = from_padded(inputs)
        self._require_context(batch, inputs["input_ids"].shape[1])
        with self.accelerator.autocast():
            loss, result = self._summed_loss(model, batch, inputs["input_ids"])
        if not math.isfinite(result.sums["loss"]):
            raise OpdError(
                f"loss is {result.sums['loss']} on cache rows {batch.row_ids.tolist()[:32]}; "
                "lower the learning rate, or inspect these rows"
            )
        sums = self._sums.setdefault(self._mode, defaultdict(float))
        for name, value in result.sums.items():
            sums[name] += value
        if num_items_in_batch is None:
            loss = loss / max(result.n_kept, 1)
        else:
            loss = loss / torch.as_tensor(num_items_in_batch, device=loss.device).clamp(min=1)
            if self.args.average_tokens_across_devices:
                # It counts all processes, over which gradients are then averaged.
                loss = loss * self.accelerator.num_processes
        return (loss, {"loss": loss}) if return_outputs else loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """The mean loss of an evaluation batch. There are no logits, whatever is asked for."""
        inputs = self._prepare_inputs(inputs)  # type: ignore[attr-defined]
        with torch.no_grad():
            return self.compute_loss(model, inputs).detach(), None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what was summed since the last time, in evaluation with the prefix "eval_"."""
        prefix = "eval_" if self._mode == "eval" else ""
        if sums := self._sums.pop(self._mode, None):
            logs |= {prefix + name: value for name, value in summarise(sums).items() if name != "loss"}
        super().log(logs, start_time)  # type: ignore[misc]

    def _summed_loss(self, model: nn.Module, batch: TeacherBatch, ids: Tensor) -> tuple[Tensor, BatchLoss]:
        version = batch.policy_version
        age = None if version is None else (self.state.global_step - version).clamp(min=0)

        def inside() -> tuple[Tensor, BatchLoss]:
            result = distill_loss(
                self.loss_config,
                hidden=response_hidden(self.student, batch),
                lm_head=self.student.head or self.student.logits,
                batch=batch,
                chunk=self._head_chunk,
                age=age,
            )
            # Apart, since wrappers look for tensors in tuples and not in classes.
            return result.loss, result

        with _forward_is(self.accelerator.unwrap_model(model), inside):
            found: tuple[Tensor, BatchLoss] = model(ids)
        return found

    def _require_context(self, batch: TeacherBatch, longest: int) -> None:
        if longest > self.student.context:
            row = int(batch.row_ids[batch.lengths.argmax()])
            raise InvalidRolloutError(
                f"row {row}: {longest} tokens, but the student's context is {self.student.context}; choose "
                f"rows with `opd_store.select(max_tokens=...)`, or pass CacheCollator(..., max_tokens=...)",
                field="token_ids",
            )

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict=state_dict)  # type: ignore[misc]
        path = Path(output_dir or self.args.output_dir) / PROVENANCE_FILE
        path.write_text(json.dumps(self._provenance, indent=1) + "\n", "utf-8")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        found = read_provenance(Path(resume_from_checkpoint))
        for name in ("student", "config", "source"):
            if name in found and found[name] != self._provenance[name]:
                raise MismatchError(
                    f"{resume_from_checkpoint}: belongs to another run: {name} is {found[name]!r:.300} "
                    f"there, {self._provenance[name]!r:.300} here. "
                    "Choose another output directory, or start again.",
                    field=name,
                    expected=repr(self._provenance[name]),
                    found=repr(found[name]),
                )
        super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]


class DistillTrainer(DistillLossMixin, transformers.Trainer):  # type: ignore[misc]
    """Hugging Face's `Trainer`, distilling from a cache."""


def require_whole_weights(accelerator: Any) -> None:  # noqa: ANN401
    """Refuse a set-up in which this process does not hold all weights and whole rollouts.

    Raises:
        InvalidArgumentError: FSDP, DeepSpeed, or context, sequence or tensor parallelism.
    """
    parallel = getattr(accelerator, "parallelism_config", None)
    found = [kind for kind in ("cp", "sp", "tp") if getattr(parallel, f"{kind}_enabled", False)]
    distributed = str(accelerator.distributed_type).removeprefix("DistributedType.")
    if distributed in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        found.append(distributed)
    if found:
        raise InvalidArgumentError(
            f"accelerate: found {', '.join(found)}, expected whole weights and whole rollouts in every "
            "process (one process, or DDP); `torchrun ... opd train` shards weights by itself"
        )


def _require(model: object, args: Any, collator: object, options: dict[str, Any]) -> None:  # noqa: ANN401
    """Refuse what would be ignored, or fail much later and far from its cause."""
    if not isinstance(model, CausalLM):
        raise InvalidArgumentError(
            f"model: expected a CausalLM, found {type(model).__name__}; load it with "
            "opd_train.load_causal_lm, which knows its tokenizer and identity"
        )
    if not isinstance(collator, CacheCollator):
        raise InvalidArgumentError(
            f"data_collator: expected a CacheCollator, found {type(collator).__name__}"
        )
    wrong = [
        (args.remove_unused_columns, "remove_unused_columns", "False: the model's forward names none of a "
         "cache's columns, so that the trainer would drop them all"),
        (args.label_smoothing_factor, "label_smoothing_factor", "0: the loss is a LossConfig's"),
        (args.torch_compile, "torch_compile", "False: the loss runs inside the model's forward"),
        (args.n_gpu > 1, "n_gpu", "1: start one process a GPU with `torchrun` or `accelerate launch`"),
    ]  # fmt: skip
    refused = ("compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics", "model_init")
    remedy = "None: logits never exist, and the student is given"
    wrong += [(options.get(name) is not None, name, remedy) for name in refused]
    for found, name, remedy in wrong:
        if found:
            value = getattr(args, name, None) if name not in options else options[name]
            raise InvalidArgumentError(f"{name}: found {value!r:.100}, expected {remedy}")


def _require_values(loss: LossConfig, collator: CacheCollator) -> None:
    """Refuse an objective that the collator brings no ids for."""
    options = {"draws": loss.objective.needs_draws, "chosen": loss.chosen_ids}
    for option, needed in options.items():
        if needed and not getattr(collator, option):
            raise InvalidArgumentError(
                f"data_collator: objective {loss.objective.value!r} compares on ids that it does not read; "
                f"pass CacheCollator(..., {option}=True)"
            )
    if not loss.chosen_ids:
        require_topk(loss.objective, topk=collator.ranks)


@contextmanager
def _forward_is(module: nn.Module, function: Callable[[], Any]) -> Iterator[None]:
    """The next call of the module runs the function instead, with the module's own forward back in place.

    What wraps the module, or hooks into it, does what it does around a forward: DDP prepares its reducer,
    FSDP gathers weights.
    """
    missing = object()
    before = vars(module).get("forward", missing)

    def restore() -> None:
        if before is missing:
            vars(module).pop("forward", None)
        else:
            module.forward = before

    def once(*_: object, **__: object) -> Any:  # noqa: ANN401
        restore()
        return function()

    module.forward = once
    try:
        yield
    finally:
        restore()
