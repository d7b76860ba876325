"""Errors of the cache. One class per reaction a caller can have.

OpdError
├── InvalidArgumentError   a call that can never work; fix the call                (also ValueError)
├── InvalidRolloutError    values that no teacher can have produced; fix the data   (also ValueError)
├── MismatchError          the cache belongs to another tokenizer, model or run     (also ValueError)
├── FormatError            bytes that the specification forbids                     (also ValueError)
│   ├── IntegrityError     bytes that are not the ones written; fetch the file again
│   └── UnsupportedVersionError   a newer format, or a feature this release lacks
├── CacheNotFoundError     nothing to open                                          (also FileNotFoundError)
├── CacheExistsError       something is already there                               (also FileExistsError)
├── CommitConflictError    another writer committed the same version first
└── StorageError           disk or bucket said no: full, denied, out of reach       (also OSError)

Every class survives pickling, since loader workers send errors between processes.
"""

from __future__ import annotations

from functools import partial


class OpdError(Exception):
    """Base of every error this project raises on purpose."""


class InvalidArgumentError(OpdError, ValueError):
    """An argument outside its documented range."""


class InvalidRolloutError(OpdError, ValueError):
    """A rollout with impossible values, such as a log-prob above zero or an id outside the vocabulary."""

    def __init__(self, message: str, *, sample_id: str = "", field: str = "", position: int = -1) -> None:
        super().__init__(message)
        self.sample_id, self.field, self.position = sample_id, field, position


class MismatchError(OpdError, ValueError):
    """Two identities that have to agree do not."""

    def __init__(self, message: str, *, field: str = "", expected: str = "", found: str = "") -> None:
        super().__init__(message)
        self.field, self.expected, self.found = field, expected, found


class FormatError(OpdError, ValueError):
    """A file that breaks a rule of the specification."""

    def __init__(self, message: str, *, uri: str = "", row: int = -1, column: str = "") -> None:
        super().__init__(message)
        self.uri, self.row, self.column = uri, row, column


class IntegrityError(FormatError):
    """A missing, cut or changed file. Nothing of the damaged region was returned."""


class UnsupportedVersionError(FormatError):
    """A cache written by a newer release, or with a required feature this release does not know."""


class CacheNotFoundError(OpdError, FileNotFoundError):
    """No committed version at this place."""


class CacheExistsError(OpdError, FileExistsError):
    """The place for a new cache is taken."""


class CommitConflictError(OpdError):
    """Another writer committed the version this writer was about to commit."""


class StorageError(OpdError, OSError):
    """The storage refused an operation. `errno` and `filename` are those of the cause."""

    def __init__(self, message: str, *, errno: int | None = None, filename: str | None = None) -> None:
        super().__init__(message)
        self.errno, self.filename = errno, filename

    def __reduce__(self) -> tuple[object, ...]:
        # OSError keeps these two outside __dict__ and would lose them.
        return partial(type(self), *self.args, errno=self.errno, filename=self.filename), ()

    def __str__(self) -> str:
        return str(self.args[0])
