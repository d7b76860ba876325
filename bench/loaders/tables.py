"""The tables of bench/loader.py: whom each one asks for what, and what it prints.

Every function fills `Bench.found` and returns columns and rows.
"""

from __future__ import annotations

import math

from loaders.bench import BARE, LADDER, OURS, RING, Bench, Item, Pair, median
from loaders.bucket import Bucket

Table = tuple[tuple[str, ...], list[tuple[str, ...]]]
FEW_RANKS = 8
TOKENS_PER_S = 20_000
DELAY_MS = 50
REMOTE = ("Arrow IPC", "Parquet", "MDS", "litdata", "WebDataset", "Lance", OURS)
"""Beginnings of the names of what can read from a bucket."""
BY_WORKERS = (0, 2)
WAITING = ("memmap", "MDS", "litdata", OURS)
"""Whom the trainer waits for."""


def rate(found: dict[str, float], clock: str) -> float:
    """Million positions a second."""
    return found["positions"] / max(found[clock], 1e-9) / 1e6


def number(value: float, digits: int) -> str:
    """A dash for nan."""
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def columns(heads: str) -> tuple[str, ...]:
    """After the layout's."""
    return ("layout", *heads.split("|"))


def is_ours(name: str) -> bool:
    """Whether it is this project's."""
    return name.startswith(OURS)


def epochs(bench: Bench, data: str) -> Table:
    """An epoch in stored order into tensors."""
    pairs = bench.layouts("epoch")
    answers = bench.rounds("epoch", data, pairs)
    positions = next((answer[0][0]["positions"] for answer in answers.values()), 1)
    medians = {}
    for name, answer in answers.items():
        later = [passes[1] for passes in answer]
        medians[name] = {
            "first": median(rate(passes[0], "cpu") for passes in answer),
            "wall": median(rate(one, "wall") for one in later),
            "cpu": median(rate(one, "cpu") for one in later),
        }
        for base in (RING, BARE):
            if base in answers:
                steps = zip(answer, answers[base], strict=False)
                ratios = [rate(one[1], "cpu") / rate(other[1], "cpu") for one, other in steps]
                medians[name][base] = median(ratios)
        bench.found["epoch", data, name] = medians[name]
    rows = []
    for name, pair in bench.named(pairs):
        if name not in medians:
            continue
        best = best_peer(medians, half=pair[1]["half"] or LADDER in name, pairs=pairs)
        found = medians[name]
        rows.append(
            (
                name,
                f"{bench.n_bytes(data, pair[1]) / positions:.1f}",
                f"{found['first']:.2f}",
                f"{found['wall']:.2f}",
                f"{found['cpu']:.2f}",
                number(found.get(RING, math.nan), 3),
                number(found.get(BARE, math.nan), 3),
                number(found["cpu"] / best, 2),
            )
        )
    return columns("B/position|first pass M/CPU-s|M/s|M/CPU-s|/ ring|/ memmap|/ best peer"), rows


def best_peer(medians: dict[str, dict[str, float]], *, half: bool, pairs: list[Pair]) -> float:
    """Positions per CPU-second of the fastest format of others: of those that compress, or the exact ones."""
    names = {pair[1]["name"] for pair in pairs if pair[1]["half"] == half}
    names -= {RING, BARE}
    found = [value["cpu"] for name, value in medians.items() if name in names and not is_ours(name)]
    return max(found, default=float("nan"))


def shuffles(bench: Bench, data: str) -> Table:
    """An epoch in random order, token ids as int64, with and without worker processes."""
    pairs = bench.layouts("shuffled", lambda item: item["shuffled"])
    for workers in BY_WORKERS:
        able = [pair for pair in pairs if pair[1]["forks"] or not workers]
        answers = bench.rounds("shuffled", data, able, workers=workers, seed=bench.seed)
        for name, answer in answers.items():
            found = bench.found.setdefault(("shuffled", data, name), {})
            found[f"wall {workers}"] = median(rate(passes[1], "wall") for passes in answer)
            found[f"cpu {workers}"] = median(rate(passes[1], "cpu") for passes in answer)
            found[f"first {workers}"] = median(rate(passes[0], "wall") for passes in answer)
    names = [name for name, _ in bench.named(pairs) if ("shuffled", data, name) in bench.found]
    peers = [bench.found["shuffled", data, name].get("wall 0", 0.0) for name in names if not is_ours(name)]
    best = max(peers, default=float("nan"))
    rows = []
    for name in names:
        found = bench.found["shuffled", data, name]
        cells = [
            number(found.get(f"{clock} {workers}", math.nan), 2)
            for workers in BY_WORKERS
            for clock in ("first", "wall", "cpu")
        ]
        rows.append((name, *cells, number(found.get("wall 0", math.nan) / best, 2)))
    heads = [
        f"{workers} workers, {clock}"
        for workers in BY_WORKERS
        for clock in ("first pass M/s", "M/s", "M/CPU-s")
    ]
    return ("layout", *heads, "/ best peer"), rows


