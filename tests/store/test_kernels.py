"""C and numpy give the same bits, accept the same pages, and refuse the same arguments."""

from __future__ import annotations

import random
import struct
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from store import supports
from store.caches import run_python
from store.supports import KINDS, TABLES, VOCAB, band_ends, encode

from fuzz.mutate import mutate_body
from fuzz.structure import build_body, join_page, parse_body, split_page
from opd_store import ENCODINGS, FormatError, InvalidArgumentError, kernels, layout
from opd_store.encodings import Band, PageShape, build_id_table, decode_into, decode_page
from opd_store.encodings.planes import MAX_WINDOW, frame_content
from opd_store.testing import peaked_topk, random_topk, shortened
from opd_store.values import support_problem

PACKED = [name for name in ENCODINGS if name != "plain"]
BOTH = pytest.mark.parametrize("compiled", [True, False], ids=["C", "numpy"])
NEEDS_C = pytest.mark.skipif(not kernels.COMPILED, reason="installed without a compiler")
_kernels = pytest.importorskip("opd_store._kernels") if kernels.COMPILED else None


@pytest.fixture(autouse=True)
def path(request, monkeypatch):
    """The path that a test asks for by its parameter `compiled`."""
    params = getattr(request.node, "callspec", None)
    if params is not None and "compiled" in params.params:
        if params.params["compiled"] and not kernels.COMPILED:
            pytest.skip("installed without a compiler")
        monkeypatch.setattr(kernels, "COMPILED", params.params["compiled"])


