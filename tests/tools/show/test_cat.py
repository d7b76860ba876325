"""`opd cat` and `opd head`: text with log-probs, on a terminal and elsewhere."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from click.testing import CliRunner
from opd_tools.main import main
from opd_tools.show.cat import parse_rows
from opd_tools.show.rollout_view import SHADES, flowing, flowing_plain, sampled_logprob, shade, view_of
from opd_tools.show.token_text import TokenTexts
from rich.console import Console
from tokenizers import Tokenizer, decoders, models
from tools.show.caches import save_tokenizer, some_rollouts, write

import opd_store
from opd_store import CacheMeta, InvalidArgumentError, Rollout


def opd(*args):
    return CliRunner().invoke(main, [str(arg) for arg in args])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A cache, and its tokenizer."""
    root = tmp_path_factory.mktemp("cat")
    fingerprint = save_tokenizer(root / "tokenizer")
    return write(root / "cache", some_rollouts(), fingerprint=fingerprint), root / "tokenizer"


def rollout_of(tokens, logprobs, **more):
    return Rollout(
        token_ids=np.array([2, 3, *tokens], np.uint32),
        prompt_len=2,
        teacher_logprob=np.array(logprobs, np.float32),
        **more,
    )


def view(tokens, logprobs, texts=None, *, alternatives=0, max_tokens=None, **more):
    rollout = rollout_of(tokens, logprobs, **more)
    return view_of(7, rollout, texts, alternatives=alternatives, max_tokens=max_tokens)


def test_text_with_numbers(made):
    texts = TokenTexts(made[1], opd_store.open(made[0]).meta)
    mask = np.array([True, False, True, True])
    shown = flowing_plain(view([4, 5, 8, 7], [-0.01, -2.345, -1.0, -0.06], texts, loss_mask=mask))
    assert shown == "  prompt: thecat\n  response: sat~on~[2.3]\u23ce[1.0]\n  mat[0.1]"


def test_a_vocabulary_of_words_without_one_for_the_unknown(tmp_path):
    file = tmp_path / "tokenizer.json"
    Tokenizer(models.WordLevel({"one": 0, "two": 1}, unk_token="?")).save(str(file))
    meta = CacheMeta(vocab_size=2, tokenizer_fingerprint=opd_store.tokenizer_fingerprint(file.read_bytes()))
    texts = TokenTexts(file, meta)
    assert [texts.text(0), texts.text(1)] == [" one", " two"]


def test_ids_without_a_tokenizer():
    assert flowing_plain(view([4, 5], [-0.5, 0.0])) == "  prompt: 2 3 \n  response: 4[0.5] 5"


def test_colour_is_surprise(made):
    texts = TokenTexts(made[1], opd_store.open(made[0]).meta)
    text = flowing(view([4, 5, 6], [-0.01, -2.5, -9.0], texts))
    assert text.plain == "thecatsatona"
    styles = {text.plain[span.start : span.end]: span.style for span in text.spans}
    assert styles["on"].bgcolor.name == SHADES[3][1]
    assert styles["a"].bgcolor.name == SHADES[5][1]
    assert "sat" not in styles
    assert styles["thecat"] == "dim"
    console = Console(file=io.StringIO(), force_terminal=True, color_system="truecolor", width=60)
    console.print(text)
    assert "48;2;176;74;0" in console.file.getvalue()


def test_shades_rise():
    assert [shade(value) for value in (None, 0.0, 0.0999)] == [None] * 3
    assert [shade(least) for least, _ in SHADES] == [colour for _, colour in SHADES]


def test_the_sampled_token_is_found_in_the_topk():
    (rollout,) = some_rollouts(1)
    bare = opd_store.Rollout(
        token_ids=rollout.token_ids,
        prompt_len=rollout.prompt_len,
        topk_ids=rollout.topk_ids,
        topk_logprob=rollout.topk_logprob,
        log_tail=rollout.log_tail,
    )
    hit = (rollout.topk_ids == rollout.response_ids[:, None]).any(axis=1)
    found = sampled_logprob(bare)
    np.testing.assert_array_equal(found[hit], rollout.teacher_logprob[hit])
    assert np.isnan(found[~hit]).all()
    assert hit.any()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3", [3]),
        ("-1,0", [9, 0]),
        ("2:5", [2, 3, 4]),
        (":2,8:", [0, 1, 8, 9]),
        ("-2:", [8, 9]),
        (" 1 , 1 ", [1, 1]),
        (":", list(range(10))),
        ("20:30", []),
    ],
)
def test_rows(text, expected):
    assert parse_rows(text, 10) == expected


@pytest.mark.parametrize("text", ["", "a", "1:2:3", "10", "-11", "1,,2", "1-3", "9" * 30, "\x1b[31m"])
def test_rows_that_are_none(text):
    with pytest.raises(InvalidArgumentError, match="--rows"):
        parse_rows(text, 10)


