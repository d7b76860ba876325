"""Files that the real projects' code made, and what only one binary format can get wrong."""

from __future__ import annotations

import io
import os
import pickle
import shutil
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from click.testing import CliRunner
from opd_tools.converters.core.format import ReadSettings
from opd_tools.converters.core.record import Values
from opd_tools.converters.core.source import Source
from opd_tools.converters.plain import torch_pile
from opd_tools.converters.reading import torch_load
from opd_tools.converters.trainers import distillkit, maxtext, megatron, tf_example
from opd_tools.converters.trainers.distillkit_codec import packed, unpacked
from opd_tools.converters.trainers.distillkit_config import codec_of
from opd_tools.main import main
from tools.converters.binary_samples import tf_example as written_example
from tools.converters.converting import FINGERPRINT, converted, refused
from tools.converters.samples import SAMPLES, good_rollouts

import opd_store
from opd_store import FormatError, InvalidArgumentError

FILES = Path(__file__).parent / "files"


def records(module, path, **settings):
    """The contents of a source, and its records."""
    contents = module.read(Source(str(path)), ReadSettings(**{"vocab_size": 500, **settings}))
    return contents, list(contents.records)


def run(path, to, *options, vocab_size=500):
    args = ["convert", path, to, "--tokenizer-fingerprint", FINGERPRINT, "--vocab-size", vocab_size, *options]
    return CliRunner().invoke(main, [str(arg) for arg in args], prog_name="opd")


# DistillKit

# Nats from DistillKit's own decoder, which decodes in the dtype of the exact values.
OWN_DTYPE = {"exact-bfloat16-delta": 0.05}


@pytest.mark.parametrize("path", sorted((FILES / "distillkit").iterdir()), ids=lambda path: path.name)
def test_distillkit_files_are_read_as_distillkit_reads_them(tmp_path, path):
    contents, found = records(distillkit, path)
    with np.load(path / "expected.npz") as file:
        expected = dict(file)
    assert contents.values is Values.LOGPROBS
    assert len(found) == 3
    for record in found:
        # Packed rows are in another order, and lost the last row of each.
        number = [len(expected[f"ids{n}"]) for n in range(3)].index(
            len(record.topk_ids) + (path.name == "packed")
        )
        size = len(record.topk_ids)
        assert len(record.token_ids) == size + 1
        np.testing.assert_array_equal(record.topk_ids, expected[f"ids{number}"][:size])
        own = expected[f"logprob{number}"][:size]
        np.testing.assert_allclose(record.topk_logprob, own, rtol=0, atol=OWN_DTYPE.get(path.name, 2e-5))
        if path.name.startswith("exact"):
            teacher = expected[f"teacher{number}"][:size]
            np.testing.assert_allclose(record.topk_logprob, teacher, rtol=0, atol=0.02)
    assert run(path, tmp_path / "cache").exit_code == 0
    assert opd_store.verify(tmp_path / "cache").ok


LEGACY = {"vocab_size": 500, "k": 24, "exact_k": 8, "polynomial_degree": 2}
WRONG = {
    "k": (InvalidArgumentError, lambda c: c | {"k": c["exact_k"] - 1}, "fit into k"),
    "fewer ids": (FormatError, lambda c: c | {"k": c["k"] + 4}, "bytepacked_indices: expected"),
    "dtype": (FormatError, lambda c: c | {"exact_dtype": "float16"}, "compressed_logprobs: expected"),
    "terms": (FormatError, lambda c: c | {"polynomial_terms": [0, 1]}, "compressed_logprobs: expected"),
    "term": (InvalidArgumentError, lambda c: c | {"polynomial_terms": ["__import__"]}, "powers, sqrt or exp"),
    "size of ids": (FormatError, lambda c: c | {"d": 5000}, "bytepacked_indices: expected"),
    "legacy": (InvalidArgumentError, lambda c: LEGACY, "legacy codec"),
    "nothing": (InvalidArgumentError, lambda c: {"model": "x"}, "no compression config"),
    "list": (InvalidArgumentError, lambda c: [1], "no compression config"),
    "flag": (InvalidArgumentError, lambda c: c | {"delta_encoding": "no"}, "expected true or false"),
}


@pytest.mark.parametrize("what", WRONG)
def test_distillkit_files_under_a_wrong_config_are_refused(tmp_path, what):
    error, change, said = WRONG[what]
    shutil.copytree(FILES / "distillkit" / "published", tmp_path / "in")
    config = tmp_path / "in" / "compression_config.yaml"
    config.write_text(yaml.safe_dump(change(yaml.safe_load(config.read_text()))))
    with pytest.raises(error, match=said):
        records(distillkit, tmp_path / "in")