def by_numpy(call):
    """What the reference gives."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "COMPILED", False)
        return call()


def by_c(call):
    """What the C code gives, which must not leave it to numpy."""
    real, done = kernels.decode_streams, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "decode_streams", lambda *a, **k: done.append(real(*a, **k)) or done[-1])
        result = call()
    assert done == [True]
    return result


def bits(band):
    arrays = (band.ids, band.logprob, band.log_tail, band.draws)
    return [None if array is None else (array.dtype, array.shape, array.tobytes()) for array in arrays]


def page_args(page, encoding, shape, table):
    table = None if encoding == "plain" else table
    return (
        (np.frombuffer(page, np.uint8), shape),
        {"encoding": encoding, "id_table": table, "where": "here"},
    )


def rooms(shape, how):
    """([P, k] ids, log-probs and draws, [P] tails) to decode into, and the larger arrays they are in."""
    n, k = shape.n_positions, shape.n_ranks
    size = {"joined": (n, k), "columns": (n, k + 5), "upside down": (n, k), "every other": (2 * n, k + 2)}[
        how
    ]
    whole = [np.full(size, 7, dtype) for dtype in (np.uint32, np.float32, np.uint32)]
    whole.append(np.full(size[0], 7, np.float32))
    rows = {"upside down": slice(None, None, -1), "every other": slice(None, None, 2)}.get(how, slice(None))
    first = min(3, size[1] - k)
    return [array[rows, first : first + k] if array.ndim == 2 else array[rows] for array in whole], whole


def assert_same(page, encoding, shape, table, how="columns"):
    args, options = page_args(page, encoding, shape, table)
    expected = by_numpy(lambda: decode_page(*args, **options))
    assert bits(by_c(lambda: decode_page(*args, **options))) == bits(expected)
    for wanted in ("all", "ids and log-probs"):
        (ids, logprob, draws, log_tail), whole = rooms(shape, how)
        extra = {}
        if wanted == "all":
            extra = {"log_tail": log_tail, "draws": None if expected.draws is None else draws}
        by_c(
            lambda extra=extra, ids=ids, lp=logprob: decode_into(
                *args, **options, ids=ids, logprob=lp, **extra
            )
        )
        pairs = [(ids, expected.ids), (logprob, expected.logprob)]
        if wanted == "all":
            pairs += [(log_tail, expected.log_tail)]
            pairs += [] if expected.draws is None else [(draws, expected.draws)]
        for found, right in pairs:
            assert found.tobytes() == right.tobytes()
        # Nothing beside the rows was touched.
        for array in (ids, logprob, draws, log_tail):
            array[...] = 7
        assert all((array == 7).all() for array in whole)


@NEEDS_C
@pytest.mark.parametrize("ragged", [False, True], ids=["fixed", "ragged"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("encoding", PACKED)
@settings(deadline=None, max_examples=15)
@given(data=st.data())
def test_the_same_bits(encoding, kind, ragged, data):
    band = data.draw(supports.supports(kind, ragged=ragged))
    table = TABLES[data.draw(st.sampled_from(sorted(TABLES)))]
    how = data.draw(st.sampled_from(["joined", "columns", "upside down", "every other"]))
    n, size = band.ids.shape
    ends = data.draw(band_ends(size)) if kind == "topk" else (size,)
    pages, _ = encode(band, encoding, kind=kind, bands=ends, table=table)
    for page, start, end in zip(pages, (0, *ends), ends, strict=False):
        assert_same(page, encoding, PageShape(KINDS[kind], start, end, n), table, how)


@NEEDS_C
@pytest.mark.parametrize("ragged", [False, True], ids=["fixed", "ragged"])
@pytest.mark.parametrize("encoding", PACKED)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (1, 4096), (3, 4096), (700, 1), (700, 2), (300, 65), (1, 64)])
def test_odd_shapes(encoding, n, k, ragged):
    vocab = 5000
    rng = np.random.default_rng(n + k)
    band = random_topk(rng, n, k, vocab)
    if ragged:
        band = shortened(rng, band, least=0)
    table = build_id_table([peaked_topk(rng, 40, 64, vocab).ids], vocab_size=vocab, n_lists=3)
    for chosen in (None, table):
        (page,), _ = encode(band, encoding, kind="chosen", table=chosen)
        assert_same(page, encoding, PageShape(KINDS["chosen"], 0, k, n), chosen)


def test_pages_without_positions_are_empty_on_both_paths():
    page = join_page(layout.PAGE_HEADER.pack(1, 0, 0, 3, 0, 0, 0, 0, 0), bytes(5))
    shape = PageShape(layout.KIND_TOPK, 0, 3, 0)
    args, options = page_args(page, "f32", shape, None)
    for found in (decode_page(*args, **options), by_numpy(lambda: decode_page(*args, **options))):
        assert (found.ids.shape, found.log_tail.shape) == ((0, 3), (0,))


@NEEDS_C
@pytest.mark.parametrize("n_planes", range(5))
def test_any_number_of_planes(n_planes):
    """More planes than the values need, and none where all of them are zero."""
    small = Band(np.zeros((9, 1), np.uint32), np.zeros((9, 1), np.float32), np.zeros(9, np.float32))
    wide = peaked_topk(np.random.default_rng(0), 9, 20, VOCAB)
    for encoding in PACKED:
        for band in (small, wide):
            (page,), _ = encode(band, encoding, table=TABLES["lists"])
            header, body = split_page(page)
            streams = parse_body(body)
            for stream in streams:
                n = (
                    len(frame_content(memoryview(stream[0][1])) if stream[0][0] else stream[0][1])
                    if stream
                    else 0
                )
                if stream or n_planes == 0:
                    stream += [(False, bytes(n))] * (n_planes - len(stream))
            shape = PageShape(layout.KIND_TOPK, 0, band.ids.shape[1], 9)
            assert_same(join_page(header, build_body(streams)), encoding, shape, TABLES["lists"])


def frame(content, *, window=None, size_bytes=8, **flags):
    """One raw block in a frame, with a header put together by hand; RFC 8878, 3.1.1."""
    codes = {1: 0, 2: 1, 4: 2, 8: 3}
    stored = len(content) - (256 if size_bytes == 2 else 0)
    descriptor = codes[size_bytes] << 6 | (window is None) << 5
    for flag, bit in {"unused": 4, "reserved": 3, "checksum": 2, "dictionary": 0}.items():
        descriptor |= flags.get(flag, 0) << bit
    header = struct.pack("<IB", 0xFD2FB528, descriptor) + (b"" if window is None else bytes([window]))
    header += bytes(flags.get("dictionary", 0)) + stored.to_bytes(size_bytes, "little")
    return header + struct.pack("<I", 1 | len(content) << 3)[:3] + content


FRAMES = {
    "1 byte of size": ({"size_bytes": 1}, True),
    "4 bytes of size": ({"size_bytes": 4}, True),
    "8 bytes of size": ({"size_bytes": 8}, True),
    "window": ({"window": 0, "size_bytes": 4}, True),
    "window of 8 MiB": ({"window": 13 << 3, "size_bytes": 4}, True),
    "window of 9 MiB": ({"window": 13 << 3 | 1, "size_bytes": 4}, False),
    "reserved bit": ({"reserved": 1}, False),
    "checksum": ({"checksum": 1}, False),
}


@NEEDS_C
@pytest.mark.parametrize("name", [*FRAMES, "2 bytes of size"])
def test_headers_of_frames(name):
    """What C reads of a frame's header is what zstandard reads."""
    options, is_good = FRAMES.get(name, ({"size_bytes": 2}, True))
    n = 300 if name == "2 bytes of size" else 9
    band = peaked_topk(np.random.default_rng(0), n, 1, VOCAB)
    (page,), _ = encode(band, "ladder/64")
    header, body = split_page(page)
    streams = parse_body(body)
    assert len(streams[3][0][1]) > 1
    is_zstd, payload = streams[3][0]
    content = zstandard.ZstdDecompressor().decompress(payload) if is_zstd else payload
    assert len(content) == n
    streams[3][0] = (True, frame(content, **options))
    page = join_page(header, build_body(streams))
    shape = PageShape(layout.KIND_TOPK, 0, 1, n)
    if is_good:
        assert_same(page, "ladder/64", shape, None)
        return
    args, named = page_args(page, "ladder/64", shape, None)
    with pytest.raises(FormatError, match=r"a zstd frame of|does not decompress"):
        decode_page(*args, **named)


