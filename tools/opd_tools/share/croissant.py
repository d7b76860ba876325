"""Croissant metadata of a published cache: what search engines and data set tools read.

Source: the Croissant format specification, version 1.0, of MLCommons.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pyarrow as pa

from opd_tools.console import printable
from opd_tools.share.contents import Contents
from opd_tools.share.facts import Facts
from opd_tools.share.preview import PREVIEW

CROISSANT = "croissant.json"

_CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "arrayShape": "cr:arrayShape",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "containedIn": "cr:containedIn",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "equivalentProperty": "cr:equivalentProperty",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileProperty": "cr:fileProperty",
    "fileObject": "cr:fileObject",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isArray": "cr:isArray",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "parentField": "cr:parentField",
    "path": "cr:path",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "samplingRate": "cr:samplingRate",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}


def croissant(facts: Facts, found: Contents, preview: bytes, schema: pa.Schema) -> bytes:
    """The document: the manifest and the preview as files, the shards as a set of files, and the columns of
    the preview.

    Args:
        preview: the Parquet file.
        schema: its columns.
    """
    name, data = found.manifests[-1]
    distribution = [
        _file("manifest", name, data, "application/json", "The manifest: names every file by its digest."),
        _file(
            "preview-file", PREVIEW, preview, "application/x-parquet", "The first rollouts, native columns."
        ),
        {
            "@type": "cr:FileSet",
            "@id": "shards",
            "name": "shards",
            "description": "Arrow files with all rollouts; top-k log-probs are packed, see opd-store.",
            "encodingFormat": "application/vnd.apache.arrow.file",
            "includes": "shards/*.arrow",
        },
    ]
    fields = [_field(column.name, column.type) for column in schema]
    document = {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "name": facts.slug,
        "description": facts.summary,
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "license": facts.licence,
        "citeAs": f"{printable(facts.title)}, {printable(facts.url, None)}@{facts.digest}",
        "url": facts.link,
        "version": facts.tag.removeprefix("v") if facts.has_semantic_tag else facts.digest,
        "distribution": distribution,
        "recordSet": [
            {
                "@type": "cr:RecordSet",
                "@id": "preview",
                "name": "preview",
                "description": "The first rollouts.",
                "field": fields,
            }
        ],
    }
    return json.dumps(document, indent=1, ensure_ascii=True).encode() + b"\n"


def _file(identity: str, name: str, data: bytes, kind: str, about: str) -> dict[str, Any]:
    return {
        "@type": "cr:FileObject",
        "@id": identity,
        "name": name,
        "description": about,
        "contentUrl": name,
        "contentSize": f"{len(data)} B",
        "encodingFormat": kind,
        "sha256": hashlib.sha256(data).hexdigest(),
    }


def _field(name: str, kind: pa.DataType) -> dict[str, Any]:
    is_list = pa.types.is_list(kind)
    value = kind.value_type if is_list else kind
    if pa.types.is_boolean(value):
        type_name = "sc:Boolean"
    elif pa.types.is_integer(value):
        type_name = "sc:Integer"
    elif pa.types.is_floating(value):
        type_name = "sc:Float"
    else:
        type_name = "sc:Text"
    field: dict[str, Any] = {
        "@type": "cr:Field",
        "@id": f"preview/{name}",
        "name": name,
        "dataType": type_name,
        "source": {"fileObject": {"@id": "preview-file"}, "extract": {"column": name}},
    }
    return field | ({"repeated": True} if is_list else {})