@pytest.mark.parametrize("name", ["exact-float64-delta", "exact-float32"])
def test_distillkit_delta_encoding_has_to_be_right(tmp_path, name):
    shutil.copytree(FILES / "distillkit" / name, tmp_path / "in")
    config = tmp_path / "in" / "compression_config.yaml"
    found = yaml.safe_load(config.read_text())
    config.write_text(yaml.safe_dump(found | {"delta_encoding": not found["delta_encoding"]}))
    line = refused(run(tmp_path / "in", tmp_path / "cache"), tmp_path / "cache")
    assert "sum to" in line if found["delta_encoding"] else "delta_encoding" in line


def test_distillkit_config_is_found_in_a_training_config_and_runs_nothing(tmp_path):
    shutil.copytree(FILES / "distillkit" / "published", tmp_path / "in")
    config = tmp_path / "in" / "compression_config.yaml"
    training = tmp_path / "train.yml"
    training.write_text(
        yaml.safe_dump({"teacher": {"logprob_compressor": yaml.safe_load(config.read_text())}})
    )
    config.unlink()
    with pytest.raises(InvalidArgumentError, match="--config"):
        records(distillkit, tmp_path / "in")
    assert len(records(distillkit, tmp_path / "in", config=training)[1]) == 3
    training.write_text(f"!!python/object/apply:os.system ['touch {tmp_path}/pwned']")
    with pytest.raises(InvalidArgumentError, match="not YAML"):
        records(distillkit, tmp_path / "in", config=training)
    assert not (tmp_path / "pwned").exists()


def test_distillkit_fits_that_are_impossible_keep_their_exact_ranks(tmp_path):
    shutil.copytree(FILES / "distillkit" / "recommended", tmp_path / "in")
    path = tmp_path / "in" / "data_0.parquet"
    rows = pq.read_table(path).to_pylist()
    # The constant coefficient of the first position, after four bfloat16.
    rows[0]["compressed_logprobs"][0][8:12] = np.frombuffer(np.float32(40).tobytes(), np.uint8).tolist()
    pq.write_table(pa.Table.from_pylist(rows), path)
    contents, found = records(distillkit, tmp_path / "in")
    assert list(contents.tally.values()) == [1]
    assert (found[0].topk_ids[0, 4:] == -1).all()
    assert (found[0].topk_ids[1:] >= 0).all()


def test_raw_and_legacy_logits_are_taken_for_logits(tmp_path):
    ids = [[[1, 2], [3, 1]]]
    for values, expected in (
        ([[[-0.1, -3.0], [-0.2, -2.0]]], "logprobs"),
        ([[[9.0, 4.0], [3.0, 2.0]]], "renormalised"),
    ):
        table = pa.table({"input_ids": [[5, 1, 3]], "token_ids": ids, "top_values": values})
        pq.write_table(table, tmp_path / "raw.parquet")
        contents, (record,) = records(distillkit, tmp_path / "raw.parquet")
        assert (contents.values.value, contents.topk) == (expected, 2)
        np.testing.assert_array_equal(record.topk_ids, ids[0])