def outcome(call):
    try:
        return bits(call())
    except FormatError as error:
        return str(error)


@NEEDS_C
@pytest.mark.parametrize("ragged", [False, True], ids=["fixed", "ragged"])
@pytest.mark.parametrize("encoding", PACKED)
def test_mutated_pages_come_out_the_same(encoding, ragged):
    """C accepts what numpy accepts and nothing else."""
    rng, numbers = random.Random(f"{encoding} {ragged}"), np.random.default_rng(5)
    seeds = []
    for kind, size in (("topk", 2), ("topk", 20), ("sampled", 9)):
        band = peaked_topk(numbers, 5, size, VOCAB)
        band = shortened(numbers, band, least=0) if ragged else band
        draws = np.where(band.ids == layout.NO_ID, np.uint32(0), np.uint32(3)) if kind == "sampled" else None
        band = Band(band.ids, band.logprob, band.log_tail, draws)
        for table in TABLES.values():
            (page,), _ = encode(band, encoding, kind=kind, table=table)
            seeds.append((page, PageShape(KINDS[kind], 0, size, 5), table))
    seen = {True: 0, False: 0}
    for _ in range(1500):
        page, shape, table = rng.choice(seeds)
        header, body = split_page(page)
        if rng.random() < 0.05:
            header = header[:1] + bytes([header[1] ^ rng.choice((1, 2))]) + header[2:]
        changed = join_page(header, mutate_body(body, rng))
        args, options = page_args(changed, encoding, shape, table)
        found = outcome(lambda a=args, o=options: decode_page(*a, **o))
        assert found == outcome(lambda a=args, o=options: by_numpy(lambda: decode_page(*a, **o))), (
            changed.hex()
        )
        seen[isinstance(found, str)] += 1
    assert min(seen.values()) > 50