def randoms(bench: Bench, data: str, *, count: int) -> Table:
    """One rollout at random, warm."""
    pairs = bench.layouts("random", lambda item: item["random"])
    answers = bench.rounds("random", data, pairs, seed=bench.seed, count=count)
    bare = answers.get(BARE, [])
    rows = []
    for name, answer in answers.items():
        ratios = [one["p50"] / other["p50"] for one, other in zip(answer, bare, strict=False)]
        found = {key: median(one[key] for one in answer) for key in ("p50", "p99")} | {
            "ratio": median(ratios)
        }
        bench.found["random", data, name] = found
        rows.append((name, f"{found['p50']:.0f}", f"{found['p99']:.0f}", number(found["ratio"], 2)))
    for name, pair in bench.named(pairs):
        if is_ours(name):
            answer = bench.ask("of_length", pair, data, length=512, count=8, repeats=25)
            if answer is not None:
                bench.found["of length", data, name] = answer
    return ("layout", "p50 us", "p99 us", "p50 / memmap"), rows


def firsts(bench: Bench, data: list[str]) -> Table:
    """A fresh process opens and reads a batch."""
    pairs = first_pairs(bench)
    rows = {name: [name] for name, _ in bench.named(pairs)}
    heads = []
    for one in data:
        answers = bench.rounds("first", one, pairs)
        for name, cells in rows.items():
            answer = answers.get(name)
            if answer is None:
                cells += ["-", "-"]
                continue
            found = {key: median(step[key] for step in answer) for key in ("open", "first")}
            bench.found["first", one, name] = found
            cells += [f"{found['open']:.1f}", f"{found['first']:.1f}"]
        shards = one.partition("-")[2]
        heads += [f"{shards} shards, open ms", "first batch ms"]
    return ("layout", *heads), [tuple(cells) for cells in rows.values()]


def first_pairs(bench: Bench) -> list[Pair]:
    """Compressed variants open like the others."""

    def wanted(item: Item) -> bool:
        name = item["name"]
        return is_ours(name) or name == BARE or (item["stores"] == name and "zstd" not in name)

    return bench.layouts("first", wanted)


def memories(bench: Bench, data: str, quarter: str) -> Table:
    """Peak growth of memory over an epoch, and ours over caches of two sizes."""
    pairs = bench.layouts("memory")
    rows = []
    for name, pair in bench.named(pairs):
        found = bench.ask("memory", pair, data, order="stored")
        if found is None:
            continue
        twice = is_ours(name) or name == BARE
        small = bench.ask("memory", pair, quarter, order="stored") if twice else None
        before = ["-", "-"]
        if small is not None:
            before = [f"{small[key]:.0f}" for key in ("anon", "mapped")]
            added = (bench.n_bytes(data, pair[1]) - bench.n_bytes(quarter, pair[1])) / 2**20
            grown = sum(found[key] - small[key] for key in ("anon", "mapped"))
            found["resident of added"] = grown / added
        bench.found["memory", data, name] = found
        rows.append(
            (name, f"{found['batch']:.1f}", f"{found['anon']:.0f}", f"{found['mapped']:.0f}", *before)
        )
    for name, pair in bench.named(bench.layouts("shuffled", lambda item: item["shuffled"])):
        found = bench.ask("memory", pair, data, order="shuffled")
        if found is not None:
            bench.found["shuffled memory", data, name] = found
            cells = (f"{found['batch']:.1f}", f"{found['anon']:.0f}", f"{found['mapped']:.0f}", "-", "-")
            rows.append((f"{name}; shuffled", *cells))
    heads = "largest batch MB|anonymous MB|mapped MB|anonymous, 1/4 of the data|mapped, 1/4"
    return columns(heads), rows


