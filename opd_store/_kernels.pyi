from collections.abc import Callable
from typing import Any

import pyarrow as pa
from numpy.typing import NDArray

def decode_streams(
    body: NDArray[Any],
    decompress: Callable[[memoryview], bytes | None],
    max_window: int,
    rank_start: int,
    rank_end: int,
    ragged: bool,
    has_draws: bool,
    scale: int,
    words: bool,
    limit: int,
    by_rank: NDArray[Any] | None,
    lists: NDArray[Any] | None,
    ids: NDArray[Any],
    logprob: NDArray[Any],
    log_tail: NDArray[Any] | None,
    draws: NDArray[Any] | None,
    /,
) -> bool: ...
def rows_are_fine(
    ids: NDArray[Any],
    logprob: NDArray[Any],
    log_tail: NDArray[Any],
    draws: NDArray[Any] | None,
    vocab_size: int,
    ragged: bool,
    may_be_empty: bool,
    limit: float,
    /,
) -> bool: ...
def copy_rows(
    dst: NDArray[Any],
    dst_starts: NDArray[Any],
    sources: tuple[NDArray[Any], ...],
    src_starts: NDArray[Any],
    counts: NDArray[Any],
    /,
) -> None: ...
def let_go(mapped: pa.Buffer, /) -> None: ...
