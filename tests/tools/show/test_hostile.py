"""What a stranger wrote into a cache or tokenizer reaches terminal and page as harmless text.

Hundreds of names, in every text that a cache has, through every verb that prints. Python reports each file
that is opened and each connection that is made meanwhile.
"""

from __future__ import annotations

import os

import pytest
from store.caches import ROOT, run_python
from tools.show.caches import some_rollouts, write

from opd_store import InvalidArgumentError

WATCHED = r"""
import itertools, json, os, random, re, sys
from html.parser import HTMLParser
from pathlib import Path
import opd_store
from click.testing import CliRunner
from opd_store import CacheMeta, ModelInfo, SamplerInfo
from opd_tools.main import main
from tools.show.caches import VOCAB, save_tokenizer, some_rollouts, write
import dataclasses

root = Path(sys.argv[1])
PIECES = ["\x1b[31m", "\x1b]8;;http://evil/\x07", "\x1b[2J", "\x9b31m", "\r\n", "\x00", "\x07", "\x08" * 9,
          "\u202e", "\u2066", "\u200b", "\u2028", "\ufeff", "\x7f", "\t", "e\u0301" * 30, "\U000e0041",
          "<script>alert(1)</script>", "</td><img src=x onerror=y>", "\"'&", "[bold red]x[/]",
          "[link=http://evil]", ":smile:",
          "$x^{2}$", "$$", "\\", "_hidden", "{0.__class__}", "%s%n%d", "`id`", "$(id)",
          "../" * 40 + "etc/passwd", "/etc/passwd",
          "file:///etc/passwd", "http://127.0.0.1:9/x", "s3://evil/x", "\\\\host\\share", "~root",
          "CON", "opd: error", "row 0  r0", "\u65e5\u672c", "\U0001f600", "long " * 800]
draw = random.Random(0)
names = ["".join(draw.sample(PIECES, draw.randint(1, 3)))[:4000] + str(n) for n in range(300)]
assert set("".join(PIECES)) <= set("".join(names))
supply = itertools.cycle(names)
used = []

def name():
    used.append(next(supply))
    return used[-1]

def model():
    return ModelInfo(name=name(), revision=name(), dtype=name(), quantisation=name(), engine=name(),
                     engine_version=name(), logprob_mode=name(), logprob_temperature=1.0)

def make(path, words):
    fingerprint = save_tokenizer(path / "tokenizer", words)
    meta = CacheMeta(
        vocab_size=VOCAB, tokenizer_fingerprint=fingerprint, teacher=model(), other_teachers=(model(),),
        sft_teacher=model(), behaviour=model(), reference=model(),
        sampler=SamplerInfo(engine=name(), engine_version=name(), max_new_tokens=3),
        chat_template_args={name(): name()}, prompt_dataset=name(), prompt_revision=name(), truncation=name(),
        licence=name(), code_version=name(), extra={name(): name(), "converted_from": name(), "lost": name()})
    rollouts = [
        dataclasses.replace(r, sample_id=name(), label=name(), teacher=n % 2, extra={"x_text": name()})
        for n, r in enumerate(some_rollouts(6))
    ]
    return write(path / "cache", rollouts, meta=meta, user_columns={"x_text": "utf8"})

def run(*args, codes=(0,)):
    done = CliRunner().invoke(main, [str(arg) for arg in args])
    assert done.exit_code in codes, (args, done.output, done.exception)
    assert done.exception is None or isinstance(done.exception, SystemExit), (args, repr(done.exception))
    for char in done.output:
        assert char == "\n" or char.isprintable(), (args, repr(char))
    return done.output

class Page(HTMLParser):
    def handle_starttag(self, tag, attributes):
        assert tag in {"html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "table", "tr", "td",
                       "th", "figure", "figcaption", "img"}, tag
        for key, value in attributes:
            assert key in {"lang", "charset", "alt", "src", "class"}, key
            assert key != "src" or value.startswith("data:image/svg+xml;base64,")

def use(path, other, number):
    cache, tokenizer = path / "cache", path / "tokenizer"
    run("inspect", cache)
    json.loads(run("inspect", cache, "--json"))
    for more in ((), ("--tokenizer", tokenizer), ("--tokenizer", tokenizer, "--alternatives", 2)):
        shown = run("cat", cache, *more)
        # What a rollout says never begins a line, as headings do.
        assert sum(line.startswith("row ") for line in shown.splitlines()) == 6
        assert all(line.startswith(("row ", "  ")) for line in shown.splitlines() if line)
        assert max(map(len, shown.splitlines())) < 20_000
        for line in run("head", cache, "--json", *more).splitlines():
            assert json.loads(line)
    run("stats", cache, "--by", "x_text", "--by", "teacher")
    json.loads(run("stats", cache, "--by", "x_text", "--json").partition("\n")[2])
    run("diff", cache, other, codes=(1,))
    run("diff", cache, other, "--json", codes=(1,))
    run("verify", cache)
    run("log", cache)
    if number % 2 == 0:
        # Half of them, since drawing takes longer than all the rest.
        run("report", cache, "--out", path / "page.html")
        text = (path / "page.html").read_text("utf-8")
        assert not [char for char in text if not (char == "\n" or char.isprintable())]
        Page().feed(text)
    # Damaged, so that errors name it.
    shard = next((cache / "shards").iterdir())
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(bytes(data))
    run("verify", cache, codes=(1,))
    run("cat", cache, codes=(0, 1))
    run("cat", other, "--tokenizer", tokenizer, codes=(1,))

def words(n):
    found = ["<s>", "</s>", *(name() for _ in range(20)), "z" * 262_144]
    return list(dict.fromkeys(found))

FORBIDDEN = ("socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork",
             "urllib.", "http.", "webbrowser.", "ctypes.", "marshal.", "pickle.", "os.remove", "os.rename",
             "os.link", "os.symlink", "os.mkdir", "os.chmod")
events, opened = [], []
watching = False

def hook(event, arguments):
    if watching and event.startswith(FORBIDDEN):
        events.append((event, repr(arguments)[:200]))
    if watching and event == "open" and isinstance(arguments[0], (str, bytes)):
        opened.append(os.fsdecode(arguments[0]))

other = write(root / "other" / "cache", some_rollouts(3))
paths = [root / f"hostile-{number}" for number in range(5)]
for path in paths:
    make(path, words(0))
# Once unwatched, so that what is imported and which fonts are read is known.
use(paths.pop(), other, 0)
sys.addaudithook(hook)
watching = True
for number, path in enumerate(paths):
    use(path, other, number)
watching = False
assert not events, events[:5]
allowed = re.compile(re.escape(str(root)) + "/|.*/(fonts|matplotlib)/")
outside = [place for place in opened if not allowed.match(place)]
assert not outside, outside[:5]
assert len(opened) > 100
assert len(set(used)) == 300
print(len(used))
"""


def test_hundreds_of_hostile_names(tmp_path):
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tools", ROOT / "tests")))
    assert int(run_python(WATCHED, tmp_path, PYTHONPATH=path, PYTHONUTF8="1")) >= 300


@pytest.mark.parametrize(
    "name", ["x_\x1b[31m", "x_\u202e", "x_../../x", "x_" + "y" * 262_144, "y", "x_A", "x_a\n"]
)
def test_columns_have_harmless_names(tmp_path, name):
    with pytest.raises(InvalidArgumentError) as caught:
        write(tmp_path / "cache", some_rollouts(1), user_columns={name: "utf8"})
    assert len(str(caught.value)) < 500
