"""The page of a training run: whole, self-contained, and harmless whatever its files say."""

from __future__ import annotations

import base64
import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from opd_tools.training.run_page import PLOTS, page, read_run

from opd_train.training.monitors import DriftConfig

HOSTILE = "<script>alert(1)</script>\"'&\x1b[31m\u202e</td><img src=x onerror=y>"
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Tags, whether they are balanced, and what the page would load or run."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.images, self.cells = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        names = dict(attributes)
        assert not any(name.startswith("on") for name in names), names
        for name in ("src", "href"):
            assert name not in names or names[name].startswith("data:image/png;base64,")
        if tag == "img":
            self.images.append(
                (names["alt"], base64.b64decode(names["src"].partition(",")[2], validate=True))
            )
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.cells.append(data)


def written(path, rows, provenance=None, *, done=True):
    path.mkdir(parents=True)
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if provenance is not None:
        where = path / ("final" if done else "step-00000002")
        where.mkdir()
        (where / "opd.json").write_text(json.dumps(provenance))
    return path


def full_rows(n=12):
    names = [name for plot in PLOTS for name in plot.metrics]
    alarm = {"kind": "drift", "rule": "ess_min", "metric": "ess", "step": 5, "value": 0.4, "threshold": 0.5}
    rows = [
        {"step": step, **{name: 0.1 + step / 10 for name in names}, "seconds": {"student": 1.5 * step}}
        for step in range(1, n + 1)
    ]
    rows[4]["alarms"] = [alarm | {"raised": True}]
    rows[8]["alarms"] = [alarm | {"raised": False, "step": 9}]
    return rows


def test_it_has_every_plot_every_alarm_and_every_setting(tmp_path):
    provenance = {"config": {"lr": 0.25, "loss": {"objective": "forward_kl"}}, "cache": "sha256:1234"}
    text = page(read_run(written(tmp_path / "run", full_rows(), provenance)))
    found = Page(text)
    assert [title for title, _ in found.images] == [plot.title for plot in PLOTS]
    assert all(image.startswith(b"\x89PNG") and len(image) > 5000 for _, image in found.images)
    for cell in (
        "raised",
        "cleared",
        "drift",
        "ess",
        "loss.objective",
        "forward_kl",
        "lr",
        "0.25",
        "sha256:1234",
    ):
        assert cell in found.cells
    assert "12 steps, done" in text
    assert "18" in found.cells


def test_what_a_run_does_not_have_is_left_out(tmp_path):
    rows = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": float("nan"), "ess": None, "lr": "fast"}]
    text = page(read_run(written(tmp_path / "run", rows)))
    assert [title for title, _ in Page(text).images] == ["Loss"]
    assert "None." in text
    assert "not finished" in text


def test_a_running_run_has_the_newest_checkpoint(tmp_path):
    path = written(tmp_path / "run", full_rows(), {"config": {"lr": 3}}, done=False)
    (path / "step-00000010").mkdir()
    (path / "step-00000010" / "opd.json").write_text('{"config": {"lr": 7}}')
    assert read_run(path).provenance == {"config": {"lr": 7}}


