"""What a stranger's file says reaches the terminal only as harmless text."""

from __future__ import annotations

import json
import shutil

import pytest
from click.testing import CliRunner
from opd_tools.console import printable
from opd_tools.main import main
from opd_tools.training.evaluate import is_match
from train.tiny_models import loaded, random_rollouts, rollouts_jsonl

import opd_store
from opd_store import CacheMeta, ModelInfo

# Colour, clear screen, new line, bell, 8-bit CSI, right-to-left override, zero width space, line separator.
HOSTILE = "evil\x1b[31m\x1b[2J\r\n\x07\x9b31m\u202egnp.exe\u200b\u2028end"
LONG = "long " * 800


def safe(text):
    for char in text:
        assert char == "\n" or char.isprintable(), repr(char)


def test_printable():
    shown = printable(HOSTILE)
    safe(shown)
    assert "\n" not in shown
    for part in ("evil", "\\u001b[31m", "\\u000a", "\\u009b", "\\u202e", "\\u200b", "\\u2028", "end"):
        assert part in shown
    assert printable("\ud800 na\u00efve \u65e5\u672c") == "\\ud800 na\u00efve \u65e5\u672c"
    assert len(printable(LONG)) == 200
    assert printable(LONG).endswith("...")
    assert printable(LONG, None) == LONG


@pytest.fixture
def hostile(tmp_path, work):
    """A cache whose every text is hostile."""
    lm = loaded(work / "teacher")
    info = ModelInfo(name=HOSTILE, dtype=HOSTILE, engine=LONG, revision=HOSTILE)
    meta = CacheMeta(
        vocab_size=lm.vocab_size,
        tokenizer_fingerprint=lm.tokenizer_fingerprint,
        teacher=info,
        sft_teacher=ModelInfo(name=LONG),
        behaviour=info,
        prompt_dataset=HOSTILE,
        licence=LONG,
        code_version=HOSTILE,
    )
    with opd_store.create(tmp_path / "cache", meta=meta) as writer:
        for rollout in random_rollouts(3):
            writer.append(rollout)
    return tmp_path / "cache"


def test_inspect_shows_hostile_names_escaped_and_short(opd, hostile):
    shown = opd("inspect", hostile).ok()
    safe(shown.out + shown.err)
    assert "evil\\u001b[31m" in shown.out
    assert max(len(line) for line in shown.out.splitlines()) < 240
    document = opd("inspect", hostile, "--json").ok().out
    assert document.isascii()
    safe(document)
    assert HOSTILE in json.loads(document)["provenance"]["prompts"]


def test_errors_about_hostile_names_are_one_escaped_line(opd, hostile, work, tmp_path):
    args = ("train", hostile, "--student", work / "student", "--out", tmp_path / "run", "--steps", 1)
    safe(opd(*args).refused(2))
    score = ("score", work / "teacher", work / "rollouts.jsonl", hostile, "--topk", 0)
    line = opd(*score).refused(1)
    safe(line)
    assert "evil" in line
    assert len(line) < 2100


def append(path, row):
    path.write_text(path.read_text() + json.dumps(row) + "\n")


def test_hostile_ids_in_rollouts_and_prompts(opd, work, tmp_path):
    lm = loaded(work / "teacher")
    path = rollouts_jsonl(tmp_path / "r.jsonl", lm, [])
    row = {"id": HOSTILE + LONG, "prompt_ids": [4], "response_ids": [lm.vocab_size]}
    append(path, row)
    line = opd("score", work / "teacher", path, tmp_path / "out").refused(1, "evil")
    safe(line)
    assert len(line) < 600
    row |= {"behaviour_logprob": HOSTILE + LONG, "id": "x"}
    append(rollouts_jsonl(path, lm, []), row)
    line = opd("score", work / "teacher", path, tmp_path / "out").refused(1, "behaviour_logprob")
    safe(line)
    path.write_text(json.dumps({"prompt_ids": HOSTILE + LONG}))
    line = opd("rollouts", work / "student", path, tmp_path / "out").refused(1, "prompt_ids", "evil")
    safe(line)
    assert len(line) < 600
    path.write_text(json.dumps({"rollouts": 1, HOSTILE: LONG}))
    safe(opd("score", work / "teacher", path, tmp_path / "out").refused(1))


def test_a_hostile_model_directory(opd, work, tmp_path):
    path = tmp_path / ("m\x1b[31m\u202e" + "x" * 50)
    shutil.copytree(work / "teacher", path)
    done = opd("score", path, work / "rollouts.jsonl", tmp_path / "cache", "--topk", 1).ok()
    safe(done.out + done.err)
    assert opd_store.open(tmp_path / "cache").meta.teacher.name == path.name
    shown = opd("inspect", tmp_path / "cache").ok().out
    safe(shown)
    (path / "config.json").write_text('{"model_type": "' + "\\u001b[31m" + '"}')
    line = opd("eval", path, "--cache", tmp_path / "cache").refused(1)
    safe(line)


def test_a_hostile_path_of_a_cache(opd, hostile, tmp_path):
    path = tmp_path / "c\x1b[2J\u202e"
    shutil.copytree(hostile, path)
    for args in (("inspect", path), ("verify", path)):
        done = opd(*args).ok()
        safe(done.out + done.err)
    next((path / "shards").iterdir()).write_bytes(b"")
    done = opd("verify", path)
    assert done.status == 1
    safe(done.out + done.err)


@pytest.mark.parametrize(
    "environment", [{}, {"NO_COLOR": "1"}, {"NO_COLOR": "", "TERM": "xterm-256color"}], ids=str
)
def test_no_escape_bytes_where_no_terminal_is(opd, work, cache, tmp_path, environment):
    commands = [
        ("inspect", cache),
        ("verify", cache),
        ("train", cache, "--student", work / "student", "--out", tmp_path / "run", "--steps", 1),
        ("eval", work / "student", "--cache", cache),
        ("inspect", tmp_path / "missing"),
        ("--help",),
        ("frobnicate",),
    ]
    for args in commands:
        done = opd(*args, environment=environment)
        assert "\x1b" not in done.out + done.err, args
        assert "\r" not in done.out + done.err, args


def test_colour_is_left_out_on_a_terminal_too_when_asked(cache, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in CliRunner().invoke(main, ["inspect", str(cache)], color=True).output


@pytest.mark.parametrize(
    ("rule", "text", "answer", "expected"),
    [
        ("exact", " 7\n", "7", True),
        ("exact", "7.0", "7", False),
        ("last-number", "3 and 1,234.0 apples", "1234", True),
        ("last-number", "7 then 8", "7", False),
        ("last-number", "none", "7", False),
        ("last-number", "x", "y", False),
        ("last-number", "it is -5.", "-5", True),
        ("suffix", "so: abc ", "abc", True),
        ("suffix", "abc so", "abc", False),
    ],
)
def test_when_an_answer_is_right(rule, text, answer, expected):
    assert is_match(rule, text, answer) is expected
