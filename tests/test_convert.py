"""convert writes llama.cpp's file: the same bytes, and nothing under its name before it is whole."""

import hashlib
import importlib.resources
import json
import shutil

import jsonschema
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from refimpl.cli.main import run
from refimpl.errors import BadFile, Unsupported, Usage
from refimpl.files import gguf
from refimpl.files.golden import tiny_model
from refimpl.writers import keys
from refimpl.writers.convert import convert
from tools import variants

GOLDEN = tiny_model()
WHOLE = json.loads((GOLDEN / "bf16-tensors.json").read_text())


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def change(folder, edit):
    """A copy of the tiny checkpoint with other weights."""
    variants.plain(GOLDEN.parent, folder)
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors")
    return folder


def test_the_file_is_the_converters_byte_for_byte(tmp_path):
    out = tmp_path / "model.gguf"
    done = convert(GOLDEN, out, name="tiny-glm-dsa", provenance=False)
    assert digest(out) == WHOLE["sha256"]
    assert done.tensors == len(WHOLE["tensors"]) and done.size == out.stat().st_size


def test_provenance_is_one_key_more_and_the_last(tmp_path):
    convert(GOLDEN, tmp_path / "a.gguf", name="tiny-glm-dsa", provenance=False)
    convert(GOLDEN, tmp_path / "b.gguf", name="tiny-glm-dsa")
    with gguf.Gguf(tmp_path / "a.gguf") as a, gguf.Gguf(tmp_path / "b.gguf") as b:
        assert [*a.metadata, keys.PROVENANCE] == list(b.metadata)
        assert b.raw_metadata().startswith(a.raw_metadata())
        said = json.loads(b.metadata[keys.PROVENANCE])
        assert (said["command"], said["source"], said["outtype"]) == ("convert", "tiny-glm-dsa", "bf16")
        for name in a.tensors:
            assert (a.read(name) == b.read(name)).all()


@pytest.mark.parametrize("jobs", [1, 3])
def test_any_number_of_threads_and_any_piece_size_write_the_same(tmp_path, monkeypatch, jobs):
    monkeypatch.setattr("refimpl.writers.convert.PIECE_WEIGHTS", 1000)
    convert(GOLDEN, tmp_path / "model.gguf", name="tiny-glm-dsa", provenance=False, jobs=jobs)
    assert digest(tmp_path / "model.gguf") == WHOLE["sha256"]


def test_f16_tells_what_it_cannot_hold(tmp_path):
    def edit(weights):
        w = weights["model.layers.0.mlp.gate_proj.weight"].astype(np.float32)
        w[0, :3] = [1e6, -1e6, 1e-9]
        weights["model.layers.0.mlp.gate_proj.weight"] = w.astype(ml_dtypes.bfloat16)

    done = convert(change(tmp_path / "source", edit), tmp_path / "model.gguf", "f16")
    name = "blk.0.ffn_gate.weight"
    assert done.overflow == {name: 2} and done.underflow[name] == 1
    with gguf.Gguf(tmp_path / "model.gguf") as f:
        assert f.read(name, slice(0, 1)).view(np.float16)[0, :3].tolist() == [np.inf, -np.inf, 0]


def test_a_float32_source_is_rounded_to_the_nearest_bf16(tmp_path):
    values = np.array([1 + 2**-8, 1 + 3 * 2**-8, -(1 + 2**-8 + 2**-20), 3.4e38, np.nan, np.inf], np.float32)

    def edit(weights):
        w = weights["model.layers.0.mlp.gate_proj.weight"].astype(np.float32)
        w[0, :6] = values
        weights["model.layers.0.mlp.gate_proj.weight"] = w

    convert(change(tmp_path / "source", edit), tmp_path / "model.gguf")
    with gguf.Gguf(tmp_path / "model.gguf") as f:
        got = f.read("blk.0.ffn_gate.weight", slice(0, 1)).view(ml_dtypes.bfloat16)[0, :6]
    want = values.astype(ml_dtypes.bfloat16)
    assert got[:4].tolist() == want[:4].tolist() and np.isnan(got[4]) and np.isinf(got[5])