@pytest.mark.parametrize("bits", range(1, 33))
def test_packed_integers(bits):
    values = np.random.default_rng(bits).integers(0, 1 << bits, (3, 11))
    assert packed(values, bits).shape == (3, -(-11 * bits // 8))
    np.testing.assert_array_equal(unpacked(packed(values, bits), bits, 11), values)


def test_config_of_every_documented_codec():
    bins = [{"scale_dtype": "float16", "element_bits": 3, "num_elements": 5}]
    config = {"d": 151_936, "k": 20, "exact_k": 4, "polynomial_terms": [0, "sqrt"], "residual_bins": bins}
    codec = codec_of(yaml.safe_dump({"logprob_compressor": config}).encode(), "x")
    assert (codec.id_bits, codec.id_bytes, codec.logprob_bytes) == (18, 45, 4 * 4 + 2 * 4 + 2 + 2)


# MaxText


def test_maxtext_files_are_read_as_maxtext_means_them(tmp_path):
    with np.load(FILES / "maxtext.npz") as file:
        expected = dict(file)
    contents, found = records(maxtext, FILES / "maxtext", vocab_size=200)
    assert contents.values is Values.RENORMALISED
    assert contents.topk == 6
    whole, first, second, cut = found
    for record, number, rows in ((whole, 0, slice(0, 11)), (first, 1, slice(0, 4)), (second, 1, slice(5, 8))):
        tokens = expected[f"inputs{number}"]
        np.testing.assert_array_equal(record.token_ids, tokens[rows.start : rows.stop + 1])
        np.testing.assert_array_equal(record.topk_ids, expected[f"top_k_indices{number}"][rows])
        np.testing.assert_array_equal(record.topk_logprob, expected[f"top_k_logits{number}"][rows])
    np.testing.assert_array_equal(whole.loss_mask, [False] * 2 + [True] * 9)
    assert second.loss_mask is None
    # What was cut off at its end has one token more among its targets.
    np.testing.assert_array_equal(cut.token_ids, [*expected["inputs2"], expected["targets2"][-1]])
    assert contents.tally == {"rows about the token after the last one, which the file does not hold": 3}
    assert run(FILES / "maxtext", tmp_path / "cache", vocab_size=200).exit_code == 0
    cache = opd_store.open(tmp_path / "cache")
    assert cache.meta.teacher.logprob_mode == "renormalised_topk"


def test_maxtext_rows_about_the_token_itself_are_refused(tmp_path):
    from array_record.python.array_record_module import ArrayRecordWriter

    tokens = np.arange(1, 9)
    writer = ArrayRecordWriter(str(tmp_path / "a.array_record"), "group_size:1")
    features = {
        "top_k_logits": np.zeros((8, 1)),
        "top_k_indices": tokens,
        "inputs": tokens,
        "targets": tokens,
    }
    writer.write(written_example(features))
    writer.close()
    with pytest.raises(FormatError, match="only models of the next token"):
        records(maxtext, tmp_path)


def test_every_damage_to_an_example_is_an_error_or_another_value():
    data = written_example(
        {"a": np.array([1.5, 2]), "b": np.array([3, -1, 1 << 40]), "c": np.array([], np.int64)}
    )
    found = tf_example.parse(data)
    assert found["a"].tolist() == [1.5, 2]
    assert found["b"].tolist() == [3, -1, 1 << 40]
    for size in range(1, len(data)):
        with pytest.raises(ValueError):  # noqa: PT011
            tf_example.parse(data[:size])
    for at in range(len(data)):
        for value in (0, 0x7F, 0x80, 0xFF):
            damaged = data[:at] + bytes([value]) + data[at + 1 :]
            try:
                tf_example.parse(damaged)
            except ValueError:
                continue


# Megatron-LM


def test_megatron_files_are_read_in_the_order_of_training(tmp_path):
    with np.load(FILES / "megatron.npz") as file:
        expected = dict(file)
    contents, found = records(megatron, FILES / "megatron", vocab_size=70_000)
    assert contents.topk == 7
    assert len(found) == len(expected["tokens"])
    for number, record in enumerate(found):
        np.testing.assert_array_equal(record.token_ids, expected["tokens"][number])
        ids = record.topk_ids
        kept = ids >= 0
        # Beyond top-p nothing is kept, and microbatches have different widths.
        assert kept[:, 0].all()
        np.testing.assert_array_equal(ids[kept], expected["ids"][number][:, : ids.shape[1]][kept])
        teacher = expected["logprob"][number][:, : ids.shape[1]][kept]
        np.testing.assert_allclose(record.topk_logprob[kept], teacher, rtol=1e-3, atol=1e-6)
    assert any((record.topk_ids == -1).any() for record in found)
    assert (np.concatenate([record.topk_ids.ravel() for record in found]) > 65_535).any()
    assert run(FILES / "megatron", tmp_path / "cache", vocab_size=70_000).exit_code == 0
    assert opd_store.verify(tmp_path / "cache").ok


def _without_tokens(path):
    (path / "tokens.npy").unlink()


def _two_token_files(path):
    shutil.copy(path / "tokens.npy", path / "other.npy")


def _other_order(path):
    np.save(path / "tokens.npy", np.load(path / "tokens.npy")[::-1])


def _one_less(path):
    np.save(path / "tokens.npy", np.load(path / "tokens.npy")[:-1])


def _one_more(path):
    tokens = np.load(path / "tokens.npy")
    np.save(path / "tokens.npy", np.concatenate([tokens, tokens[:1]]))


def _short(path):
    np.save(path / "tokens.npy", np.load(path / "tokens.npy")[:, 2:])


def _floats(path):
    np.save(path / "tokens.npy", np.load(path / "tokens.npy").astype(float))


def _rank_missing(path):
    (path / "cp1_dp0__4.tar").unlink()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_without_tokens, "hold no tokens"),
        (_two_token_files, "--column tokens=NAME"),
        (_other_order, "another order"),
        (_one_less, "ends before iteration 4"),
        (_one_more, "more sequences"),
        (_short, "8 rows, but"),
        (_floats, "expected rows of integers"),
        (_rank_missing, r"no files cp1_dp0__\*.tar"),
    ],
)
def test_megatron_files_that_do_not_belong_together(tmp_path, spoil, said):
    shutil.copytree(FILES / "megatron", tmp_path / "in")
    spoil(tmp_path / "in")
    with pytest.raises((FormatError, InvalidArgumentError), match=said):
        records(megatron, tmp_path / "in", vocab_size=70_000)


