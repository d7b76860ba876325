"""Everything that needs torch: sampling, scoring, streaming, corrections, losses, the trainer."""

from opd_store import teacher_consistency
from opd_train.assemble import BatchAssembler
from opd_train.batches import TeacherBatch, TeacherTargets, collate
from opd_train.checkpoint import save_model
from opd_train.corrections import CorrectionConfig, CorrectionKind, correction_weights
from opd_train.evaluation import Estimate, accuracy, cache_divergence, sequence_kl
from opd_train.head import topk_logprobs
from opd_train.identity import check_cache, find_doubts, resolve_objective
from opd_train.live import LiveSource
from opd_train.loader import CacheLoader, WorkerError
from opd_train.losses import sampled_token_loss, topk_forward_kl, topk_reverse_kl
from opd_train.models import CausalLM, load_causal_lm, weights_digest
from opd_train.objectives import LossConfig, Objective
from opd_train.order import Shuffle
from opd_train.pages import PageDecoder, TopK
from opd_train.pipeline import roll_out, score_cache
from opd_train.prompts import read_prompts, read_rollouts
from opd_train.sampling import Prompt, sample_rollouts
from opd_train.scoring import score_rollouts
from opd_train.selection import TooLong
from opd_train.stream import CacheStream
from opd_train.trainer import DistillConfig, Stopwatch, Trainer
from opd_train.transfer import DeviceFeed

__all__ = [
    "BatchAssembler",
    "CacheLoader",
    "CacheStream",
    "CausalLM",
    "CorrectionConfig",
    "CorrectionKind",
    "DeviceFeed",
    "DistillConfig",
    "Estimate",
    "LiveSource",
    "LossConfig",
    "Objective",
    "PageDecoder",
    "Prompt",
    "Shuffle",
    "Stopwatch",
    "TeacherBatch",
    "TeacherTargets",
    "TooLong",
    "TopK",
    "Trainer",
    "WorkerError",
    "accuracy",
    "cache_divergence",
    "check_cache",
    "collate",
    "correction_weights",
    "find_doubts",
    "load_causal_lm",
    "read_prompts",
    "read_rollouts",
    "resolve_objective",
    "roll_out",
    "sample_rollouts",
    "sampled_token_loss",
    "save_model",
    "score_cache",
    "score_rollouts",
    "sequence_kl",
    "teacher_consistency",
    "topk_forward_kl",
    "topk_logprobs",
    "topk_reverse_kl",
    "weights_digest",
]
