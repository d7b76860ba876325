"""`opd publish`: what it refuses, what it writes beside the cache, and that it can be killed and repeated."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings

import pyarrow.parquet as pq
import pytest
import yaml
from opd_tools.share.card import card
from opd_tools.share.facts import facts_of
from opd_tools.share.transfer import upload
from store.caches import VOCAB, files, some_rollouts, write
from tools.commands import ENVIRONMENT
from tools.share.conftest import REPO, TEACHER, ok, opd, refused
from train.tiny_models import tiny_tokenizer

import opd_store
from opd_store import CacheMeta, CacheNotFoundError, IntegrityError, ModelInfo
from opd_store.testing import example_meta

EXTRAS = {
    "README.md",
    "croissant.json",
    "preview/rollouts.parquet",
    "figures/lengths.svg",
    "figures/bytes.svg",
}


def cache_with(path, **fields):
    write(path, some_rollouts(5), meta=dataclasses.replace(example_meta(VOCAB), **fields))
    return path


def front_matter(text):
    return yaml.safe_load(text.split("---\n")[1])


def test_it_is_there_for_everybody(local, place):
    url, access = place
    done = json.loads(ok(opd("publish", local, url, "--json", access=access)).stdout)
    digest = opd_store.open(local).digest
    assert (done["uri"], done["digest"], done["existed"]) == (f"{url}@{digest}", digest, False)
    assert done["files"] == len(files(local)) + len(EXTRAS)
    assert opd_store.verify(done["uri"], **access).ok
    again = ok(opd("publish", local, url, access=access))
    assert "published before, nothing to do" in again.stderr
    assert again.stdout == f"{done['uri']}\n"


@pytest.mark.parametrize(
    ("fields", "options", "parts"),
    [
        ({}, (), ("--licence", "--teacher-revision")),
        ({"licence": "mit"}, (), ("which weights", "--teacher-digest")),
        ({"licence": "mit", "teacher": None}, (), ("the teacher (--teacher)", "its weights")),
        ({"licence": " ", "teacher": TEACHER}, (), ("--licence",)),
        ({"licence": "mit", "teacher": ModelInfo(name="unknown", revision="1")}, (), ("--teacher)",)),
        (
            {"licence": "mit", "teacher": TEACHER, "other_teachers": (ModelInfo(name="b"),)},
            (),
            ("which weights",),
        ),
        ({"licence": "mit", "teacher": TEACHER}, ("--licence", "apache-2.0"), ("the cache says 'mit'",)),
        ({"licence": "mit", "teacher": TEACHER}, ("--teacher", "b"), ("teacher name", "changes nothing")),
        ({"licence": "mit"}, ("--teacher-digest", "sha256:1"), ("weights_digest",)),
    ],
)
def test_what_nobody_could_cite_is_refused(tmp_path, fields, options, parts):
    path = cache_with(tmp_path / "cache", **fields)
    refused(opd("publish", path, tmp_path / "out", *options), 2, *parts)
    assert [entry.name for entry in tmp_path.iterdir()] == ["cache"]


def test_what_is_missing_can_be_filled_in(tmp_path):
    path = cache_with(tmp_path / "cache", teacher=None)
    before = files(path)
    weights = "sha256:" + "ab" * 32
    options = ("--licence", "mit", "--teacher", "me/model", "--teacher-digest", weights)
    done = ok(opd("publish", path, tmp_path / "out", *options))
    assert "a digest of its own" in done.stderr
    found = opd_store.open(tmp_path / "out")
    assert found.meta.licence == "mit"
    assert found.meta.teacher == ModelInfo(name="me/model", weights_digest=weights)
    assert found.digest != opd_store.open(path).digest
    assert "nothing to do" in ok(opd("publish", path, tmp_path / "out", *options)).stderr
    assert files(path) == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["cache", "out"]


def test_a_tag_names_the_commit_for_good(local, hub, tmp_path):
    access = {"storage_options": hub.options}
    ok(opd("publish", local, REPO, "--tag", "v1.0.0", access=access))
    repo = hub.repos["user/name"]
    assert repo.messages == [
        "initial commit",
        "Add shards (3 files)",
        "Add index (6 files)",
        "Add manifest and description (8 files)",
    ]
    assert repo.tags == {"v1.0.0": repo.branches["main"]}
    assert not repo.private
    ok(opd("publish", local, REPO, "--tag", "v1.0.0", access=access))
    assert len(repo.messages) == 4
    digest = opd_store.open(local).digest
    assert opd_store.open(f"{REPO}@v1.0.0@{digest}", **access).digest == digest
    ok(opd("pull", f"{REPO}@v1.0.0", tmp_path / "back", access=access))
    # Another card is another commit, which the tag does not name.
    ok(opd("publish", local, REPO, "--title", "Other", access=access))
    refused(
        opd("publish", local, REPO, "--title", "Other", "--tag", "v1.0.0", access=access),
        2,
        "choose another tag",
    )


def test_a_new_repository_may_be_private(local, hub):
    ok(opd("publish", local, REPO, "--private", access={"storage_options": hub.options}))
    assert hub.repos["user/name"].private


def test_a_cache_behind_a_url_is_sent_on(local, place, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    url, access = place
    ok(opd("publish", local, url, access=access))
    ok(opd("publish", url, tmp_path / "out", access=access))
    assert opd_store.open(tmp_path / "out").digest == opd_store.open(local).digest
    assert opd_store.verify(tmp_path / "out").ok
    assert not any(path.is_file() for path in (tmp_path / "home").rglob("*"))


def test_a_dry_run_sends_nothing(local, hub, tmp_path):
    access = {"storage_options": hub.options}
    done = json.loads(ok(opd("publish", local, REPO, "--dry-run", "--json", access=access)).stdout)
    assert not hub.repos
    names = {file["name"] for stage in done["stages"] for file in stage["files"]}
    assert names == set(files(local)) | EXTRAS
    assert not any(file["there"] for stage in done["stages"] for file in stage["files"])
    ok(opd("publish", local, tmp_path / "out"))
    shown = ok(opd("publish", local, tmp_path / "out", "--dry-run")).stdout
    assert re.findall(r"(\w+): 0 of \d+ files to send", shown) == ["shards", "index", "description"]
    assert not opd("publish", local, "memory://nothing/here", "--dry-run").exit_code


def test_the_card(local, tmp_path):
    ok(opd("publish", local, tmp_path / "my-cache", "--tag", "v1.2.0", "--title", "A title"))
    text = (tmp_path / "my-cache/README.md").read_text()
    assert front_matter(text) == {
        "license": "apache-2.0",
        "pretty_name": "A title",
        "size_categories": ["n<1K"],
        "task_categories": ["text-generation"],
        "tags": ["opd-store", "distillation", "on-policy-distillation", "logprobs"],
        "configs": [
            {
                "config_name": "preview",
                "default": True,
                "data_files": [{"split": "train", "path": "preview/*.parquet"}],
            }
        ],
        "base_model": "org/teacher-7B",
    }
    cache = opd_store.open(local)
    for part in ("# A title", cache.digest, "Tag `v1.2.0`", "org/teacher-7B", "abc123", "| rollouts | 40 |"):
        assert part in text
    assert f"{cache.max_error:.3g} nats" in text
    for name in re.findall(r"\]\(([^)]*)\)", text):
        assert (tmp_path / "my-cache" / name).is_file()
    # What it says to run runs.
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len([line for line in code.splitlines() if line]) <= 5
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr


def test_licences_that_the_hub_does_not_know_are_named(tmp_path):
    path = cache_with(tmp_path / "cache", licence="Tongyi Qianwen: non-commercial", teacher=TEACHER)
    ok(opd("publish", path, tmp_path / "out"))
    found = front_matter((tmp_path / "out/README.md").read_text())
    assert (found["license"], found["license_name"]) == ("other", "tongyi-qianwen-non-commercial")
    assert "Tongyi Qianwen: non-commercial" in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize(
    ("student", "said"),
    [(None, "is not known"), ("1", "of the same weights"), ("2", "of **other weights**")],
)
def test_the_card_says_whether_the_teachers_agree(tmp_path, student, said):
    digest = {number: "sha256:" + number * 64 for number in "12"}
    sft = None if student is None else ModelInfo(name="t", weights_digest=digest[student])
    teacher = ModelInfo(name="t", weights_digest=digest["1"])
    path = cache_with(tmp_path / "cache", licence="mit", teacher=teacher, sft_teacher=sft)
    ok(opd("publish", path, tmp_path / "out"))
    assert said in (tmp_path / "out/README.md").read_text()


HOSTILE = "\x1b[2J\u202e| --- \n# heading `code` <script>alert(1)</script> [x](javascript:y) \u2028---\n" * 3


def test_hostile_metadata_stays_text(tmp_path):
    teacher = ModelInfo(name="a" + HOSTILE, revision=HOSTILE, engine=HOSTILE)
    fields = {"licence": HOSTILE, "prompt_dataset": HOSTILE, "extra": {"note|\n": HOSTILE}}
    path = tmp_path / "cache"
    hostile = [dataclasses.replace(rollout, label=HOSTILE[:100]) for rollout in some_rollouts(2)]
    meta = dataclasses.replace(
        example_meta(VOCAB), teacher=dataclasses.replace(teacher, name="evil"), **fields
    )
    write(path, hostile, meta=meta)
    hostile = f"{tmp_path}/out"
    shown = ok(
        opd("publish", path, hostile, "--title", "t\x1b]0;x\x07\u202e", "--tag", "v1\n---\nlicense: mit")
    )
    text = (tmp_path / "out/README.md").read_text()
    for produced in (text, shown.output, (tmp_path / "out/croissant.json").read_text()):
        assert not set(produced) & {"\x1b", "\x07", "\u202e", "\u2028"}
    found = front_matter(text)
    assert found["license"] == "other"
    assert found["pretty_name"] == "t\\u001b]0;x\\u0007\\u202e"
    body = text.split("---\n", 2)[2]
    assert "<script>" not in body
    assert not re.search(r"(?<!\\)\[x\]", body)
    assert [line for line in body.splitlines() if line.startswith("# ")] == [
        "# t\\\\u001b\\]0;x\\\\u0007\\\\u202e"
    ]
    # Each row of a table is one row.
    rows = [line for line in body.splitlines() if line.startswith("|")]
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 3 for line in rows)


def test_the_preview(tmp_path, monkeypatch):
    tokenizer = tiny_tokenizer().backend_tokenizer
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ids = tokenizer.get_vocab_size()
    meta = CacheMeta(
        vocab_size=ids,
        tokenizer_fingerprint=opd_store.tokenizer_fingerprint((tmp_path / "tokenizer.json").read_bytes()),
        licence="mit",
        teacher=TEACHER,
    )
    rollouts = some_rollouts(30, vocab_size=ids, response_len=9)
    write(tmp_path / "cache", rollouts, meta=meta)
    options = ("--tokenizer", tmp_path, "--preview", "8")
    ok(opd("publish", tmp_path / "cache", tmp_path / "out", *options))
    table = pq.read_table(tmp_path / "out/preview/rollouts.parquet")
    assert len(table) == 8
    assert not set(table.column_names) & {"topk_ids", "topk_logprob", "log_tail", "rollout_hash"}
    for row, rollout in zip(table.to_pylist(), rollouts, strict=False):
        assert row["token_ids"] == rollout.token_ids.tolist()
        assert row["prompt"] == tokenizer.decode(rollout.token_ids[:2].tolist(), skip_special_tokens=False)
        assert row["response"] == tokenizer.decode(rollout.token_ids[2:].tolist(), skip_special_tokens=False)
    # Long rollouts make it shorter, down to one.
    monkeypatch.setattr("opd_tools.share.preview._MAX_TOKENS", 5)
    ok(opd("publish", tmp_path / "cache", tmp_path / "short", *options))
    assert len(pq.read_table(tmp_path / "short/preview/rollouts.parquet")) == 1


def test_mlcroissant_reads_the_metadata_and_the_preview(local, tmp_path):
    with warnings.catch_warnings():
        # Of what it imports.
        warnings.simplefilter("ignore")
        mlcroissant = pytest.importorskip("mlcroissant")
        ok(opd("publish", local, tmp_path / "out", "--tag", "v1.2.3"))
        found = mlcroissant.Dataset(str(tmp_path / "out/croissant.json"))
        assert not found.metadata.issues.errors
        assert {
            issue for issue in found.metadata.issues.warnings if "datePublished" not in str(issue)
        } == set()
        records = list(found.records("preview"))
    assert found.metadata.version == "1.2.3"
    assert {node.uuid for node in found.metadata.distribution} == {"manifest", "preview-file", "shards"}
    cache = opd_store.open(local)
    assert len(records) == len(cache)
    for record, rollout in zip(records, cache, strict=True):
        assert record["preview/sample_id"].decode() == rollout.sample_id
        assert list(record["preview/token_ids"]) == rollout.token_ids.tolist()


def test_the_same_cache_gives_the_same_files(local, tmp_path):
    for name in ("one/cache", "two/cache"):
        (tmp_path / name).parent.mkdir()
        ok(opd("publish", local, tmp_path / name))
    one, two = files(tmp_path / "one/cache"), files(tmp_path / "two/cache")
    assert one.keys() == two.keys()
    assert {name for name in one if one[name] != two[name]} == {"README.md", "croissant.json"}
    cache = opd_store.open(local)
    facts = [facts_of(cache, title="t", url="u", tag="") for _ in range(2)]
    assert card(facts[0], [], has_text=False) == card(facts[1], [], has_text=False)


def test_a_changed_card_is_replaced_and_the_rest_stays(local, place):
    url, access = place
    ok(opd("publish", local, url, access=access))
    done = json.loads(ok(opd("publish", local, url, "--title", "New", "--json", access=access)).stdout)
    assert done["files"] == 2
    assert opd_store.verify(url, **access).ok


def test_a_killed_run_goes_on(local, hub, tmp_path):
    """A process that is killed in the middle of an upload, for real."""
    hub.upload_s = 0.3
    options = [
        part for name, value in hub.options.items() for part in ("--storage-option", f"{name}={value}")
    ]
    command = [sys.executable, "-m", "opd_tools.main", "publish", str(local), REPO, "--tag", "v1", *options]
    environment = {**os.environ, **ENVIRONMENT, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    started = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 100
        while len(hub.objects) < 2 and time.monotonic() < end:
            time.sleep(0.01)
    finally:
        started.send_signal(signal.SIGKILL)
        started.wait()
    assert 2 <= len(hub.objects) < 10
    assert not any(name.startswith("manifests") for name in hub.files("user/name"))
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    digest = opd_store.open(local).digest
    assert done.stdout == f"{REPO}@{digest}\n"
    assert hub.repos["user/name"].tags.keys() == {"v1"}
    sent = [line for line in hub.log if line.startswith("PUT /objects/")]
    # What was on its way when it was killed may have come twice.
    assert len(sent) - len(set(sent)) <= 5
    expected = files(local)
    assert {name: data for name, data in hub.files("user/name").items() if name in expected} == expected


def test_a_cache_that_is_damaged_is_not_published(local, moto, tmp_path):
    shutil.copytree(local, tmp_path / "cache")
    shard = next((tmp_path / "cache/shards").iterdir())
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    # In a column that the preview reads, or where only the digest of the file tells.
    refused(opd("publish", tmp_path / "cache", tmp_path / "out"), 1, "Run `opd verify` on this cache")
    assert not (tmp_path / "out").exists()
    for url in (str(tmp_path / "out"), f"{moto.root}/damaged-here"):
        with pytest.raises(IntegrityError, match="so it was not sent"):
            upload(tmp_path / "cache", url, {"storage_options": {} if "://" not in url else moto.options})
        with pytest.raises(CacheNotFoundError):
            opd_store.open(url, **({} if "://" not in url else {"storage_options": moto.options}))
