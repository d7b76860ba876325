"""Two readers, one written from the prose alone, agree on every vector."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import struct
import subprocess
import sys

import numpy as np
import pytest
from spec.spec_files import INVALID, SPEC, VALID, reference

import opd_store
from opd_store.encodings import IdTable, PageShape, check_page_crc, decode_page

ACCEPTED = json.loads((VALID / "cases.json").read_text())
REFUSED = json.loads((INVALID / "cases.json").read_text())


# Rules that `opd_store` does not keep yet. A name that it has learnt fails here until it is taken out.
def bits(value: float) -> str:
    """The bits of a float32 as hexadecimal digits."""
    return f"{struct.unpack('<I', struct.pack('<f', value))[0]:08x}"


def test_no_vector_is_unlisted():
    assert {p.name for p in VALID.iterdir() if p.is_dir()} == set(ACCEPTED["cases"])
    assert {p.name for p in INVALID.iterdir() if p.is_dir()} == set(REFUSED["cases"])
    assert len(ACCEPTED["cases"]) >= 30
    assert len(REFUSED["cases"]) >= 300
    version = f"{opd_store.layout.FORMAT_MAJOR}.{opd_store.layout.FORMAT_MINOR}"
    assert ACCEPTED["format_version"] == REFUSED["format_version"] == version == VALID.name


@pytest.mark.parametrize("name", ACCEPTED["cases"])
def test_our_reader_finds_the_listed_values(name):
    case = ACCEPTED["cases"][name]
    cache = opd_store.open(VALID / name)
    assert (cache.version, cache.digest, cache.topk) == (case["version"], case["digest"], case["topk"])
    assert opd_store.verify(VALID / name).problems == []
    assert len(cache) == len(case["rows"])
    for row, expected in enumerate(case["rows"]):
        rollout = cache[row]
        found = {"rollout_hash": cache.row_hash(row).hex(), **rollout.extra}
        for field in dataclasses.fields(rollout):
            value = getattr(rollout, field.name)
            if value is None or field.name == "extra":
                continue
            if isinstance(value, np.ndarray):
                items = value.ravel().tolist()
                value = [bits(item) for item in items] if value.dtype == np.float32 else list(map(int, items))
            found[field.name] = value
        assert {k: v.hex() if isinstance(v, float) else v for k, v in found.items()} == expected
        assert row in cache.find_all(bytes.fromhex(expected["rollout_hash"]))


@pytest.mark.parametrize("name", ACCEPTED["cases"])
def test_the_reference_reader_finds_the_listed_values(name):
    case = ACCEPTED["cases"][name]
    cache = reference.read_cache(VALID / name)
    assert (cache["version"], cache["digest"], cache["topk"]) == (
        case["version"],
        case["digest"],
        case["topk"],
    )
    listed = {"teacher_logprob", "behaviour_logprob", "reference_logprob"}
    for support in ("topk", "chosen", "sampled"):
        listed |= {f"{support}_logprob", f"{support}_log_tail"}
    listed.add("log_tail")
    assert len(cache["rows"]) == len(case["rows"])
    for row, expected in zip(cache["rows"], case["rows"], strict=True):
        found = {}
        for column, value in row.items():
            if column == "band_tails":
                continue
            if column in listed and value is not None:
                value = [bits(item) for item in value]
            elif isinstance(value, float | bytes):
                value = value.hex()
            if value is not None:
                found[column] = value
        assert found == expected


@pytest.mark.parametrize("name", ["bands", "exact", "ragged-ladder", "rank-groups", "table-ragged"])
def test_both_readers_agree_on_fewer_ranks(name):
    cache = opd_store.open(VALID / name)
    read = reference.read_cache(VALID / name)
    for number, row in enumerate(read["rows"]):
        for ranks in range(1, cache.topk + 1):
            ours = cache.rollout(number, ranks=ranks)
            ids, logprobs, tails = reference.first_ranks(row, cache.topk, ranks)
            assert ours.topk_ids.ravel().tolist() == ids
            assert [bits(v) for v in ours.topk_logprob.ravel().tolist()] == [bits(v) for v in logprobs]
            np.testing.assert_allclose(ours.log_tail, tails, rtol=2e-7, atol=2e-7)


@pytest.mark.parametrize("name", REFUSED["cases"])
def test_our_reader_refuses_with_the_listed_error(name):
    case = REFUSED["cases"][name]
    path = INVALID / name
    problems: dict[str, BaseException] = {}

    def attempt(stage, call):
        if not problems:
            try:
                call()
            except opd_store.OpdError as error:
                problems[stage] = error

    attempt("open", lambda: opd_store.open(path))
    if not problems:
        attempt("read", lambda: list(opd_store.open(path)))
    attempt("find", lambda: opd_store.open(path).find(bytes(32)))
    if not problems:
        problems["verify"] = opd_store.verify(path).problems[0]
    ((stage, error),) = problems.items()
    assert type(error).__name__ == case["error"], error
    assert stage in case["stage"].split(" or "), error
    assert str(path) in str(error)


@pytest.mark.parametrize("name", REFUSED["cases"])
def test_verify_refuses(name):
    path = INVALID / name
    kind = getattr(opd_store, REFUSED["cases"][name]["error"])
    try:
        problems = opd_store.verify(path).problems
    except opd_store.OpdError as error:
        problems = [error]
    assert any(isinstance(problem, kind) for problem in problems)


@pytest.mark.parametrize("name", REFUSED["cases"])
def test_the_reference_reader_refuses(name):
    with pytest.raises(reference.RefusedError) as caught:
        reference.read_cache(INVALID / name)
    assert str(caught.value)
    assert caught.value.kind == REFUSED["cases"][name]["error"], caught.value


def test_every_refusal_has_an_error_class_of_the_prose():
    prose = (SPEC / "format.md").read_text()
    for case in REFUSED["cases"].values():
        assert f"| `{case['error']}` |" in prose
        assert set(case["stage"].split(" or ")) <= {"open", "read", "find", "verify"}
        assert case["rule"]


def parts_of(case):
    page = (VALID / case["file"]).read_bytes()
    table = (VALID / case["table"]).read_bytes() if "table" in case else None
    shape = PageShape(case["kind"], case["rank_start"], case["rank_end"], case["n_positions"])
    return page, bytes.fromhex(case["rollout_hash"]), table, shape


def read_by_us(case, page, name, table):
    """Checksum and body, as `verify` does."""
    shape = PageShape(case["kind"], case["rank_start"], case["rank_end"], case["n_positions"])
    view = np.frombuffer(page, np.uint8)
    ours = None if table is None else IdTable.from_bytes(np.frombuffer(table, np.uint8), where="example")
    digest = None if table is None else hashlib.sha256(table).digest()
    check_page_crc(view, name, digest, where="example")
    return decode_page(view, shape, encoding=case["encoding"], id_table=ours, where="example")


def read_by_reference(case, page, name, table):
    return reference.read_page(
        page,
        name,
        **{key: case[key] for key in ("kind", "rank_start", "rank_end", "n_positions", "encoding")},
        table=None if table is None else reference.IdTable(table, case["vocab_size"]),
    )


@pytest.mark.parametrize("case", ACCEPTED["pages"], ids=lambda case: case["file"])
def test_the_example_pages(case):
    page, name, table, _ = parts_of(case)
    ids, logprobs, tails, draws = read_by_reference(case, page, name, table)
    assert draws is None
    flat = [value for row in logprobs for value in row]
    assert [value for row in ids for value in row] == case["ids"]
    assert ([bits(v) for v in flat], [bits(v) for v in tails]) == (case["logprob"], case["log_tail"])
    band = read_by_us(case, page, name, table)
    assert band.ids.ravel().tolist() == case["ids"]
    assert [bits(v) for v in band.logprob.ravel().tolist()] == case["logprob"]
    assert [bits(v) for v in band.log_tail.tolist()] == case["log_tail"]


@pytest.mark.parametrize("case", ACCEPTED["pages"], ids=lambda case: case["file"])
def test_every_bit_of_the_example_pages(case):
    page, name, table, _ = parts_of(case)
    digest = None if table is None else hashlib.sha256(table).digest()
    for bit in range(8 * len(page)):
        damaged = bytearray(page)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(reference.RefusedError):
            read_by_reference(case, bytes(damaged), name, table)
        # IntegrityError, but for a page that now claims an id table where there is none.
        with pytest.raises(opd_store.FormatError):
            check_page_crc(np.frombuffer(damaged, np.uint8), name, digest, where="example")
    with pytest.raises(reference.RefusedError):
        read_by_reference(case, page, name[::-1], table)


@pytest.mark.parametrize("case", ACCEPTED["pages"], ids=lambda case: case["file"])
def test_every_bit_of_the_example_pages_with_right_checksums(case):
    """Nothing but the checksum changes hands here: a wrong page is refused or reads as the same in both."""
    page, name, table, _ = parts_of(case)
    for bit in range(8 * len(page)):
        if bit // 32 == 5:
            continue
        raw = bytearray(page)
        raw[bit // 8] ^= 1 << bit % 8
        owner = name + (hashlib.sha256(table).digest() if table is not None and raw[1] & 2 else b"")
        checksum = reference.crc32c(bytes(raw[24:]), reference.crc32c(owner + bytes(raw[:20])))
        raw[20:24] = checksum.to_bytes(4, "little")
        try:
            ids, logprobs, tails, _ = read_by_reference(case, bytes(raw), name, table)
        except reference.RefusedError:
            with pytest.raises(opd_store.FormatError):
                read_by_us(case, bytes(raw), name, table)
            continue
        band = read_by_us(case, bytes(raw), name, table)
        present = band.ids != opd_store.NO_ID
        assert band.ids[present].tolist() == [i for row in ids for i in row if i != opd_store.NO_ID]
        if all(i != opd_store.NO_ID for row in ids for i in row):
            found = [bits(v) for v in band.logprob[present].tolist()]
            assert found == [bits(v) for row in logprobs for v in row]
            assert [bits(v) for v in band.log_tail.tolist()] == [bits(v) for v in tails]


@pytest.mark.parametrize("case", ACCEPTED["pages"], ids=lambda case: case["file"])
def test_the_example_pages_cut_anywhere(case):
    page, _, table, shape = parts_of(case)
    for length in range(len(page)):
        with pytest.raises(reference.RefusedError):
            read_by_reference(case, page[:length], bytes(32), table)
        with pytest.raises(opd_store.FormatError):
            decode_page(
                np.frombuffer(page[:length], np.uint8), shape, encoding=case["encoding"], where="example"
            )


@pytest.mark.parametrize("file", ["page-frequency.ids", "page-lists.ids"])
def test_the_example_tables_cut_anywhere_and_changed(file):
    data = (VALID / file).read_bytes()
    vocab_size = int.from_bytes(data[8:12], "little")
    for damaged in [data[:n] for n in range(len(data))] + [data + b"\0", b"X" + data[1:]]:
        with pytest.raises(reference.RefusedError):
            reference.IdTable(damaged, vocab_size)
        with pytest.raises(opd_store.FormatError):
            IdTable.from_bytes(np.frombuffer(damaged, np.uint8), where="example")


def test_the_vectors_are_those_of_the_script(tmp_path):
    """Manifests and decoded values always; Arrow's own framing may differ between its releases."""
    command = [sys.executable, SPEC / "make_vectors.py", tmp_path]
    subprocess.run(command, check=True, capture_output=True, cwd=SPEC.parent)
    for place in (VALID, INVALID):
        made = tmp_path / place.relative_to(SPEC / "vectors")
        recorded = json.loads((place / "cases.json").read_text())
        again = json.loads((made / "cases.json").read_text())
        assert again.keys() == recorded.keys()
        assert again["cases"].keys() == recorded["cases"].keys()
        for name, case in recorded["cases"].items():
            assert again["cases"][name].get("rows") == case.get("rows"), name
    names = {path.name for path in VALID.iterdir() if path.suffix in (".bin", ".ids")}
    made = tmp_path / "valid" / VALID.name
    assert names == {path.name for path in made.iterdir() if path.suffix in (".bin", ".ids")}
    for name in names - {"page-lists.ids"}:
        assert (made / name).read_bytes() == (VALID / name).read_bytes(), name


