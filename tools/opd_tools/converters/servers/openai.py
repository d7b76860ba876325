"""Chat completions of OpenAI, and of servers that speak its API: log-probs of generated tokens, as text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opd_store import FormatError, InvalidArgumentError
from opd_tools.converters.core.format import Format, ReadSettings
from opd_tools.converters.core.record import Contents, Record, Tally
from opd_tools.converters.core.source import Source
from opd_tools.converters.reading.json_rows import (
    FINISH_REASONS,
    Rows,
    integers,
    numbers,
    padded,
    records,
    width,
)
from opd_tools.converters.reading.text import TextTokenizer
from opd_tools.converters.servers.exchange import Exchange, Prompts, exchange

_BY_ID = "token_id:"
"""How servers spell a token when they are asked for ids instead of text."""
LEFT_OUT = "rollouts with a token that is spelt like no id or like several, left out"


class Spelling:
    """Ids of tokens by their bytes, where exactly one id has these."""

    def __init__(self, prompts: Prompts, tally: Tally) -> None:
        self._prompts, self._tally = prompts, tally
        self._ids: dict[bytes, tuple[int, ...]] | None = None

    def id_of(self, entry: Mapping[str, Any], where: str) -> int | None:
        """None where no id, or more than one, has these bytes. Raises InvalidArgumentError, FormatError."""
        token = entry["token"]
        if isinstance(token, str) and token.startswith(_BY_ID):
            return int(token[len(_BY_ID) :])
        given = entry.get("bytes")
        spelt = bytes(given) if given is not None else str(token).encode()
        if self._ids is None:
            self._ids = self._tokenizer(where).spelling()
        found = self._ids.get(spelt, ())
        return found[0] if len(found) == 1 else None

    def rows(self, content: Sequence[Mapping[str, Any]], where: str) -> Rows | None:
        """Rows of `top_logprobs`; entries without an id of their own are counted, and stay in the tail."""
        ids: list[list[int]] = []
        logprobs: list[list[float]] = []
        for position in content:
            entries = [(self.id_of(e, where), e["logprob"]) for e in position.get("top_logprobs") or ()]
            kept = [(token, value) for token, value in entries if token is not None]
            if len(kept) < len(entries):
                left_out = len(entries) - len(kept)
                self._tally["entries spelt like no id or like several, moved into the tail"] += left_out
            ids.append([token for token, _ in kept])
            logprobs.append([value for _, value in kept])
        return padded(ids, logprobs, where) if any(ids) else None

    def require_same_text(self, tokens: NDArray[np.int64], choice: Mapping[str, Any], where: str) -> None:
        """Raise FormatError unless ids decode to the bytes that they were found by, and to the message."""
        content = choice["logprobs"]["content"]
        if any(str(position["token"]).startswith(_BY_ID) for position in content):
            return
        spelt = b"".join(bytes(p["bytes"]) if p.get("bytes") else str(p["token"]).encode() for p in content)
        text = spelt.decode("utf-8", "replace")
        decoded = self._tokenizer(where).decode(tokens)
        if "\ufffd" in text + decoded:  # characters that the response cut
            return
        # Some decoders take the first word's space away.
        if text.strip() != decoded.strip():
            raise FormatError(
                f"{where}: ids decode to {decoded!r:.80}, but the file says {text!r:.80}; "
                "is this the right tokenizer?"
            )
        message = (choice.get("message") or {}).get("content")
        if isinstance(message, str) and message.strip() not in text:
            raise FormatError(f"{where}: log-probs are of {text!r:.80}, but the message is {message!r:.80}")

    def _tokenizer(self, where: str) -> TextTokenizer:
        if (tokenizer := self._prompts.tokenizer) is None:
            raise InvalidArgumentError(f"{where}: tokens are text; give --tokenizer")
        return tokenizer


def generated(
    said: Exchange, choice: Mapping[str, Any], prompt: NDArray[np.int64], spelling: Spelling, tally: Tally
) -> Record | None:
    """The rollout of a choice with `logprobs.content`; None where ids cannot be told, which is counted."""
    content = choice["logprobs"]["content"]
    if not content:
        tally["responses without a token, left out"] += 1
        return None
    if choice.get("token_ids") is not None:
        tokens = integers(choice["token_ids"], said.where, "token_ids")
    else:
        found = [spelling.id_of(position, said.where) for position in content]
        if None in found:
            tally[LEFT_OUT] += 1
            return None
        tokens = np.array(found, np.int64)
        spelling.require_same_text(tokens, choice, said.where)
    if len(tokens) != len(content):
        raise FormatError(f"{said.where}: {len(tokens)} token ids, but {len(content)} log-probs")
    rows = spelling.rows(content, said.where)
    return Record(
        where=said.where,
        token_ids=np.concatenate([prompt, tokens]),
        prompt_len=len(prompt),
        teacher_logprob=numbers([position["logprob"] for position in content], said.where, "logprob"),
        topk_ids=None if rows is None else rows[0],
        topk_logprob=None if rows is None else rows[1],
        sample_id=choice_name(said, choice),
        finish_reason=finish_reason(choice, stop_is_there=choice.get("token_ids") is not None),
    )


def choice_name(said: Exchange, choice: Mapping[str, Any]) -> str:
    """A name for the rollout of one choice of several."""
    name = said.name or said.where
    index = choice.get("index")
    return f"{name}#{index}" if index else name


def finish_reason(choice: Mapping[str, Any], *, stop_is_there: bool) -> str:
    """Why a choice ended; "stop" only where a stop token is the last token."""
    reason = FINISH_REASONS.get(str(choice.get("finish_reason")), "unknown")
    matched_text = isinstance(choice.get("stop_reason"), str)
    return "unknown" if reason == "stop" and (matched_text or not stop_is_there) else reason


def choices_of(body: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Choices of a response. Raises FormatError."""
    choices = body.get("choices")
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise FormatError("no list of choices")
    return choices


