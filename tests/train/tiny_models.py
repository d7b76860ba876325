"""Models of a few thousand weights, saved as Hugging Face directories, and data for them."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import opd_store
from opd_store import CacheMeta, ModelInfo, Rollout
from opd_train import CausalLM, load_causal_lm, score_cache

VOCAB = 37
"""Prime, so that no chunk, rank or batch divides it."""
CONTEXT = 64
EOS = 1
TEMPLATE = "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }} {% endfor %}a:"

_SIZES = {"vocab_size": VOCAB, "max_position_embeddings": CONTEXT, "bos_token_id": 0, "eos_token_id": EOS}
_BLOCK = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
# Weights far larger than an initialisation, so that distributions are peaked and errors show.
_RANGE = {"initializer_range": 0.3}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {**_SIZES, **_BLOCK, **_RANGE}),
    "gpt2": (
        "GPT2Config",
        {
            "vocab_size": VOCAB,
            "n_positions": CONTEXT,
            "n_embd": 16,
            "n_layer": 2,
            "n_head": 2,
            "bos_token_id": 0,
            "eos_token_id": EOS,
            **_RANGE,
        },
    ),
    "gemma2": (
        "Gemma2Config",
        {**_SIZES, **_BLOCK, **_RANGE, "head_dim": 8, "sliding_window": 8, "final_logit_softcapping": 2.0},
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {**_SIZES, **_BLOCK, **_RANGE, "head_dim": 8, "sliding_window": 8, "final_logit_softcapping": 2.0},
    ),
    "qwen3": ("Qwen3Config", {**_SIZES, **_BLOCK, **_RANGE, "head_dim": 8}),
    # The only one with a bias on its logits.
    "phi": ("PhiConfig", {**_SIZES, **_BLOCK, **_RANGE}),
    "cohere": ("CohereConfig", {**_SIZES, **_BLOCK, **_RANGE, "pad_token_id": 0, "logit_scale": 0.125}),
    "granite": ("GraniteConfig", {**_SIZES, **_BLOCK, **_RANGE, "logits_scaling": 3.0}),
    # Saved under other tensor names than those of its modules.
    "neox": ("GPTNeoXConfig", {**_SIZES, **_BLOCK, **_RANGE}),
    # Its head asks the body for more than hidden states.
    "mixtral": ("MixtralConfig", {**_SIZES, **_BLOCK, **_RANGE, "num_local_experts": 2}),
}
ARCHITECTURES = tuple(CONFIGS)


def tiny_tokenizer(vocab_size: int = VOCAB, *, first: str = "a", template: str | None = None) -> Any:
    """One token a character: ids 0 and 1 are <s> and </s>, the rest are `first` and what follows it."""
    vocab = {"<s>": 0, "</s>": EOS, " ": 2, ":": 3}
    vocab |= {chr(ord(first) + i - len(vocab)): i for i in range(len(vocab), vocab_size)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = template
    return tokenizer


def save_tiny(
    path: Path,
    kind: str = "llama",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    tokenizer: Any = None,
    provenance: dict[str, Any] | None = None,
    **overrides: Any,
) -> Path:
    """Write a model directory with random weights."""
    name, fields = CONFIGS[kind]
    config = getattr(transformers, name)(**fields | overrides)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    model.save_pretrained(path)
    (tiny_tokenizer(fields["vocab_size"]) if tokenizer is None else tokenizer).save_pretrained(path)
    if provenance is not None:
        (path / "opd.json").write_text(json.dumps(provenance))
    return path


def save_successor(path: Path, margin: float = 60.0, *, kind: str = "llama") -> Path:
    """Write a model that gives (id + 1) % VOCAB after any id, with a margin of tens of nats.

    Embedding is the identity, every block adds nothing, and the head is the shifted identity.
    """
    sizes = {"hidden_size": VOCAB + 1, "head_dim": 2, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**{**CONFIGS["llama"][1], **sizes}, tie_word_embeddings=False)
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.zero_()
        model.model.norm.weight.fill_(1.0)
        identity = torch.eye(VOCAB, VOCAB + 1)
        model.model.embed_tokens.weight.copy_(identity)
        # The norm scales a unit vector to length sqrt(H).
        model.lm_head.weight.copy_(identity.roll(1, dims=0) * margin / (VOCAB + 1) ** 0.5)
    model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@functools.cache
def loaded(path: Path, dtype: torch.dtype = torch.float32) -> CausalLM:
    """A model directory, read once. Never train what this returns."""
    return load_causal_lm(path, dtype=dtype)


def random_rollouts(
    n: int, *, seed: int = 0, prompt: tuple[int, int] = (1, 6), response: tuple[int, int] = (1, 12)
) -> list[Rollout]:
    """`n` rollouts of random ids and different lengths, with behaviour log-probs and some masked tokens."""
    rng = np.random.default_rng(seed)
    found = []
    for number in range(n):
        prompt_len = int(rng.integers(*prompt, endpoint=True))
        size = int(rng.integers(*response, endpoint=True))
        mask = rng.random(size) < 0.8
        mask[0] = True
        found.append(
            Rollout(
                token_ids=rng.integers(0, VOCAB, prompt_len + size).astype(np.uint32),
                prompt_len=prompt_len,
                behaviour_logprob=-rng.exponential(3.0, size).astype(np.float32),
                loss_mask=mask if number % 2 else None,
                sample_id=f"r{number}",
            )
        )
    return found


def meta_of(lm: CausalLM, **fields: Any) -> CacheMeta:
    """A description of rollouts made with the model's tokenizer."""
    return CacheMeta(
        vocab_size=lm.vocab_size, tokenizer_fingerprint=lm.tokenizer_fingerprint, behaviour=lm.info, **fields
    )


def scored_cache(
    path: Path, teacher: CausalLM, rollouts: list[Rollout], *, topk: int = 5, **fields: Any
) -> opd_store.Cache:
    """A cache of these rollouts, scored."""
    score_cache(teacher, rollouts, meta_of(teacher, **fields), path, topk=topk, encoding="plain")
    return opd_store.open(path)


def naive_logprobs(lm: CausalLM, rollout: Rollout) -> np.ndarray:
    """[R, V] float64 log-softmax of the model's own logits at each response position."""
    ids = torch.from_numpy(rollout.token_ids.astype(np.int64))[None]
    with torch.no_grad():
        logits = lm.model(input_ids=ids).logits[0].double()
    return torch.log_softmax(logits, dim=-1)[rollout.prompt_len - 1 : -1].numpy()


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    """One JSON value a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rollouts_jsonl(path: Path, lm: CausalLM, rollouts: list[Rollout], **head: Any) -> Path:
    """Rollouts as another sampler would hand them over."""
    rows = [
        {"rollouts": 1, "tokenizer_fingerprint": lm.tokenizer_fingerprint, "vocab_size": lm.vocab_size} | head
    ]
    for rollout in rollouts:
        row: dict[str, Any] = {
            "id": rollout.sample_id,
            "prompt_ids": rollout.token_ids[: rollout.prompt_len].tolist(),
            "response_ids": rollout.response_ids.tolist(),
        }
        if rollout.behaviour_logprob is not None:
            row["behaviour_logprob"] = rollout.behaviour_logprob.tolist()
        rows.append(row)
    return write_jsonl(path, rows)


def model_info(name: str, digit: str) -> ModelInfo:
    """A model with a digest of one repeated digit."""
    return ModelInfo(name=name, weights_digest="sha256:" + digit * 64)
