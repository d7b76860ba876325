"""`opd sign` and `opd verify --key`: what a signature holds for, and what it does not."""

from __future__ import annotations

import json
import shutil

import pytest
from opd_tools.share.signature import check_signature
from opd_tools.share.transfer import upload
from store.caches import add, files, some_rollouts
from tools.share.conftest import ok, opd, refused

import opd_store

pytest.importorskip("model_signing")
SIGNATURE = "manifests/00000003.json.sig"


def make_key(path, *, password=None, curve="SECP256R1"):
    """A new key pair: paths of the private and the public half."""
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric import ec

    private = ec.generate_private_key(getattr(ec, curve)())
    lock = s.NoEncryption() if password is None else s.BestAvailableEncryption(password.encode())
    halves = path.with_suffix(".pem"), path.with_suffix(".pub")
    halves[0].write_bytes(private.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, lock))
    public = private.public_key().public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo)
    halves[1].write_bytes(public)
    return halves


@pytest.fixture
def keys(tmp_path):
    return make_key(tmp_path / "key")


@pytest.fixture
def signed(local, tmp_path, keys):
    shutil.copytree(local, tmp_path / "cache")
    ok(opd("sign", tmp_path / "cache", "--key", keys[0]))
    return tmp_path / "cache"


@pytest.mark.parametrize("curve", ["SECP256R1", "SECP384R1", "SECP521R1"])
def test_a_signature_holds(local, tmp_path, curve):
    private, public = make_key(tmp_path / "key", curve=curve)
    shutil.copytree(local, tmp_path / "cache")
    done = json.loads(ok(opd("sign", tmp_path / "cache", "--key", private, "--json")).stdout)
    digest = opd_store.open(local).digest
    assert done == {
        "uri": f"{tmp_path / 'cache'}@{digest}",
        "digest": digest,
        "signature": str(tmp_path / "cache" / SIGNATURE),
        "files": 6,
        "existed": False,
    }
    shown = ok(opd("verify", tmp_path / "cache", "--key", public)).stdout
    assert f"signed by the owner of this key: {done['signature']}" in shown
    found = json.loads(ok(opd("verify", tmp_path / "cache", "--key", public, "--json")).stdout)
    assert (found["ok"], found["signature"]) == (True, done["signature"])


def test_signing_again_changes_nothing_and_another_key_is_refused(signed, keys, tmp_path):
    before = files(signed)
    assert "nothing to do" in ok(opd("sign", signed, "--key", keys[0])).stderr
    other, _ = make_key(tmp_path / "other")
    refused(opd("sign", signed, "--key", other), 2, "a signature by another key")
    assert files(signed) == before


def test_it_travels_with_the_cache(signed, keys, place, tmp_path):
    url, access = place
    upload(signed, url, access)
    ok(opd("verify", url, "--key", keys[1], access=access))
    ok(opd("pull", url, tmp_path / "back", access=access))
    assert check_signature(str(tmp_path / "back"), keys[1], {}).files == 6
    # Signed later, it follows alone.
    (signed / SIGNATURE).unlink()
    ok(opd("sign", signed, "--key", keys[0]))
    assert upload(signed, url, access).files == 1


def test_the_tool_of_the_format_accepts_it(signed, keys, tmp_path):
    import model_signing

    shutil.copy(signed / SIGNATURE, tmp_path / "signature")
    config = model_signing.verifying.Config().use_elliptic_key_verifier(public_key=keys[1])
    config.set_ignore_unsigned_files(True).verify(signed, tmp_path / "signature")
    shard = next((signed / "shards").iterdir())
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(ValueError, match="mismatch"):
        config.verify(signed, tmp_path / "signature")


def test_it_is_for_one_version(signed, keys):
    digest = opd_store.open(signed).digest
    version = add(signed, some_rollouts(2, seed=4, topk=20))
    refused(opd("verify", signed, "--key", keys[1]), 2, "no signature", "opd sign")
    ok(opd("verify", f"{signed}@{digest}", "--key", keys[1]))
    # Under another version's name it does not hold.
    shutil.copy(signed / SIGNATURE, signed / "manifests/00000004.json.sig")
    refused(opd("verify", signed, "--key", keys[1]), 1, "does not hold for", version.digest)
    (signed / "manifests/00000004.json.sig").unlink()
    ok(opd("sign", f"{signed}@{digest}", "--key", keys[0]))
    ok(opd("sign", signed, "--key", keys[0]))
    ok(opd("verify", signed, "--key", keys[1]))


def test_another_key_or_a_changed_signature_is_refused(signed, keys, tmp_path):
    _, other = make_key(tmp_path / "other")
    refused(opd("verify", signed, "--key", other), 1, "does not hold for", "Key mismatch")
    path = signed / SIGNATURE
    good = path.read_bytes()
    bundle = json.loads(good)
    bundle["dsseEnvelope"]["payload"] = bundle["dsseEnvelope"]["payload"][:-4] + "AAAA"
    for data in (json.dumps(bundle).encode(), b"", b"{}", b"\xff\x00", good[: len(good) // 2], b"[1]"):
        path.write_bytes(data)
        refused(opd("verify", signed, "--key", keys[1]), 1, "does not hold for")


def test_every_file_of_the_version_is_named(signed, keys):
    found = check_signature(str(signed), keys[1], {})
    newest = opd_store.open(signed)
    assert found.digest == newest.digest
    statement = json.loads((signed / SIGNATURE).read_bytes())
    import base64

    payload = json.loads(base64.b64decode(statement["dsseEnvelope"]["payload"]))
    names = {item["name"]: item["digest"] for item in payload["predicate"]["resources"]}
    expected = {shard.path for shard in newest.shards} | {"manifests/00000003.json"}
    expected |= {ref.path for part in newest.manifest.segments for ref in (part.shards, part.rollouts)}
    assert names.keys() == expected
    assert names["manifests/00000003.json"] == newest.digest.removeprefix("sha256:")


def test_a_key_with_a_password(local, tmp_path):
    private, public = make_key(tmp_path / "key", password="opensesame")
    shutil.copytree(local, tmp_path / "cache")
    refused(opd("sign", tmp_path / "cache", "--key", private), 2, "cannot be signed with")
    refused(opd("sign", tmp_path / "cache", "--key", private, "--password", "wrong"), 2, "cannot be signed")
    assert not (tmp_path / "cache" / SIGNATURE).exists()
    for _ in range(2):
        ok(opd("sign", tmp_path / "cache", "--key", private, "--password", "opensesame"))
    ok(opd("verify", tmp_path / "cache", "--key", public))


def test_wrong_usage(local, signed, keys, tmp_path):
    (tmp_path / "no-key.pem").write_text("nothing")
    refused(opd("sign", local, "--key", tmp_path / "no-key.pem"), 2, "cannot be signed with")
    refused(opd("sign", local, "--key", keys[1]), 2, "cannot be signed with")
    refused(opd("verify", signed, "--key", tmp_path / "no-key.pem"), 2, "cannot be checked with")
    refused(opd("sign", "s3://bucket/cache", "--key", keys[0]), 2, "only a local cache can be signed")
    refused(opd("sign", tmp_path / "none", "--key", keys[0]), 2, "no cache here")
    (signed / SIGNATURE).unlink()
    next((signed / "shards").iterdir()).unlink()
    refused(opd("sign", signed, "--key", keys[0]), 1, "missing, although")