def prompt_count(body: Mapping[str, Any]) -> int | None:
    """Tokens of the prompt that the server counted."""
    count = (body.get("usage") or {}).get("prompt_tokens")
    return count if isinstance(count, int) else None


def response_of(value: Any) -> Mapping[str, Any]:  # noqa: ANN401
    """The response in a JSON value for telling formats apart; empty if it is nothing of the kind."""
    try:
        said = exchange(value, "", Tally())
    except (FormatError, TypeError):
        return {}
    return {} if said is None else said.body


def dicts_in(value: Any) -> list[Mapping[str, Any]]:  # noqa: ANN401
    """Objects of a list; none if it is no list."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def detect(source: Source) -> bool:
    """Whether the first response has choices with `logprobs.content`, and no log-probs of its prompt."""
    body = response_of(source.first_json())
    found = [choice.get("logprobs") for choice in dicts_in(body.get("choices"))[:1]]
    content = [isinstance(logprobs, dict) and isinstance(logprobs.get("content"), list) for logprobs in found]
    return any(content) and not body.get("prompt_logprobs")


def read(source: Source, settings: ReadSettings) -> Contents:
    """Tokens are text, so a tokenizer is needed unless the server was asked for ids."""
    tally = Tally()
    return Contents(
        records=_records(source, settings, tally),
        topk=width(_records(source, settings, Tally()), settings),
        lost=(
            "the stop token that ended a response is not in the file",
            "whether log-probs are at temperature 1 is not in the file",
        ),
        tally=tally,
    )


def _records(source: Source, settings: ReadSettings, tally: Tally) -> Iterator[Record]:
    prompts = Prompts(settings, tally)
    spelling = Spelling(prompts, tally)

    def one(value: Any, where: str) -> Iterator[Record]:  # noqa: ANN401
        said = exchange(value, where, tally)
        if said is None:
            return
        for choice in choices_of(said.body):
            if not choice.get("logprobs"):
                raise FormatError(f"{where}: a choice without logprobs; ask for logprobs and top_logprobs")
            prompt = prompts.of(said, choice, count=prompt_count(said.body))
            record = generated(said, choice, prompt, spelling, tally)
            if record is not None:
                yield record

    return records(source, one)


FORMAT = Format(
    name="openai",
    title="OpenAI chat completions (JSON)",
    alignment="label: entry t of logprobs.content is about generated token t",
    keeps="generated tokens that their bytes tell exactly, their log-probs, top_logprobs",
    loses="tokens that are spelt alike, the stop token, the temperature; prompts are encoded again, from "
    "messages with the chat template",
    tested="a file that the types of OpenAI's Python package made, and files built from its layout",
    detect=detect,
    read=read,
)
