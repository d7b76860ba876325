"""`opd report` of a cache: one page with everything, that loads nothing."""

from __future__ import annotations

import base64
import json
import re
import xml.etree.ElementTree as ET

import pytest
from click.testing import CliRunner
from opd_tools.main import main
from opd_tools.show.sampling import groupable
from tools.show.caches import some_rollouts, write

import opd_store

EVERYTHING = [
    "Length",
    "Surprise, minus log-prob of the sampled token",
    "Entropy of the teacher, between its bounds",
    "Probability outside the first k ranks",
    "Ratio, teacher to behaviour policy",
    "Effective sample size of a rollout",
    "Finish reasons",
    "Size by column",
]


def opd(*args):
    return CliRunner().invoke(main, [str(arg) for arg in args])


def images(text):
    """Title to the SVG of every figure."""
    found = re.findall(r'<img alt="([^"]*)" src="data:image/svg\+xml;base64,([^"]*)">', text)
    assert len(found) == text.count("<img")
    return {title: base64.b64decode(data, validate=True).decode() for title, data in found}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return write(tmp_path_factory.mktemp("report") / "cache", some_rollouts())


def test_everything_is_on_the_page(cache, tmp_path):
    out = tmp_path / "page.html"
    shown = opd("report", cache, "--out", out)
    assert shown.exit_code == 0, shown.output
    assert shown.stdout == f"{out}\n"
    text = out.read_text("utf-8")
    found = images(text)
    assert list(found)[: len(EVERYTHING)] == EVERYTHING
    for column in ("finish_reason", "x_domain", "x_level"):
        assert f"<h2>By {column}</h2>" in text
        assert f"Surprise by {column}" in found
        assert f"Response length by {column}" in found
    # One teacher only.
    assert "<h2>By teacher</h2>" not in text
    for part in ("all 12 rollouts", "a teacher", opd_store.open(cache).digest, "ladder", "mass of k ranks"):
        assert (part in text) is (part != "ladder"), part
    for svg in found.values():
        ET.fromstring(svg)
        assert "<script" not in svg
        assert len(svg) < 100_000
    assert "maths" in found["Surprise by x_domain"]
    assert not re.search(r"(src|href)=\"(?!data:)", text)
    assert "http" not in re.sub(r"base64,[^\"]*", "", text)


def test_the_same_cache_gives_the_same_page(cache, tmp_path):
    pages = []
    for name in ("a", "b"):
        document = json.loads(opd("report", cache, "--out", tmp_path / name, "--json").stdout)
        assert document == {"path": str(tmp_path / name), "bytes": (tmp_path / name).stat().st_size}
        pages.append((tmp_path / name).read_bytes())
    assert pages[0] == pages[1]


def test_what_a_cache_does_not_have_is_left_out(tmp_path):
    bare = [
        opd_store.Rollout(token_ids=rollout.token_ids, prompt_len=rollout.prompt_len)
        for rollout in some_rollouts(3, topk=0)
    ]
    cache = write(tmp_path / "cache", bare, topk=0, user_columns={})
    assert opd("report", cache, "--out", tmp_path / "page.html").exit_code == 0
    found = images((tmp_path / "page.html").read_text("utf-8"))
    assert list(found) == ["Length", "Finish reasons", "Size by column"]


def test_an_empty_cache_has_a_page(tmp_path):
    cache = write(tmp_path / "cache", [])
    assert opd("report", cache, "--out", tmp_path / "page.html").exit_code == 0


def test_a_part_is_read_of_a_large_one(cache, tmp_path):
    assert opd("report", cache, "--out", tmp_path / "p", "--limit", 3).exit_code == 0
    assert "3 of 12 rollouts, evenly spread" in (tmp_path / "p").read_text("utf-8")


def test_columns_with_values_to_group_by(tmp_path):
    kinds = {"x_b": "bool", "x_i": "int64", "x_f": "float64", "x_t": "utf8"}
    cache = write(tmp_path / "cache", [], user_columns=kinds)
    assert groupable(opd_store.open(cache)) == ["teacher", "finish_reason", "x_b", "x_i", "x_t"]


@pytest.mark.parametrize(
    ("args", "part"),
    [
        (("{cache}",), "--out"),
        (("{missing}", "--out", "{missing}"), "no cache"),
        (("{empty}",), "metrics.jsonl"),
    ],
)
def test_refused(cache, tmp_path, args, part):
    (tmp_path / "empty").mkdir()
    places = {"cache": cache, "missing": tmp_path / "missing", "empty": tmp_path / "empty"}
    shown = opd("report", *(arg.format(**places) for arg in args))
    assert shown.exit_code == 2
    assert part in shown.stderr
    assert sorted(path.name for path in cache.iterdir()) == ["index", "manifests", "shards", "tmp"]
