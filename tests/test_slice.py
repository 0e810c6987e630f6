"""slice cuts a whole model out of a big file: right ranges, right sizes, and it runs."""

import importlib.resources
import json
import os

import jsonschema
import models
import numpy as np
import pytest

import refimpl
from refimpl.cli.main import run
from refimpl.errors import BadFile, Unsupported, Usage
from refimpl.files import gguf, names
from refimpl.files.golden import tiny_model
from refimpl.files.source import LocalFile
from refimpl.verifier.run import verify
from refimpl.writers import keys
from refimpl.writers.convert import convert
from refimpl.writers.slice import parse_ranges, slice_model
from tools import variants

GOLDEN = tiny_model()
STOCK = GOLDEN / "stock.gguf"


def test_layers_and_experts_are_the_sources_bytes_under_new_numbers(tmp_path):
    done = slice_model(STOCK, tmp_path / "out.gguf", "0,2", "3:5,9")
    assert (done.layers, done.experts) == ([0, 2], [3, 4, 9])
    with gguf.Gguf(STOCK) as whole, gguf.Gguf(tmp_path / "out.gguf") as f:
        assert f.defects == []
        for name, tensor in f.tensors.items():
            old = name.replace("blk.1.", "blk.2.")
            raw = whole.read(old).reshape(*whole.tensors[old].shape[:-1], -1)
            link = names.link(name, names.hparams(f))
            if link.role in ("routed", "router"):
                raw = raw[[3, 4, 9]]
            elif link.role == "router_bias":
                raw = raw.view(np.float32)[..., [3, 4, 9]].view(np.uint8)
            assert (f.read(name) == raw.reshape(-1, tensor.row_bytes)).all(), name
        expected = {link.gguf: shape for link, shape in names.expected(names.hparams(f))}
        assert expected == {name: t.shape for name, t in f.tensors.items()}


def test_the_keys_say_what_the_slice_is(tmp_path):
    slice_model(STOCK, tmp_path / "out.gguf", "1:3", "0:3")
    with gguf.Gguf(STOCK) as whole, gguf.Gguf(tmp_path / "out.gguf") as f:
        changed = {key for key in whole.metadata if f.metadata[key] != whole.metadata[key]}
        at = "glm-dsa."
        assert changed == {
            f"{at}block_count", f"{at}leading_dense_block_count", f"{at}expert_count",
            f"{at}expert_used_count", f"{at}attention.indexer.types", "general.size_label",
        }  # fmt: skip
        assert [*whole.metadata, keys.PROVENANCE] == list(f.metadata)
        hp = names.hparams(f)
        said = json.loads(f.metadata[keys.PROVENANCE])
        assert list(f.metadata[f"{at}attention.indexer.types"]) == [True, True]
    assert (hp.num_hidden_layers, hp.first_k_dense_replace) == (2, 0)
    assert (hp.n_routed_experts, hp.num_experts_per_tok) == (3, 3)
    assert (said["command"], said["source"], said["layers"]) == ("slice", "stock.gguf", [1, 2])
    assert said["experts"] == [0, 1, 2]


def test_a_slice_runs_as_the_whole_does_with_these_experts(tmp_path):
    slice_model(STOCK, tmp_path / "out.gguf", experts="0:8")
    tokens = np.arange(20) * 7 % 1256
    mine = refimpl.load(tmp_path / "out.gguf").logits(tokens)
    whole = refimpl.load(STOCK, experts=range(8)).logits(tokens)
    assert (mine.view(np.uint32) == whole.view(np.uint32)).all() and np.ptp(mine) > 1


def test_fewer_layers_run(tmp_path):
    slice_model(STOCK, tmp_path / "out.gguf", "0,2", "3,5:9")
    logits = refimpl.load(tmp_path / "out.gguf").logits(range(20))
    assert logits.shape == (20, 1280) and np.isfinite(logits).all() and np.ptp(logits) > 1


def test_a_checkpoint_is_sliced_as_its_gguf_is(tmp_path):
    convert(GOLDEN, tmp_path / "bf16.gguf", provenance=False)
    slice_model(tmp_path / "bf16.gguf", tmp_path / "a.gguf", "0,2", "5:9")
    slice_model(GOLDEN, tmp_path / "b.gguf", "0,2", "5:9")
    with gguf.Gguf(tmp_path / "a.gguf") as a, gguf.Gguf(tmp_path / "b.gguf") as b:
        assert list(a.tensors) == list(b.tensors)
        for name, tensor in a.tensors.items():
            assert tensor.format is b.tensors[name].format and (a.read(name) == b.read(name)).all()
        same = [key for key in a.metadata if key not in (keys.PROVENANCE, "general.name")]
        assert all(a.metadata[key] == b.metadata[key] for key in same)


