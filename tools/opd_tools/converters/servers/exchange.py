"""One exchange with a server as people log it: the response, and the request if they kept it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opd_store import FormatError, InvalidArgumentError
from opd_tools.converters.core.format import ReadSettings
from opd_tools.converters.core.record import Tally
from opd_tools.converters.reading.json_rows import integers, name_of
from opd_tools.converters.reading.text import TextTokenizer

LINE = "`request` beside `response` in each line, or prompt_token_ids, prompt or messages"
"""Where a prompt is looked for, for messages."""
_IDS = ("prompt_token_ids", "prompt_ids", "input_ids")


@dataclass(frozen=True, kw_only=True, slots=True)
class Exchange:
    """A response and what is known about its request."""

    where: str
    body: Mapping[str, Any]
    """The response."""
    request: Mapping[str, Any]
    """Fields of the request, or those that somebody added to the response."""
    name: str | None


def exchange(value: Any, where: str, tally: Tally) -> Exchange | None:  # noqa: ANN401
    """The exchange in a JSON value: a response, `request` beside `response`, or a line of a batch output.

    None for a request that failed, which is counted.

    Raises:
        FormatError: not an object.
    """
    if not isinstance(value, dict):
        raise FormatError(f"{where}: expected an object, found {type(value).__name__}")
    response = value.get("response", value)
    if isinstance(response, dict) and "body" in response:
        status = response.get("status_code")
        response = response["body"] if status is None or status < 400 else None
    if not isinstance(response, dict) or (value.get("error") and response is value):
        if not value.get("error") and "response" not in value:
            raise FormatError(f"{where}: no response in it")
        tally["requests that failed, left out"] += 1
        return None
    asked = value.get("request")
    request = asked.get("body", asked) if isinstance(asked, dict) else {}
    if not isinstance(request, dict):
        raise FormatError(f"{where}: a request that is no object")
    named = (response.get(key) for key in ("sample_id", "id", "request_id"))
    name = name_of(value.get("custom_id"), value.get("sample_id"), *named)
    return Exchange(where=where, body=response, request={**value, **request}, name=name)


class Prompts:
    """Token ids of prompts: as logged, else by encoding what was logged."""

    def __init__(self, settings: ReadSettings, tally: Tally) -> None:
        self._path = settings.tokenizer
        self._tokenizer: TextTokenizer | None = None
        self._tally = tally

    @property
    def tokenizer(self) -> TextTokenizer | None:
        """The tokenizer that the user gave, loaded when it is first asked for."""
        if self._tokenizer is None and self._path is not None:
            self._tokenizer = TextTokenizer(self._path)
        return self._tokenizer

    def of(self, said: Exchange, choice: Mapping[str, Any], *, count: int | None) -> NDArray[np.int64]:
        """Ids of the prompt that a choice answers.

        Args:
            count: tokens of the prompt that the server counted, or None.

        Raises:
            FormatError: nothing says what the prompt was.
            InvalidArgumentError: it is text, and there is no tokenizer, or no chat template.
        """
        for place in (choice, said.body, said.request):
            for key in _IDS:
                if place.get(key) is not None:
                    return integers(place[key], said.where, key)
        prompt = said.request.get("prompt")
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
            n = max(1, int(said.request.get("n") or 1))
            prompt = prompt[int(choice.get("index", 0)) // n]
        if isinstance(prompt, list):
            return integers(prompt, said.where, "prompt")
        messages = said.request.get("messages")
        if isinstance(prompt, str):
            encoded = self._encoded(prompt, said.where, count)
        elif isinstance(messages, list):
            encoded = self._required(said.where).chat(messages, said.request.get("tools"), said.where)
        else:
            raise FormatError(f"{said.where}: nothing says what the prompt was; needed is {LINE}")
        self._tally[
            "prompts that were text, encoded again: their ids may differ from the ones sampled with"
        ] += 1
        if count is not None and count != len(encoded):
            self._tally["prompts whose encoding has another length than the server counted"] += 1
        return encoded

    def _encoded(self, text: str, where: str, count: int | None) -> NDArray[np.int64]:
        tokenizer = self._required(where)
        with_special = tokenizer.encode(text, where, special=True)
        if count is None or len(with_special) == count:
            return with_special
        plain = tokenizer.encode(text, where)
        return plain if len(plain) == count else with_special

    def _required(self, where: str) -> TextTokenizer:
        if (tokenizer := self.tokenizer) is None:
            raise InvalidArgumentError(f"{where}: the prompt is text; give --tokenizer")
        return tokenizer
