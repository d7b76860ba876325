"""`CausalLM.head` against the models' own logits, and through the head's functions."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn
from train.tiny_models import CONFIGS, VOCAB, loaded, save_tiny

from opd_train import load_causal_lm
from opd_train.head import topk_logprobs

HEADS = {
    "llama": (1.0, None),
    "gpt2": (1.0, None),
    "gemma2": (1.0, 2.0),
    "gemma3": (1.0, 2.0),
    "cohere": (0.125, None),
    "granite": (1 / 3, None),
    "neox": (1.0, None),
    "mixtral": (1.0, None),
    "qwen3": (1.0, None),
    "phi": (1.0, None),
}


@pytest.fixture(scope="module", params=HEADS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def path(kind, tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("head") / kind, kind)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_described_by_scale_and_softcap(kind, path, dtype):
    lm = load_causal_lm(path, dtype=dtype)
    assert (lm.head.scale, lm.head.softcap) == HEADS[kind]
    assert lm.head.weight is lm.model.get_output_embeddings().weight
    assert (lm.head.bias is None) == (kind != "phi")
    ids = torch.arange(11)[None] * 3 % VOCAB
    with torch.no_grad():
        expected = lm.model(input_ids=ids).logits[0].float()
        found = lm.head.logits(lm.hidden(ids, None)[0])
    # In bfloat16 a model rounds after the product, the scale, tanh and the cap; we round after the product.
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3 * 2**-8}[dtype]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("through", ["head", "logits"])
def test_log_probs_and_every_gradient_are_those_of_the_model(path, through):
    lm = load_causal_lm(path)
    lm.model.requires_grad_(True)
    ids = torch.arange(11)[None] * 3 % VOCAB
    parameters = dict(lm.model.named_parameters())
    dense = torch.log_softmax(lm.model(input_ids=ids).logits[0], dim=-1)
    expected = torch.autograd.grad(dense[:, :2].sum(), list(parameters.values()))
    every = torch.arange(VOCAB).expand(11, VOCAB)
    found = topk_logprobs(lm.hidden(ids, None)[0], getattr(lm, through), every, chunk=4)
    torch.testing.assert_close(found, dense, rtol=1e-5, atol=2e-5)
    gradients = torch.autograd.grad(found[:, :2].sum(), list(parameters.values()))
    for name, one, other in zip(parameters, gradients, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: name + text)


def test_what_it_cannot_describe_it_leaves_to_the_model(models, monkeypatch):
    forward, logits = transformers.LlamaForCausalLM.forward, []

    def capped(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        logits.append(output.logits)
        output.logits = 300 * torch.tanh(output.logits / 300)
        return output

    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", capped)
    assert load_causal_lm(models["llama"]).head is None
    # On the model's own hidden states it would have passed for rounding.
    assert logits[0].abs().max() < 20


def test_a_wrapped_output_layer_is_no_plain_one(models):
    lm = load_causal_lm(models["llama"])

    class Adapted(nn.Linear):
        pass

    assert lm.head is not None
    layer = Adapted(16, VOCAB, bias=False)
    lm.model.set_output_embeddings(layer)
    assert lm.head is None


def test_weights_that_are_not_numbers_are_no_reason_to_refuse_the_description(models, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(models["llama"])
    with torch.no_grad():
        model.lm_head.weight[3, 3] = torch.nan
    model.save_pretrained(tmp_path)
    loaded(models["llama"]).tokenizer.save_pretrained(tmp_path)
    assert load_causal_lm(tmp_path).head is not None


def test_the_table_names_every_architecture():
    assert HEADS.keys() == CONFIGS.keys()