def test_the_mtp_block_is_the_last_layer_and_stays_only_when_asked(tmp_path):
    source = variants.with_mtp(GOLDEN.parent, tmp_path / "source")
    slice_model(source, tmp_path / "with.gguf", "0,2:4")
    with gguf.Gguf(tmp_path / "with.gguf") as f:
        assert (names.hparams(f).num_hidden_layers, names.hparams(f).num_nextn_predict_layers) == (2, 1)
        assert "blk.2.nextn.eh_proj.weight" in f.tensors
    slice_model(source, tmp_path / "without.gguf", "0:3", "0:4")
    with gguf.Gguf(tmp_path / "without.gguf") as f:
        assert (names.hparams(f).num_hidden_layers, names.hparams(f).num_nextn_predict_layers) == (3, 0)
        assert not any("nextn" in name for name in f.tensors)
    assert verify(tmp_path / "without.gguf", tmp_path / "without.gguf").passed
    with pytest.raises(Usage, match="needs a layer besides"):
        slice_model(source, tmp_path / "x.gguf", "3")


def test_only_the_ranges_that_are_needed_are_read(tmp_path, monkeypatch):
    """A model of 60 layers of 192 experts: a header, and a hole behind it."""
    hp = models.replace(models.TINY, num_hidden_layers=60, n_routed_experts=192)
    big = models.write(tmp_path / "big.gguf", hp)
    read = []
    original = LocalFile.read_into
    monkeypatch.setattr(
        LocalFile, "read_into", lambda self, at, out: read.append(out.nbytes) or original(self, at, out)
    )
    done = slice_model(big, tmp_path / "out.gguf", "3", "17,100:102")
    with gguf.Gguf(tmp_path / "out.gguf") as f:
        assert f.tensors["blk.0.ffn_down_exps.weight"].shape == (3, 256, 256)
        data = sum(t.nbytes for t in f.tensors.values())
    assert done.bytes_read == data and data <= sum(read) < data + 5_000_000 < big.stat().st_size / 100


@pytest.mark.parametrize(
    ("text", "most", "want"), [("0,3:5", 8, [0, 3, 4]), (" 2 : 4 ,7", 8, [2, 3, 7]), (None, 3, [0, 1, 2])]
)
def test_ranges_are_half_open(text, most, want):
    assert parse_ranges(text, most, "layers") == want


@pytest.mark.parametrize("text", ["", "3:3", "5,3", "1,1", "0:9", "8", "a", "-1", "1:2:3", "1;2", "٣"])
def test_other_ranges_are_a_usage_error(text):
    with pytest.raises(Usage, match="--experts"):
        parse_ranges(text, 8, "experts")


def test_bad_input_is_one_error_and_no_file(tmp_path):
    with pytest.raises(Usage, match="never overwrites"):
        slice_model(STOCK, STOCK, "0", force=True)
    broken = bytearray(STOCK.read_bytes()[:200_000])
    (tmp_path / "short.gguf").write_bytes(broken)
    with pytest.raises(BadFile):
        slice_model(tmp_path / "short.gguf", tmp_path / "out.gguf")
    with pytest.raises((BadFile, Unsupported)):
        slice_model(GOLDEN / "model.safetensors", tmp_path / "out.gguf", "0")
    assert os.listdir(tmp_path) == ["short.gguf"]


def test_the_command_prints_json_of_its_schema(tmp_path, capsys):
    schema = json.loads(
        importlib.resources.files("refimpl.report").joinpath("schemas/slice.json").read_text()
    )
    args = ["slice", str(STOCK), str(tmp_path / "out.gguf"), "--layers", "0:2", "--experts", "0:4"]
    assert run([*args, "--json", "--quiet"]) == 0
    document = json.loads(capsys.readouterr().out)
    jsonschema.Draft202012Validator(schema).validate(document)
    assert document["layers"] == [0, 1] and document["experts"] == [0, 1, 2, 3]
    assert run([*args, "--quiet"]) == 2
    assert run([*args, "--quiet", "--force"]) == 0
    assert "2 layers · 4 experts" in capsys.readouterr().out
