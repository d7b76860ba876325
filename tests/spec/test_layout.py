"""The numbers of the prose, of `layout.json` and of the code are the same."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
import struct

import numpy as np
import pytest
from spec.spec_files import SPEC, VALID, reference

import opd_store
from opd_store import CacheSchema, encodings, layout, meta
from opd_store.encodings import PageShape, ids, idtable, planes
from opd_store.index import ROLLOUT_TABLE, SHARD_TABLE
from opd_store.manifest import encode_manifest
from opd_store.schema import USER_TYPES, arrow_schema
from opd_store.testing import example_meta

LAYOUT = json.loads((SPEC / "layout.json").read_text())
PROSE = sorted(SPEC.glob("*.md"))
WIDTHS = {"uint8": "B", "uint16": "H", "uint32": "I", "uint64": "Q"}


def tables(name: str) -> list[list[list[str]]]:
    """Every table of a file: rows of cells, without its heading and rule."""
    found: list[list[list[str]]] = []
    previous = ""
    for line in (SPEC / name).read_text().splitlines():
        if line.startswith("|"):
            if not previous.startswith("|"):
                found.append([])
            found[-1].append([cell.strip() for cell in line.strip("|").split("|")])
        previous = line
    return [table[2:] for table in found]


def table_with(name: str, *first: str) -> list[list[str]]:
    """The only table whose first row starts with these cells."""
    (found,) = (table for table in tables(name) if table[0][: len(first)] == list(first))
    return found


def in_json(value: object) -> object:
    if isinstance(value, struct.Struct):
        return {"struct": value.format, "bytes": value.size}
    if isinstance(value, re.Pattern):
        return value.pattern
    if isinstance(value, bytes):
        return value.decode("ascii")
    return list(value) if isinstance(value, tuple) else value


def test_layout_json_mirrors_the_module():
    names = [name for name in vars(layout) if name.isupper()]
    assert list(LAYOUT["constants"]) == names
    assert LAYOUT["constants"] == {name: in_json(getattr(layout, name)) for name in names}


def test_the_page_header_has_its_offsets():
    offset = 0
    for field in LAYOUT["page_header"]:
        assert field["offset"] == offset
        assert field["size"] == struct.calcsize("<" + WIDTHS[field["type"]])
        offset += field["size"]
    kinds = "".join(WIDTHS[field["type"]] for field in LAYOUT["page_header"])
    assert layout.PAGE_HEADER.format == "<" + kinds
    assert offset == layout.PAGE_HEADER.size == 24
    assert LAYOUT["page_header"][-1] == {
        "offset": layout.PAGE_CRC_OFFSET,
        "size": 4,
        "type": "uint32",
        "field": "crc32c",
    }


def test_the_byte_table_of_the_page_header():
    rows = table_with("format.md", "0", "1")
    fields = [
        {"offset": int(offset), "size": int(size), "type": kind, "field": name}
        for offset, size, kind, name, _ in rows
    ]
    assert fields == LAYOUT["page_header"]


def test_the_limits():
    rows = table_with("format.md", "MAX_MANIFEST_BYTES")
    listed = {name: int(value) for name, value, _ in rows}
    assert listed == {name: v for name, v in LAYOUT["constants"].items() if name.startswith("MAX_")}
    for name, value in listed.items():
        assert getattr(reference, name) == value
    assert reference.PROBABILITY_TOLERANCE == layout.PROBABILITY_TOLERANCE


@pytest.mark.parametrize(("first", "schema"), [("sha256", SHARD_TABLE), ("rollout_hash", ROLLOUT_TABLE)])
def test_the_index_tables(first, schema):
    listed = [(name, kind) for name, kind, _ in table_with("format.md", first)]
    assert listed == [(field.name, str(field.type)) for field in schema]
    assert not any(field.nullable for field in schema)
    assert schema.metadata is None


def test_the_columns():
    users = {"x_b": "utf8", "x_a": "bool"}
    made = CacheSchema(topk=20, bands=(8, 20), chosen=5, sampled=6, user_columns=users)
    schema = arrow_schema(made)
    assert schema == reference.shard_schema(made.to_json())
    expected = []
    for name, kind, nulls, _ in table_with("columns.md", "rollout_hash"):
        if name == "*user columns*":
            expected += [("x_a", "bool", True), ("x_b", "string", True)]
        elif name == "*packed columns*":
            names = ("topk_0_8", "topk_8_20", "chosen", "sampled")
            expected += [(name, kind, nulls == "yes") for name in names]
        else:
            expected.append((name, kind, nulls == "yes"))
    assert [(field.name, str(field.type), field.nullable) for field in schema] == expected


def test_the_types_of_user_columns():
    listed = dict(table_with("columns.md", "bool"))
    assert listed == {name: str(kind) for name, kind in USER_TYPES.items()}


def test_the_encodings():
    listed = [
        (name, int(code), int(parameter))
        for code, parameter, name, *_ in table_with("encodings.md", "0", "0")
    ]
    assert listed == [(name, c.CODE, c.NAMES[name]) for name, c in encodings._CODECS.items()]
    assert listed == [(e["name"], e["code"], e["parameter"]) for e in LAYOUT["encodings"]]
    assert [name for name, *_ in listed] == list(encodings.ENCODINGS) == list(reference.ENCODINGS)
    assert all(reference.ENCODINGS[name] == (code, parameter) for name, code, parameter in listed)


def test_the_bounds_of_encodings_hold():
    """The errors of the table are those that the writer enforces."""
    text = {row[2]: row[4] for row in table_with("encodings.md", "0", "0")}
    for scale in (128, 64, 32):
        bound = encodings.ladder.error_bound(np.float32([-1.0, -100.0]), scale)
        assert bound.tolist() == [1 / (2 * scale)] * 2
        assert text[f"ladder/{scale}"] == f"1/{2 * scale}"
    assert encodings.ladder.error_bound(np.float32([-1.0, -0.0]), 0).tolist() == [2**-11, 2**-25]
    assert text["ladder16"] == "2^-11 of its size, at least 2^-25"


def test_the_tolerances():
    listed = dict(table_with("columns.md", "plain, f32"))
    assert listed == {"plain, f32": "0", "ladder16": "1/128", "ladder/s": "1/(2 s)"}
    for name, error in itertools.product(encodings.ENCODINGS, (0.0, 1e-3, 0.01, 0.0625, 0.25, 9.0)):
        found = encodings.value_tolerance(name, error)
        assert reference.tolerance(name, error) == pytest.approx(found, rel=1e-12)
    assert encodings.value_tolerance("ladder16") == pytest.approx(1.001001 * math.exp(1 / 128) - 1)
    assert encodings.value_tolerance("plain") == pytest.approx(0.001001)
    assert encodings.value_tolerance("plain", 1 / 64) == encodings.value_tolerance("ladder/32")
    assert encodings.value_tolerance("f32", 9.0) == pytest.approx(1.001001 * math.exp(1 / 16) - 1)
    assert reference.LARGEST_SUM_ERROR == layout.LARGEST_SUM_ERROR


def test_the_flags_of_a_page():
    flags = LAYOUT["page_flags"]
    assert (flags["ragged"], flags["uses_table"]) == (layout.PAGE_RAGGED, layout.PAGE_USES_TABLE)
    assert flags["ragged"] | flags["uses_table"] == layout.PAGE_FLAGS
    assert flags["kind"] == 15 << layout.PAGE_KIND_SHIFT
    assert sum(flags.values()) == 255
    listed = {name: bits for bits, name, _ in table_with("format.md", "0", "ragged")}
    assert listed == {"ragged": "0", "uses_table": "1", "reserved": "2, 3", "kind": "4 to 7"}
    kinds = {"topk": layout.KIND_TOPK, "chosen": layout.KIND_CHOSEN, "sampled": layout.KIND_SAMPLED}
    assert LAYOUT["kinds"] == kinds == reference.KINDS
    named = {column.lower(): int(kind) for column, kind, _ in table_with("columns.md", "topk_START_END")}
    assert named == {"topk_start_end": 0, "chosen": 1, "sampled": 2}


def test_streams_and_id_tables():
    found = {
        "max_planes": planes.MAX_PLANES,
        "size_bytes": 4,
        "frame_flag": planes.ZSTD_FLAG,
        "max_window": planes.MAX_WINDOW,
    }
    assert LAYOUT["streams"] == found
    assert LAYOUT["ladder"]["max_units"] == encodings.ladder.MAX_UNITS
    assert LAYOUT["ladder"]["max_half"] == encodings.ladder.MAX_HALF
    assert LAYOUT["ladder"]["escape"] == encodings.ladder.ESCAPE
    assert PageShape(0, 0, 4096, 1).rank_groups()[0] == (1, LAYOUT["ladder"]["first_cut"])
    modes = {"as_they_are": ids.PLAIN, "by_frequency": ids.BY_FREQUENCY, "by_list": ids.BY_LIST}
    assert LAYOUT["ids"] == {"modes": modes, "escape": idtable.ESCAPE}
    table = LAYOUT["id_table"]
    assert (table["list_length"], table["max_lists"]) == (idtable.LIST_LENGTH, idtable.MAX_LISTS)
    assert idtable._HEADER.format == "<8sII"
    rows = table_with("encodings.md", "0", "8", "bytes", "magic")
    for row, entry in zip(rows, table["header"], strict=False):
        assert row[:4] == [str(entry["offset"]), str(entry["size"]), entry["type"], entry["field"]]
    assert table["header"][-1]["offset"] + table["header"][-1]["size"] == idtable._HEADER.size
    prose = (SPEC / "encodings.md").read_text()
    for number in (planes.MAX_WINDOW, idtable.MAX_LISTS, idtable.LIST_LENGTH):
        assert str(number) in prose
    assert reference.MAX_WINDOW == planes.MAX_WINDOW


@pytest.mark.parametrize(("start", "end"), [(0, 1), (0, 8), (8, 64), (6, 20), (7, 9), (64, 4096), (15, 17)])
def test_rank_groups(start, end):
    groups = PageShape(0, start, end, 1).rank_groups()
    assert groups == reference.rank_groups(start, end)
    assert [rank for a, b in groups for rank in range(a, b)] == list(range(start + 1, end))
    cuts = {8 << i for i in range(10)}
    assert [a for a, _ in groups[1:]] == sorted(cut for cut in cuts if start + 1 < cut < end)


def test_rank_groups_of_the_prose():
    text = " ".join((SPEC / "encodings.md").read_text().split())
    assert "Ranks [0, 8) have the group [1, 8)" in text
    assert PageShape(0, 0, 8, 1).rank_groups() == [(1, 8)]
    assert "ranks [8, 64) have [9, 16), [16, 32) and [32, 64)" in text
    assert PageShape(0, 8, 64, 1).rank_groups() == [(9, 16), (16, 32), (32, 64)]
    assert "ranks [6, 20) have [7, 8), [8, 16) and [16, 20)" in text
    assert PageShape(0, 6, 20, 1).rank_groups() == [(7, 8), (8, 16), (16, 20)]


def test_the_fields_of_a_manifest():
    version = opd_store.manifest.Manifest(
        sequence=1, parent=None, meta=example_meta(), schema=CacheSchema(), segments=()
    )
    written = json.loads(encode_manifest(version))
    assert [name for name, *_ in table_with("manifest.md", "format")] == list(written)
    assert [name for name, *_ in table_with("manifest.md", "bands")] == list(written["schema"])
    listed = [name for name, *_ in table_with("manifest.md", "vocab_size")]
    assert listed == list(meta.CacheMeta.__dataclass_fields__)
    (versions,) = (json.loads(p.read_text()) for p in [VALID / "versions/manifests/00000004.json"])
    assert [name for name, *_ in table_with("manifest.md", "shards")] == list(versions["segments"][0])


def test_the_fields_of_models_and_samplers():
    section = (SPEC / "manifest.md").read_text().split("## 4. meta")[1].split("## 5.")[0]
    for kind in (opd_store.ModelInfo, opd_store.SamplerInfo):
        for name in kind.__dataclass_fields__:
            assert f"`{name}`" in section, name


def examples() -> list[tuple[str, bytes, list[list[str]]]]:
    """Every dump of the prose: name of the file, its bytes, and the table that explains them."""
    found = []
    for path in (SPEC / "format.md", SPEC / "encodings.md"):
        text = path.read_text()
        for match in re.finditer(r"```\n((?:[0-9a-f]{8}: [0-9a-f ]+\n)+)```\n\n((?:\|.*\n)+)", text):
            before = re.findall(r"`valid/1\.0/(page-[a-z]+\.(?:bin|ids))`", text[: match.start()])
            rows = [
                [cell.strip() for cell in line.strip("|").split("|")] for line in match[2].splitlines()[2:]
            ]
            dump = "".join(line.split(": ")[1] for line in match[1].splitlines())
            found.append((before[-1] if before else "page-example.bin", bytes.fromhex(dump), rows))
    return found


def test_the_worked_examples_to_the_byte():
    found = examples()
    names = [
        "page-example.bin",
        "page-ladder.bin",
        "page-frequency.ids",
        "page-frequency.bin",
        "page-lists.bin",
    ]
    # The last one names its table between itself and its dump.
    assert [name.replace("page-lists.ids", "page-lists.bin") for name, *_ in found] == names
    for name, (_, dump, rows) in zip(names, found, strict=True):
        data = (VALID / name).read_bytes()
        assert dump == data, name
        assert "".join(re.findall("`([0-9a-f]+)`", " ".join(row[0] for row in rows))) == data.hex(), name
    prose = (SPEC / "format.md").read_text() + (SPEC / "encodings.md").read_text()
    for case in json.loads((VALID / "cases.json").read_text())["pages"]:
        assert f"`{case['rollout_hash']}`" in prose
    assert f"`{opd_store.rollout_hash([1, 2], 'sha256:' + '5e' * 32).hex()}`" in prose
    assert f"`{hashlib.sha256((VALID / 'page-frequency.ids').read_bytes()).hexdigest()}`" in prose


def test_the_example_of_a_rollout_hash():
    text = (SPEC / "hashing.md").read_text()
    assert opd_store.rollout_hash([1, 2, 2**32 - 1], "sha256:" + "5e" * 32).hex() in text
    sizes = {size: cell for size, cell in table_with("hashing.md", "21")}
    assert len(layout.ROLLOUT_HASH_DOMAIN) == 21
    assert layout.ROLLOUT_HASH_DOMAIN[:-1].decode() in sizes["21"]
    assert f"`{layout.TOKENIZER_HASH_DOMAIN[:-1].decode()}` and a zero byte (23 bytes)" in text
    assert len(layout.TOKENIZER_HASH_DOMAIN) == 23


def test_tokenizer_fingerprints_of_both_readers():
    cases = json.loads((VALID / "cases.json").read_text())["tokenizers"]
    assert len(cases) == 4
    for case in cases:
        text = json.dumps(case["description"])
        assert opd_store.tokenizer_fingerprint(text) == case["fingerprint"]
        assert reference.tokenizer_fingerprint(case["description"]) == case["fingerprint"]


@pytest.mark.parametrize("path", PROSE, ids=lambda path: path.name)
def test_the_prose_keeps_its_rules(path):
    text = path.read_text()
    for word in ("must", "shall", "Must"):
        assert not re.search(rf"\b{word}\b", text), f"{word} is not a word of RFC 2119"
    assert max(len(line) for line in text.splitlines() if not line.startswith("|")) <= 120
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        title, _, body = section.partition("\n")
        if title.strip() != "Change log":
            assert re.match(r"\s*\*(Normative|Informative)\.\*", body), f"{path.name}: {title}"


def test_every_vector_is_named_in_the_prose():
    text = " ".join(path.read_text() for path in PROSE)
    wildcards = [found.removesuffix("*") for found in re.findall(r"`invalid/1\.0/([a-z0-9]+-\*)`", text)]
    for folder in ("valid", "invalid"):
        for name in json.loads((SPEC / f"vectors/{folder}/1.0/cases.json").read_text())["cases"]:
            named = re.search(rf"`(?:valid/1\.0/|invalid/1\.0/)?{name}`", text)
            assert named or any(name.startswith(start) for start in wildcards) or name == "minimal", name
    for name in re.findall(
        r"`((?:manifest|meta|schema|segment|index|shard|column|page|plane|zstd|ladder|ids|table|value|ragged)-[a-z-]+)`",
        text,
    ):
        assert (SPEC / "vectors/invalid/1.0" / name).is_dir(), name


def test_the_format_is_not_released():
    text = (SPEC / "versioning.md").read_text()
    version = f"{layout.FORMAT_MAJOR}.{layout.FORMAT_MINOR}"
    assert f"| {version} | not released | not released |" in text
    written = json.loads((VALID / "minimal/manifests/00000001.json").read_text())
    assert written["unreleased"] is True
    assert written["format_version"] == version
