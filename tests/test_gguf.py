"""GGUF: what is written is read again, and gguf-py reads the same."""

import os
import tracemalloc

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import refimpl
from refimpl.errors import BadFile, Unsupported
from refimpl.files.encode import encode
from refimpl.files.gguf import GGUFValueType as V
from refimpl.files.gguf import header_bytes, write
from refimpl.quants.formats import BF16, F32, Q4_K, Q8_0, known

WIDTHS = {V.UINT8: "u1", V.INT8: "i1", V.UINT16: "<u2", V.INT16: "<i2", V.UINT32: "<u4", V.INT32: "<i4",
          V.UINT64: "<u8", V.INT64: "<i8"}  # fmt: skip

number = st.sampled_from(sorted(WIDTHS)).flatmap(
    lambda kind: st.tuples(st.just(kind), st.integers(np.iinfo(WIDTHS[kind]).min, np.iinfo(WIDTHS[kind]).max))
)
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=600)
array = st.one_of(
    st.lists(text, min_size=1, max_size=5),
    st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=5),
    st.lists(st.booleans(), min_size=1, max_size=5),
    st.lists(st.floats(width=32, allow_nan=False), max_size=5).map(lambda x: np.array(x, "<f4")),
    st.lists(st.integers(0, 2**64 - 1), max_size=5).map(lambda x: np.array(x, "<u8")),
)
value = st.one_of(
    number,
    st.tuples(st.just(V.STRING), text),
    st.tuples(st.just(V.BOOL), st.booleans()),
    st.tuples(st.just(V.FLOAT32), st.floats(width=32, allow_nan=False)),
    st.tuples(st.just(V.FLOAT64), st.floats(allow_nan=False)),
    st.tuples(st.just(V.ARRAY), array),
)
key = st.text("abcdefghijklmnopqrstuvwxyz_.0123456789", min_size=1, max_size=40).filter(
    lambda k: k != "general.alignment" and not k.startswith("split.")
)
shape = st.lists(st.integers(1, 4), max_size=3).flatmap(
    lambda lead: st.sampled_from([F32, BF16, Q8_0, Q4_K]).flatmap(
        lambda fmt: st.integers(1, 3).map(lambda blocks: ((*lead, blocks * fmt.weights), fmt))
    )
)
name = st.text("abcdefghijklmnopqrstuvwxyz_.0123456789", min_size=1, max_size=63)


def listed(value):
    """A metadata value as plain Python."""
    if isinstance(value, str | int | float):
        return value
    value = value.tolist() if isinstance(value, np.ndarray) else value
    return [listed(v) for v in value]


def stored(tensors, seed=0):
    """Tensors with random bytes: (name, shape, format, chunks) as write takes them, and the bytes."""
    random = np.random.default_rng(seed)
    out, raw = [], {}
    for name, (shape, fmt) in tensors.items():
        rows = int(np.prod(shape[:-1], dtype=object)) if len(shape) > 1 else 1
        raw[name] = random.integers(0, 256, (rows, fmt.row_bytes(shape[-1])), np.uint8)
        half = rows // 2
        out.append((name, shape, fmt, [raw[name][:half], raw[name][half:]]))
    return out, raw


@settings(max_examples=60, deadline=None)
@given(
    metadata=st.dictionaries(key, value, max_size=6),
    tensors=st.dictionaries(name, shape, max_size=4),
    alignment=st.sampled_from([1, 8, 32, 4096]),
)
def test_what_is_written_is_read_again(tmp_path_factory, metadata, tensors, alignment):
    path = tmp_path_factory.mktemp("round") / "a.gguf"
    listing, raw = stored(tensors)
    write(path, metadata, listing, alignment)
    with refimpl.open(path) as f:
        assert f.defects == []
        assert (f.kind, f.version, f.alignment) == ("gguf", 3, alignment)
        got = {k: v for k, v in f.metadata.items() if k != "general.alignment"}
        assert listed(list(got)) == list(metadata)
        assert {k: listed(v) for k, v in got.items()} == {k: listed(v) for k, (_, v) in metadata.items()}
        assert {k: f.metadata.types[k] for k in got} == {k: t for k, (t, _) in metadata.items()}
        assert list(f.tensors) == list(tensors)
        for n, (shape, fmt) in tensors.items():
            assert (f.tensors[n].shape, f.tensors[n].format) == (shape, fmt)
            assert (f.tensors[n].offset - f.data_offset) % alignment == 0
            np.testing.assert_array_equal(f.read(n), raw[n])
        again = path.with_name("b.gguf")
        write(again, f.metadata.typed(), listing, alignment)
        assert again.read_bytes() == path.read_bytes()
        write(again, f.raw_metadata(), listing, alignment)
        assert again.read_bytes() == path.read_bytes()