def test_the_script_refuses_another_version(tmp_path):
    code = (
        "import runpy, sys; from opd_store import layout; layout.FORMAT_MINOR += 1; "
        f"sys.argv = ['make_vectors.py', {str(tmp_path)!r}]; "
        f"runpy.run_path({str(SPEC / 'make_vectors.py')!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=SPEC.parent)
    assert done.returncode == 1
    assert "Released vectors never change" in done.stderr
    assert not list(tmp_path.iterdir())


def test_the_reference_reader_stands_alone():
    """Standard library, pyarrow and zstandard, nothing of ours."""
    source = (SPEC / "reference_reader.py").read_text()
    assert "numpy" not in source
    assert "opd_store" not in source.replace("opd-store", "")


def test_the_command_line():
    command = [sys.executable, "-I", SPEC / "reference_reader.py"]
    done = subprocess.run([*command, VALID / "columns"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "3 rollouts" in done.stdout
    done = subprocess.run([*command, VALID / "topk", "--row", "1"], capture_output=True, text=True)
    assert json.loads(done.stdout)["sample_id"] == "r1"
    done = subprocess.run([*command, INVALID / "value-sum"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "refused: " in done.stderr
    assert "Traceback" not in done.stderr
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2


def test_pins():
    case = ACCEPTED["cases"]["versions"]
    assert reference.read_cache(VALID / "versions", case["digest"])["version"] == 4
    parent = reference.read_cache(VALID / "versions")["parent"]
    older = reference.read_cache(VALID / "versions", parent)
    assert older["version"] == 3
    assert older["digest"] == parent == opd_store.open(f"{VALID / 'versions'}@{parent}").digest
    with pytest.raises(reference.RefusedError, match="no version"):
        reference.read_cache(VALID / "versions", "sha256:" + "0" * 64)


def test_crc32c_of_the_reference_reader():
    # RFC 3720, appendix B.4.
    assert reference.crc32c(bytes(32)) == 0x8A9136AA
    assert reference.crc32c(b"\xff" * 32) == 0x62A8AB43
    assert reference.crc32c(bytes(range(32))) == 0x46DD794E
    assert reference.crc32c(b"789", reference.crc32c(b"123456")) == 0xE3069283
