"""Mutations that know how bytes are put together, so that most inputs get past the first check."""

from __future__ import annotations

import random
import struct

import zstandard

from fuzz.structure import build_body, parse_body

INTERESTING = (
    0,
    1,
    2,
    3,
    4,
    5,
    7,
    8,
    127,
    128,
    254,
    255,
    256,
    257,
    299,
    300,
    301,
    32767,
    32768,
    65535,
    65536,
)
LARGE = (1 << 24, (1 << 24) + 1, (1 << 31) - 1, 1 << 31, (1 << 32) - 2, (1 << 32) - 1)
TEXTS = (
    b"null",
    b"true",
    b"-1",
    b"1e999",
    b"0.5",
    b"[]",
    b"{}",
    b'""',
    b'"\\ud800"',
    b"NaN",
    b"[[",
    b"99999999",
)


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """One to four small changes."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        _change(changed, rng)
    return bytes(changed)


def _change(data: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(data) + 1)
    choice = rng.randrange(9)
    if choice == 0 and data:
        data[at % len(data)] ^= 1 << rng.randrange(8)
    elif choice == 1 and data:
        data[at % len(data)] = rng.choice(INTERESTING) & 0xFF
    elif choice == 2:
        data[at:at] = rng.randbytes(rng.choice((1, 2, 4, 8)))
    elif choice == 3:
        del data[at : at + rng.choice((1, 2, 4, 8, 64))]
    elif choice == 4:
        start = rng.randrange(len(data) + 1)
        data[at:at] = data[start : start + rng.choice((1, 4, 8, 32))]
    elif choice in (5, 6) and len(data) >= 8:
        # Numbers of flatbuffers and headers are aligned.
        width, form = rng.choice(((2, "<H"), (4, "<I"), (8, "<Q")))
        place = at % (len(data) - width + 1) // width * width
        value = rng.choice(INTERESTING + LARGE)
        if rng.random() < 0.3:
            (old,) = struct.unpack_from(form, data, place)
            value = old + rng.choice((-8, -4, -1, 1, 4, 8))
        struct.pack_into(form, data, place, value % (1 << 8 * width))
    elif choice == 7:
        text = rng.choice(TEXTS)
        data[at : at + rng.choice((0, len(text)))] = text
    else:
        del data[at:]


def mutate_body(data: bytes, rng: random.Random) -> bytes:
    """Change the streams of a page body, or sometimes its bytes."""
    streams = parse_body(data) if rng.random() < 0.85 else []
    if not streams:
        return mutate_bytes(data, rng)
    number = rng.randrange(len(streams))
    stream = streams[number]
    choice = rng.randrange(12)
    if choice == 0:
        streams.insert(rng.randrange(len(streams) + 1), list(stream))
    elif choice == 1:
        del streams[number]
    elif choice == 2:
        other = rng.randrange(len(streams))
        streams[number], streams[other] = streams[other], streams[number]
    elif choice == 3 and stream:
        del stream[rng.randrange(len(stream))]
    elif choice == 4:
        size = len(_opened(*stream[0])) if stream else rng.choice((1, 3, 6))
        stream.append((False, rng.randbytes(size)))
    elif stream:
        at = rng.randrange(len(stream))
        stream[at] = _mutate_plane(*stream[at], rng)
    else:
        stream.append((False, rng.randbytes(rng.choice((1, 3, 6)))))
    return build_body(streams)


def _opened(zstd: bool, payload: bytes) -> bytes:
    if not zstd:
        return payload
    try:
        # Not `decompress`, which allocates whatever the frame says.
        return zstandard.ZstdDecompressor(max_window_size=1 << 23).stream_reader(payload).read(1 << 16)
    except zstandard.ZstdError:
        return payload


def _mutate_plane(zstd: bool, payload: bytes, rng: random.Random) -> tuple[bool, bytes]:
    choice = rng.randrange(8)
    if choice == 0:
        return not zstd, payload
    if choice == 1:
        return zstd, mutate_bytes(payload, rng)
    if choice == 2:
        return zstd, payload + rng.choice((payload, b"\0", b"\x50\x2a\x4d\x18\0\0\0\0"))
    values = bytearray(_opened(zstd, payload))
    # Values change, their number does not.
    for _ in range(rng.choice((1, 1, 2, 8))):
        if values:
            values[rng.randrange(len(values))] = rng.choice(
                (0, 1, 2, 4, 5, 127, 128, 254, 255, rng.randrange(256))
            )
    if choice == 3:
        values = bytearray([rng.choice((0, 1, 5, 255))]) * len(values)
    if rng.random() < 0.5:
        return False, bytes(values)
    options = {"write_content_size": rng.random() < 0.9, "write_checksum": rng.random() < 0.1}
    return True, zstandard.ZstdCompressor(level=rng.choice((1, 3, 19)), **options).compress(bytes(values))