def test_gguf_py_reads_our_file_as_we_do(tmp_path):
    metadata = {
        "general.architecture": (V.STRING, "glm-dsa"), "a.u8": (V.UINT8, 200), "a.i8": (V.INT8, -3),
        "a.u16": (V.UINT16, 60000), "a.i16": (V.INT16, -300), "a.u32": (V.UINT32, 4_000_000_000),
        "a.i32": (V.INT32, -5), "a.u64": (V.UINT64, 2**63), "a.i64": (V.INT64, -(2**60)),
        "a.f32": (V.FLOAT32, 0.1), "a.f64": (V.FLOAT64, 0.1), "a.bool": (V.BOOL, True),
        "a.texts": (V.ARRAY, ["", "é", "🂡" * 300]), "a.numbers": (V.ARRAY, [1, 2, 3]),
        "a.bools": (V.ARRAY, [True, False]),
    }  # fmt: skip
    tensors = {"w": ((3, 2, 512), Q4_K), "b": ((7,), F32), "c": ((5, 64), Q8_0)}
    listing, _ = stored(tensors)
    path = tmp_path / "a.gguf"
    write(path, metadata, listing)
    assert_same_as_gguf_py(path)


def test_we_read_the_file_of_gguf_py_as_it_does(tmp_path):
    path = tmp_path / "b.gguf"
    writer = gguf.GGUFWriter(path, "glm-dsa", use_temp_file=False)
    writer.add_uint32("glm-dsa.block_count", 3)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "ç"])
    writer.add_array("x.floats", [1.5, 2.5])
    writer.add_custom_alignment(64)
    writer.add_tensor("x.weight", np.arange(24, dtype=np.float32).reshape(2, 3, 4))
    writer.add_tensor("y.weight", np.arange(6, dtype=np.float16).reshape(3, 2))
    raw = np.arange(2 * 34, dtype=np.uint8).reshape(2, 34)
    writer.add_tensor("z.weight", raw, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert_same_as_gguf_py(path)


def assert_same_as_gguf_py(path):
    theirs = gguf.GGUFReader(path)
    with refimpl.open(path) as ours:
        assert ours.defects == []
        fields = {k: f.contents() for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
        assert {k: listed(v) for k, v in ours.metadata.items()} == {k: listed(v) for k, v in fields.items()}
        assert ours.data_offset == theirs.data_offset
        assert [t.name for t in theirs.tensors] == list(ours.tensors)
        for t in theirs.tensors:
            mine = ours.tensors[t.name]
            assert mine.format.id == t.tensor_type
            assert mine.shape == tuple(int(n) for n in t.shape[::-1])
            assert (mine.offset, mine.nbytes) == (t.data_offset, t.n_bytes)
            np.testing.assert_array_equal(ours.read(t.name).reshape(-1), t.data.view(np.uint8).reshape(-1))


def test_rows_are_read_by_ranges(tmp_path):
    listing, raw = stored({"w": ((3, 4, 64), Q8_0)})
    write(tmp_path / "a.gguf", {}, listing)
    with refimpl.open(tmp_path / "a.gguf") as f:
        np.testing.assert_array_equal(f.read("w", slice(5, 9)), raw["w"][5:9])
        np.testing.assert_array_equal(f.read("w", slice(-1, None)), raw["w"][-1:])
        assert f.read("w", slice(4, 4)).shape == (0, 68)
        out = np.full((2, 68), 0xAA, np.uint8)
        assert f.read("w", slice(0, 2), out) is out
        np.testing.assert_array_equal(out, raw["w"][:2])
        with pytest.raises(ValueError, match="out must be"):
            f.read("w", slice(0, 3), out)
        with pytest.raises(ValueError, match="step"):
            f.read("w", slice(0, 3, 2))
        with pytest.raises(KeyError):
            f.read("v")


def test_nested_arrays_are_read(tmp_path):
    nested = [[[1, 2], [3]], [["a"], ["b", "c"]]]
    write(tmp_path / "a.gguf", {"x": (V.ARRAY, nested)}, [])
    with refimpl.open(tmp_path / "a.gguf") as f:
        assert listed(f.metadata["x"]) == nested


def test_version_2_is_read_and_others_are_named(tmp_path):
    for version in (2, 3):
        (tmp_path / "a.gguf").write_bytes(header_bytes({"a": (V.UINT8, 1)}, [], version=version)[0])
        with refimpl.open(tmp_path / "a.gguf") as f:
            assert (f.version, dict(f.metadata)) == (version, {"a": 1})


def test_a_type_that_we_do_not_decode_still_has_its_size(tmp_path):
    fmt = known(int(gguf.GGMLQuantizationType.IQ2_XXS))
    assert (fmt.name, fmt.weights, fmt.block.itemsize) == ("iq2_xxs", 256, 66)
    listing, raw = stored({"w": ((2, 512), fmt)})
    write(tmp_path / "a.gguf", {}, listing)
    with refimpl.open(tmp_path / "a.gguf") as f:
        np.testing.assert_array_equal(f.read("w"), raw["w"])


def test_every_type_of_gguf_py_has_its_size_and_removed_ones_have_none():
    for kind, (weights, size) in gguf.GGML_QUANT_SIZES.items():
        assert (known(int(kind)).weights, known(int(kind)).block.itemsize) == (weights, size)
    assert [known(i) for i in (4, 5, 31, 32, 33, 36, 37, 38, 2**31, 2**32 - 1)] == [None] * 10


def test_a_vocabulary_of_154_880_tokens_stays_bytes_until_it_is_read(tmp_path):
    tokens = [f"token{i}" for i in range(154_880)]
    merges = [f"to ken{i}" for i in range(321_649)]
    metadata = {
        "tokenizer.ggml.tokens": (V.ARRAY, tokens),
        "tokenizer.ggml.token_type": (V.ARRAY, np.ones(154_880, "<i4")),
        "tokenizer.ggml.merges": (V.ARRAY, merges),
    }
    write(tmp_path / "a.gguf", metadata, [])
    refimpl.open(tmp_path / "a.gguf").close()  # imports
    tracemalloc.start()
    with refimpl.open(tmp_path / "a.gguf") as f:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < f.header_bytes  # a third of it is measured; all strings as objects take 3.7 times it
        got = f.metadata["tokenizer.ggml.tokens"]
        assert (len(got), got[0], got[154_879]) == (154_880, "token0", "token154879")
        assert got == tokens
        assert f.metadata["tokenizer.ggml.merges"][-1] == "to ken321648"


def test_writing_is_atomic(tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(b"before")
    with pytest.raises(ValueError, match="3 bytes given, 16 needed"):
        write(path, {}, [("w", (4,), F32, [b"abc"])])
    assert path.read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["a.gguf"]


@pytest.mark.parametrize(
    "metadata",
    [{"a": (V.UINT8, 256)}, {"a": (V.INT32, 1.5)}, {"a": (V.BOOL, 2)}, {"a": (V.ARRAY, [])},
     {"a": (V.ARRAY, np.zeros((2, 2)))}, {"a": (V.ARRAY, [2**40])}],
)  # fmt: skip
def test_a_value_that_does_not_fit_its_type_is_not_written(metadata):
    with pytest.raises(ValueError):
        encode(metadata)


# --- splits -----------------------------------------------------------------------------------------------


def write_split(folder, shards, total=None, counts=None, numbers=None, prefix="m"):
    """A split file of these tensors per shard; returns the paths."""
    count = len(shards)
    paths, raw = [], {}
    total = sum(map(len, shards)) if total is None else total
    for i, tensors in enumerate(shards):
        listing, bytes_ = stored(tensors, seed=i)
        raw |= bytes_
        metadata = {"general.architecture": (V.STRING, "glm-dsa")} if i == 0 else {}
        metadata |= {
            "split.no": (V.UINT16, i if numbers is None else numbers[i]),
            "split.count": (V.UINT16, count if counts is None else counts[i]),
            "split.tensors.count": (V.INT32, total),
        }
        paths.append(folder / f"{prefix}-{i + 1:05}-of-{count:05}.gguf")
        write(paths[-1], metadata, listing)
    return paths, raw


SHARDS = [{}, {"a": ((2, 64), Q8_0), "b": ((3,), F32)}, {"c": ((4, 32), Q8_0)}]


def test_any_shard_opens_the_whole_split(tmp_path):
    paths, raw = write_split(tmp_path, SHARDS)
    for path in paths:
        with refimpl.open(path) as f:
            assert f.parts == [str(p) for p in paths]
            assert f.size == sum(p.stat().st_size for p in paths)
            assert f.metadata["general.architecture"] == "glm-dsa"
            assert {n: t.part for n, t in f.tensors.items()} == {"a": 1, "b": 1, "c": 2}
            for n in raw:
                np.testing.assert_array_equal(f.read(n), raw[n])


def test_more_shards_than_file_descriptors_are_read(tmp_path):
    shards = [{f"w{i}": ((1, 32), Q8_0)} for i in range(300)]
    paths, raw = write_split(tmp_path, shards)
    with refimpl.open(paths[7]) as f:
        for n in raw:
            np.testing.assert_array_equal(f.read(n), raw[n])


def test_a_directory_in_the_shards_name_stays_where_it_is(tmp_path):
    (tmp_path / "x-00009-of-00009.gguf").mkdir()
    paths, _ = write_split(tmp_path / "x-00009-of-00009.gguf", SHARDS)
    with refimpl.open(paths[1]) as f:
        assert {os.path.dirname(p) for p in f.parts} == {str(tmp_path / "x-00009-of-00009.gguf")}


@pytest.mark.parametrize(
    ("lie", "word"),
    [({"total": 4}, "split.tensors.count is 4"), ({"counts": [3, 4, 3]}, "split.count is 4"),
     ({"numbers": [0, 2, 1]}, "split.no is 2"), ({"numbers": [0, 1, 7]}, "split.no is 7"),
     ({"counts": [3, 3, 1]}, "split.no is 2 of split.count 1")],
)  # fmt: skip
def test_a_split_that_lies_is_refused(tmp_path, lie, word):
    paths, _ = write_split(tmp_path, SHARDS, **lie)
    with pytest.raises(BadFile, match=word) as caught:
        refimpl.open(paths[0])
    assert caught.value.offset is not None


def test_a_missing_shard_is_named(tmp_path):
    paths, _ = write_split(tmp_path, SHARDS)
    paths[1].unlink()
    with pytest.raises(BadFile, match="no such file") as caught:
        refimpl.open(paths[0])
    assert caught.value.path == str(paths[1])


def test_swapped_shards_are_refused(tmp_path):
    paths, _ = write_split(tmp_path, SHARDS)
    paths[1].rename(tmp_path / "x")
    paths[2].rename(paths[1])
    (tmp_path / "x").rename(paths[2])
    with pytest.raises(BadFile, match=r"split\.no is 2, not 1"):
        refimpl.open(paths[0])


def test_a_renamed_shard_is_refused(tmp_path):
    paths, _ = write_split(tmp_path, SHARDS)
    paths[0].rename(tmp_path / "model.gguf")
    with pytest.raises(BadFile, match="not by its name"):
        refimpl.open(tmp_path / "model.gguf")


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    paths, _ = write_split(tmp_path, [{"a": ((3,), F32)}, {"a": ((3,), F32)}])
    with pytest.raises(BadFile, match="'a' is also in"):
        refimpl.open(paths[0])


# --- what is no model -------------------------------------------------------------------------------------


def test_a_file_of_another_kind_is_unsupported(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"PK\x03\x04 and so on")
    with pytest.raises(Unsupported, match="neither GGUF nor safetensors"):
        refimpl.open(tmp_path / "a.bin")


def test_a_missing_file_and_a_pipe_are_bad_files(tmp_path):
    with pytest.raises(BadFile, match="no such file"):
        refimpl.open(tmp_path / "a.gguf")
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(BadFile, match="not a regular file"):
        refimpl.open(tmp_path / "pipe.gguf")
    with pytest.raises(BadFile):
        refimpl.open("a\0b")
