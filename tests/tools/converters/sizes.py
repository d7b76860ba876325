"""How large the samples are."""

VOCAB = 41
TOPK = 5
