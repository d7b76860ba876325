"""Small bar charts as SVG text: nothing to install, and the same numbers give the same bytes."""

from __future__ import annotations

import html
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from opd_tools.console import printable

_WIDTH, _HEIGHT, _LEFT, _TOP, _BELOW = 640, 260, 56, 36, 44
_BAR = 22


def histogram(title: str, unit: str, values: NDArray[np.integer], *, bins: int = 40) -> str:
    """How often values occur, in bins of equal width."""
    counts, edges = np.histogram(values, bins=bins) if len(values) else (np.zeros(1), np.array([0.0, 1.0]))
    inner = _WIDTH - _LEFT - 12
    tall = _HEIGHT - _TOP - _BELOW
    most = max(int(counts.max()), 1)
    shapes = []
    for at, count in enumerate(counts.tolist()):
        height = tall * count / most
        x = _LEFT + inner * at / len(counts)
        width = max(inner / len(counts) - 1, 1)
        shapes.append(_bar(x, _TOP + tall - height, width, height))
    base = _HEIGHT - _BELOW
    shapes += [
        f'<path d="M{_LEFT} {_TOP}V{base}H{_WIDTH - 12}" fill="none" stroke="#555"/>',
        _text(_LEFT - 6, _TOP + 10, f"{most:,}", "end"),
        _text(_LEFT - 6, base, "0", "end"),
        _text(_LEFT, base + 16, f"{edges[0]:,.0f}", "middle"),
        _text(_WIDTH - 12, base + 16, f"{edges[-1]:,.0f}", "end"),
        _text(_LEFT + inner / 2, base + 32, unit, "middle"),
    ]
    return _svg(title, _HEIGHT, shapes)


def bars(title: str, unit: str, values: Sequence[tuple[str, float]]) -> str:
    """A horizontal bar for each name."""
    left = 200
    most = max((value for _, value in values), default=1.0) or 1.0
    shapes = []
    for at, (name, value) in enumerate(values):
        y = _TOP + at * _BAR
        width = (_WIDTH - left - 90) * value / most
        shapes.append(_text(left - 8, y + 13, name, "end"))
        shapes.append(_bar(left, y + 2, width, _BAR - 7))
        shapes.append(_text(left + width + 6, y + 13, f"{value:.2f}", "start"))
    height = _TOP + len(values) * _BAR + 28
    shapes.append(_text(_WIDTH / 2, height - 8, unit, "middle"))
    return _svg(title, height, shapes)


def _svg(title: str, height: float, shapes: list[str]) -> str:
    head = _text(_WIDTH / 2, 20, title, "middle", size=14)
    lines = "\n".join([head, *shapes])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height:g}" '
        f'width="{_WIDTH}" height="{height:g}" font-family="sans-serif">\n'
        f'<rect width="100%" height="100%" fill="#fff"/>\n{lines}\n</svg>\n'
    )


def _bar(x: float, y: float, width: float, height: float) -> str:
    return f'<rect x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{height:.2f}" fill="#4477aa"/>'


def _text(x: float, y: float, text: str, anchor: str, *, size: int = 11) -> str:
    shown = html.escape(printable(text, 60))
    return (
        f'<text x="{x:.2f}" y="{y:.2f}" font-size="{size}" text-anchor="{anchor}" fill="#222">{shown}</text>'
    )