def test_megatron_needs_17_bits():
    with pytest.raises(InvalidArgumentError, match="17 bits"):
        records(megatron, FILES / "megatron", vocab_size=151_936)


def test_megatron_tokens_may_be_a_table(tmp_path):
    shutil.copytree(FILES / "megatron", tmp_path / "in")
    tokens = np.load(tmp_path / "in" / "tokens.npy")
    # Without the last token, the last row of each is about nothing.
    pq.write_table(pa.table({"tokens": tokens[:, :-1].tolist()}), tmp_path / "in" / "a.parquet")
    found = records(megatron, tmp_path / "in", vocab_size=70_000, columns={"tokens": "a.parquet"})[1]
    assert {len(record.topk_ids) for record in found} == {7}


# .pt files


def saved(content, **options):
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


class Malicious:
    """Unpickled carelessly, it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("how", ["zip", "legacy", "pickle", "inside", "key"])
def test_a_malicious_pickle_executes_nothing(tmp_path, how):
    bad = Malicious(tmp_path / "pwned")
    data = {
        "zip": lambda: saved(bad),
        "legacy": lambda: saved(bad, _use_new_zipfile_serialization=False),
        "pickle": lambda: pickle.dumps(bad),
        "inside": lambda: saved({"input_ids": torch.arange(4), "meta": [{"a": bad}]}),
        "key": lambda: saved({"input_ids": torch.arange(4), bad: 1}),
    }[how]()
    (tmp_path / "pile.pt").write_bytes(data)
    line = refused(run(tmp_path / "pile.pt", tmp_path / "cache", "--from", "torch-pile"), tmp_path / "cache")
    assert "cannot be read as tensors alone" in line
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"a": torch.zeros(1).expand(1 << 40)}, "much larger than the file"),
        ({"a": torch.eye(3).to_sparse()}, "sparse"),
        ({"a": torch.zeros(2, dtype=torch.complex64)}, "complex"),
        ({(1, 2): torch.zeros(1)}, "keys"),
        ({"a": {1, 2}}, "type set"),
        ({"a": np.ones(2)}, "which is no tensor"),
    ],
)
def test_what_is_no_pile_of_tensors_is_refused(content, said):
    with pytest.raises(FormatError, match=said):
        torch_load.load(saved(content), "x.pt")
    # The child is there for the next file.
    assert torch_load.load(saved({"a": torch.ones(1)}), "y.pt")["a"].tolist() == [1.0]


def test_a_child_that_ended_is_an_error_and_the_next_file_gets_a_new_one():
    torch_load.load(saved({}), "x.pt")
    torch_load._loader._process.kill()
    torch_load._loader._process.wait()
    assert torch_load.load(saved({"b": [1, 2]}), "y.pt")["b"].tolist() == [1, 2]
    loader = torch_load.TorchLoader()
    loader._process.kill()
    with pytest.raises(FormatError, match=r"x\.pt: reading it ended the process"):
        loader.load(saved({}), "x.pt")
    loader.close()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_tensors_of_every_dtype_arrive(dtype):
    values = torch.tensor([[-0.5, -3.0]], dtype=getattr(torch, dtype))
    found = torch_load.load(saved({"a": [values, torch.tensor([1, 65_535], dtype=torch.uint16)]}), "x")["a"]
    assert found[0].tolist() == [[-0.5, -3.0]]
    assert found[1].tolist() == [1, 65_535]


TOKENS = torch.tensor([[5, 1, 3, 2], [5, 2, 1, 4]])
IDS = torch.stack([TOKENS.roll(-1, 1), torch.full_like(TOKENS, 9)], 2)
VALUES = torch.tensor([-0.1, -3.0]).expand(2, 4, 2)
PILES = {
    "stacked": {"input_ids": TOKENS, "logprobs": VALUES, "indices": IDS},
    "one less": {"token_ids": TOKENS, "log_probs": VALUES[:, :-1], "top_indices": IDS[:, :-1]},
    "label": {"tokens": TOKENS, "top_logprobs": VALUES, "ids": IDS.roll(1, 1)},
    "list": [{"input_ids": TOKENS[n], "logprobs": VALUES[n], "indices": IDS[n]} for n in (0, 1)],
    "lists": {"input_ids": list(TOKENS), "logprobs": list(VALUES), "indices": list(IDS)},
}


@pytest.mark.parametrize("name", PILES)
def test_piles_of_every_shape(tmp_path, name):
    torch.save(PILES[name], tmp_path / "a.pt")
    columns = {"rows": "label"} if name == "label" else {}
    contents, found = records(torch_pile, tmp_path, columns=columns)
    assert (contents.topk, contents.values) == (2, Values.LOGPROBS)
    for number, record in enumerate(found):
        assert record.token_ids.tolist() == TOKENS[number].tolist()
        assert record.topk_ids[:, 0].tolist() == TOKENS[number, 1:].tolist()
        np.testing.assert_allclose(record.topk_logprob, VALUES[number, 1:])


def test_whittle_directories(tmp_path):
    # The layout of whittle's store_teacher_logits.py, from its source.
    for folder in ("logits", "indices"):
        (tmp_path / folder).mkdir()
    for batch in (0, 1):
        content = {"input_ids": TOKENS, "batch_idx": batch, "logits": VALUES.bfloat16() + 7, "top_k": 2}
        torch.save(content, tmp_path / "logits" / f"logits_batch_{batch:06d}.pt")
        indices = {"indices": IDS, "batch_idx": batch}
        torch.save(indices, tmp_path / "indices" / f"indices_batch_{batch:06d}.pt")
    torch.save({"total_batches": 2}, tmp_path / "metadata.pt")
    contents, found = records(torch_pile, tmp_path)
    assert contents.values is Values.RENORMALISED
    assert [record.topk_ids[:, 0].tolist() for record in found] == [
        TOKENS[n, 1:].tolist() for n in (0, 1)
    ] * 2
    torch.save({"indices": IDS, "batch_idx": 7}, tmp_path / "indices" / "indices_batch_000001.pt")
    with pytest.raises(FormatError, match="not of the same batch"):
        records(torch_pile, tmp_path)


def test_all_logits_give_the_exact_tail(tmp_path):
    logits = torch.randn(2, 4, 20, generator=torch.Generator().manual_seed(0))
    torch.save({"input_ids": TOKENS, "logits": logits}, tmp_path / "a.pt")
    with pytest.raises(InvalidArgumentError, match="--topk"):
        records(torch_pile, tmp_path, vocab_size=20)
    _, found = records(torch_pile, tmp_path, vocab_size=20, topk=3)
    for number, record in enumerate(found):
        expected = logits[number, :-1].double().log_softmax(-1)
        np.testing.assert_allclose(
            record.topk_logprob, expected.numpy()[np.arange(3)[:, None], record.topk_ids]
        )
        total = np.exp(record.topk_logprob).sum(1) + np.exp(record.log_tail)
        np.testing.assert_allclose(total, 1, rtol=1e-12)
    with pytest.raises(FormatError, match="if these are a top-k"):
        records(torch_pile, tmp_path, vocab_size=21, topk=3)


@pytest.mark.parametrize("name", ["distillkit", "jsonl", "maxtext", "megatron", "table", "torch-pile"])
def test_files_behind_a_url(tmp_path, name):
    path = SAMPLES[name].write(tmp_path, good_rollouts())
    memory = fsspec.filesystem("memory")
    memory.put(str(path), f"/{tmp_path.name}/{path.name}", recursive=path.is_dir())
    try:
        result = converted(name, f"memory://{tmp_path.name}/{path.name}", tmp_path / "cache")
    finally:
        memory.rm(f"/{tmp_path.name}", recursive=True)
    converted(name, path, tmp_path / "local")
    assert result["format"] == name
    for first, second in zip(*map(opd_store.open, (tmp_path / "cache", tmp_path / "local")), strict=True):
        np.testing.assert_array_equal(first.token_ids, second.token_ids)
        np.testing.assert_array_equal(first.topk_logprob, second.topk_logprob)