@NEEDS_C
def test_threads_do_not_disturb_each_other():
    band = peaked_topk(np.random.default_rng(1), 300, 64, VOCAB)
    jobs = []
    for encoding in PACKED * 6:
        (page,), _ = encode(band, encoding, table=TABLES["lists"])
        args, options = page_args(page, encoding, PageShape(layout.KIND_TOPK, 0, 64, 300), TABLES["lists"])
        jobs.append(lambda a=args, o=options: bits(decode_page(*a, **o)))
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda job: job(), jobs)) == [job() for job in jobs]


def test_without_the_extension_numpy_decodes():
    code = """if True:
        import sys
        sys.modules["opd_store._kernels"] = None
        import numpy as np
        from opd_store import kernels
        from store import supports
        from opd_store.testing import peaked_topk
        band = peaked_topk(np.random.default_rng(0), 5, 9, 300)
        pages, _ = supports.encode(band, "f32")
        (found,) = supports.decode(pages, "f32", 5, bands=(9,))
        print(kernels.COMPILED, np.array_equal(found.logprob, band.logprob))
    """
    assert run_python(code).split() == ["False", "True"]


# Arrays to decode into.


@BOTH
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_arrays_that_do_not_fit_are_refused(encoding, compiled):
    band = peaked_topk(np.random.default_rng(0), 5, 9, VOCAB)
    (page,), _ = encode(band, encoding)
    args, options = page_args(page, encoding, PageShape(layout.KIND_TOPK, 0, 9, 5), None)
    ids, logprob, tail = np.zeros((5, 9), np.uint32), np.zeros((5, 9), np.float32), np.zeros(5, np.float32)
    frozen = ids.copy()
    frozen.flags.writeable = False
    odd = np.frombuffer(bytearray(181), np.uint8)[1:].view(np.uint32).reshape(5, 9)
    good = {"ids": ids, "logprob": logprob, "log_tail": tail}
    cases = [
        {"ids": ids[:4]},
        {"ids": ids[:, :8]},
        {"ids": ids.view(np.int32)},
        {"ids": np.zeros((9, 5), np.uint32).T},
        {"ids": frozen},
        {"ids": odd},
        {"ids": ids.reshape(-1)},
        {"logprob": logprob.astype(np.float64)},
        {"logprob": np.zeros((5, 18), np.float32)[:, ::2]},
        {"log_tail": tail[:4]},
        {"draws": ids},
    ]
    for case in cases:
        with pytest.raises(InvalidArgumentError, match=r"here: to decode into: expected ids uint32 \(5, 9\)"):
            decode_into(*args, **options, **(good | case))
    decode_into(*args, **options, **good)
    expected = decode_page(*args, **options)
    for found, right in ((ids, expected.ids), (logprob, expected.logprob), (tail, expected.log_tail)):
        assert found.tobytes() == right.tobytes()


def arguments(**changed):
    """Of `_kernels.decode_streams`, for a ladder page of 5 positions and 9 ranks with lists."""
    band = peaked_topk(np.random.default_rng(0), 5, 9, VOCAB)
    (page,), _ = encode(band, "ladder/64", table=TABLES["lists"])
    table = TABLES["lists"]
    values = {
        "body": np.frombuffer(split_page(page)[1], np.uint8),
        "decompress": frame_content,
        "max_window": MAX_WINDOW,
        "rank_start": 0,
        "rank_end": 9,
        "ragged": False,
        "has_draws": False,
        "scale": 64,
        "words": False,
        "limit": (1 << 24) - 1,
        "by_rank": table.by_rank,
        "lists": table.padded_lists,
        "ids": np.zeros((5, 9), np.uint32),
        "logprob": np.zeros((5, 9), np.float32),
        "log_tail": np.zeros(5, np.float32),
        "draws": None,
    }
    assert changed.keys() <= values.keys()
    return tuple((values | changed).values())


