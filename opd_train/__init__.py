"""Everything that needs torch: sampling, scoring, streaming, corrections, losses, the trainer."""

from opd_store import teacher_consistency
from opd_train.capture.drawing import Draws
from opd_train.capture.pipeline import roll_out, score_cache
from opd_train.capture.prompts import read_prompts, read_rollouts
from opd_train.capture.sampling import Prompt, sample_rollouts
from opd_train.capture.scoring import score_rollouts
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
from opd_train.data.assemble import BatchAssembler
from opd_train.data.batches import TeacherBatch, TeacherTargets, collate
from opd_train.data.loader import CacheLoader, WorkerError
from opd_train.data.order import Shuffle
from opd_train.data.pages import PageDecoder, TopK
from opd_train.data.selection import TooLong
from opd_train.data.stream import CacheStream
from opd_train.data.transfer import DeviceFeed
from opd_train.evaluation import Estimate, accuracy, cache_divergence, sequence_kl
from opd_train.head import FusedLoss, HeadWeights, VocabShard, fused_loss, topk_logprobs
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
from opd_train.model_identity import weights_digest
from opd_train.models import CausalLM, load_causal_lm
from opd_train.objective.batch_loss import BatchLoss, distill_loss
from opd_train.objective.loss_config import LossConfig, Objective, default_loss
from opd_train.objective.step_metrics import summarise
from opd_train.training.config import DistillConfig, LoraConfig
from opd_train.training.distributed import World, join_world
from opd_train.training.export import save_model
from opd_train.training.forward import response_hidden
from opd_train.training.identity import check_cache, find_doubts
from opd_train.training.live import LiveSource
from opd_train.training.monitors import Alarm, AlarmKind, DriftConfig, DriftMonitor
from opd_train.training.refresh import RefreshConfig, RefreshingSource, StreamConfig
from opd_train.training.start import StartReport, check_start
from opd_train.training.stopwatch import Stopwatch
from opd_train.training.trainer import Trainer

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
    "default_loss",
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
