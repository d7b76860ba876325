"""Hugging Face model directories: loading, identity, and the path from hidden states to logits."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from opd_store import FormatError, InvalidArgumentError, ModelInfo
from opd_train.head import HeadWeights
from opd_train.model_identity import (
    PROVENANCE_FILE,
    chat_template_digest,
    fingerprint_of,
    read_provenance,
    weights_digest,
)

_HEAD_TOLERANCE = 1e-3
# What architectures call the soft-cap of their logits, a factor on them, and a divisor.
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
_DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")


@dataclass(frozen=True, kw_only=True)
class CausalLM:
    """A causal language model with its tokenizer and identity.

    Axes: B = rows, S = padded length, N = chosen positions, H = hidden size, V = number of logits.
    """

    model: Any
    """A `transformers` model with a language-model head."""
    tokenizer: Any
    path: Path
    info: ModelInfo
    tokenizer_fingerprint: str
    chat_template_digest: str | None
    provenance: dict[str, Any]
    """Content of `opd.json` in the directory, {} without one."""
    head_is_linear: bool = False
    """Whether `head` was found to give the model's own logits."""

    @property
    def vocab_size(self) -> int:
        """V, rows of the output head, which may exceed the tokenizer's entries."""
        return int(self.model.get_output_embeddings().weight.shape[0])

    @property
    def sft_teacher(self) -> ModelInfo | None:
        """The model whose samples this one was fine-tuned on, as `opd.json` says; None where unknown.

        Raises:
            FormatError: the file describes it wrongly.
        """
        described = self.provenance.get("sft_teacher")
        if described is None:
            return None
        return ModelInfo.from_json(described, where=f"{self.path / PROVENANCE_FILE}: sft_teacher")

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device  # type: ignore[no-any-return]

    @property
    def context(self) -> int:
        """Longest sequence the position embedding allows."""
        return int(getattr(self.model.config, "max_position_embeddings", None) or 1 << 30)

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Ids that end a response, from the generation settings and the tokenizer, rising."""
        configured = self.model.generation_config.eos_token_id
        ids = configured if isinstance(configured, list) else [configured]
        return tuple(sorted({int(i) for i in (*ids, self.tokenizer.eos_token_id) if i is not None}))

    def hidden(self, input_ids_BS: Tensor, attention_mask_BS: Tensor | None, **kwargs: Any) -> Tensor:  # noqa: ANN401
        """[B, S, H] last hidden states, after the final norm."""
        output = self.model.base_model(
            input_ids=input_ids_BS, attention_mask=attention_mask_BS, use_cache=False, **kwargs
        )
        return output.last_hidden_state  # type: ignore[no-any-return]

    def logits(self, hidden_NH: Tensor) -> Tensor:
        """[N, V] float32 logits through the model's own head: bias, scale and soft-cap included.

        The model's forward runs with its body replaced by one that hands the given hidden states back. So
        whatever an architecture does between body and logits (Gemma's soft-cap, Cohere's and Granite's
        scales) is what runs.
        """
        with _body_returns_input(self.model):
            return self.model(inputs_embeds=hidden_NH[None], use_cache=False).logits[0].float()  # type: ignore[no-any-return]

    @property
    def head(self) -> HeadWeights | None:
        """The weights of the head, for `topk_logprobs` and `fused_loss`; None where `logits` is the only way.

        That is so for heads that do more than a product, a scale and a soft-cap, and while the output layer
        is wrapped (LoRA on it) or its weight is split over processes.
        """
        return _head_weights(self.model) if self.head_is_linear else None


class _BodyOutput(BaseModelOutput):  # type: ignore[misc]
    def __getattr__(self, name: str) -> None:
        # Heads pass on what else their body returns (caches, router logits); there is nothing else.
        if name.startswith("_"):
            raise AttributeError(name)


class _ReturnInput(nn.Module):
    def forward(self, *_: object, inputs_embeds: Tensor, **__: object) -> _BodyOutput:
        return _BodyOutput(last_hidden_state=inputs_embeds)


@contextmanager
def _body_returns_input(model: Any) -> Iterator[None]:  # noqa: ANN401
    name = model.base_model_prefix
    body = model._modules[name]
    model._modules[name] = _ReturnInput()
    try:
        yield
    finally:
        model._modules[name] = body


def load_causal_lm(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    attention: str | None = None,
) -> CausalLM:
    """Load a local Hugging Face directory of a causal language model. Runs no code from it, uses no network.

    Args:
        attention: transformers' `attn_implementation`; None lets it choose.

    Raises:
        InvalidArgumentError: not such a directory, no fast tokenizer, or a head that cannot be applied apart.
        FormatError: a damaged directory, or one that needs code or pickled weights of its own.
    """
    directory = Path(path)
    if not (directory / "config.json").is_file():
        raise InvalidArgumentError(
            f"{directory}: not a Hugging Face model directory (no config.json). "
            "Pass the local directory of a downloaded model."
        )
    safe = {"local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory, **safe)
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=dtype,
            attn_implementation=attention,
            output_loading_info=True,
            use_safetensors=True,
            **safe,
        )
    except Exception as error:  # a damaged directory can raise anything here
        raise FormatError(
            f"{directory}: transformers cannot load it ({type(error).__name__}: {error!s:.500}). "
            "Fetch it again; "
            "pickled weights and models that bring their own code are never opened."
        ) from error
    if report["missing_keys"]:
        # transformers fills them with random numbers and goes on.
        raise FormatError(
            f"{directory}: its weights lack {sorted(report['missing_keys'])[0]!r:.200}; fetch it again"
        )
    model = model.to(device).eval()
    loaded = CausalLM(
        model=model,
        tokenizer=tokenizer,
        path=directory,
        info=ModelInfo(
            name=directory.resolve().name,
            weights_digest=weights_digest(directory),
            dtype=str(dtype).removeprefix("torch."),
            engine="transformers",
            engine_version=transformers.__version__,
            logprob_temperature=1.0,
            logprob_mode="raw",
        ),
        tokenizer_fingerprint=fingerprint_of(tokenizer, directory),
        chat_template_digest=chat_template_digest(tokenizer),
        provenance=read_provenance(directory),
    )
    try:
        stops, context = loaded.stop_token_ids, loaded.context
    except (TypeError, ValueError) as error:
        raise FormatError(f"{directory}: eos_token_id or max_position_embeddings is not a number") from error
    if context < 2 or not all(0 <= stop < loaded.vocab_size for stop in stops):
        raise FormatError(
            f"{directory}: stop ids {stops} and context {context} do not fit {loaded.vocab_size} logits"
        )
    _check_head(loaded)
    return replace(loaded, head_is_linear=_is_linear(loaded))


@torch.no_grad()
def _check_head(loaded: CausalLM) -> None:
    ids = torch.arange(4, device=loaded.device).remainder(loaded.vocab_size)[None]
    expected = loaded.model(input_ids=ids, use_cache=False).logits[0].float()
    try:
        found = loaded.logits(loaded.hidden(ids, None)[0])
    except (AttributeError, KeyError, TypeError) as error:
        raise InvalidArgumentError(
            f"{loaded.path}: the head of {type(loaded.model).__name__} cannot be applied apart from its body "
            f"({type(error).__name__}: {error}); this architecture is not supported"
        ) from error
    difference = (expected - found).abs().max().item()
    # NaN weights are not this check's business: they are found, with their place, when something is scored.
    if difference > _HEAD_TOLERANCE * (1 + expected.abs().max().item()):
        raise InvalidArgumentError(
            f"{loaded.path}: applying the head of {type(loaded.model).__name__} to its hidden states "
            "gives logits "
            f"that differ by {difference:.3g} from its own; this architecture is not supported"
        )


def _head_weights(model: Any) -> HeadWeights | None:  # noqa: ANN401
    """The head as its output layer and configuration describe it; None where it is no plain linear layer."""
    layer = model.get_output_embeddings()
    # A sharded weight is a DTensor; naming its class would cost every process a second of imports.
    if type(layer) is not nn.Linear or hasattr(layer.weight, "full_tensor"):
        return None
    config = model.config.get_text_config()
    settings = {
        name: value
        for name in (*_SOFTCAPS, *_FACTORS, *_DIVISORS)
        if isinstance(value := getattr(config, name, None), int | float) and value
    }
    return HeadWeights(
        weight=layer.weight,
        bias=layer.bias,
        scale=math.prod(settings.get(name, 1.0) for name in _FACTORS)
        / math.prod(settings.get(name, 1.0) for name in _DIVISORS),
        softcap=next((settings[name] for name in _SOFTCAPS if name in settings), None),
    )


@torch.no_grad()
def _is_linear(loaded: CausalLM) -> bool:
    """Whether the description gives the model's own logits, within rounding."""
    try:
        head = _head_weights(loaded.model)
    except InvalidArgumentError:
        return False
    if head is None:
        return False
    ids = torch.arange(4, device=loaded.device).remainder(loaded.vocab_size)[None]
    hidden_NH = loaded.hidden(ids, None)[0]
    # A soft-cap without a name we know would hardly show on the logits of untrained weights.
    hidden_NH = torch.cat([hidden_NH, 30 * hidden_NH])
    expected = loaded.logits(hidden_NH)
    difference = (expected - head.logits(hidden_NH)).abs().max().item()
    tolerance = max(_HEAD_TOLERANCE, 4 * torch.finfo(head.weight.dtype).eps)
    return not difference > tolerance * (1 + expected.abs().max().item())