WORDS = np.zeros((5, 9), np.uint32)
READ_ONLY = np.frombuffer(bytes(180), np.uint32).reshape(5, 9)
HOSTILE = {
    "other rows": {"ids": np.zeros((4, 9), np.uint32)},
    "other ranks": {"rank_end": 10},
    "no ranks": {"rank_end": 0},
    "negative ranks": {"rank_start": -1, "rank_end": 8},
    "too many ranks": {"rank_end": 1 << 40},
    "wide items": {"ids": np.zeros((5, 9), np.uint64)},
    "narrow items": {"logprob": np.zeros((5, 9), np.float16)},
    "one dimension": {"ids": np.zeros(45, np.uint32)},
    "three dimensions": {"ids": np.zeros((5, 9, 1), np.uint32)},
    "columns first": {"ids": np.zeros((9, 5), np.uint32).T},
    "read only": {"ids": READ_ONLY},
    "not aligned": {"ids": np.frombuffer(bytearray(181), np.uint8)[1:].view(np.uint32).reshape(5, 9)},
    "no ids": {"ids": None},
    "tails of other rows": {"log_tail": np.zeros(6, np.float32)},
    "draws without any": {"draws": WORDS},
    "draws of another shape": {"has_draws": True, "draws": WORDS[:4]},
    "a limit above float32": {"limit": 1 << 24},
    "a limit above float16": {"scale": 0, "limit": 0x7C00},
    "a small limit": {"limit": 254},
    "a negative scale": {"scale": -1},
    "lists of another length": {"lists": np.zeros(255, np.uint32)},
    "an empty order": {"by_rank": np.zeros(0, np.uint32)},
    "an order with gaps": {"by_rank": np.zeros(600, np.uint32)[::2]},
    "an order in rows": {"by_rank": np.zeros((300, 1), np.uint32)},
    "wide order": {"by_rank": np.zeros(300, np.uint64)},
    "a body with gaps": {"body": np.zeros(50, np.uint8)[::2]},
    "a body of words": {"body": np.zeros(50, np.uint32)},
}


@NEEDS_C
@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_arguments(case):
    with pytest.raises(ValueError, match=r".+"):
        _kernels.decode_streams(*arguments(**HOSTILE[case]))
    assert _kernels.decode_streams(*arguments())


@NEEDS_C
def test_hostile_decompression():
    band = peaked_topk(np.random.default_rng(0), 200, 9, VOCAB)
    (page,), _ = encode(band, "ladder/64")
    rows = {"ids": np.zeros((200, 9), np.uint32), "logprob": np.zeros((200, 9), np.float32), "log_tail": None}
    rows |= {"body": np.frombuffer(split_page(page)[1], np.uint8), "by_rank": None, "lists": None}
    assert _kernels.decode_streams(*arguments(**rows))
    for answer in (None, b"", b"\xff" * 199, bytearray(200), "a" * 200, 200):
        assert not _kernels.decode_streams(*arguments(**rows, decompress=lambda _, answer=answer: answer))
    # Any bytes of the right size: sums grow beyond the limit or not, ids are what they are.
    for byte in range(256):
        whole = lambda frame, byte=byte: bytes([byte]) * len(frame_content(frame))  # noqa: E731
        assert _kernels.decode_streams(*arguments(**rows, decompress=whole)) in (True, False)

    def fail(_):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        _kernels.decode_streams(*arguments(**rows, decompress=fail))
    with pytest.raises(TypeError):
        _kernels.decode_streams(*arguments(body=None))
    with pytest.raises(TypeError):
        _kernels.decode_streams()


@NEEDS_C
def test_ids_and_codes_beyond_a_table_are_not_decoded():
    """The table that a page was not written with."""
    table = TABLES["lists"]
    for small in ({"by_rank": table.by_rank[:1]}, {"lists": table.padded_lists[:256]}, {"lists": None}):
        tried = [_kernels.decode_streams(*arguments(**small))]
        assert tried == [False]


