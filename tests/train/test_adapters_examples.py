"""The examples of other people's loops run, and learn."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
from train.tiny_models import loaded, random_rollouts, scored_cache

from opd_train import cache_divergence, load_causal_lm

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def cache(teacher, tmp_path_factory):
    path = tmp_path_factory.mktemp("examples") / "cache"
    return scored_cache(path, teacher, random_rollouts(96, seed=3), topk=6)


def run(name, *arguments):
    runpy.run_path(str(EXAMPLES / name))["main"](*map(str, arguments))


def test_plain_pytorch(cache, models, capsys):
    run("plain_pytorch.py", cache.uri, models["llama"])
    steps = [float(kl) for kl in re.findall(r"teacher (\S+) nat", capsys.readouterr().out)]
    assert len(steps) == 9
    assert steps[-1] < 0.9 * steps[0]


@pytest.mark.parametrize("name", ["hf_trainer.py", "trl_sft.py"])
# Of a default of TRL's config.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
def test_in_a_framework(cache, models, tmp_path, monkeypatch, name):
    monkeypatch.setenv("CI", "1")  # no telemetry
    run(name, cache.uri, models["llama"], tmp_path / "out")
    trained = load_causal_lm(tmp_path / "out")
    assert trained.provenance["source"]["cache"] == cache.digest
    before, after = (
        cache_divergence(lm, cache, batch_tokens=500) for lm in (loaded(models["llama"]), trained)
    )
    assert after["reverse_kl"].mean < before["reverse_kl"].mean
