"""As much of the Hugging Face Hub as writing and reading a data set needs, on the loopback device.

Nothing on PyPI, npm or Debian brings a server for this: `hf-local-hub` there is a client whose server is not
in the package, and `olah` is a mirror for reading. So this is our own reading of the protocol, as
huggingface_hub 2.4 speaks it without Xet: repositories, `preupload`, LFS batches, `commit`, trees, `resolve`
with ranges, tags. Real Xet transfers and the rules of the real Hub are not covered by it.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading
import time
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

TOKEN = "hf_the-secret-of-the-tests"
_REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"


@dataclass
class Repo:
    """Commits, each a dict of path to blob id, and names for them."""

    private: bool
    commits: dict[str, dict[str, str]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def at(self, revision: str) -> str:
        return self.branches.get(revision) or self.tags.get(revision) or revision

    def commit(self, files: dict[str, str], message: str, branch: str = "main") -> str:
        self.messages.append(message)
        text = json.dumps([len(self.messages), files])
        name = hashlib.sha1(text.encode()).hexdigest()
        self.commits[name] = files
        self.branches[branch] = name
        return name


@dataclass
class HubServer:
    """What it holds, what it was asked, and what goes wrong."""

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    blobs: dict[str, tuple[bytes, str | None]] = field(default_factory=dict)
    """Blob id to contents and, for large files, SHA-256."""
    objects: dict[str, bytes] = field(default_factory=dict)
    """What was uploaded by LFS, by the SHA-256 that the client said it has."""
    log: list[str] = field(default_factory=list)
    lose_replies: int = 0
    """Commits that happen, and whose connection is cut before the answer."""
    fail: dict[str, int] = field(default_factory=dict)
    """How often requests that contain this get status 500."""
    damage: int = 0
    """Uploads that lose a bit on their way."""
    stop_after: int | None = None
    """Uploads after which everything is refused, as if the network was gone."""
    upload_s: float = 0.0
    """How long each upload takes."""

    @property
    def options(self) -> dict[str, object]:
        return {"endpoint": self.url, "token": TOKEN}

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        found = self.repos[repo]
        return {path: self.blobs[blob][0] for path, blob in found.commits[found.at(revision)].items()}

    def count(self, *parts: str) -> int:
        return sum(all(part in line for part in parts) for line in self.log)


class Handler(http.server.BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    hub: HubServer
    lock: threading.Lock

    def log_message(self, *_: object) -> None:
        """Nothing."""

    def _handle(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b"".join(iter(self._chunk, b""))
        else:
            body = self.rfile.read(length)
        path = urllib.parse.unquote(self.path.partition("?")[0])
        with self.lock:
            self.hub.log.append(f"{self.command} {path}")
            for part, left in self.hub.fail.items():
                if part in path and left:
                    self.hub.fail[part] -= 1
                    return self._send(500, {"error": "Internal Error"})
            if self.hub.stop_after == 0:
                return self._send(400, {"error": "the test ends it here"})
            if not path.startswith("/objects/") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return self._send(401, {"error": "Invalid credentials"})
            for pattern, method in ROUTES:
                if found := re.fullmatch(pattern, f"{self.command} {path}"):
                    return getattr(self, f"_{method}")(body, **found.groupdict())
        return self._send(404, {"error": f"no such route: {path}"})

    do_GET = do_POST = do_PUT = do_HEAD = _handle

    def _chunk(self) -> bytes:
        data = self.rfile.read(int(self.rfile.readline(), 16))
        self.rfile.readline()
        return data

    def _send(self, status: int, value: object, **headers: str) -> None:
        self._raw(status, json.dumps(value).encode(), {"Content-Type": "application/json"} | headers)

    def _raw(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _found(self, repo: str, revision: str | None = None) -> tuple[Repo, dict[str, str]] | None:
        known = self.hub.repos.get(repo)
        if known is None:
            self._send(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            return None
        commit = known.at(revision or "main")
        if commit not in known.commits:
            self._send(404, {"error": "no such revision"}, X_Error_Code="RevisionNotFound")
            return None
        return known, known.commits[commit]

    def _create(self, body: bytes) -> None:
        value = json.loads(body)
        name = f"{value.get('organization') or 'user'}/{value['name']}"
        if name in self.hub.repos:
            return self._send(409, {"error": "exists", "url": f"{self.hub.url}/datasets/{name}"})
        self.hub.repos[name] = repo = Repo(bool(value.get("private") or value.get("visibility") == "private"))
        repo.commit({}, "initial commit")
        return self._send(200, {"url": f"{self.hub.url}/datasets/{name}", "name": name})

    def _info(self, body: bytes, repo: str, revision: str | None = None) -> None:
        if found := self._found(repo, revision):
            sha = found[0].at(revision or "main")
            self._send(200, {"id": repo, "sha": sha, "siblings": [], "private": found[0].private})

    def _tree(self, body: bytes, repo: str, revision: str, path: str | None = None) -> None:
        if not (found := self._found(repo, revision)):
            return
        prefix = f"{path}/" if path else ""
        recursive = "recursive=true" in self.path.lower()
        entries = []
        for name, blob in sorted(found[1].items()):
            if name.startswith(prefix) and (recursive or "/" not in name[len(prefix) :]):
                data, sha256 = self.hub.blobs[blob]
                entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": blob}
                if sha256 is not None:
                    entry["lfs"] = {"oid": sha256, "size": len(data), "pointerSize": 130}
                entries.append(entry)
        if prefix and not entries:
            return self._send(404, {"error": "no such directory"}, X_Error_Code="EntryNotFound")
        return self._send(200, entries)

    def _preupload(self, body: bytes, repo: str, revision: str) -> None:
        if found := self._found(repo, revision):
            files = []
            for file in json.loads(body)["files"]:
                # Here as there: binary files are large files.
                name = file["path"]
                mode = "regular" if name.endswith((".json", ".md", ".svg", ".sig")) else "lfs"
                blob = found[1].get(name)
                files.append({"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": blob})
            self._send(200, {"files": files})

    def _batch(self, body: bytes, repo: str) -> None:
        objects = []
        for item in json.loads(body)["objects"]:
            answer = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.hub.objects:
                answer["actions"] = {"upload": {"href": f"{self.hub.url}/objects/{item['oid']}"}}
            objects.append(answer)
        self._send(200, {"transfer": "basic", "objects": objects})

    def _upload(self, body: bytes, oid: str) -> None:
        if self.hub.stop_after is not None:
            self.hub.stop_after -= 1
        time.sleep(self.hub.upload_s)
        if self.hub.damage:
            self.hub.damage -= 1
            body = bytes([body[0] ^ 1]) + body[1:]
        self.hub.objects[oid] = body
        self._send(200, {})

    def _commit(self, body: bytes, repo: str, revision: str) -> None:
        if not (found := self._found(repo, revision)):
            return None
        known, files = found[0], dict(found[1])
        lines = [json.loads(line) for line in body.splitlines()]
        header = lines[0]["value"]
        if header.get("parentCommit", known.at(revision)) != known.at(revision):
            return self._send(412, {"error": "A commit has happened since."})
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "lfsFile":
                data = self.hub.objects.get(value["oid"])
                if data is None or len(data) != value["size"]:
                    return self._send(400, {"error": "no such object"})
                blob = hashlib.sha1(value["oid"].encode()).hexdigest()
                self.hub.blobs[blob] = data, value["oid"]
            else:
                data = base64.b64decode(value["content"])
                blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
                self.hub.blobs[blob] = data, None
            files[value["path"]] = blob
        name = known.commit(files, header["summary"], revision)
        if self.hub.lose_replies:
            self.hub.lose_replies -= 1
            self.close_connection = True
            return None
        return self._send(
            200, {"commitUrl": f"{self.hub.url}/datasets/{repo}/commit/{name}", "commitOid": name}
        )

    def _refs(self, body: bytes, repo: str) -> None:
        if found := self._found(repo):
            names = {"branches": ("heads", found[0].branches), "tags": ("tags", found[0].tags)}
            answer = {
                kind: [
                    {"name": name, "ref": f"refs/{where}/{name}", "targetCommit": commit}
                    for name, commit in known.items()
                ]
                for kind, (where, known) in names.items()
            }
            self._send(200, answer | {"converts": []})

    def _tag(self, body: bytes, repo: str, revision: str) -> None:
        if found := self._found(repo, revision):
            name = json.loads(body)["tag"]
            if name in found[0].tags:
                return self._send(409, {"error": "tag exists"})
            found[0].tags[name] = found[0].at(revision)
            return self._send(200, {})
        return None

    def _yaml(self, body: bytes) -> None:
        self._send(200, {"errors": [], "warnings": []})

    def _resolve(self, body: bytes, repo: str, revision: str, path: str) -> None:
        if not (found := self._found(repo, revision)):
            return None
        if path not in found[1]:
            return self._send(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
        data, sha256 = self.hub.blobs[found[1][path]]
        headers = {"ETag": f'"{sha256 or found[1][path]}"', "X_Repo_Commit": found[0].at(revision)}
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            start, end = int(wanted[1]), min(int(wanted[2]) + 1, len(data))
            if start >= len(data):
                return self._send(416, {"error": "range"})
            return self._raw(
                206, data[start:end], headers | {"Content_Range": f"bytes {start}-{end - 1}/{len(data)}"}
            )
        return self._raw(200, data, headers)


ROUTES = (
    (r"POST /api/repos/create", "create"),
    (rf"GET /api/datasets/{_REPO}", "info"),
    (rf"GET /api/datasets/{_REPO}/revision/(?P<revision>[^/]+)", "info"),
    (rf"GET /api/datasets/{_REPO}/tree/(?P<revision>[^/]+)(?:/(?P<path>.*))?", "tree"),
    (rf"POST /api/datasets/{_REPO}/preupload/(?P<revision>[^/]+)", "preupload"),
    (rf"POST /datasets/{_REPO}\.git/info/lfs/objects/batch", "batch"),
    (r"PUT /objects/(?P<oid>[0-9a-f]{64})", "upload"),
    (rf"POST /api/datasets/{_REPO}/commit/(?P<revision>[^/]+)", "commit"),
    (rf"GET /api/datasets/{_REPO}/refs", "refs"),
    (rf"POST /api/datasets/{_REPO}/tag/(?P<revision>[^/]+)", "tag"),
    (r"POST /api/validate-yaml", "yaml"),
    (rf"(?:GET|HEAD) /datasets/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.*)", "resolve"),
)


@contextlib.contextmanager
def hub_server() -> Iterator[HubServer]:
    """A Hub without repositories."""
    hub = HubServer()
    handler = type("HubHandler", (Handler,), {"hub": hub, "lock": threading.Lock()})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    yield hub
    server.shutdown()
    server.server_close()
