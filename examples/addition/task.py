"""A verifiable toy task: three-digit addition with a written carry scratch pad, one token per character.

Prompt `347+185=`. The response works through the columns from the units up, then gives the answer after `;`:

    dialect A  75:12,48:13,31:05;532    7 and 5 make carry 1 digit 2, 4 and 8 and the carry make 13, ...
    dialect B  75:21,48:31,31:50;532    the same working with the digit written before the carry

A column is the two operand digits, `:`, and the two digits of their sum including the carry from the column
to its right. Both dialects use the same characters and reach the same answer, so a teacher trained on B is a
competent solver that disagrees with A's working. Only the answer is judged.

Sizes: 810,000 problems, 18 symbols, 9 prompt tokens with bos, 22-23 response tokens with eos.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Collection, Iterable
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

DIGITS = 3
"""Digits per operand, leading digit not zero. The answer has DIGITS or DIGITS + 1 digits."""

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
CHARACTERS = "0123456789+=:,;"
SYMBOLS = (PAD, BOS, EOS, *CHARACTERS)
"""The vocabulary; a symbol's token id is its index."""

PROMPT_TOKENS = 1 + 2 * DIGITS + 2
"""Tokens in every prompt, bos included."""
MAX_RESPONSE_TOKENS = 6 * DIGITS + (DIGITS + 1) + 1
"""Tokens in the longest correct response, eos included. A sampler may stop here."""

_ANSWER = re.compile(rf";(\d{{1,{DIGITS + 1}}})$")


class Problem(NamedTuple):
    """An addition problem, `a + b`; both operands have DIGITS digits."""

    a: int
    b: int


class Dialect(StrEnum):
    """How the two digits of a column sum are written in the scratch pad."""

    A = "A"
    """Carry first: 7 + 5 is `12`."""
    B = "B"
    """Digit first: 7 + 5 is `21`."""


def problems(n: int, seed: int, exclude: Collection[Problem] = ()) -> list[Problem]:
    """Draws `n` distinct problems uniformly, in an order fixed by `seed`.

    Args:
        n: how many.
        seed: the same seed and `exclude` give the same list.
        exclude: problems that must not appear, for example the held-out test set.

    Raises:
        ValueError: fewer than `n` problems remain after `exclude`.
    """
    low, high = 10 ** (DIGITS - 1), 10**DIGITS
    taken = set(exclude)
    available = (high - low) ** 2 - len(taken)
    if n > available:
        raise ValueError(f"asked for {n} distinct problems, {available} remain; lower n or raise DIGITS")
    rng = random.Random(seed)
    drawn: list[Problem] = []
    while len(drawn) < n:
        problem = Problem(rng.randrange(low, high), rng.randrange(low, high))
        if problem not in taken:
            taken.add(problem)
            drawn.append(problem)
    return drawn


def prompt_text(problem: Problem) -> str:
    """The prompt as the model sees it, `<bos>347+185=`."""
    return f"{BOS}{problem.a}+{problem.b}="


def solution_text(problem: Problem, dialect: Dialect = Dialect.A) -> str:
    """The reference response without eos, `75:12,48:13,31:05;532` in dialect A."""
    columns: list[str] = []
    carry = 0
    for place in range(DIGITS):
        x, y = problem.a // 10**place % 10, problem.b // 10**place % 10
        carry, digit = divmod(x + y + carry, 10)
        columns.append(f"{x}{y}:{carry}{digit}" if dialect is Dialect.A else f"{x}{y}:{digit}{carry}")
    return f"{','.join(columns)};{problem.a + problem.b}"


def answer_of(response_text: str) -> int | None:
    """The number between the last `;` and the end of the response, or None when there is no such number.

    Args:
        response_text: a decoded response with special tokens removed.
    """
    match = _ANSWER.search(response_text)
    return int(match.group(1)) if match else None


def build_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """Makes the character tokenizer and saves it under `path` in the Hugging Face format.

    Encode with `add_special_tokens=False`; prompts carry their bos as text. Decoding joins characters without
    spaces. A character outside CHARACTERS is refused: the vocabulary has no unknown token.
    """
    vocabulary = {symbol: index for index, symbol in enumerate(SYMBOLS)}
    core = Tokenizer(models.WordLevel(vocabulary))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # transformers leaves it untyped
        tokenizer_object=core,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        clean_up_tokenization_spaces=False,
        model_max_length=PROMPT_TOKENS + MAX_RESPONSE_TOKENS,
    )
    tokenizer.save_pretrained(str(path))
    return tokenizer


def write_prompts_jsonl(path: str | Path, items: Iterable[Problem]) -> None:
    """Writes one `{"id", "prompt", "answer"}` object a line; the id names the problem, so it is stable."""
    with Path(path).open("w", encoding="utf-8") as file:
        for problem in items:
            a, b = problem
            row = {"id": f"add-{a}-{b}", "prompt": prompt_text(problem), "answer": a + b}
            file.write(json.dumps(row) + "\n")
