"""What the ids of a rollout say, token by token."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opd_store import CacheMeta, InvalidArgumentError, MismatchError
from opd_tools.converters.reading.text import identity, tokenizer_file

_LONGEST_CHARACTER = 4
"""Tokens, of a byte each."""
_UNFINISHED = "\ufffd"


class TokenTexts:
    """Texts of tokens through a tokenizer.json."""

    def __init__(self, path: Path, meta: CacheMeta) -> None:
        """Read the tokenizer.

        Args:
            path: a tokenizer.json or a directory with one.
            meta: of the cache whose ids it is for.

        Raises:
            InvalidArgumentError: not a tokenizer.json.
            MismatchError: the ids of the cache belong to another tokenizer.
        """
        file = tokenizer_file(path)
        fingerprint, _ = identity(file)
        if fingerprint != meta.tokenizer_fingerprint:
            raise MismatchError(
                f"{file}: its fingerprint is {fingerprint}, the cache has {meta.tokenizer_fingerprint}; give "
                "the tokenizer that the cache was made with, or leave --tokenizer out to see ids",
                field="tokenizer_fingerprint",
                expected=meta.tokenizer_fingerprint,
                found=fingerprint,
            )
        from tokenizers import Tokenizer

        try:
            self._tokenizer: Any = Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises nothing narrower
            raise InvalidArgumentError(f"{file}: not a tokenizer.json: {error!s:.200}") from error
        self.text = functools.lru_cache(maxsize=1 << 16)(self._text)
        """The text of one id anywhere but at the start; its name in the vocabulary where it has no text."""

    def texts(self, ids: Sequence[int]) -> list[str]:
        """Text of each id where it stands; all of them together are the text of the sequence.

        Of tokens that make up one character only together, the last one has it and the others have "". A
        token without any text has its name in the vocabulary.
        """
        found: list[str] = []
        first = shown = 0  # ids[first:shown] is context, ids[shown:] waits to become whole characters
        for end in range(1, len(ids) + 1):
            context, now = self._decode(ids[first:shown]), self._decode(ids[first:end])
            text = now[len(context) :] if now.startswith(context) else ""
            # Some decoders give up a whole run of bytes for one that is missing, so context may change too.
            if now.endswith(_UNFINISHED):
                if end < len(ids) and end - shown < _LONGEST_CHARACTER:
                    found.append("")
                    continue
                # Bytes that are no character.
                found[shown:] = [self.text(token_id) for token_id in ids[shown:end]]
            else:
                found.append(text or self.text(ids[end - 1]))
            first, shown = shown, end
        return found

    def _text(self, token_id: int) -> str:
        name = self._tokenizer.id_to_token(token_id)
        if name is None:
            return f"<{token_id}>"
        anchor = [self._anchor]
        before, both = self._decode(anchor), self._decode([*anchor, token_id])
        text = both[len(before) :] if both.startswith(before) else ""
        return text if text and _UNFINISHED not in text else str(name)

    @functools.cached_property
    def _anchor(self) -> int:
        """A token with a text, after which others have the text that they have inside a sequence."""
        # By name: encoding a text that is not in a vocabulary of words is an error.
        for name in ("a", "A", "1", "."):
            token_id = self._tokenizer.token_to_id(name)
            if token_id is not None and self._decode([token_id]):
                return int(token_id)
        return 0

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False)) if len(ids) else ""