def test_cat_shows_all_and_head_the_first(made):
    cache, tokenizer = made
    shown = opd("cat", cache)
    assert shown.exit_code == 0, shown.output
    assert shown.output.count("\nrow ") + 1 == 12
    assert opd("cat", cache, "--rows", "0:5").output == opd("head", cache).output
    assert opd("head", cache, "-n", 0).output == ""
    assert opd("head", cache, "-n", 99).output == shown.output
    assert "row 0  r0  5 + 5 tokens  length  log-prob" in shown.output
    assert "x_domain=maths  x_level=0" in shown.output
    assert "more tokens" in opd("head", cache, "--max-tokens", 2, "--tokenizer", tokenizer).output


def test_alternatives_are_those_of_the_cache(made):
    cache, tokenizer = made
    rollout = opd_store.open(cache)[4]
    args = ("cat", cache, "--rows", 4, "--alternatives", 3)
    lines = [json.loads(line) for line in opd(*args, "--json", "--tokenizer", tokenizer).output.splitlines()]
    assert len(lines) == 1
    assert lines[0]["prompt_ids"] == rollout.token_ids[:5].tolist()
    for at, token in enumerate(lines[0]["response"]):
        assert token["id"] == rollout.response_ids[at]
        assert token["logprob"] == pytest.approx(float(rollout.teacher_logprob[at]))
        assert token["masked"] is bool(not rollout.loss_mask[at])
        assert [other["id"] for other in token["alternatives"]] == rollout.topk_ids[at, :3].tolist()
        found = [other["logprob"] for other in token["alternatives"]]
        np.testing.assert_allclose(found, rollout.topk_logprob[at, :3], rtol=1e-6)
    table = opd(*args).output.splitlines()[2:]
    assert len(table) == rollout.response_len
    assert table[0].split()[:3] == ["0", str(rollout.response_ids[0]), f"{rollout.teacher_logprob[0]:.3f}"]
    assert table[0].endswith(f"{rollout.topk_ids[0, 2]} {rollout.topk_logprob[0, 2]:.3f}")


def test_json_without_a_tokenizer_has_no_text(made):
    (document,) = [json.loads(line) for line in opd("head", made[0], "-n", 1, "--json").output.splitlines()]
    assert document["prompt"] is None
    assert set(document["response"][0]) == {"id", "logprob", "masked"}


@pytest.mark.parametrize(
    ("args", "code", "part"),
    [
        (("--tokenizer", "{other}"), 1, "its fingerprint is"),
        (("--tokenizer", "{root}"), 2, "tokenizer.json"),
        (("--rows", "99"), 2, "--rows: row 99"),
        (("--alternatives", "-1"), 2, "-1"),
    ],
)
def test_refused(made, tmp_path, args, code, part):
    save_tokenizer(tmp_path / "other", ["<s>", "</s>", "another"])
    places = {"other": tmp_path / "other", "root": tmp_path}
    shown = opd("cat", made[0], *(arg.format(**places) for arg in args))
    assert shown.exit_code == code
    assert part in shown.stderr
    assert shown.stdout == ""


def test_no_alternatives_without_topk(tmp_path):
    cache = write(tmp_path / "cache", some_rollouts(2, topk=0), topk=0)
    assert opd("cat", cache, "--alternatives", 2).exit_code == 2
    assert opd("cat", cache, "--alternatives", 0).exit_code == 0


BYTES = {f"<0x{byte:02X}>": byte for byte in range(256)}


@pytest.fixture(scope="module")
def byte_texts(tmp_path_factory):
    """A tokenizer with an id a byte, as a fallback has it, and a word piece with a space."""
    path = tmp_path_factory.mktemp("bytes")
    core = Tokenizer(models.BPE({**BYTES, "\u2581word": 256}, [], byte_fallback=True))
    core.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.save(str(path / "tokenizer.json"))
    fingerprint = opd_store.tokenizer_fingerprint((path / "tokenizer.json").read_bytes())
    return TokenTexts(path, CacheMeta(vocab_size=300, tokenizer_fingerprint=fingerprint))


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (list("na\u00efve".encode()), ["n", "a", "", "\u00ef", "v", "e"]),
        ([256, 256, 33, 256], ["word", " word", "!", " word"]),
        (list("\u65e5\u672c".encode()), ["", "", "\u65e5", "", "", "\u672c"]),
        ([0xFF], ["<0xFF>"]),
        ([65, 0xE6, 0x97], ["A", "<0xE6>", "<0x97>"]),
        ([299, 65], ["<299>", "A"]),
        ([], []),
    ],
)
def test_texts_of_tokens(byte_texts, ids, expected):
    assert byte_texts.texts(ids) == expected
