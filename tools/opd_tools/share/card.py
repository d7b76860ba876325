"""The card of a published cache, in Markdown: what it is, where it came from, how to load it."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable

from opd_store import ModelInfo
from opd_tools.console import printable
from opd_tools.share.facts import Facts
from opd_tools.share.preview import PREVIEW

CARD = "README.md"
_MARKUP = re.compile(r"([\\`*_\[\]|~])")
_MAX_CELL = 300
# What the Hub calls licences; anything else is "other", with its name beside.
_HUB_LICENCES = {
    "afl-3.0", "agpl-3.0", "apache-2.0", "artistic-2.0", "bigscience-openrail-m", "bsd-2-clause",
    "bsd-3-clause", "bsl-1.0", "cc", "cc-by-2.0", "cc-by-3.0", "cc-by-4.0", "cc-by-nc-4.0",
    "cc-by-nc-nd-4.0", "cc-by-nc-sa-4.0", "cc-by-nd-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc0-1.0",
    "cdla-permissive-2.0", "epl-2.0", "gemma", "gpl-2.0", "gpl-3.0", "lgpl-3.0", "llama2", "llama3",
    "llama3.1", "llama3.2", "llama3.3", "mit", "mpl-2.0", "odbl", "odc-by", "openrail", "unlicense", "zlib",
}  # fmt: skip
_CONSISTENCY = {
    "consistent": "The student was fine-tuned on samples of the same weights that scored these rollouts.",
    "inconsistent": "The student was fine-tuned on samples of **other weights** than those that scored these "
    "rollouts: the offline objective has a bias that no bound on drift removes (arXiv 2604.13010, thm 3.8).",
    "unknown": "Whether the student was fine-tuned on samples of the same teacher is not known.",
}


def card(facts: Facts, figures: Iterable[tuple[str, str]], *, has_text: bool) -> str:
    """The file.

    Args:
        figures: (alternative text, path) of images beside it.
        has_text: whether the preview has the rollouts as text.
    """
    images = "\n\n".join(f"![{_md(about)}]({path})" for about, path in figures)
    pinned = f"{facts.url}@{facts.digest}"
    version = f" Tag `{_code(facts.tag)}`." if facts.tag else ""
    shows = "text and native columns" if has_text else "native columns"
    return f"""---
{_front_matter(facts)}
---

# {_md(facts.title)}

{_md(facts.summary, None)}

This is version `{facts.digest}`.{version} The digest names every byte: whoever opens the address below gets
these rollouts or an error. Log-probs are natural, at temperature 1, over the whole vocabulary; row *t* of a
response is about its token *t*.

## Load it

```python
import opd_store

cache = opd_store.open({json.dumps(printable(pinned, None))})
rollout = cache[0]
print(rollout.token_ids, rollout.topk_ids, rollout.topk_logprob, rollout.log_tail)
```

`pip install opd-store` reads it; `opd verify` checks every byte, `opd pull` copies it, whole or in part.
[`{PREVIEW}`]({PREVIEW}) has the first rollouts for viewers ({shows}, without the top-k).

## Where it came from

{_table(("field", "value"), _provenance(facts))}

{_CONSISTENCY[facts.consistency]}

## Size and error

{_table(("", ""), _numbers(facts))}

{_table(("column", "bytes a response token"), [(n, f"{v:.3f}") for n, v in facts.columns.items()])}

Log-probs and tails differ by at most {facts.max_error:.3g} nats from those that were written; ids are exact.

{images}
"""


def _front_matter(facts: Facts) -> str:
    licence = facts.licence.strip().lower()
    fields: dict[str, object] = {"license": licence if licence in _HUB_LICENCES else "other"}
    if licence not in _HUB_LICENCES:
        fields["license_name"] = re.sub(r"[^a-z0-9.]+", "-", licence).strip("-")[:60] or "see-card"
    fields |= {
        "pretty_name": facts.title,
        "size_categories": [facts.size_category],
        "task_categories": ["text-generation"],
        "tags": ["opd-store", "distillation", "on-policy-distillation", "logprobs"],
        "configs": [
            {
                "config_name": "preview",
                "default": True,
                "data_files": [{"split": "train", "path": "preview/*.parquet"}],
            }
        ],
    }
    if facts.base_model is not None:
        fields["base_model"] = facts.base_model
    # JSON is YAML, whatever a text holds, once what does not print is escaped.
    lines = ((name, json.dumps(_printable(value), ensure_ascii=False)) for name, value in fields.items())
    return "\n".join(f"{name}: {value}" for name, value in lines)


def _printable(value: object) -> object:
    if isinstance(value, str):
        return printable(value, _MAX_CELL)
    if isinstance(value, list):
        return [_printable(item) for item in value]
    if isinstance(value, dict):
        return {name: _printable(item) for name, item in value.items()}
    return value


def _provenance(facts: Facts) -> list[tuple[str, str]]:
    meta = facts.meta
    rows: list[tuple[str, object]] = [("licence of the teacher's outputs", meta.licence)]
    models: list[tuple[str, ModelInfo | None]] = [
        ("teacher", meta.teacher),
        *((f"teacher of route {route}", model) for route, model in enumerate(meta.other_teachers, 1)),
        ("teacher of the fine-tuning", meta.sft_teacher),
        ("behaviour policy", meta.behaviour),
        ("reference", meta.reference),
    ]
    for what, model in models:
        if model is not None:
            rows += [(f"{what}: {name}", value) for name, value in model.to_json().items()]
    if meta.sampler is not None:
        sampler = meta.to_json()["sampler"]
        rows += [(f"sampler: {name}", value) for name, value in sampler.items()]
    names = (
        "prompt_dataset",
        "prompt_revision",
        "truncation",
        "tokenizer_fingerprint",
        "vocab_size",
        "chat_template_digest",
        "code_version",
    )
    rows += [(name, getattr(meta, name)) for name in names]
    rows += [(f"extra: {name}", value) for name, value in sorted(meta.extra.items())]
    return [(name, str(value)) for name, value in rows if value is not None]


def _numbers(facts: Facts) -> list[tuple[str, str]]:
    per_token = facts.n_bytes / max(facts.response_tokens, 1)
    return [
        ("rollouts", f"{facts.rollouts:,}"),
        ("tokens, prompts included", f"{facts.tokens:,}"),
        ("response tokens", f"{facts.response_tokens:,}"),
        ("ranks stored at each", f"{facts.topk}"),
        ("encoding", facts.encoding),
        ("bytes", f"{facts.n_bytes:,} in {facts.n_shards:,} shards, {per_token:.2f} a response token"),
        ("greatest error", f"{facts.max_error:.3g} nats"),
    ]


def _table(heads: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    lines = [f"| {heads[0]} | {heads[1]} |", "|---|---|"]
    return "\n".join([*lines, *(f"| {_md(name)} | {_md(value)} |" for name, value in rows)])


def _md(text: str, limit: int | None = _MAX_CELL) -> str:
    """Text from a file as Markdown that shows it, on one line."""
    return _MARKUP.sub(r"\\\1", html.escape(printable(text, limit), quote=False))


def _code(text: str) -> str:
    return printable(text).replace("`", "'")
