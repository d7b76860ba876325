"""Pieces of the pages of `opd report`: everything from files is escaped, images are inline.

A page loads nothing from elsewhere and runs nothing.
"""

from __future__ import annotations

import base64
import html
import io
import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

__all__ = ["MAX_ROWS", "cut_note", "document", "figure_tag", "grid", "plt", "shown", "table", "text"]

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_TEXT, MAX_ROWS = 500, 400
"""Longer texts and tables are cut; the files have the rest."""
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 80rem; margin: 2rem auto; padding: 0 1rem }
figure { display: inline-block; width: 48%; min-width: 26rem; margin: 0 0 1rem }
figcaption { display: none }
img { width: 100% }
table { border-collapse: collapse; margin: 0 0 1rem; font-size: 14px }
td, th { border: 1px solid #ccc; padding: .2rem .6rem; text-align: left; overflow-wrap: anywhere }
.raised { background: #fde8e8 }
"""
# Text stays text, which is smaller, and the same figure gives the same bytes.
_SVG: Any = {"svg.fonttype": "none", "svg.hashsalt": "opd"}


def document(title: str, body: str) -> str:
    """A whole page. `title` is escaped here, `body` is HTML."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{text(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{text(title)}</h1>
{body}
</body>
</html>
"""


def text(value: object) -> str:
    """Text from a file, harmless in HTML: markup, control and bidi characters escaped, length limited."""
    shown = "".join(char if char.isprintable() else f"\\u{ord(char):04x}" for char in str(value))
    return html.escape(shown if len(shown) <= MAX_TEXT else shown[: MAX_TEXT - 3] + "...")


def table(rows: Iterable[tuple[object, object]]) -> str:
    """Names and values, a row each."""
    found = list(rows)
    if not found:
        return "<p>Unknown.</p>"
    lines = (
        f"<tr><th>{text(name)}</th><td>{text(shown(value))}</td></tr>" for name, value in found[:MAX_ROWS]
    )
    return "<table>\n" + "\n".join(lines) + f"\n</table>{cut_note(len(found))}"


def grid(heads: Sequence[object], lines: Sequence[Sequence[object]]) -> str:
    """A table with headings."""
    head = "".join(f"<th>{text(name)}</th>" for name in heads)
    rows = ("".join(f"<td>{text(shown(cell))}</td>" for cell in line) for line in lines[:MAX_ROWS])
    return (
        f"<table><tr>{head}</tr>\n"
        + "\n".join(f"<tr>{row}</tr>" for row in rows)
        + f"\n</table>{cut_note(len(lines))}"
    )


def cut_note(n: int) -> str:
    """What stands below a table of `n` rows."""
    return f"<p>{n - MAX_ROWS} more are left out.</p>" if n > MAX_ROWS else ""


def shown(value: object) -> str:
    """A value as text, numbers with six digits."""
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else str(value)


def figure_tag(title: str, figure: Figure, kind: str = "png") -> str:
    """The figure as an inline image, and closed.

    Args:
        kind: "svg" for few shapes, "png" for many.
    """
    buffer = io.BytesIO()
    with warnings.catch_warnings(), mpl.rc_context(_SVG):
        # A name in a script that the font lacks is drawn as boxes, or by the browser.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        warnings.filterwarnings("ignore", message="Matplotlib currently does not support")
        metadata = {"Date": None} if kind == "svg" else None
        figure.savefig(buffer, format=kind, dpi=110, metadata=metadata)
    plt.close(figure)
    mime = "image/svg+xml" if kind == "svg" else "image/png"
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return (
        f'<figure><img alt="{text(title)}" src="data:{mime};base64,{data}">'
        f"<figcaption>{text(title)}</figcaption></figure>"
    )