def test_a_missing_and_an_unknown_tensor_are_named(tmp_path):
    lacking = change(tmp_path / "a", lambda w: w.pop("model.layers.1.mlp.experts.7.up_proj.weight"))
    with pytest.raises(BadFile, match=r"layers\.1\.mlp\.experts\.7\.up_proj\.weight is missing for"):
        convert(lacking, tmp_path / "model.gguf")
    strange = change(tmp_path / "b", lambda w: w.update({"model.odd.weight": w["model.norm.weight"]}))
    with pytest.raises(BadFile, match=r"model\.odd\.weight has no place"):
        convert(strange, tmp_path / "model.gguf")
    short = change(
        tmp_path / "c", lambda w: w.update({"model.norm.weight": w["model.norm.weight"][:8].copy()})
    )
    with pytest.raises(
        BadFile, match=r"model\.norm\.weight makes a tensor \[8\], the config implies \[256\]"
    ):
        convert(short, tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()


def test_a_config_that_promises_an_mtp_block_needs_it_or_no_mtp(tmp_path):
    source = variants.plain(GOLDEN.parent, tmp_path / "source")
    config = json.loads((source / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadFile, match="--no-mtp leaves that block out"):
        convert(source, tmp_path / "model.gguf")
    convert(source, tmp_path / "model.gguf", mtp=False)
    with gguf.Gguf(tmp_path / "model.gguf") as f:
        assert f.metadata["glm-dsa.block_count"] == 3
        assert "glm-dsa.nextn_predict_layers" not in f.metadata


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", "[]"),
        ("tokenizer.json", "{}"),
        ("tokenizer.json", '{"model": {"type": "BPE", "vocab": {"a": 1e9}}, "added_tokens": []}'),
        ("tokenizer.json", '{"model": {"type": "Unigram", "vocab": {}}, "added_tokens": []}'),
        ("tokenizer.json", '{"model": {"vocab": {"a": 99999999}}, "added_tokens": []}'),
        ("tokenizer.json", '{"model": {"vocab": {}}, "added_tokens": [7]}'),
        ("tokenizer.json", "[" * 100_000),
        ("tokenizer_config.json", '{"additional_special_tokens": 7}'),
        ("README.md", "---\na: [\n---\n"),
    ],
)
def test_a_hostile_file_beside_the_weights_is_one_error(tmp_path, file, text):
    source = variants.plain(GOLDEN.parent, tmp_path / "source")
    (source / file).write_text(text)
    with pytest.raises((BadFile, Unsupported)):
        convert(source, tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()


def test_another_pre_tokenizer_is_refused(tmp_path):
    source = variants.plain(GOLDEN.parent, tmp_path / "source")
    data = json.loads((source / "tokenizer.json").read_text())
    data["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\w+"
    (source / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(BadFile, match="splits words otherwise"):
        convert(source, tmp_path / "model.gguf")


def test_only_a_checkpoint_directory_is_converted(tmp_path):
    with pytest.raises(Unsupported, match="needs a checkpoint directory"):
        convert(GOLDEN / "stock.gguf", tmp_path / "model.gguf")
    with pytest.raises(Unsupported, match="needs a checkpoint directory"):
        convert(GOLDEN / "model.safetensors", tmp_path / "model.gguf")


def test_an_output_never_overwrites_its_input_nor_anything_unasked(tmp_path):
    source = variants.plain(GOLDEN.parent, tmp_path / "source")
    before = digest(source / "model.safetensors")
    with pytest.raises(Usage, match="never overwrites its input"):
        convert(source, source / "model.safetensors", force=True)
    (tmp_path / "link").symlink_to(source / "model.safetensors")
    with pytest.raises(Usage, match="never overwrites its input"):
        convert(source, tmp_path / "link", force=True)
    assert digest(source / "model.safetensors") == before
    out = tmp_path / "model.gguf"
    out.write_bytes(b"mine")
    with pytest.raises(Usage, match="exists; --force overwrites it"):
        convert(source, out)
    assert out.read_bytes() == b"mine"
    with pytest.raises(Usage, match="is a directory"):
        convert(source, tmp_path, force=True)
    with pytest.raises(BadFile, match="there is no directory"):
        convert(source, tmp_path / "no" / "model.gguf")


def test_a_full_disk_is_said_before_anything_is_written(tmp_path, monkeypatch):
    full = shutil.disk_usage(tmp_path)._replace(free=25_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    with pytest.raises(Usage, match="the disk has 25,000,000 left"):
        convert(GOLDEN, tmp_path / "model.gguf")
    assert list(tmp_path.iterdir()) == []


def test_the_command_prints_json_of_its_schema(tmp_path, capsys):
    args = ["convert", str(GOLDEN), str(tmp_path / "model.gguf"), "--json", "--quiet"]
    assert run(args) == 0
    document = json.loads(capsys.readouterr().out)
    schema = importlib.resources.files("refimpl.report").joinpath("schemas/convert.json").read_text()
    jsonschema.Draft202012Validator(json.loads(schema)).validate(document)
    assert document["tensors"] == 67 and document["file"]["bytes"] == (tmp_path / "model.gguf").stat().st_size
    assert run(args) == 2
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "usage"
    assert run([*args, "--force", "--outtype", "q8_0"]) == 2
