"""Signatures of caches, in the format of the OpenSSF's model signing.

What is signed is the list of all files of one version with their SHA-256: the manifest, the index, the id
table and the shards. The signature lies beside the manifest.
"""

from __future__ import annotations

import dataclasses
import tempfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from opd_store import (
    CacheExistsError,
    CacheNotFoundError,
    IntegrityError,
    InvalidArgumentError,
    MismatchError,
    layout,
)
from opd_store.storage import LocalStorage, resolve
from opd_tools.share.contents import contents

_MAX_SIGNATURE_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Signed:
    """A version whose files a signature names."""

    uri: str
    digest: str
    signature: str
    """Where the signature is."""
    files: int
    existed: bool = False


def signature_of(manifest: str) -> str:
    """Name of the signature of a manifest."""
    return f"{manifest}.sig"


def sign(uri: str, key: Path, *, password: str | None = None) -> Signed:
    """Sign the newest version of a local cache, or the pinned one.

    Args:
        key: PEM file with a private key on the curve P-256, P-384 or P-521.
        password: of the key.

    Raises:
        CacheExistsError: a signature by another key is there.
        CacheNotFoundError, FormatError, IntegrityError: no cache, or a damaged one.
        InvalidArgumentError: a URL, a key that cannot be used, or model-signing is missing.
    """
    storage, pin = resolve(uri)
    if not isinstance(storage, LocalStorage):
        raise InvalidArgumentError(
            f"{storage.uri}: only a local cache can be signed; pull it, sign it, and publish it again"
        )
    digests, digest, name = _files(storage, pin)
    for file in digests:
        # A signature for what is not there would be worth little.
        if not (storage.root / file).is_file():
            raise IntegrityError(f"{storage.describe(file)}: missing, although the manifest names it.")
    signing, _, hashing = _library()
    with tempfile.TemporaryDirectory() as directory:
        made = Path(directory, "signature")
        try:
            config = signing.Config().use_elliptic_key_signer(
                private_key=key, **({} if password is None else {"password": password.encode()})
            )
        except (OSError, ValueError, TypeError) as error:
            raise InvalidArgumentError(f"--key {key}: cannot be signed with: {error!s:.200}") from error
        config.set_hashing_config(_known_digests(hashing, digests)).sign(_model_name(digest), made)
        data = made.read_bytes()
        found = Signed(storage.uri, digest, storage.describe(name), len(digests))
        if storage.put_if_absent(name, data):
            return found
        public = Path(directory, "public")
        public.write_bytes(_public_key(key, password))
        try:
            check_signature(f"{storage.root}@{digest}", public, {})
        except MismatchError as error:
            raise CacheExistsError(
                f"{found.signature}: there is a signature by another key; remove it to sign anew"
            ) from error
    return dataclasses.replace(found, existed=True)


def check_signature(uri: str, key: Path, access: dict[str, Any]) -> Signed:
    """Check the signature of a version with a public key; its files are known by their names and index.

    That the files have the bytes that their digests say is for `opd_store.verify`.

    Args:
        key: PEM file with the public key of the signer.
        access: keywords of `opd_store.open`.

    Raises:
        CacheNotFoundError: no cache, or no signature.
        FormatError, IntegrityError: the cache is damaged, or the signature cannot be read.
        InvalidArgumentError: a key that cannot be used, or model-signing is missing.
        MismatchError: signed by another key, or other files were signed.
    """
    storage, pin = resolve(uri, storage_options=access.get("storage_options"))
    digests, digest, name = _files(storage, pin)
    where = storage.describe(name)
    try:
        data = storage.read(name, _MAX_SIGNATURE_BYTES)
    except CacheNotFoundError:
        raise CacheNotFoundError(f"{where}: no signature; `opd sign` makes one") from None
    _, verifying, hashing = _library()
    try:
        config = verifying.Config().use_elliptic_key_verifier(public_key=key)
    except (OSError, ValueError, TypeError) as error:
        raise InvalidArgumentError(f"--key {key}: cannot be checked with: {error!s:.200}") from error
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "signature")
        path.write_bytes(data)
        try:
            config.set_hashing_config(_known_digests(hashing, digests)).verify(_model_name(digest), path)
        except Exception as error:  # whatever a file from elsewhere makes the library raise
            text = str(error) or type(error).__name__
            raise MismatchError(
                f"{where}: does not hold for {digest} and this key: {text:.300}",
                field="signature",
                expected=digest,
            ) from error
    return Signed(storage.uri, digest, where, len(digests))


def _files(storage: Any, pin: str | None) -> tuple[dict[str, bytes], str, str]:  # noqa: ANN401
    """Files of a version with their digests, its own digest, and where its signature is."""
    found = contents(storage, pin)
    digests = {file.name: file.sha256 for file in (*found.shards, *found.tables)}
    manifest = layout.manifest_path(found.cache.version)
    digests[manifest] = bytes.fromhex(found.cache.digest.removeprefix("sha256:"))
    return digests, found.cache.digest, signature_of(manifest)


def _model_name(digest: str) -> Path:
    """What the signature calls the cache: informative only."""
    return Path(digest.removeprefix("sha256:"))


def _public_key(key: Path, password: str | None) -> bytes:
    from cryptography.hazmat.primitives import serialization

    private = serialization.load_pem_private_key(
        key.read_bytes(), None if password is None else password.encode()
    )
    return private.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def _library() -> tuple[Any, Any, Any]:
    try:
        from model_signing import hashing, signing, verifying
    except ImportError as error:
        raise InvalidArgumentError(f"this needs {error.name}: pip install 'opd-store[sign]'") from error
    return signing, verifying, hashing


def _known_digests(hashing: Any, digests: dict[str, bytes]) -> Any:  # noqa: ANN401
    """What the library takes for hashing a directory, with digests that are known already."""
    from model_signing import manifest

    class Known(hashing.Config):  # type: ignore[misc]
        def hash(self, model_path: Path, *, files_to_hash: object = None) -> Any:  # noqa: ANN401
            kind = manifest.SerializationType.from_args(
                {"method": "files", "hash_type": "sha256", "allow_symlinks": False}
            )
            items = [
                kind.new_item(str(PurePosixPath(name)), hashing.hashing.Digest("sha256", value))
                for name, value in sorted(digests.items())
            ]
            return manifest.Manifest(model_path.name, items, kind)

    return Known()
