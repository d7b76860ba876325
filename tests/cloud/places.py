"""Where the cache `local` is copied to: a fixture `place` for the classes that hold a contract there."""

from __future__ import annotations

import pytest
from cloud.servers import Server

MEMORY = Server("memory://root")


class Local:
    @pytest.fixture
    def place(self, local):
        return str(local), None


class Memory:
    @pytest.fixture
    def place(self, local):
        return MEMORY.put(local, "cache"), {}


class OnServer:
    """`server` names the fixture of one."""

    server: str

    @pytest.fixture
    def place(self, request, local):
        found = request.getfixturevalue(self.server)
        return found.put(local, "cache"), found.options


class Web(OnServer):
    server = "web"


class Hub(OnServer):
    server = "hub"


class Moto(OnServer):
    server = "moto"


class SeaweedFS(OnServer):
    server = "seaweedfs"


class FakeGcs(OnServer):
    server = "fake_gcs"


class Azurite(OnServer):
    server = "azurite"
