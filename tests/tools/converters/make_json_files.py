"""Write `files/json/`: what other projects' own code makes of a few rollouts.

    python tests/tools/converters/make_json_files.py AXOLOTL NEMO_ALIGNER SGLANG

AXOLOTL and NEMO_ALIGNER are clones of github.com/axolotl-ai-cloud/axolotl (067b021c8) and
github.com/NVIDIA/NeMo-Aligner (af2b3bd9), SGLANG is the wheel sglang 0.5.23. All three need GPUs or much else
to be installed, so that only the functions that write are taken out of their sources and run. The file
`openai.jsonl` goes through the types of the installed `openai` package (3.54.0). Run it only to add a case.
"""

from __future__ import annotations

import ast
import base64
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tools.converters.samples import TOPK, good_rollouts, text

HERE = Path(__file__).parent / "files" / "json"
_LATER = ast.parse("from __future__ import annotations").body


def taken(source: str, names: set[str], **surroundings: Any) -> dict[str, Any]:
    """Functions and classes of a module, run without its imports."""
    tree = ast.parse(source)
    found = [node for node in tree.body if getattr(node, "name", None) in names]
    assert {node.name for node in found} == names
    exec(compile(ast.Module([*_LATER, *found], []), "taken", "exec"), surroundings)
    return surroundings


