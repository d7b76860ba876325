"""A rollout as a person reads it: text, surprise, alternatives. Nothing here prints.

Axes: R = response tokens, K = ranks read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.style import Style
from rich.text import Text

from opd_store import NO_ID, Rollout
from opd_tools.console import MAX_TEXT, printable
from opd_tools.show.token_text import TokenTexts

SHADES = (
    (0.1, "#3d3a14"),
    (0.5, "#5c4a00"),
    (1.0, "#8a5a00"),
    (2.0, "#b04a00"),
    (4.0, "#c01818"),
    (8.0, "#d4007a"),
)
"""Nats of surprise from which on a token has this background. Dark enough for light text."""
_SILENT = 0.05
"""Nats below which plain text leaves the number out."""
_INDENT = "  "


@dataclass(frozen=True, slots=True)
class Alternative:
    """One of the most likely ids at a position."""

    id: int
    text: str | None
    logprob: float


@dataclass(frozen=True, slots=True)
class Token:
    """One token of a response."""

    id: int
    text: str | None
    """None without a tokenizer."""
    logprob: float | None
    """Nats, the teacher's; None where the cache does not say."""
    is_masked: bool
    """Not trained on."""
    alternatives: tuple[Alternative, ...]

    @property
    def surprise(self) -> float | None:
        """Nats, minus the log-prob."""
        return None if self.logprob is None else abs(self.logprob)


@dataclass(frozen=True, slots=True)
class View:
    """One rollout of a cache."""

    row: int
    rollout: Rollout
    prompt: tuple[str, ...] | None
    """None without a tokenizer."""
    tokens: tuple[Token, ...]
    left_out: int
    """Response tokens that are not shown."""


def view_of(
    row: int, rollout: Rollout, texts: TokenTexts | None, *, alternatives: int, max_tokens: int | None
) -> View:
    """Put together what is shown of a rollout that was read with enough ranks."""
    shown = rollout.response_len if max_tokens is None else min(max_tokens, rollout.response_len)
    ids = rollout.token_ids[: rollout.prompt_len + shown].tolist()
    pieces = None if texts is None else texts.texts(ids)
    logprobs = sampled_logprob(rollout)
    mask = rollout.loss_mask
    tokens = []
    for at in range(shown):
        logprob = float(logprobs[at])
        place = rollout.prompt_len + at
        tokens.append(
            Token(
                id=ids[place],
                text=None if pieces is None else pieces[place],
                logprob=None if np.isnan(logprob) else logprob,
                is_masked=mask is not None and not mask[at],
                alternatives=_alternatives(rollout, at, alternatives, texts),
            )
        )
    prompt = None if pieces is None else tuple(pieces[: rollout.prompt_len])
    return View(row, rollout, prompt, tuple(tokens), rollout.response_len - shown)


def sampled_logprob(rollout: Rollout) -> NDArray[np.float32]:
    """[R] nats, the teacher's of each sampled token, from the top-k if need be; NaN where unknown."""
    if rollout.teacher_logprob is not None:
        return rollout.teacher_logprob
    found = np.full(rollout.response_len, np.nan, np.float32)
    if rollout.topk_ids is not None and rollout.topk_logprob is not None:
        hit = rollout.topk_ids == rollout.response_ids[:, None]
        at = hit.any(axis=1)
        found[at] = rollout.topk_logprob[hit]
    return found


def _alternatives(rollout: Rollout, at: int, n: int, texts: TokenTexts | None) -> tuple[Alternative, ...]:
    if not n or rollout.topk_ids is None or rollout.topk_logprob is None:
        return ()
    pairs = zip(rollout.topk_ids[at, :n].tolist(), rollout.topk_logprob[at, :n].tolist(), strict=True)
    return tuple(
        Alternative(token_id, None if texts is None else texts.text(token_id), logprob)
        for token_id, logprob in pairs
        if token_id != NO_ID
    )


def facts(view: View) -> list[str]:
    """The heading: what else is known of a rollout. Safe to print."""
    rollout = view.rollout
    found = [f"row {view.row}"]
    if rollout.sample_id is not None:
        found.append(printable(rollout.sample_id, 60))
    found.append(f"{rollout.prompt_len:,} + {rollout.response_len:,} tokens")
    found.append(rollout.finish_reason)
    known = sampled_logprob(rollout)
    known = known[~np.isnan(known)]
    if len(known):
        found.append(f"log-prob {float(known.mean(dtype=np.float64)):.3f} a token")
    if rollout.teacher:
        found.append(f"teacher {rollout.teacher}")
    if rollout.policy_version is not None:
        found.append(f"policy version {rollout.policy_version}")
    if rollout.reward is not None:
        found.append(f"reward {rollout.reward:.6g}")
    if rollout.label is not None:
        found.append(f"label {printable(rollout.label, 60)}")
    found += [f"{printable(name, 64)}={printable(value, 60)}" for name, value in rollout.extra.items()]
    return found


def shade(surprise: float | None) -> str | None:
    """Background of a token; None for the terminal's own."""
    if surprise is None:
        return None
    return next((colour for least, colour in reversed(SHADES) if surprise >= least), None)


