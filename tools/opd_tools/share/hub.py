"""A data set on the Hugging Face Hub as a place to send files to: a few commits, each of which is whole.

Uploads go through `huggingface_hub`, over Xet where `hf_xet` is installed, else over LFS. The Hub lists the
digests that the client declared, so everything is read back before the manifest is committed.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote

from opd_store import CacheExistsError, CommitConflictError, InvalidArgumentError, layout
from opd_store.storage import RemoteStorage, resolve
from opd_store.storage.address import parse
from opd_store.storage.failures import Kind
from opd_store.storage.retry import GaveUp
from opd_tools.share.attempts import Attempts
from opd_tools.share.places import Item, arrived_wrong, read_digest

T = TypeVar("T")

_ADDRESS = re.compile(r"hf://datasets/([^/@]+/[^/@]+)(?:@([^/]+))?(?:/(.*))?")
_COMMIT_FILES, _COMMIT_BYTES = 64, 8 << 30
"""What one commit holds at most: after a kill, those before it need not be sent again."""


class Hub:
    """A repository of the type "dataset", or a directory in one."""

    def __init__(self, url: str, access: dict[str, Any], *, private: bool = False) -> None:
        """Makes no connection yet.

        Args:
            private: for a repository that has to be created.

        Raises:
            InvalidArgumentError: not the address of a data set, or huggingface_hub is missing.
        """
        self._address, pin = parse(url)
        self.shown = self._address.shown
        found = _ADDRESS.fullmatch(self._address.url)
        if pin is not None:
            raise InvalidArgumentError(f"{self.shown}: a pinned version cannot be written to")
        if found is None:
            raise InvalidArgumentError(
                f"{self.shown}: expected hf://datasets/USER/NAME, with @BRANCH or a /DIRECTORY if need be; "
                "other kinds of repositories are not written to"
            )
        self.repo, revision, directory = found.groups()
        self.revision = unquote(revision or "main")
        self._prefix = f"{directory}/" if directory else ""
        options = dict(access.get("storage_options") or {})
        storage, _ = resolve(url, storage_options=options)
        assert isinstance(storage, RemoteStorage)
        self._storage, self._attempts, self._private = storage, Attempts(self._address, options), private

        import huggingface_hub

        huggingface_hub.utils.disable_progress_bars()
        self._api = huggingface_hub.HfApi(endpoint=options.get("endpoint"), token=options.get("token"))
        self._files: dict[str, Any] | None = None

    def versions(self) -> list[int]:
        directory = f"{layout.MANIFEST_DIR}/"
        names = (name.removeprefix(directory) for name in self._tree() if name.startswith(directory))
        return sorted(int(name[:8]) for name in names if layout.MANIFEST_NAME.fullmatch(name))

    def declared(self, items: list[Item]) -> set[str]:
        tree = self._tree()
        return {item.name for item in items if item.name in tree and _is(tree[item.name], item)}

    def proves(self, item: Item) -> bool:
        tree = self._tree()
        if item.name not in tree or not _is(tree[item.name], item):
            return False
        return read_digest(self._storage, item.name, item.n_bytes) == item.sha256

    def send(self, items: list[Item], what: str, on_bytes: Callable[[int], None]) -> None:
        if self._files is None or not self._files:
            self._create()
        for batch in _batches(items):
            self._commit(batch, what)
            for item in batch:
                if not self.proves(item):
                    raise arrived_wrong(self._address.describe(item.name), item)
                on_bytes(item.n_bytes)

    def tag(self, name: str, message: str) -> None:
        """Name the newest commit for good; nothing happens if that is its name already.

        Raises:
            CacheExistsError: the name belongs to another commit.
            StorageError: access denied, or out of reach.
        """
        head = self._head()

        def commit_of() -> str | None:
            refs = self._api.list_repo_refs(self.repo, repo_type="dataset")
            return next((tag.target_commit for tag in refs.tags if tag.name == name), None)

        def make() -> None:
            if commit_of() is None:
                self._api.create_tag(
                    self.repo,
                    tag=name,
                    tag_message=message,
                    revision=head,
                    repo_type="dataset",
                    exist_ok=True,
                )

        self._ask(make, "")
        if (found := self._ask(commit_of, "")) != head:
            raise CacheExistsError(
                f"{self.shown}: tag {name!r:.80} is commit {found}, not {head}, which holds this version; "
                "choose another tag"
            )

    def _tree(self) -> dict[str, Any]:
        """Every file of the directory by name; empty where there is no repository yet."""
        if self._files is None:

            def files() -> list[Any]:
                return list(
                    self._api.list_repo_tree(
                        self.repo,
                        self._prefix.rstrip("/") or None,
                        recursive=True,
                        revision=self.revision,
                        repo_type="dataset",
                    )
                )

            try:
                found = self._run(files)
            except GaveUp as error:
                if error.failure.kind not in (Kind.MISSING, Kind.NO_BUCKET):
                    failure = error
                else:
                    self._files = {}
                    return self._files
            else:
                self._files = {
                    file.path.removeprefix(self._prefix): file for file in found if hasattr(file, "blob_id")
                }
                return self._files
            raise self._attempts.error(failure, "", action="list")
        return self._files

    def _create(self) -> None:
        def create() -> None:
            self._api.create_repo(
                self.repo, repo_type="dataset", private=self._private or None, exist_ok=True
            )

        self._ask(create, "")

    def _head(self) -> str:
        return str(
            self._ask(
                lambda: self._api.dataset_info(self.repo, revision=self.revision).sha, "", action="read"
            )
        )

    def _commit(self, items: list[Item], what: str) -> None:
        import huggingface_hub

        is_last = any(item.create_only for item in items)
        parent = self._head() if is_last else None
        if is_last:
            # Nobody may have committed the same version since we looked.
            self._files = None
            there = set(map(layout.manifest_path, self.versions()))
            for item in items:
                if item.create_only and item.name in there and not self.proves(item):
                    raise CommitConflictError(f"{self.shown}/{item.name}: somebody else committed it first")
        tries = 0

        def commit() -> None:
            nonlocal tries
            tries += 1
            if tries > 1:
                # The reply may have been lost, not the commit.
                self._files = None
                if len(self.declared(items)) == len(items):
                    return
            operations = [
                huggingface_hub.CommitOperationAdd(
                    path_in_repo=self._prefix + item.name,
                    path_or_fileobj=str(item.source) if isinstance(item.source, Path) else item.source,
                )
                for item in items
            ]
            try:
                self._api.create_commit(
                    self.repo,
                    operations,
                    commit_message=f"Add {what} ({len(items)} files)",
                    repo_type="dataset",
                    revision=self.revision,
                    parent_commit=parent,
                )
            except RuntimeError as error:
                # Of an upload in a thread; what happened is in its cause.
                raise error.__cause__ or error from None

        try:
            self._run(commit, n_bytes=sum(item.n_bytes for item in items))
        except GaveUp as error:
            failure = error
        else:
            self._files = None
            return
        if "HTTP 412" in failure.failure.text:
            raise CommitConflictError(
                f"{self.shown}: somebody else committed at the same time; the same command tries again"
            )
        raise self._attempts.error(failure, items[0].name)

    def _ask(self, call: Callable[[], T], name: str, *, action: str = "write") -> T:
        try:
            return self._run(call)
        except GaveUp as error:
            failure = error
        raise self._attempts.error(failure, name, action=action)

    def _run(self, call: Callable[[], T], *, n_bytes: int = 0) -> T:
        return self._attempts.run(lambda: asyncio.to_thread(call), n_bytes=n_bytes)


def _is(file: Any, item: Item) -> bool:  # noqa: ANN401
    """Whether the Hub's entry is for this file: by SHA-256 for large files, else by what git calls it."""
    if file.size != item.n_bytes:
        return False
    if file.lfs is not None:
        return bool(file.lfs.sha256 == item.sha256.hex())
    blob = hashlib.sha1(b"blob %d\0" % item.n_bytes, usedforsecurity=False)
    for data in item.pieces():
        blob.update(data)
    return bool(file.blob_id == blob.hexdigest())


def _batches(items: list[Item]) -> Iterator[list[Item]]:
    batch: list[Item] = []
    n_bytes = 0
    for item in items:
        if batch and (len(batch) == _COMMIT_FILES or n_bytes + item.n_bytes > _COMMIT_BYTES):
            yield batch
            batch, n_bytes = [], 0
        batch.append(item)
        n_bytes += item.n_bytes
    if batch:
        yield batch
