"""Every importer on every kind of bad file: one line that says what and where, or a counted repair."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from opd_tools.converters.core.alignment import checked
from opd_tools.converters.core.format import ReadSettings
from opd_tools.converters.core.normalise import to_rollout
from opd_tools.converters.core.record import Tally
from opd_tools.converters.core.source import Source
from opd_tools.converters.core.support import Target
from opd_tools.converters.formats import all_formats, by_name
from opd_tools.main import main
from tools.converters.converting import convert, refused
from tools.converters.samples import SAMPLES, VOCAB, good_rollouts, save_tokenizer

import opd_store
from opd_store import OpdError, Rollout

Fault = tuple[Callable[[Rollout], Rollout], str]
"""What is done to each rollout; part of the error, or of the line that counts the repair."""


def _changed(field: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Rollout], Rollout]:
    def changed(rollout: Rollout) -> Rollout:
        return dataclasses.replace(rollout, **{field: change(getattr(rollout, field).copy())})

    return changed


def _put(value: float, *, rank: int = -1) -> Callable[[np.ndarray], np.ndarray]:
    def put(array: np.ndarray) -> np.ndarray:
        array[2 % len(array), rank] = value
        return array

    return put


def _filler(value: float) -> Callable[[Rollout], Rollout]:
    return _changed("topk_logprob", _put(value))


def _both(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Rollout], Rollout]:
    """Ids and log-probs alike."""
    return lambda r: _changed("topk_logprob", change)(_changed("topk_ids", change)(r))


def _repeated(array: np.ndarray) -> np.ndarray:
    array[:, -1] = array[:, 0]
    return array


def _all_moved(rollout: Rollout) -> Rollout:
    own = _changed("teacher_logprob", lambda array: np.roll(array, -1, axis=0))
    return own(_both(lambda array: np.roll(array, -1, axis=0))(rollout))


REFUSED: dict[str, Fault] = {
    "rows missing": (_both(lambda array: array[:-1]), ""),
    "id beyond vocabulary": (_changed("topk_ids", _put(VOCAB + 5)), f"not below the vocabulary size {VOCAB}"),
    "NaN": (_changed("topk_logprob", _put(np.nan, rank=0)), "nan"),
    "no log-probs": (_changed("topk_logprob", lambda array: array + 3), "sum to"),
    # Rows of the next token beside log-probs of this one, and both of the next one.
    "row off by one": (_both(lambda array: np.roll(array, -1, axis=0)), "off by one"),
    "off by one": (_all_moved, "off by one"),
}
REPAIRED: dict[str, Fault] = {
    "unsorted": (_both(lambda array: array[:, ::-1]), "put in order"),
    "duplicate ids": (_both(_repeated), "there twice"),
    "filler -inf": (_filler(-np.inf), "fillers"),
    "filler -1e3": (_filler(-1e3), "fillers"),
    "filler -9999": (_filler(-9999.0), "fillers"),
    "filler -1e9": (_filler(-1e9), "fillers"),
}
PLACES = ("line 1", "row 0", "item 0", "record 0", "sequence 0")
ROWS = [name for name, sample in SAMPLES.items() if sample.topk]


def _spoilt(tmp_path: Path, name: str, change: Callable[[Rollout], Rollout]) -> Path:
    directory = tmp_path / "in"
    directory.mkdir()
    return SAMPLES[name].write(directory, [change(rollout) for rollout in good_rollouts()])


@pytest.mark.parametrize("fault", REFUSED)
@pytest.mark.parametrize("name", ROWS)
def test_a_fault_is_refused(tmp_path, name, fault):
    if fault in SAMPLES[name].cannot:
        pytest.skip("the layout cannot express it")
    change, said = REFUSED[fault]
    path = _spoilt(tmp_path, name, change)
    line = refused(convert(name, path, tmp_path / "cache"), tmp_path / "cache")
    assert said in line
    assert "off by one" in said or any(place in line for place in PLACES), line


@pytest.mark.parametrize("fault", REPAIRED)
@pytest.mark.parametrize("name", ROWS)
def test_a_repair_is_counted(tmp_path, name, fault):
    if fault in SAMPLES[name].cannot:
        pytest.skip("the layout cannot express it")
    change, said = REPAIRED[fault]
    result = convert(name, _spoilt(tmp_path, name, change), tmp_path / "cache")
    assert result.exit_code == 0, result.output
    lost = json.loads(result.stdout)["lost"]
    assert any(said in what and count for what, count in lost.items()), lost
    opd_store.verify(tmp_path / "cache")


@pytest.mark.parametrize("shift", [-1, 1])
@pytest.mark.parametrize("name", ROWS)
def test_rows_off_by_one_can_be_moved(tmp_path, name, shift):
    if "off by one" in SAMPLES[name].cannot:
        pytest.skip("the layout cannot express it")

    def moved(rollout: Rollout) -> Rollout:
        def roll(array: np.ndarray) -> np.ndarray:
            return np.roll(array, -shift, axis=0)

        return _changed("teacher_logprob", roll)(_both(roll)(rollout))

    path = _spoilt(tmp_path, name, moved)
    line = refused(convert(name, path, tmp_path / "cache"), tmp_path / "cache")
    assert f"--shift {shift}" in line
    result = convert(name, path, tmp_path / "cache", "--shift", shift, "--encoding", "plain")
    assert result.exit_code == 0, result.output
    cache = opd_store.open(tmp_path / "cache")
    expected = {rollout.sample_id: rollout for rollout in good_rollouts()}
    for at, rollout in enumerate(cache):
        was = expected[rollout.sample_id if SAMPLES[name].named else f"r{at}"]
        # Where prompts have rows, the first ones are about the prompt.
        first = rollout.prompt_len - was.prompt_len
        start = max(first, shift, 0)
        rows = slice(start, first + rollout.response_len)
        np.testing.assert_array_equal(rollout.topk_ids[start - first :], was.topk_ids[rows])


@pytest.mark.parametrize("name", SAMPLES)
def test_files_that_are_no_files_of_this_format(tmp_path, name):
    good = SAMPLES[name].write(tmp_path, good_rollouts())
    files = sorted(path for path in ([good] if good.is_file() else good.rglob("*")) if path.is_file())
    data = {path: path.read_bytes() for path in files}
    bad = {
        "empty": {path: b"" for path in files},
        "text": {path: b"Dear reader,\nthis is a letter.\n" for path in files},
        "binary": {path: bytes(range(256)) * 9 for path in files},
        "other JSON": {path: b'{"a": [1, {"b": null}]}\n[[1]]\n' for path in files},
        "cut": {path: data[path][: len(data[path]) * 3 // 5] for path in files},
        "cut in the last bytes": {path: data[path][:-9] for path in files},
    }
    for what, contents in bad.items():
        for path, content in contents.items():
            path.write_bytes(content)
        line = refused(convert(name, good, tmp_path / "cache"), tmp_path / "cache")
        assert len(line) < 600, (what, line)
        if "cut" not in what:
            refused(convert(None, good, tmp_path / "cache"), tmp_path / "cache")


@pytest.mark.parametrize("name", [name for name, sample in SAMPLES.items() if sample.needs_tokenizer])
def test_text_needs_a_tokenizer(tmp_path, name):
    path = SAMPLES[name].write(tmp_path, good_rollouts())
    result = convert(None, path, tmp_path / "cache", "--from", name)
    assert "--tokenizer" in refused(result, tmp_path / "cache")


@pytest.mark.parametrize("name", SAMPLES)
def test_the_tokenizer_has_to_be_known(tmp_path, name):
    path = SAMPLES[name].write(tmp_path, good_rollouts())
    args = ["convert", str(path), str(tmp_path / "cache"), "--from", name]
    result = CliRunner().invoke(main, args)
    assert "give --tokenizer" in refused(result, tmp_path / "cache")
    assert result.exit_code == 2


STRANGE = [
    None,
    True,
    -1,
    7,
    10**30,
    1.5,
    float("nan"),
    "x",
    "token_id:-1",
    [],
    [[]],
    {},
    {"a": 1},
    [None, 1],
]
JSON = ["axolotl", "jsonl", "llamacpp", "nemo-aligner", "openai", "sglang", "vllm"]


def _places(value: object, path: tuple[object, ...] = ()) -> Iterator[tuple[object, ...]]:
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield from _places(item, (*path, key))


def _replaced(value: Any, path: tuple[Any, ...], by: object) -> Any:
    if not path:
        return by
    value = dict(value) if isinstance(value, dict) else list(value)
    value[path[0]] = _replaced(value[path[0]], path[1:], by)
    return value


@pytest.mark.parametrize("name", JSON)
def test_any_value_anywhere_is_read_or_refused(tmp_path, name):
    """Nothing but our own errors, from telling the format to the last rollout."""
    rng = np.random.default_rng(5)
    path = SAMPLES[name].write(tmp_path, good_rollouts(2))
    first, second = (json.loads(line) for line in path.read_text().splitlines())
    places = list(_places(first))
    settings = ReadSettings(vocab_size=VOCAB, tokenizer=save_tokenizer(tmp_path / "tokenizer.json"))
    refusals = 0
    for _ in range(250):
        changed = _replaced(first, places[rng.integers(len(places))], STRANGE[rng.integers(len(STRANGE))])
        path.write_text(json.dumps(changed) + "\n" + json.dumps(second))
        source = Source(str(path))
        for how in all_formats():
            assert how.detect is None or how.detect(source) in (True, False)
        try:
            contents = by_name(name).read(source, settings)
            target = Target(vocab_size=VOCAB, topk=max(1, contents.topk), values=contents.values)
            for record in checked(contents.records, name=name):
                to_rollout(record, target, Tally())
        except OpdError:
            refusals += 1
    assert refusals > 25