def test_a_checkpoint_may_go_while_it_is_read(tmp_path, monkeypatch):
    path = written(tmp_path / "run", full_rows(), {"config": {"lr": 3}}, done=False)
    newer = path / "step-00000010" / "opd.json"
    newer.parent.mkdir()
    newer.write_text('{"config": {"lr": 7}}')
    read_text = Path.read_text

    def removed(self, *args, **kwargs):
        if self == newer:
            newer.unlink(missing_ok=True)
        return read_text(self, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", removed)
    assert read_run(path).provenance == {"config": {"lr": 3}}


def test_nothing_from_a_file_reaches_the_page_unescaped(tmp_path):
    rows = full_rows()
    rows[2]["alarms"] = [{name: HOSTILE for name in ("kind", "metric", "step", "value", "raised")}]
    rows[3]["alarms"] = [HOSTILE, {"raised": True, "metric": [HOSTILE], "step": HOSTILE}]
    rows[-1] |= {HOSTILE: 1.0, "seconds": {HOSTILE: HOSTILE}}
    deep: dict = {"x": HOSTILE}
    for _ in range(300):
        deep = {HOSTILE[:9]: deep}
    provenance = {
        "config": {HOSTILE: [HOSTILE]},
        HOSTILE: {HOSTILE: HOSTILE},
        "deep": deep,
        "long": "x" * 9999,
    }
    text = page(read_run(written(tmp_path / HOSTILE.replace("/", ""), rows, provenance)))
    found = Page(text)
    assert "script" not in found.tags
    assert len(found.images) == len(PLOTS)
    assert "<script" not in text
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "x" * 501 not in text
    assert any(cell.startswith("<script>alert(1)") for cell in found.cells)
    assert len(re.findall("&lt;script", text)) >= 6


@pytest.mark.parametrize(
    "value", ["1" + "0" * 500, "1e308", "-1e308", "[" * 500 + "]" * 500, "NaN", "1e99"], ids=lambda v: v[:6]
)
@pytest.mark.parametrize("name", ["loss", "grad_norm", "lr"])
def test_no_value_stops_the_page(tmp_path, name, value):
    path = written(tmp_path / "run", full_rows())
    with (path / "metrics.jsonl").open("a") as file:
        file.write(f'{{"step": 13, "{name}": {value}, "alarms": [{{"raised": true, "step": {value}}}]}}\n')
    assert len(Page(page(read_run(path))).images) == len(PLOTS)


def test_a_line_that_is_being_written_is_left_out(tmp_path):
    path = written(tmp_path / "run", full_rows())
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "lo')
    assert len(read_run(path).rows) == 12


def test_the_dotted_lines_are_the_thresholds_of_the_alarms():
    config = DriftConfig()
    found = {(name, limit) for plot in PLOTS for name in plot.metrics[:2] for limit in plot.limits}
    for field in dataclasses.fields(config):
        metric = field.name.removesuffix("_min").removesuffix("_max")
        assert (metric, getattr(config, field.name)) in found or metric in ("smooth_steps", "kl_growth")


def test_long_tables_are_cut(tmp_path):
    rows = full_rows()
    rows[-1] |= {f"m{number}": 1 for number in range(1000)}
    text = page(read_run(written(tmp_path / "run", rows)))
    Page(text)
    assert "more are left out" in text
    assert len(text) < 2_000_000


def test_the_command(opd, work, cache, tmp_path):
    out = tmp_path / "run"
    opd("train", cache, "--student", work / "student", "--out", out, "--steps", 3).ok()
    assert opd("report", out).ok().out.strip() == str(out / "report.html")
    found = Page((out / "report.html").read_text("utf-8"))
    assert {"Loss", "Distance to the teacher", "Gradient norm", "Speed"} <= {
        title for title, _ in found.images
    }
    assert "student.weights_digest" in found.cells
    opd("report", out, "--out", tmp_path / "page.html").ok()
    assert (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    ("content", "code", "part"),
    [
        (None, 2, "no metrics.jsonl"),
        ("", 2, "no step"),
        ('{"step": 1', 2, "no step"),
        ('{"step": 1}\n{"st\n', 1, "line 2"),
        ('{"loss": 1}\n', 1, "line 1"),
        ("[1]\n", 1, "line 1"),
        ('{"step": 1}\n' + "[" * 100_000 + "\n", 1, "line 2"),
        ('{"step": 1' + "0" * 500 + "}\n", 1, "line 1"),
    ],
)
def test_what_is_not_a_run(opd, tmp_path, content, code, part):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    opd("report", tmp_path).refused(code, part)
    assert not (tmp_path / "report.html").exists()


def test_a_place_that_cannot_be_written(opd, tmp_path):
    path = written(tmp_path / "run", full_rows())
    opd("report", path, "--out", tmp_path / "missing" / "page.html").refused(1, "cannot write")