# Which rows are certainly possible.


def fine(kind, band, *, vocab_size=VOCAB, ragged=True, tolerance=layout.PROBABILITY_TOLERANCE):
    return kernels.rows_are_fine(
        band.ids,
        band.logprob,
        band.log_tail,
        draws=band.draws,
        vocab_size=vocab_size,
        ragged=ragged,
        may_be_empty=kind != "topk",
        limit=1 + tolerance,
    )


def problem(kind, band, *, ragged=True):
    return support_problem(
        kind, band.ids, band.logprob, band.log_tail, draws=band.draws, vocab_size=VOCAB, ragged=ragged
    )


POISONS = {
    "logprob": [np.nan, np.inf, -np.inf, 0.5, 0.0, -0.0, -1e-3, -1e-40, -300.0, np.float32(-3.4e38)],
    "ids": [0, 1, VOCAB - 1, VOCAB, 2**31 - 1, 2**31, 2**32 - 2, layout.NO_ID],
    "log_tail": [np.nan, np.inf, -np.inf, 0.5, 0.0, -0.0, -1e-4, -50.0],
    "draws": [0, 1, 2**32 - 1],
}


@NEEDS_C
@pytest.mark.parametrize("ragged", [False, True], ids=["fixed", "ragged"])
@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=120)
@given(data=st.data())
def test_what_c_finds_fine_numpy_accepts(kind, ragged, data):
    band = data.draw(supports.supports(kind, ragged=ragged))
    # All that is valid is found fine, or the check would be useless.
    assert fine(kind, band, ragged=ragged)
    assert by_numpy(lambda: problem(kind, band, ragged=ragged)) is None
    fields = {name: np.array(getattr(band, name)) for name in POISONS if getattr(band, name) is not None}
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(sorted(fields)))
        place = tuple(data.draw(st.integers(0, size - 1)) for size in fields[name].shape)
        how = data.draw(st.sampled_from(["value", "copy"]))
        other = tuple(data.draw(st.integers(0, size - 1)) for size in fields[name].shape)
        value = data.draw(st.sampled_from(POISONS[name])) if how == "value" else fields[name][other]
        fields[name][place] = value
    poisoned = Band(**({"draws": None} | fields))
    expected = by_numpy(lambda: problem(kind, poisoned, ragged=ragged))
    assert not (fine(kind, poisoned, ragged=ragged) and expected is not None), expected
    # Together they say what numpy says alone.
    assert repr(problem(kind, poisoned, ragged=ragged)) == repr(expected)


@NEEDS_C
@pytest.mark.parametrize("shape", ["flat", "peaked", "one"])
@pytest.mark.parametrize("k", [1, 5, 64, 4096])
def test_sums_near_the_limit(k, shape):
    """C accepts nothing above the limit, and all that is 2e-5 below it."""
    rng = np.random.default_rng(k)
    n, vocab = 400, 5000
    weights = {"flat": np.ones(k), "peaked": 1 / np.arange(1, k + 1) ** 3, "one": 1e-30 ** (np.arange(k) > 0)}
    tolerance = 1e-3
    total = 1 + tolerance + rng.uniform(-4e-5, 4e-5, n)
    # A log-prob is at most 0, so what is beyond 1 comes from the tail.
    share = rng.uniform(0.1, 0.9, (n, 1))
    logprob = np.log(share * weights[shape] / weights[shape].sum()).astype(np.float32)
    log_tail = np.log(total - np.exp(logprob.astype(np.float64)).sum(axis=1)).astype(np.float32)
    exact = np.exp(logprob.astype(np.float64)).sum(axis=1) + np.exp(log_tail.astype(np.float64))
    ids = np.arange(k, dtype=np.uint32)[None]
    accepted = np.array(
        [
            fine(
                "topk",
                Band(ids, logprob[i : i + 1], log_tail[i : i + 1]),
                vocab_size=vocab,
                tolerance=tolerance,
            )
            for i in range(n)
        ]
    )
    assert not (accepted & (exact > 1 + tolerance)).any()
    assert accepted[exact < 1 + tolerance - 2e-5].all()
    assert 0 < accepted.sum() < n


