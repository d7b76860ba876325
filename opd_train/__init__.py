"""Everything that needs torch: sampling, scoring, streaming, corrections, losses, the trainer."""

from opd_store import teacher_consistency
from opd_train.assemble import BatchAssembler
from opd_train.batch_loss import BatchLoss, distill_loss
from opd_train.batches import TeacherBatch, TeacherTargets, collate
from opd_train.config import DistillConfig, LoraConfig
from opd_train.corrections import (
    UNCAPPED,
    AdvantageAnchor,
    CorrectionConfig,
    CorrectionKind,
    DriftGate,
    MartingaleTest,
    Normalise,
    StalenessDecay,
    chi_square,
    correction_weights,
    effective_share,
    k3,
    martingale_test,
    rollout_ratios,
)
from opd_train.distributed import World, join_world
from opd_train.drawing import Draws
from opd_train.evaluation import Estimate, accuracy, cache_divergence, sequence_kl
from opd_train.export import save_model
from opd_train.forward import response_hidden
from opd_train.head import FusedLoss, HeadWeights, VocabShard, fused_loss, topk_logprobs
from opd_train.identity import check_cache, find_doubts, resolve_objective
from opd_train.live import LiveSource
from opd_train.loader import CacheLoader, WorkerError
from opd_train.losses import (
    huber_logprob_loss,
    mix_cross_entropy,
    mix_teachers,
    random_sampling_kd,
    renormalised_forward_kl,
    renormalised_reverse_kl,
    sampled_token_loss,
    topk_forward_kl,
    topk_jsd,
    topk_reverse_kl,
    truncated_forward_kl,
)
from opd_train.models import CausalLM, load_causal_lm, weights_digest
from opd_train.monitors import Alarm, AlarmKind, DriftConfig, DriftMonitor
from opd_train.objectives import LossConfig, Objective
from opd_train.order import Shuffle
from opd_train.pages import PageDecoder, TopK
from opd_train.pipeline import roll_out, score_cache
from opd_train.prompts import read_prompts, read_rollouts
from opd_train.refresh import RefreshConfig, RefreshingSource, StreamConfig
from opd_train.sampling import Prompt, sample_rollouts
from opd_train.scoring import score_rollouts
from opd_train.selection import TooLong
from opd_train.start import StartReport, check_start
from opd_train.step_metrics import summarise
from opd_train.stopwatch import Stopwatch
from opd_train.stream import CacheStream
from opd_train.trainer import Trainer
from opd_train.transfer import DeviceFeed

__all__ = [
    "UNCAPPED",
    "AdvantageAnchor",
    "Alarm",
    "AlarmKind",
    "BatchAssembler",
    "BatchLoss",
    "CacheLoader",
    "CacheStream",
    "CausalLM",
    "CorrectionConfig",
    "CorrectionKind",
    "DeviceFeed",
    "DistillConfig",
    "Draws",
    "DriftConfig",
    "DriftGate",
    "DriftMonitor",
    "Estimate",
    "FusedLoss",
    "HeadWeights",
    "LiveSource",
    "LoraConfig",
    "LossConfig",
    "MartingaleTest",
    "Normalise",
    "Objective",
    "PageDecoder",
    "Prompt",
    "RefreshConfig",
    "RefreshingSource",
    "Shuffle",
    "StalenessDecay",
    "StartReport",
    "Stopwatch",
    "StreamConfig",
    "TeacherBatch",
    "TeacherTargets",
    "TooLong",
    "TopK",
    "Trainer",
    "VocabShard",
    "WorkerError",
    "World",
    "accuracy",
    "cache_divergence",
    "check_cache",
    "check_start",
    "chi_square",
    "collate",
    "correction_weights",
    "distill_loss",
    "effective_share",
    "find_doubts",
    "fused_loss",
    "huber_logprob_loss",
    "join_world",
    "k3",
    "load_causal_lm",
    "martingale_test",
    "mix_cross_entropy",
    "mix_teachers",
    "random_sampling_kd",
    "read_prompts",
    "read_rollouts",
    "renormalised_forward_kl",
    "renormalised_reverse_kl",
    "resolve_objective",
    "response_hidden",
    "roll_out",
    "rollout_ratios",
    "sample_rollouts",
    "sampled_token_loss",
    "save_model",
    "score_cache",
    "score_rollouts",
    "sequence_kl",
    "summarise",
    "teacher_consistency",
    "topk_forward_kl",
    "topk_jsd",
    "topk_logprobs",
    "topk_reverse_kl",
    "truncated_forward_kl",
    "weights_digest",
]