def buckets(bench: Bench, bucket: Bucket, data: str) -> Table:
    """An epoch from S3, and the same of 8 of 64 ranks."""
    rows = []
    for name, pair in bench.named(bench.layouts("bucket", lambda item: item["name"].startswith(REMOTE))):
        item = pair[1]
        if (data, item["name"]) in bench.broken or not bench.folder(data, item).exists():
            continue
        uri = bucket.upload(bench.folder(data, item), bench.folder(data, item).name)
        stored = bench.n_bytes(data, item)
        whole = 0
        bucket.counts()
        bench.ask("opened", pair, data, uri=uri, env=bucket.env)
        to_open = sum(value for name, value in bucket.counts().items() if name != "bytes")
        for ranks in (None, FEW_RANKS) if item["few_ranks"] else (None,):
            bucket.counts()
            answer = bench.ask("opened_epoch", pair, data, uri=uri, ranks=ranks, env=bucket.env)
            counts = bucket.counts()
            if answer is None:
                continue
            n_bytes = counts.pop("bytes", 0)
            batches = answer["batches"] or math.nan
            after = (sum(counts.values()) - to_open) / batches
            whole = whole or n_bytes
            sizes = {"bytes": n_bytes, "stored": stored, "share": n_bytes / whole}
            found = answer | sizes | {"per batch": after}
            bench.found["bucket" if ranks is None else "bucket few", data, name] = found
            rows.append(
                (
                    name if ranks is None else f"{name}; {ranks} ranks",
                    f"{n_bytes / 1e6:.1f}",
                    f"{n_bytes / stored:.3f}",
                    str(counts.get("GET", 0)),
                    str(counts.get("HEAD", 0)),
                    str(counts.get("LIST", 0)),
                    str(to_open),
                    number(after, 2),
                    f"{answer['first'] * 1e3:.0f}",
                    f"{answer['wall'] * 1e3:.0f}",
                    f"{answer['cpu'] * 1e3:.0f}",
                )
            )
    heads = "MB|MB / stored|GET|HEAD|LIST|to open|then a record batch|first batch ms|epoch ms|CPU ms"
    return columns(heads), rows


def stalls(bench: Bench, bucket: Bucket | None, data: str, remote_data: str, *, seconds: float) -> Table:
    """A trainer that takes 20,000 tokens a second from one worker."""
    rows = []
    for name, pair in bench.named(bench.layouts("stall", lambda item: item["shuffled"])):
        if not name.startswith(WAITING) or name == RING:
            continue
        places: list[tuple[str, str, str | None, dict[str, str]]] = [("local", data, None, {})]
        if bucket is not None and name.startswith(REMOTE):
            uri = f"s3://bench/{bench.folder(remote_data, pair[1]).name}"
            places.append((f"S3 + {DELAY_MS} ms", remote_data, uri, bucket.env))
        for place, stored, uri, env in places:
            if bucket is not None:
                bucket.delay(DELAY_MS)
            arguments = {"tokens_per_s": TOKENS_PER_S, "seconds": seconds, "workers": 1, "seed": bench.seed}
            found = bench.ask("stall", pair, stored, uri=uri, env=env, **arguments)
            if bucket is not None:
                bucket.delay(0)
            if found is None:
                continue
            bench.found["stall", place, name] = found
            cells = (f"{100 * found['share']:.2f} %", f"{found['longest']:.0f}", f"{found['first']:.0f}")
            rows.append((f"{name}; {place}", *cells, f"{found['batches']:.0f}"))
    return ("loader", "waiting", "longest wait ms", "first batch ms", "batches"), rows


def colds(bench: Bench, data: str) -> Table:
    """Ours with everything to be read from disk and checked, with checks to be done, and with checks done."""
    pairs = bench.layouts("cold", lambda item: is_ours(item["name"]))
    answers = bench.rounds("cold", data, pairs)
    rows = []
    for name, answer in answers.items():
        cells = [
            median(rate(one[key], clock) for one in answer)
            for key in ("cold", "checks", "warm")
            for clock in ("wall", "cpu")
        ]
        bench.found["cold", data, name] = {"checks / warm": cells[3] / cells[5]}
        rows.append((name, *(f"{cell:.2f}" for cell in cells), f"{cells[3] / cells[5]:.2f}"))
    heads = [
        f"{key}, {clock}" for key in ("disk and checks", "checks", "later") for clock in ("M/s", "M/CPU-s")
    ]
    return ("layout", *heads, "checks / later"), rows
