"""Files that were made to do harm: to ask for memory or time, to name other files, to speak to a terminal."""

from __future__ import annotations

import gzip
import io
import json
import resource
import tarfile
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from opd_tools.converters.core.normalise import to_rollout
from opd_tools.converters.core.record import Record, Tally, Values, require_even
from opd_tools.converters.core.source import Source
from opd_tools.converters.core.support import Target, entries_of
from opd_tools.converters.plain import jsonl
from opd_tools.converters.reading import field_rows, fields, parquet
from opd_tools.converters.reading.arrow_lists import Rows
from tools.converters.converting import convert, refused
from tools.converters.samples import SAMPLES, good_rollouts

from opd_store import FormatError

# JSON

LINE = {"format": jsonl.LAYOUT, "prompt_len": 1, "token_ids": [3, 4, 5], "topk": 1, "topk_ids": [[4], [5]]}
LINE |= {"topk_logprob": [[-0.1], [-0.2]], "sample_id": "a"}
PLAIN = json.dumps(LINE)
JSON = {
    "deep lists": ('"a"', "[" * 200_000),
    "deep objects": ('"a"', '{"a":' * 200_000),
    "a number of 10,000 digits": ("[3, 4, 5]", f"[3, {'9' * 10_000}, 5]"),
    "an exponent without end": ("[-0.1]", "[1e400]"),
    "a float for an id": ("[[4], [5]]", "[[4.5], [5]]"),
    "a huge float for an id": ("[3, 4, 5]", "[3, 4, 1e300]"),
    "a surrogate": ('"a"', '"\\ud800"'),
    "a name of 10 MB": ('"a"', json.dumps("x" * 10_000_000)),
    "a name of escapes": ('"sample_id": "a"', '"label": "\\u001b[2J\\u202e' + "\\u0007" * 5000 + '"'),
    "uneven rows": ("[[4], [5]]", json.dumps([[4]] + [[]] * 4000 + [[5] * 40_000])),
    "more log-probs than ids": ("[[-0.1], [-0.2]]", "[[-0.1, -3], [-0.2, -3]]"),
    "a fraction of a prompt": ('"prompt_len": 1', '"prompt_len": 1.5'),
    "a mask of words": ('"topk"', '"loss_mask": ["no", "no"], "topk"'),
}


@pytest.mark.parametrize("name", JSON)
def test_json(tmp_path, name):
    """One short line, without an escape that a terminal would obey, and nothing left behind."""
    old, new = JSON[name]
    assert old in PLAIN
    path = tmp_path / "x.jsonl"
    path.write_text(PLAIN.replace(old, new) + "\n")
    line = refused(convert("jsonl", path, tmp_path / "to"), tmp_path / "to")
    assert line.isprintable()
    assert len(line) < 700


def test_a_file_name_that_speaks_to_the_terminal(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "\x1b[31m\u202e\n.jsonl").write_text("[1")
    line = refused(convert("jsonl", folder, tmp_path / "to"), tmp_path / "to")
    assert line.isprintable()


def test_a_line_without_end_in_a_small_file_takes_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("opd_tools.converters.core.source.MAX_LINE", 1 << 20)
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress(b'"' + b"x" * (64 << 20)))
    tracemalloc.start()
    with pytest.raises(FormatError, match="more than 1048576 bytes"):
        list(Source(str(path)).json_values(str(path)))
    assert tracemalloc.get_traced_memory()[1] < 16 << 20
    tracemalloc.stop()


# Tables


def test_rows_that_would_be_filled_up_without_end():
    require_even(np.array([1 << 22] * 4 + [0]), "x")
    with pytest.raises(FormatError, match="one of which has 1000000"):
        require_even(np.array([0] * 1000 + [1_000_000]), "x")


@pytest.mark.parametrize("name", ["table", "distillkit"])
def test_uneven_rows_of_a_table(tmp_path, name):
    sizes = [[1]] * 4000 + [[1] * 40_000]
    columns = {"input_ids": [[3] * 4001], "labels": [[3] * 4001], "token_ids": [sizes]}
    columns |= {"top_values": [[[-0.5] * len(row) for row in sizes]]}
    if name == "table":
        columns = {"input_ids": [[3] * 4002], "topk_ids": [sizes], "logprobs": columns["top_values"]}
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    line = refused(convert(name, tmp_path / "x.parquet", tmp_path / "to", "--topk", 1), tmp_path / "to")
    assert "shorten the longest rows" in line


