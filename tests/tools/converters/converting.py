"""`opd convert` in this process, and what tests of formats do with its results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from click.testing import CliRunner, Result
from opd_tools.main import main
from tools.converters.samples import SAMPLES, TOPK, VOCAB, good_rollouts, save_tokenizer

import opd_store
from opd_store import NO_ID

FINGERPRINT = "sha256:" + "0" * 64


def convert(name: str | None, path: Path, to: Path, *options: object) -> Result:
    """Run the command on a file that may be bad; `name` None leaves the format to be detected."""
    sample = SAMPLES.get(name or "")
    args: list[object] = ["convert", path, to, *(["--from", name] if name else []), "--json"]
    args += [*options, *(sample.options if sample else ())]
    if sample and sample.needs_tokenizer:
        args += ["--tokenizer", save_tokenizer(to.parent / "tokenizer.json")]
    elif "--tokenizer" not in options:
        args += ["--tokenizer-fingerprint", FINGERPRINT, "--vocab-size", VOCAB]
    return CliRunner().invoke(main, [str(arg) for arg in args], prog_name="opd")


def converted(name: str | None, path: Path, to: Path, *options: object) -> dict[str, Any]:
    """What the command prints about a good file."""
    result = convert(name, path, to, "--encoding", "plain", *options)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def refused(result: Result, to: Path) -> str:
    """The one line with which a file was refused, after nothing was left behind."""
    assert result.exit_code in (1, 2), result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("opd: ")
    assert not to.exists()
    assert not to.with_name(to.name + ".partial").exists()
    return line.removeprefix("opd: ")


def lines(path, values):
    """Write JSON lines."""
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def read(path):
    """Read JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def by_name(cache_path):
    """Rollouts of a cache by their sample ids."""
    cache = opd_store.open(cache_path)
    return {rollout.sample_id: rollout for rollout in (cache[at] for at in range(len(cache)))}


def require_equal(found, expected, *, own=True, prompt_len=True):
    """The rows that both have are the same."""
    np.testing.assert_array_equal(found.token_ids, expected.token_ids)
    if prompt_len:
        assert found.prompt_len == expected.prompt_len
    skip = expected.prompt_len - found.prompt_len
    there = found.topk_ids[skip:] != NO_ID
    assert (there.sum(axis=1) == TOPK).all()
    np.testing.assert_array_equal(found.topk_ids[skip:][:, :TOPK], expected.topk_ids)
    np.testing.assert_array_equal(found.topk_logprob[skip:][:, :TOPK], expected.topk_logprob)
    if own:
        np.testing.assert_array_equal(found.teacher_logprob[skip:], expected.teacher_logprob)


def changed(tmp_path, name, change, n=12):
    """The sample of a format with `change` made to each line."""
    rollouts = good_rollouts(n)
    path = SAMPLES[name].write(tmp_path, rollouts)
    found = [change(line, rollout) for line, rollout in zip(read(path), rollouts, strict=True)]
    return lines(path, found), {rollout.sample_id: rollout for rollout in rollouts}
