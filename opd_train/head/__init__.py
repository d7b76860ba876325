"""From hidden states to the few log-probs a loss needs, without ever holding [N, V]."""

from opd_train.head.fused import FusedLoss, fused_loss
from opd_train.head.logprobs import topk_logprobs
from opd_train.head.weights import HeadWeights, LmHead, VocabShard

__all__ = ["FusedLoss", "HeadWeights", "LmHead", "VocabShard", "fused_loss", "topk_logprobs"]
