"""The numbers of the prose, of `layout.json` and of the code are the same."""

from __future__ import annotations

import json
import re
import struct

import pytest
from spec.spec_files import SPEC, VALID, reference

import opd_store
from opd_store import CacheSchema, encodings, layout, meta
from opd_store.columns import USER_TYPES, arrow_schema
from opd_store.index import ROLLOUT_TABLE, SHARD_TABLE
from opd_store.manifest import encode_manifest
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
    assert f"PROBABILITY_TOLERANCE ({layout.PROBABILITY_TOLERANCE})" in (SPEC / "columns.md").read_text()


@pytest.mark.parametrize(("first", "schema"), [("sha256", SHARD_TABLE), ("rollout_hash", ROLLOUT_TABLE)])
def test_the_index_tables(first, schema):
    listed = [(name, kind) for name, kind, _ in table_with("format.md", first)]
    assert listed == [(field.name, str(field.type)) for field in schema]
    assert not any(field.nullable for field in schema)
    assert schema.metadata is None


def test_the_columns():
    users = {"x_b": "utf8", "x_a": "bool"}
    schema = arrow_schema(CacheSchema(topk=20, bands=(8, 20), user_columns=users))
    assert schema == reference.shard_schema({"bands": [8, 20], "user_columns": users})
    expected = []
    for name, kind, nulls, _ in table_with("columns.md", "rollout_hash"):
        if name == "*user columns*":
            expected += [("x_a", "bool", True), ("x_b", "string", True)]
        elif name == "*packed columns*":
            expected += [("topk_0_8", kind, nulls == "yes"), ("topk_8_20", kind, nulls == "yes")]
        else:
            expected.append((name, kind, nulls == "yes"))
    assert [(field.name, str(field.type), field.nullable) for field in schema] == expected


def test_the_types_of_user_columns():
    listed = dict(table_with("columns.md", "bool"))
    assert listed == {name: str(kind) for name, kind in USER_TYPES.items()}


def test_the_encodings():
    listed = {int(code): name for code, name, *_ in table_with("encodings.md", "0", "plain")}
    assert listed == {codec.CODE: codec.NAME for codec in encodings._CODECS}
    for name in listed.values():
        assert f"\n## {name}\n" in (SPEC / "encodings.md").read_text()


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


def test_the_worked_example_to_the_byte():
    text = (SPEC / "format.md").read_text()
    dump = "".join(re.findall(r"^[0-9a-f]{8}: ([0-9a-f ]+)$", text, re.MULTILINE)).replace(" ", "")
    page = (VALID / "page-example.bin").read_bytes()
    assert bytes.fromhex(dump) == page
    rows = table_with("format.md", "`00` `00`")
    assert "".join(re.findall("`([0-9a-f]+)`", " ".join(cell for cell, _ in rows))) == page.hex()
    name = opd_store.rollout_hash([1, 2], "sha256:" + "5e" * 32).hex()
    assert f"`{name}`" in text


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
    wildcards = [found.removesuffix("*") for found in re.findall(r"`invalid/1\.0/([a-z]+-\*)`", text)]
    for folder in ("valid", "invalid"):
        for name in json.loads((SPEC / f"vectors/{folder}/1.0/cases.json").read_text())["cases"]:
            named = re.search(rf"`(?:valid/1\.0/|invalid/1\.0/)?{name}`", text)
            assert named or any(name.startswith(start) for start in wildcards) or name == "minimal", name
    for name in re.findall(r"`((?:manifest|index|shard|column|page)-[a-z-]+)`", text):
        assert (SPEC / "vectors/invalid/1.0" / name).is_dir(), name


def test_the_format_is_not_released():
    text = (SPEC / "versioning.md").read_text()
    version = f"{layout.FORMAT_MAJOR}.{layout.FORMAT_MINOR}"
    assert f"| {version} | not released | not released |" in text
    written = json.loads((VALID / "minimal/manifests/00000001.json").read_text())
    assert written["unreleased"] is True
    assert written["format_version"] == version