@pytest.mark.parametrize("offsets", [[0, 3, 1 << 30], [0, -5, 3], [0, 3, 1]])
@pytest.mark.parametrize("outer", [False, True])
def test_arrow_offsets_beyond_the_values(tmp_path, offsets, outer):
    """They are in the file as its maker liked; pyarrow alone would read other memory."""
    bad = pa.array([[4, 5], [6]])
    if outer:
        bad = pa.ListArray.from_arrays(pa.array([0, 1, 2], pa.int32()), bad)
    good = pa.array([[3, 4, 5]] * 2)
    names = ["input_ids", "topk_ids" if outer else "loss_mask"]
    batch = pa.RecordBatch.from_arrays([good, bad], names)
    with pa.ipc.new_file(str(tmp_path / "x.arrow"), batch.schema) as writer:
        writer.write_batch(batch)
    data = (tmp_path / "x.arrow").read_bytes()
    before, after = (np.array(numbers, np.int32).tobytes() for numbers in ([0, 2, 3], offsets))
    assert data.count(before) == 1
    (tmp_path / "x.arrow").write_bytes(data.replace(before, after))
    source = Source(str(tmp_path / "x.arrow"))
    with pytest.raises(FormatError, match="damaged"):
        list(parquet.tables(source))


def test_parquet_rows_that_are_a_few_bytes_in_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "_MOST_ROW_BYTES", 1 << 20)
    pq.write_table(pa.table({"input_ids": [[7] * 300_000]}), tmp_path / "x.parquet")
    assert (tmp_path / "x.parquet").stat().st_size < 5000
    with pytest.raises(FormatError, match="expected at most 1 MiB"):
        list(parquet.tables(Source(str(tmp_path / "x.parquet"))))


def test_text_that_is_none(tmp_path):
    """In a value, and in the name of a column."""
    for name, text in (("in", "spelling"), ("of", "response")):
        columns = {"token_ids": [[3, 4, 5]], "teacher_logprob": [[-0.1, -0.2]], "label": ["spelling"]}
        columns["x_response"] = [1]
        path = tmp_path / f"{name}.parquet"
        pq.write_table(pa.table(columns), path, compression="none", use_dictionary=False, store_schema=False)
        path.write_bytes(path.read_bytes().replace(text.encode(), b"\xff" + text.encode()[1:]))
        line = refused(convert("table", path, tmp_path / "to"), tmp_path / "to")
        assert "damaged" in line or "no Parquet" in line


def test_slices_of_a_batch_take_only_what_is_theirs(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "_BATCH_BYTES", 1 << 10)
    rows = [[[i, i + 1], [i] * (i % 3)] for i in range(200)]
    batch = pa.RecordBatch.from_pydict({"a": pa.array(rows, pa.list_(pa.list_(pa.uint64())))})
    with pa.ipc.new_file(str(tmp_path / "x.arrow"), batch.schema) as writer:
        writer.write_batch(batch)
    found = []
    for _, _, part in parquet.tables(Source(str(tmp_path / "x.arrow"))):
        assert len(part) < 50
        column = Rows(part.column("a"), "x")
        found += [[[v for v in row if v != -1] for row in column[i].tolist()] for i in range(len(part))]
    assert found == rows


SCALARS = {
    "prompt_len": ([-2, 1.5, float("nan"), float("inf"), "1"], "prompt_len"),
    "policy_version": ([1.5, float("nan"), float("inf"), "1"], "policy_version"),
    "reward": (["much"], "reward"),
}


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, (values, _) in SCALARS.items() for v in values])
def test_scalars_that_are_no_such_numbers(tmp_path, field, value):
    columns = {"token_ids": [[3, 4, 5]], "teacher_logprob": [[-0.1, -0.2]], field: [value]}
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    line = refused(convert("table", tmp_path / "x.parquet", tmp_path / "to"), tmp_path / "to")
    assert f"row 0, {field}: expected" in line


def test_ids_are_not_rounded():
    record = Record(
        where="x",
        token_ids=np.array([3, 4]),
        topk_ids=np.array([[4.5]]),
        topk_logprob=np.array([[-0.1]]),
    )
    with pytest.raises(FormatError, match="expected integers"):
        entries_of(record, 9, Tally())


