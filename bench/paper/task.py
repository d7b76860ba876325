"""The demo's addition with words in it: as checkable as before, but the teacher is of many minds.

A response works through the columns from the units up. Before each column comes one of 76 filler letters,
which say nothing:

    dialect A  k75:12,b48:13,o31:05;532    carry first
    dialect B  k75:21,b48:31,o31:50;532    digit first

Which filler comes is drawn from a Zipf law over the letters in an order that the column and the carry decide.
So a third of the positions before the answer have an entropy of about 3.5 nats, and the others next to none:
language has both. Only the answer is judged.

Sizes: vocabulary of 94, 9 prompt tokens with bos, 25-26 response tokens with eos.
"""

from __future__ import annotations

import functools
import re
import string
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from paper.addition import Dialect, Problem, answer_of, prompt_text
from paper.addition import task as demo

FILLERS = string.ascii_letters + "αβγδεζηθικλμνξοπρστυφχψω"
SYMBOLS = (*demo.SYMBOLS, *FILLERS)
MAX_RESPONSE_TOKENS = demo.MAX_RESPONSE_TOKENS + demo.DIGITS
CONTEXT = demo.PROMPT_TOKENS + MAX_RESPONSE_TOKENS + 8
_PROBABILITY = 1 / np.arange(1, len(FILLERS) + 1)
_PROBABILITY /= _PROBABILITY.sum()
_ANSWER = re.compile(r";\d+$")

__all__ = ["CONTEXT", "FILLERS", "Dialect", "Problem", "answer_of", "prompt_text"]


@functools.cache
def filler_order(column: int, carry: int, dialect: Dialect) -> NDArray[np.int64]:
    """Fillers from the most to the least likely."""
    key = [column, carry, 0 if dialect is Dialect.A else 1]
    return np.random.default_rng(key).permutation(len(FILLERS))


def solution_text(problem: Problem, dialect: Dialect, rng: np.random.Generator) -> str:
    """A correct response without eos; the fillers are drawn."""
    columns = []
    carry = 0
    for place in range(demo.DIGITS):
        x, y = problem.a // 10**place % 10, problem.b // 10**place % 10
        filler = FILLERS[filler_order(place, carry, dialect)[rng.choice(len(FILLERS), p=_PROBABILITY)]]
        carry, digit = divmod(x + y + carry, 10)
        columns.append(
            f"{filler}{x}{y}:" + (f"{carry}{digit}" if dialect is Dialect.A else f"{digit}{carry}")
        )
    return f"{','.join(columns)};{problem.a + problem.b}"


def build_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """One token a character, saved under `path` in the Hugging Face format."""
    core = Tokenizer(models.WordLevel({symbol: index for index, symbol in enumerate(SYMBOLS)}))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=demo.PAD,
        bos_token=demo.BOS,
        eos_token=demo.EOS,
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
    )
    tokenizer.save_pretrained(str(path))
    return tokenizer


def write_prompts(path: Path, problems: Iterable[Problem]) -> None:
    """Prompts as `opd_train.read_prompts` takes them, with their answers."""
    demo.write_prompts_jsonl(path, problems)


def correct(text: str, answer: str) -> bool:
    """Whether a response ends in the right number."""
    return bool(_ANSWER.search(text)) and answer_of(text) == int(answer)


def examples(
    tokenizer: PreTrainedTokenizerFast, problems: Sequence[Problem], share_b: float, seed: int
) -> list[tuple[list[int], int]]:
    """Token ids of prompt and correct response, and the prompt's length; a share of them in dialect B."""
    rng = np.random.default_rng(seed)
    found = []
    for problem in problems:
        dialect = Dialect.B if rng.random() < share_b else Dialect.A
        prompt = tokenizer(prompt_text(problem), add_special_tokens=False)["input_ids"]
        solution = tokenizer(solution_text(problem, dialect, rng), add_special_tokens=False)["input_ids"]
        found.append(([*prompt, *solution, tokenizer.eos_token_id], len(prompt)))
    return found
