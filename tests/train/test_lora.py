"""Adapters: only they change, they resume exactly, and the merged model is the trained one."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file
from train.tiny_models import loaded, save_tiny
from train.training import CONFIG, Stop, assert_equal, make_cache, trainer, weights

from opd_store import InvalidArgumentError, MismatchError
from opd_train import load_causal_lm
from opd_train.training.config import LoraConfig

LORA = LoraConfig(rank=3, alpha=6)
WITH_LORA = dataclasses.replace(CONFIG, lora=LORA, lr=1e-2)


@pytest.fixture(scope="module")
def cache(teacher, tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("lora") / "cache", teacher)


def logits(lm):
    with torch.no_grad():
        return lm.model(input_ids=torch.arange(12)[None]).logits


# peft asks transformers by an old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "neox"])
def test_only_adapters_change_and_merging_changes_nothing(cache, models, tmp_path, kind):
    made = trainer(cache, models[kind], WITH_LORA, tmp_path / "out")
    base = {name.replace("base_layer.", ""): tensor for name, tensor in weights(made.student).items()}
    first = {name for name in base if "lora_" in name}
    untrained = loaded(models[kind])
    torch.testing.assert_close(logits(made.student), logits(untrained), rtol=0, atol=1e-6)
    made.run()
    after = {name.replace("base_layer.", ""): tensor for name, tensor in weights(made.student).items()}
    for name, tensor in base.items():
        assert torch.equal(after[name], tensor) == (name not in first), name
    assert_equal({name: base[name] for name in base.keys() - first}, weights(untrained))

    merged = load_causal_lm(made.final_dir)
    assert type(merged.model) is type(untrained.model)
    assert (logits(merged) - logits(untrained)).abs().max() > 0.1
    torch.testing.assert_close(logits(merged), logits(made.student), rtol=0, atol=2e-5)
    assert merged.provenance["student"]["weights_digest"] == untrained.info.weights_digest
    assert merged.provenance["config"]["lora"] == {"rank": 3, "alpha": 6, "targets": []}

    # In an order of its own a set would come out otherwise in every process.
    settings = json.loads((made.final_dir / "adapter/adapter_config.json").read_text())
    assert len(settings["target_modules"]) > 5
    assert settings["target_modules"] == sorted(settings["target_modules"])

    # As peft itself opens it.
    import peft

    restored = peft.PeftModel.from_pretrained(load_causal_lm(models[kind]).model, made.final_dir / "adapter")
    with torch.no_grad():
        found = restored(input_ids=torch.arange(12)[None]).logits
    torch.testing.assert_close(found, logits(made.student), rtol=0, atol=1e-6)


def test_checkpoints_hold_adapters_only_and_resume_bit_for_bit(cache, models, tmp_path):
    made = trainer(cache, models["llama"], WITH_LORA, tmp_path / "whole")
    made.run()
    with pytest.raises(Stop):
        trainer(cache, models["llama"], WITH_LORA, tmp_path / "out", stop=5).run()
    stored = load_file(tmp_path / "out/step-00000004/rank-00000.safetensors")
    names = {name.split("/")[1] for name in stored if not name.startswith("random/")}
    assert names == {name for name in weights(made.student) if "lora_" in name}
    again = trainer(cache, models["llama"], WITH_LORA, tmp_path / "out")
    again.run()
    assert_equal(weights(again.student), weights(made.student))
    for name in ("model.safetensors", "adapter/adapter_model.safetensors"):
        assert (again.final_dir / name).read_bytes() == (made.final_dir / name).read_bytes()
    # A finished run gives its adapters, and another rank is another run.
    third = trainer(cache, models["llama"], WITH_LORA, tmp_path / "out")
    assert third.run() == {}
    assert_equal(weights(third.student), weights(made.student))
    other = dataclasses.replace(WITH_LORA, lora=dataclasses.replace(LORA, rank=4))
    with pytest.raises(MismatchError, match=r"config\.lora\.rank is 3 there, 4 here"):
        trainer(cache, models["llama"], other, tmp_path / "out").run()


def test_targets(cache, models, tmp_path):
    config = dataclasses.replace(WITH_LORA, lora=dataclasses.replace(LORA, targets=("q_proj", "v_proj")))
    made = trainer(cache, models["llama"], config)
    trained = {
        name.split(".lora_")[0] for name, p in made.student.model.named_parameters() if p.requires_grad
    }
    assert {name.rpartition(".")[2] for name in trained} == {"q_proj", "v_proj"}
    tied = save_tiny(tmp_path / "tied", tie_word_embeddings=True)
    for student, targets in ((models["llama"], "lm_head"), (models["llama"], "no_such"), (tied, "lm_head")):
        config = dataclasses.replace(WITH_LORA, lora=dataclasses.replace(LORA, targets=(targets,)))
        with pytest.raises(InvalidArgumentError, match=rf"lora targets \['{targets}'\]"):
            trainer(cache, student, config)


@pytest.mark.parametrize("change", [{"rank": 0}, {"alpha": 0}, {"alpha": -1}], ids=str)
def test_settings_out_of_range(change):
    with pytest.raises(InvalidArgumentError, match=f"lora {next(iter(change))}: expected more than 0"):
        dataclasses.replace(LORA, **change)
