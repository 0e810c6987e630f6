"""Checkpoints: what the safetensors library writes is read, range by range."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from tiny_checkpoint import CONFIG, is_float32, write_checkpoint

import refimpl
from refimpl.files import names
from refimpl.quants.formats import BF16, F16, F32

DTYPES = {
    "f32": (np.dtype("<f4"), F32),
    "f16": (np.dtype("<f2"), F16),
    "bf16": (np.dtype(ml_dtypes.bfloat16), BF16),
}
name = st.text(st.characters(exclude_categories=["Cs"]), max_size=20).filter(lambda n: n != "__metadata__")
stored = st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 4), max_size=4))


@settings(max_examples=60, deadline=None)
@given(
    tensors=st.dictionaries(name, stored, max_size=6),
    metadata=st.none() | st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3),
    data=st.data(),
)
def test_what_the_library_writes_is_read(tmp_path_factory, tensors, metadata, data):
    path = tmp_path_factory.mktemp("st") / "a.safetensors"
    random = np.random.default_rng(0)
    arrays = {
        n: random.integers(0, 256, (*shape, DTYPES[kind][0].itemsize), np.uint8).view(DTYPES[kind][0])[..., 0]
        for n, (kind, shape) in tensors.items()
    }
    if not tensors:
        metadata = None  # safetensors 0.8 writes `{},"__metadata__":…` here, and refuses it itself
    save_file({n: a.copy() for n, a in arrays.items()}, path, metadata)
    with refimpl.open(path) as f:
        assert (f.kind, f.defects, set(f.tensors)) == ("safetensors", [], set(arrays))
        assert [t.offset for t in f.tensors.values()] == sorted(t.offset for t in f.tensors.values())
        for n, a in arrays.items():
            t = f.tensors[n]
            assert (t.shape, t.format) == (a.shape, DTYPES[tensors[n][0]][1])
            want = np.frombuffer(a.tobytes(), np.uint8).reshape(t.rows, t.row_bytes)
            np.testing.assert_array_equal(f.read(n), want)
            first, last = sorted(data.draw(st.tuples(st.integers(0, t.rows), st.integers(0, t.rows))))
            np.testing.assert_array_equal(f.read(n, slice(first, last)), want[first:last])


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_a_directory_is_read_as_one(tmp_path, shards):
    weights = write_checkpoint(tmp_path / "hf", shards=shards)
    with refimpl.open(tmp_path / "hf") as f:
        assert (f.kind, len(f.parts), f.config, f.defects) == ("hf", shards, CONFIG, [])
        assert f.size == sum(p.stat().st_size for p in (tmp_path / "hf").glob("*.safetensors"))
        assert names.hparams(f) == names.Hparams.from_config(CONFIG)
        for n, w in weights.items():
            raw = f.read(n)
            if is_float32(n):
                np.testing.assert_array_equal(raw.view(np.float32), w[None])
            else:
                bits = raw.view(np.uint16).astype(np.uint32) << 16
                np.testing.assert_array_equal(bits.view(np.float32).reshape(w.shape), w)


def test_only_the_range_asked_for_is_read(tmp_path):
    """A shard is sparse beyond its first rows: reading it whole would take a terabyte."""
    import json
    import struct

    rows, n = 1 << 20, 1 << 18
    header = json.dumps(
        {"w": {"dtype": "F32", "shape": [rows, n], "data_offsets": [0, 4 * rows * n]}}
    ).encode()
    with open(tmp_path / "a.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header + np.arange(n, dtype="<f4").tobytes())
        file.truncate(8 + len(header) + 4 * rows * n)
    with refimpl.open(tmp_path / "a.safetensors") as f:
        np.testing.assert_array_equal(f.read("w", slice(0, 1)).view(np.float32)[0], np.arange(n, dtype="<f4"))
        assert not f.read("w", slice(rows - 1, rows)).any()