@NEEDS_C
def test_ids_are_distinct_in_rows_far_apart():
    """More rows than there are stamps; the same ids in every one."""
    band = peaked_topk(np.random.default_rng(0), 1, 20, VOCAB)
    n = 1200
    rows = [np.tile(part, (n, 1)) for part in (band.ids, band.logprob)]
    assert fine("topk", Band(*rows, np.tile(band.log_tail, n)))
    for at in (0, 254, 255, 256, 510, 511, n - 1):
        ids = rows[0].copy()
        ids[at, 19] = ids[at, 0]
        assert not fine("topk", Band(ids, rows[1], np.tile(band.log_tail, n)))


@NEEDS_C
def test_rows_that_c_leaves_to_numpy():
    band = peaked_topk(np.random.default_rng(0), 4, 9, VOCAB)
    for other in (
        Band(np.asfortranarray(band.ids), band.logprob, band.log_tail),
        Band(band.ids, band.logprob.astype(np.float64), band.log_tail),
        Band(band.ids.astype(np.int64), band.logprob, band.log_tail),
        Band(band.ids, band.logprob, band.log_tail, band.ids.astype(np.int64)),
    ):
        assert not fine("topk", other)
    unaligned = np.frombuffer(b"." + band.log_tail.tobytes(), np.uint8)[1:].view(np.float32)
    assert not fine("topk", Band(band.ids, band.logprob, unaligned))
    assert problem("topk", Band(band.ids, band.logprob, unaligned)) is None
    assert not fine("topk", band, vocab_size=kernels.MAX_STAMPS + 1)
    wide = [np.full((4, 30), 7, a.dtype) for a in (band.ids, band.logprob)]
    for whole, part in zip(wide, (band.ids, band.logprob), strict=True):
        whole[:, 4:13] = part
    assert fine("topk", Band(*(whole[:, 4:13] for whole in wide), band.log_tail))


ROWS = (np.zeros((4, 9), np.uint32), np.full((4, 9), -9, np.float32), np.zeros(4, np.float32))


@NEEDS_C
@pytest.mark.parametrize(
    "bad",
    [
        (ROWS[0][:3], *ROWS[1:], None, 300),
        (ROWS[0], ROWS[1][:, :8], ROWS[2], None, 300),
        (*ROWS[:2], ROWS[2][:3], None, 300),
        (*ROWS, ROWS[0][:, :8], 300),
        (*ROWS, None, 0),
        (*ROWS, None, 1 << 31),
        (*ROWS[:2], None, None, 300),
        (ROWS[0].astype(np.uint64), *ROWS[1:], None, 300),
        (np.zeros((9, 4), np.uint32).T, *ROWS[1:], None, 300),
    ],
)
def test_hostile_rows(bad):
    with pytest.raises(ValueError, match=r".+"):
        _kernels.rows_are_fine(*bad, False, False, 1.0)


# Rows of many arrays.


