"""Loading model directories: the head, the identity, and what is refused."""

from __future__ import annotations

import io
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from train.tiny_models import VOCAB, loaded, save_tiny, tiny_tokenizer

from opd_store import FormatError, InvalidArgumentError
from opd_train import load_causal_lm, weights_digest


def test_head_alone_gives_the_models_own_logits(any_model):
    ids = torch.arange(11)[None] * 3 % VOCAB
    with torch.no_grad():
        expected = any_model.model(input_ids=ids).logits[0]
        found = any_model.logits(any_model.hidden(ids, None)[0])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_scales_and_soft_caps_are_really_in_the_tiny_models(models):
    for kind in ("gemma2", "cohere", "granite"):
        lm = loaded(models[kind])
        hidden = torch.randn(5, 16, generator=torch.Generator().manual_seed(0)) * 9
        with torch.no_grad():
            plain = lm.model.get_output_embeddings()(hidden)
            assert (plain - lm.logits(hidden)).abs().max() > 0.1, kind
    assert any_cap(loaded(models["gemma2"])) <= 2.0


def any_cap(lm):
    with torch.no_grad():
        return lm.logits(torch.randn(50, 16) * 100).abs().max().item()


def test_the_body_is_back_after_the_head_ran_even_after_an_error(any_model):
    body = any_model.model.base_model
    with pytest.raises(RuntimeError):
        any_model.logits(torch.zeros(2, 99))
    assert any_model.model.base_model is body


def test_weights_digest_depends_on_every_tensor_and_neither_on_file_nor_on_dtype(models, tmp_path):
    lm = load_causal_lm(models["llama"])
    before = weights_digest(models["llama"])
    assert lm.info.weights_digest == before
    assert load_causal_lm(models["llama"], dtype=torch.bfloat16).info.weights_digest == before
    assert weights_digest(models["teacher"]) != before
    for name, parameter in lm.model.named_parameters():
        with torch.no_grad():
            kept = parameter.view(-1)[-1].clone()
            parameter.view(-1)[-1] += 1
            lm.model.save_pretrained(tmp_path / "changed")
            assert weights_digest(tmp_path / "changed") != before, name
            parameter.view(-1)[-1] = kept
    lm.model.save_pretrained(tmp_path / "split", max_shard_size="5KB")
    assert len(list((tmp_path / "split").glob("*.safetensors"))) > 1
    assert weights_digest(tmp_path / "split") == before
    with pytest.raises(InvalidArgumentError, match=r"no model\.safetensors"):
        weights_digest(tmp_path)


def test_identity(models):
    lm = loaded(models["gpt2"])
    assert (lm.vocab_size, lm.context, lm.stop_token_ids) == (VOCAB, 64, (1,))
    assert (lm.info.name, lm.info.dtype, lm.info.engine) == ("gpt2", "float32", "transformers")
    assert (lm.info.logprob_temperature, lm.info.logprob_mode) == (1.0, "raw")
    assert lm.tokenizer_fingerprint == loaded(models["llama"]).tokenizer_fingerprint
    assert lm.chat_template_digest is None
    assert lm.provenance == {}


def test_tokenizer_and_template_change_the_identity(models, tmp_path):
    other = save_tiny(tmp_path / "other", tokenizer=tiny_tokenizer(first="A", template="x{{ messages }}"))
    lm = load_causal_lm(other)
    assert lm.tokenizer_fingerprint != loaded(models["llama"]).tokenizer_fingerprint
    assert str(lm.chat_template_digest).startswith("sha256:")


def test_not_a_model_directory(tmp_path):
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(InvalidArgumentError, match=r"no config\.json"):
            load_causal_lm(path)


@pytest.mark.parametrize(
    "damage", ["broken config", "no weights", "cut weights", "wrong shape", "other json"]
)
def test_a_damaged_model_directory_is_refused_with_its_path(models, tmp_path, damage):
    path = save_tiny(tmp_path / "model")
    if damage == "broken config":
        (path / "config.json").write_text("{")
    elif damage == "no weights":
        (path / "model.safetensors").unlink()
    elif damage == "cut weights":
        (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:-100])
    elif damage == "wrong shape":
        tensors = load_file(path / "model.safetensors")
        tensors["model.norm.weight"] = torch.ones(3)
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    else:
        (path / "opd.json").write_text("[1]")
    with pytest.raises(FormatError, match=str(path)):
        load_causal_lm(path)


def test_a_missing_tensor_is_refused(tmp_path):
    # transformers would fill it with random numbers, and score with them.
    path = save_tiny(tmp_path / "model")
    tensors = load_file(path / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FormatError, match="down_proj"):
        load_causal_lm(path)


def test_an_architecture_whose_head_is_not_apart_is_refused(models, tmp_path, monkeypatch):
    def forward(self, *args, **kwargs):
        output = original(self, *args, **kwargs)
        if kwargs.get("inputs_embeds") is None:
            output.logits = output.logits + 1.0
        return output

    original = transformers.LlamaForCausalLM.forward
    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", forward)
    with pytest.raises(InvalidArgumentError, match=r"LlamaForCausalLM.*not supported"):
        load_causal_lm(models["llama"])


def test_code_in_a_model_directory_does_not_run(tmp_path, monkeypatch):
    path = save_tiny(tmp_path / "model")
    config = json.loads((path / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}
    (path / "config.json").write_text(json.dumps(config))
    witness = tmp_path / "witness"
    (path / "evil.py").write_text(f"open({str(witness)!r}, 'w')\n")
    # Asked whether to run it, a person in a hurry would say yes.
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    with pytest.raises(FormatError, match=str(path)):
        load_causal_lm(path)
    assert not witness.exists()


def test_pickled_weights_are_not_opened(tmp_path):
    path = save_tiny(tmp_path / "model")
    (path / "model.safetensors").unlink()
    witness = tmp_path / "witness"

    class Evil:
        def __reduce__(self):
            return open, (str(witness), "w")

    torch.save({"model.norm.weight": Evil()}, path / "pytorch_model.bin")
    with pytest.raises(FormatError, match="pickled weights"):
        load_causal_lm(path)
    assert not witness.exists()
