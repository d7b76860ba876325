"""`opd inspect`: complete, and few requests over a network."""

from __future__ import annotations

import json

import fsspec
import pytest
from click.testing import CliRunner
from opd_tools.main import main
from opd_tools.show.inspect import describe
from tools.show.caches import VOCAB, some_rollouts, write

import opd_store
from opd_store import CacheMeta, ModelInfo, SamplerInfo

META = CacheMeta(
    vocab_size=VOCAB,
    tokenizer_fingerprint="sha256:" + "5e" * 32,
    teacher=ModelInfo(name="Teacher", revision="main", dtype="bfloat16", quantisation="fp8", engine="vllm"),
    other_teachers=(ModelInfo(name="Second", logprob_temperature=1.0, logprob_mode="raw"),),
    sampler=SamplerInfo(
        temperature=0.7, min_p=0.1, repetition_penalty=1.1, max_new_tokens=9, engine="sglang"
    ),
    chat_template_digest="sha256:" + "ab" * 32,
    chat_template_args={"thinking": "off"},
    truncation="left",
    extra={"converted_from": "DistillKit", "lost": "tails"},
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    path = tmp_path_factory.mktemp("inspect") / "cache"
    return write(path, some_rollouts(60), meta=META, encoding="ladder/128", batch_bytes=2000, shard_bytes=1)


def inspected(uri):
    shown = CliRunner().invoke(main, ["inspect", str(uri), "--json"])
    assert shown.exit_code == 0, shown.output
    return json.loads(shown.stdout)


def test_provenance_is_complete(cache):
    found = inspected(cache)
    provenance = found["provenance"]
    assert provenance["teacher"] == "Teacher at main, digest unknown, bfloat16, fp8, vllm"
    assert provenance["teacher 1"] == "Second, digest unknown, log-probs at temperature 1, raw"
    assert provenance["sampler"] == (
        "temperature 0.7, top-p 1, min-p 0.1, repetition penalty 1.1, at most 9 tokens, sglang"
    )
    assert provenance["full support"] == "no"
    assert provenance["chat template"].endswith("ab, thinking=off")
    assert provenance["truncation"] == "left"
    assert found["notes"] == {"converted_from": "DistillKit", "lost": "tails"}
    assert CacheMeta.from_json(found["meta"], where="test") == META
    assert found["schema"]["topk"] == 4
    assert found["cache"]["longest rollout"] == 13
    assert found["cache"]["shards"] == opd_store.open(cache).n_shards > 5


def test_a_url_is_described_from_its_index(cache):
    """As much over a network, but for small columns, and in five requests."""
    fs = fsspec.filesystem("memory")
    for file in (path for path in cache.rglob("*") if path.is_file()):
        fs.pipe_file(f"/inspect/{file.relative_to(cache)}", file.read_bytes())
    remote = opd_store.open("memory://inspect")
    assert remote.stats.requests == 5
    found, local = describe(remote), describe(opd_store.open(cache))
    assert remote.stats.requests == 5
    for section in ("provenance", "top-k", "notes"):
        assert found[section] == local[section]
    sizes, expected = found["bytes per position"], local["bytes per position"]
    assert list(sizes) == ["scalars", "lists", "topk_0_4"]
    # A record batch pads its columns and has a header.
    assert sizes["topk_0_4"] >= expected["topk_0_4"]
    lists = sum(expected[name] for name in ("token_ids", "loss_mask", "teacher_logprob", "behaviour_logprob"))
    assert lists <= sizes["lists"] <= lists + 20


def test_parts_cover_the_shards_but_for_schema_and_footer(cache):
    found = opd_store.open(cache)
    regions = [shard.regions for shard in found.shards]
    inner = sum(region.length for shard in regions for region in shard[1:-1])
    assert sum(found.part_bytes().values()) == inner
    by_column, _ = found.column_bytes(batches=10**6)
    assert found.part_bytes()["topk_0_4"] >= by_column["topk_0_4"]


def test_parts_of_an_empty_cache(tmp_path):
    cache = opd_store.open(write(tmp_path / "cache", []))
    assert cache.part_bytes() == {"scalars": 0, "lists": 0, "topk_0_4": 0}
    assert inspected(tmp_path / "cache")["cache"]["longest rollout"] == 0