@BOTH
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_copied_rows(compiled, data):
    types = [("f4", "f4"), ("u4", "u4"), ("u4", "i8"), ("?", "?"), ("f8", "f8"), ("i8", "i8")]
    source_type, type_ = data.draw(st.sampled_from(types))
    width = data.draw(st.sampled_from([None, 1, 3, 8]))
    is_flat = width is not None and data.draw(st.booleans())
    gap = data.draw(st.sampled_from([0, 2]))
    sizes = data.draw(st.lists(st.integers(0, 7), max_size=5))
    rng = np.random.default_rng(len(sizes))
    n_rows = sum(sizes) + 3
    shape = (n_rows,) if width is None else (n_rows, width + gap)
    whole = np.ones(shape, type_)
    dst = whole if width is None else whole[:, gap // 2 : gap // 2 + width]
    starts, firsts, sources = [], [], []
    expected = whole.copy()
    view = expected if width is None else expected[:, gap // 2 : gap // 2 + width]
    at = 1
    for size in sizes:
        first = data.draw(st.integers(0, 4))
        source = rng.integers(0, 2**32 if source_type == "u4" else 2, (first + size + 1, *shape[1:]))
        source = source.astype(source_type)
        source = source if width is None else source[:, :width]
        view[at : at + size] = source[first : first + size]
        starts.append(at)
        skipped = data.draw(st.integers(0, 2)) if is_flat else 0
        # A flat source may start anywhere, and end in the middle of a row.
        flat = np.concatenate([np.ones(skipped, source_type), source.reshape(-1), np.ones(1, source_type)])
        firsts.append(skipped + first * width if is_flat else first)
        sources.append(flat if is_flat else source)
        at += size
    kernels.copy_rows(dst, starts, sources, np.array(firsts, np.int64), sizes)
    assert whole.tobytes() == expected.tobytes()


FLAT, WIDE = np.zeros(9, np.float32), np.zeros((9, 2), np.float32)
BAD_COPIES = {
    "before the source": (FLAT, [0], [FLAT], [-1], [2]),
    "after the source": (FLAT, [0], [FLAT], [8], [2]),
    "before dst": (FLAT, [-1], [FLAT], [0], [2]),
    "after dst": (FLAT, [8], [FLAT], [0], [2]),
    "negative count": (FLAT, [3], [FLAT], [3], [-1]),
    "huge count": (FLAT, [0], [FLAT], [0], [2**62]),
    "huge start": (FLAT, [2**63 - 1], [FLAT], [0], [1]),
    "huge first": (FLAT, [0], [FLAT], [2**63 - 1], [1]),
    "lowest start": (FLAT, [-(2**63)], [FLAT], [0], [9]),
    "too few counts": (FLAT, [0, 0], [FLAT, FLAT], [0, 0], [1]),
    "too few starts": (FLAT, [0], [FLAT, FLAT], [0, 0], [1, 1]),
    "too many sources": (FLAT, [], [FLAT], [], []),
    "another type": (FLAT, [0], [FLAT.view(np.uint32)], [0], [1]),
    "another size": (FLAT, [0], [FLAT.astype(np.float64)], [0], [1]),
    "narrower": (FLAT.view(np.uint32), [0], [np.zeros(9, np.int64)], [0], [1]),
    "another width": (WIDE, [0], [np.zeros((9, 3), np.float32)], [0], [1]),
    "another dimension": (FLAT, [0], [WIDE], [0], [1]),
    "too short for its rows": (WIDE, [0], [FLAT], [0], [5]),
    "too short from there": (WIDE, [0], [FLAT], [2], [4]),
    "flat, before the source": (WIDE, [0], [FLAT], [-1], [1]),
    "flat, after the source": (WIDE, [0], [FLAT], [10], [0]),
    "flat with gaps": (WIDE, [0], [np.zeros(18, np.float32)[::2]], [0], [1]),
    "flat with gaps, narrow": (WIDE[:, :1], [0], [np.zeros(18, np.float32)[::2]], [0], [1]),
    "objects": (np.zeros(2, object), [0], [np.zeros(2, object)], [0], [2]),
    "a good one before": (FLAT, [0, 0], [FLAT + 1, FLAT], [0, 0], [9, 10]),
}


@BOTH
@pytest.mark.parametrize("case", BAD_COPIES)
def test_copies_that_are_refused(case, compiled):
    dst, *others = BAD_COPIES[case]
    with pytest.raises(ValueError, match=r"source|expected"):
        kernels.copy_rows(dst, *others)
    assert not FLAT.any()
    assert not WIDE.any()