def from_git(checkout: str, path: str) -> str:
    command = ["git", "-C", checkout, "show", f"HEAD:{path}"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def axolotl(checkout: str, rollouts: list[Any]) -> None:
    """Both strategies' `transform_logprobs`, given rows for the response only."""
    classes = {"ChatTemplateStrategyWithKD", "ChatTemplateStrategyWithKDv2"}
    source = from_git(checkout, "src/axolotl/integrations/kd/chat_template.py")
    found = taken(source, classes, torch=torch, ChatTemplateStrategy=object)
    for name, version in zip(sorted(classes), ("v1", "v2"), strict=True):
        strategy = found[name].__new__(found[name])
        strategy.logprobs_field, strategy.gen_temperature, strategy.kd_temperature = "logprobs", 1.0, 1.0
        lines = []
        for r in rollouts:
            sample = {
                "input_ids": r.token_ids.tolist(),
                "labels": [-100] * r.prompt_len + r.response_ids.tolist(),
                "attention_mask": [1] * len(r.token_ids),
            }
            rows = list(zip(r.topk_ids.tolist(), r.topk_logprob.tolist(), strict=True))
            if version == "v1":
                sample["logprobs"] = [
                    [{"token": f"token_id:{i}", "logprob": p} for i, p in zip(*row, strict=True)]
                    for row in rows
                ]
            else:
                sample["target_token_ids"] = [ids for ids, _ in rows]
                sample["logprobs"] = [values for _, values in rows]
            lines.append(strategy.transform_logprobs(sample) | {"sample_id": r.sample_id})
        save(f"axolotl-{version}", lines)


def nemo(checkout: str, rollouts: list[Any]) -> None:
    """`write_generations`, given a padded batch."""
    source = from_git(checkout, "examples/nlp/synthetic_data_gen/compute_topk_logits.py")
    write = taken(source, {"write_generations"}, json=json)["write_generations"]
    size = max(len(r.token_ids) for r in rollouts) - 1
    tokens, labels = torch.ones(2, len(rollouts), size, dtype=torch.int64)
    mask, total = torch.zeros(2, len(rollouts), size)
    logits = torch.zeros(len(rollouts), size, TOPK)
    ids = torch.zeros(len(rollouts), size, TOPK, dtype=torch.int64)
    for at, r in enumerate(rollouts):
        length = len(r.token_ids) - 1
        rows = slice(r.prompt_len - 1, length)
        tokens[at, :length] = torch.tensor(r.token_ids[:-1].astype(np.int64))
        labels[at, :length] = torch.tensor(r.token_ids[1:].astype(np.int64))
        mask[at, rows] = 1
        top = torch.tensor(r.topk_logprob[:, :1])
        logits[at, rows] = torch.tensor(r.topk_logprob) - top
        total[at, rows] = -top[:, 0]
        ids[at, rows] = torch.tensor(r.topk_ids.astype(np.int64))
    batch = {"tokens": tokens, "labels": labels, "loss_mask": mask}
    (HERE / "nemo-aligner.jsonl").unlink(missing_ok=True)
    names = [r.sample_id for r in rollouts]
    write(HERE / "nemo-aligner.jsonl", names, batch, logits, ids, total, 0)


def sglang(wheel: str, rollouts: list[Any]) -> None:
    """The fields of flat log-probs, in base64 and as lists."""
    archive = zipfile.ZipFile(wheel)

    def source(name: str) -> str:
        return archive.read(f"sglang/srt/managers/{name}.py").decode()

    found = taken(source("io_struct"), {"build_flat_top_logprobs_arrays", "flat_top_logprobs_layout"}, np=np)
    names = {"_build_flat_top_logprobs_fields", "_build_flat_top_logprobs_fields_from_arrays"}
    found = taken(source("tokenizer_manager"), names, **found, pybase64=base64)
    for encoded in (True, False):
        lines = []
        for r in rollouts:
            start = r.prompt_len - 1
            own = [None, *r.teacher_logprob.tolist()]
            fields = found["_build_flat_top_logprobs_fields"](
                "input",
                [None, *r.topk_logprob.tolist()],
                [None, *r.topk_ids.tolist()],
                TOPK,
                return_b64=encoded,
            )
            triples = [[p, t, None] for p, t in zip(own, r.token_ids[start:].tolist(), strict=True)]
            meta = {"id": r.sample_id, "prompt_tokens": len(r.token_ids), "input_token_logprobs": triples}
            lines.append({"meta_info": meta | fields, "input_ids": r.token_ids.tolist()})
        save("sglang-base64" if encoded else "sglang-lists", lines)


def openai(rollouts: list[Any]) -> None:
    """Chat completions as the package gives them back."""
    from openai.types.chat import ChatCompletion

    def entry(token: int, value: float) -> dict[str, Any]:
        return {"token": text([token]), "bytes": list(text([token]).encode()), "logprob": value}

    lines = []
    for r in rollouts:
        rows = zip(r.response_ids, r.teacher_logprob, r.topk_ids, r.topk_logprob, strict=True)
        content = [
            entry(int(token), float(own))
            | {"top_logprobs": [entry(int(i), float(p)) for i, p in zip(ids, values, strict=True)]}
            for token, own, ids, values in rows
        ]
        choice = {
            "index": 0,
            "finish_reason": "length",
            "message": {"role": "assistant", "content": text(r.response_ids)},
            "logprobs": {"content": content},
        }
        body = {
            "id": r.sample_id,
            "object": "chat.completion",
            "created": 0,
            "model": "m",
            "choices": [choice],
        }
        response = ChatCompletion.model_validate(body).model_dump(mode="json")
        lines.append({"response": response, "prompt_token_ids": r.token_ids[: r.prompt_len].tolist()})
    save("openai", lines)


def save(name: str, lines: list[Any]) -> None:
    path = HERE / f"{name}.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def main() -> None:
    HERE.mkdir(parents=True, exist_ok=True)
    # As many as it takes to tell that rows are renormalised.
    rollouts = good_rollouts(6, seed=4)
    expected = [
        {
            "sample_id": r.sample_id,
            "token_ids": r.token_ids.tolist(),
            "prompt_len": r.prompt_len,
            "topk_ids": r.topk_ids.tolist(),
            "topk_logprob": r.topk_logprob.tolist(),
            "teacher_logprob": r.teacher_logprob.tolist(),
        }
        for r in rollouts
    ]
    (HERE / "expected.json").write_text(json.dumps(expected))
    axolotl(sys.argv[1], rollouts)
    nemo(sys.argv[2], rollouts)
    sglang(sys.argv[3], rollouts)
    openai(rollouts)


if __name__ == "__main__":
    main()