def legend() -> Text:
    """One line that explains the colours."""
    text = Text("surprise in nats: ", style="dim")
    for least, colour in SHADES:
        text.append(f" {least:g} ", style=Style(color="#ffffff", bgcolor=colour))
    text.append("  masked", style="strike")
    return text


def visible(text: str, limit: int = MAX_TEXT, *, as_line: bool = False) -> str:
    """Text of a token, safe to print; a line feed stays one, behind a sign, unless `as_line`."""
    if len(text) > limit:
        text = text[: limit - 3] + "..."
    shown = "\n".join(
        "\u21e5".join(printable(part, None) for part in line.split("\t")) for line in text.split("\n")
    )
    return shown.replace("\n", "\u23ce" if as_line else f"\u23ce\n{_INDENT}")


def flowing(view: View) -> Text:
    """The text, coloured by surprise. To be printed indented, so that nothing in it looks like a heading."""
    text = Text(_joined(_prompt_pieces(view)), style="")
    text.stylize("dim")
    gap = "" if view.prompt is not None else " "
    for token in view.tokens:
        colour = shade(token.surprise)
        style = Style(
            color="#ffffff" if colour else None, bgcolor=colour, strike=token.is_masked or None, bold=None
        )
        text.append(gap)
        text.append(_shown(token), style=style)
    text.append(_rest(view), style="dim")
    return text


def flowing_plain(view: View) -> str:
    """The same without colour: the surprise follows a token as a number, masked tokens stand in tildes."""
    pieces = [_INDENT, "prompt: ", _joined(_prompt_pieces(view)), f"\n{_INDENT}response: "]
    gap = "" if view.prompt is not None else " "
    for token in view.tokens:
        shown = f"~{_shown(token)}~" if token.is_masked else _shown(token)
        number = "" if token.surprise is None or token.surprise < _SILENT else f"[{token.surprise:.1f}]"
        # The number belongs to what stands before the line feed.
        body, feed, rest = shown.partition("\n") if shown.endswith(f"\n{_INDENT}") else (shown, "", "")
        pieces.append(f"{body}{number}{feed}{rest}{gap}")
    return "".join(pieces).rstrip(" ") + _rest(view)


def table(view: View, *, colour: bool) -> Text:
    """One line a token: position, id, text, log-prob, alternatives."""
    text = Text()
    text.append(f"{_INDENT}{_joined(_prompt_pieces(view))}\n", style="dim")
    width = min(max((len(_quoted(token.text)) for token in view.tokens), default=0), 24)
    for at, token in enumerate(view.tokens):
        background = shade(token.surprise) if colour else None
        style = Style(color="#ffffff" if background else None, bgcolor=background)
        text.append(f"{_INDENT}{at:>6} {token.id:>7} ")
        text.append(_quoted(token.text).ljust(width), style=style)
        text.append(f" {_number(token.logprob)}{' masked' if token.is_masked else ''}")
        others = ", ".join(
            f"{_quoted(other.text) or other.id} {_number(other.logprob).strip()}"
            for other in token.alternatives
        )
        text.append(f"  {others}\n" if others else "\n", style="dim")
    text.rstrip()
    text.append(_rest(view), style="dim")
    return text


def as_json(view: View) -> dict[str, Any]:
    """One document. Texts are as they are in the file; JSON escapes them."""
    rollout = view.rollout
    tokens = [
        {"id": token.id}
        | ({} if token.text is None else {"text": token.text})
        | {"logprob": token.logprob, "masked": token.is_masked}
        | (
            {"alternatives": [_alternative_json(other) for other in token.alternatives]}
            if token.alternatives
            else {}
        )
        for token in view.tokens
    ]
    return {
        "row": view.row,
        "sample_id": rollout.sample_id,
        "finish_reason": rollout.finish_reason,
        "policy_version": rollout.policy_version,
        "teacher": rollout.teacher,
        "reward": rollout.reward,
        "label": rollout.label,
        "extra": dict(rollout.extra),
        "prompt_ids": rollout.token_ids[: rollout.prompt_len].tolist(),
        "prompt": None if view.prompt is None else "".join(view.prompt),
        "response": tokens,
        "left_out": view.left_out,
    }


def _alternative_json(other: Alternative) -> dict[str, Any]:
    text = {} if other.text is None else {"text": other.text}
    return {"id": other.id, **text, "logprob": None if np.isinf(other.logprob) else other.logprob}


def _prompt_pieces(view: View) -> Sequence[str]:
    if view.prompt is not None:
        return view.prompt
    return [f"{token_id} " for token_id in view.rollout.token_ids[: view.rollout.prompt_len].tolist()]


def _joined(pieces: Sequence[str]) -> str:
    return "".join(visible(piece) for piece in pieces)


def _shown(token: Token) -> str:
    return str(token.id) if token.text is None else visible(token.text)


def _quoted(text: str | None) -> str:
    return "" if text is None else f"'{visible(text, 40, as_line=True)}'"


def _number(logprob: float | None) -> str:
    # Without a minus before a zero.
    return "      -" if logprob is None else f"{round(logprob, 3) + 0.0:7.3f}"


def _rest(view: View) -> str:
    return f"\n{_INDENT}... {view.left_out:,} more tokens" if view.left_out else ""