def test_a_rollout_that_lost_its_end_does_not_say_how_it_ended():
    record = Record(
        where="x",
        token_ids=np.array([3, 4, 5]),
        topk_ids=np.array([[4], [-1]]),
        topk_logprob=np.array([[-0.1], [-np.inf]]),
        finish_reason="stop",
    )
    tally = Tally()
    target = Target(vocab_size=9, topk=1, values=Values.LOGPROBS)
    assert to_rollout(record, target, tally).finish_reason == "unknown"
    assert tally["tokens after the last row, left out"] == 1


def test_all_logits_are_worked_on_in_parts(monkeypatch):
    monkeypatch.setattr(field_rows, "_MOST_LOGITS", 64)
    logits = np.random.default_rng(0).normal(0, 3, (37, 20)).astype(np.float16)
    settings = fields.Fields(names={}, guessed=(), source_aligned=False, kept=4, vocab_size=20)
    found = field_rows.likeliest(logits, settings, "x")
    expected = logits.astype(float) - np.log(np.exp(logits.astype(float)).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(
        found["topk_logprob"], np.take_along_axis(expected, found["topk_ids"], 1), atol=1e-12
    )
    total = np.exp(found["topk_logprob"]).sum(axis=1) + np.exp(found["log_tail"])
    np.testing.assert_allclose(total, 1, atol=1e-12)


# Configs, archives

YAML = {
    "itself": "teacher: &a {teacher: *a}",
    "nine laughs": "a0: &a0 [1]\n"
    + "".join(f"a{n + 1}: &a{n + 1} [{', '.join([f'*a{n}'] * 9)}]\n" for n in range(30))
    + "d: 1\nexact_k: 1\nk: *a30\n",
    "merges": "a0: &a0 {x: 1}\n"
    + "".join(f"a{n + 1}: &a{n + 1} {{<<: [{', '.join([f'*a{n}'] * 9)}]}}\n" for n in range(30)),
    # A few of these would take the parser minutes.
    "deep": "[" * 50_000,
    "long": "x: 1\n" * 20_000,
    "a date that is none": "d: 2001-99-99",
    "a number that is long": "d: " + "9" * 10_000,
    "Python": "d: !!python/object/apply:os.system [x]",
    "bytes": "\x00\x01",
}


@pytest.mark.parametrize("name", YAML)
def test_yaml(tmp_path, name):
    path = SAMPLES["distillkit"].write(tmp_path, good_rollouts(2))
    (path / "compression_config.yaml").write_text(YAML[name])
    line = refused(convert("distillkit", path, tmp_path / "to"), tmp_path / "to")
    assert "YAML" in line
    assert len(line) < 500


def _tar(path, *members):
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, data, change in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for key, value in change.items():
                setattr(info, key, value)
            tar.addfile(info, io.BytesIO(data))


META = ("_meta.json", b'{"saver": {"k": 2}}', {})
ZEROS = zstandard.ZstdCompressor().compress(bytes(200 << 20))
TARS = {
    "link": ("1.pt.zst", b"", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}),
    "hard link": ("1.pt.zst", b"", {"type": tarfile.LNKTYPE, "linkname": "_meta.json"}),
    "device": ("1.pt.zst", b"", {"type": tarfile.CHRTYPE}),
    "bomb": ("1.pt.zst", ZEROS, {}),
    "no zstd": ("1.pt.zst", b"x" * 100, {}),
}


@pytest.mark.parametrize("name", TARS)
def test_tar(tmp_path, name):
    path = SAMPLES["megatron"].write(tmp_path, good_rollouts(4))
    for tar in path.glob("*.tar"):
        _tar(tar, META, ("../../escaped", b"x", {}), TARS[name])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    line = refused(convert("megatron", path, tmp_path / "to"), tmp_path / "to")
    assert "1.pt.zst: " in line
    assert not (tmp_path.parent / "escaped").exists()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 160 << 10


def test_a_sparse_member_is_refused(tmp_path):
    path = SAMPLES["megatron"].write(tmp_path, good_rollouts(4))
    for tar in path.glob("*.tar"):
        header = bytearray(tarfile.TarInfo("1.pt.zst").tobuf(tarfile.GNU_FORMAT))
        header[156:157] = tarfile.GNUTYPE_SPARSE
        # One piece of no bytes at the end, and a size of 4 GiB.
        header[386:410] = b"40000000000\x0000000000000\x00"
        header[483:495] = b"40000000000\x00"
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\x00 " % sum(header)
        _tar(tar, META)
        tar.write_bytes(tar.read_bytes()[:1024] + bytes(header) + bytes(1024))
    line = refused(convert("megatron", path, tmp_path / "to"), tmp_path / "to")
    assert "sparse" in line
