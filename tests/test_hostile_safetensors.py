"""Hostile safetensors files and checkpoints: each is one clear error, in under a second and 200 MB."""

import json
import struct

import numpy as np
import pytest
from test_hostile_gguf import TERA, bounded, measure, sparse
from tiny_checkpoint import write_checkpoint

import refimpl
from refimpl.errors import BadFile, Unsupported
from refimpl.files import names

INDEX = "model.safetensors.index.json"


def file(header, data=b"", length=None, pad=b""):
    """A .safetensors of this header (JSON text, or what becomes it) and data; the length may lie."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    raw += pad
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)} | more


def one(**change):
    return file({"w": entry(**change)}, bytes(8))


W = b'"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}'
TWICE = b"{%s, %s}" % (W, W)
A, B = {"a": entry()}, {"b": entry(offsets=(8, 16))}
# where the defect is: bytes of the file
HEADER = {
    "an empty file": (b"", 0),
    "seven bytes": (bytes(7), 0),
    "a header longer than the file": (file(A, bytes(8), length=1000), 8),
    "a header of 2**63 bytes": (file(A, bytes(8), length=2**63), 0),
    "a header of 2**64 - 1 bytes": (file(A, bytes(8), length=2**64 - 1), 0),
    "a header over 100 MB": (file(A, bytes(8), length=100_000_001), 0),
    "a header of no bytes": (file(A, bytes(8), length=0), 0),
    "a header that is a list": (file(b"[]"), 8),
    "a header that does not start with a brace": (file(b' {"a":1}'), 8),
    "a header with a byte order mark": (file(b"\xef\xbb\xbf{}"), 8),
    "junk after the header": (file(A, bytes(8), pad=b"x"), 8 + len(json.dumps(A))),
    "NULs after the header": (file(A, bytes(8), pad=b"\0\0"), 8 + len(json.dumps(A)) + 1),
    "a second object after the header": (file(b"{} {}"), 11),
    "broken JSON": (file(b'{"a": }'), 14),
    "JSON that is not UTF-8": (file(b'{"a\xff": 1}'), 11),
    "NaN": (file(b'{"a": NaN}'), 14),
    "an integer of 5,000 digits": (file(b'{"a": %s}' % (b"9" * 5000)), 8),
    "a tensor twice": (file(TWICE, bytes(8)), 8 + TWICE.rfind(b'"w"')),
    "a key of an entry twice": (file(b'{"w":{"dtype":"F32","dtype":"F16"}}'), 8 + 20),
    "metadata that is no map": (file({"__metadata__": []} | A, bytes(8)), 9),
    "metadata that holds a number": (file({"__metadata__": {"a": 1}} | A, bytes(8)), 9),
    "an entry that is a number": (file({"w": 1}), 9),
    "an entry without a dtype": (file({"w": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8)), 9),
    "an entry with more": (one(extra=1), 9),
    "a dtype that does not exist": (one(dtype="F31"), 9),
    "a dtype that is a list": (one(dtype=["F32"]), 9),
    "a dtype in lower case": (one(dtype="f32"), 9),
    "a shape that is a number": (file({"w": {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]}},
    bytes(8)), 9),
    "a negative axis": (one(shape=(-2,)), 9),
    "an axis that is a bool": (one(shape=(True, 2)), 9),
    "an axis that is a float": (one(shape=(2.0,)), 9),
    "an axis of 2**64": (one(shape=(2**64, 0)), 9),
    "axes whose product wraps": (one(shape=(2**32, 2**32, 2)), 9),
    "axes whose product wraps to 2": (one(shape=(2**63 - 1, 2**62)), 9),
    "100 axes": (one(shape=(1,) * 100), 9),
    "a range that does not fit the shape": (one(shape=(3,)), 9),
    "a range that does not fit the dtype": (one(dtype="F16"), 9),
    "half a byte": (file({"w": entry("F4", (3,), (0, 1))}, bytes(1)), 9),
    "a range that ends before it begins": (one(offsets=(8, 0)), 9),
    "a negative offset": (one(offsets=(-8, 0)), 9),
    "an offset that is a float": (one(offsets=(0.0, 8.0)), 9),
    "an offset that is a string": (one(offsets=("0", "8")), 9),
    "an offset that is a bool": (one(offsets=(False, 8)), 9),
    "an offset over 2**53": (one(offsets=(2**53 + 1, 2**53 + 9)), 9),
    "an offset over 2**64": (one(offsets=(0, 2**64 + 8)), 9),
    "three offsets": (one(offsets=(0, 8, 16)), 9),
    "a range past the end": (file(A, bytes(4)), 9),
    "ranges that overlap": (file(A | {"b": entry(offsets=(4, 12))}, bytes(12)), 8 + len(json.dumps(A)) + 1),
    "two names for one range": (file(A | {"b": entry()}, bytes(8)), 8 + len(json.dumps(A)) + 1),
    "a hole": (file(A | {"b": entry(offsets=(12, 20))}, bytes(20)), 8 + len(json.dumps(A)) + 1),
    "a hole before the first": (file(B, bytes(16)), 9),
    "a tail that no tensor names": (file(A, bytes(9)), 8 + len(json.dumps(A)) + 8),
    "a tail after no tensor": (file({}, bytes(1)), 10),
    "JSON nested 100,000 deep": (file(b'{"a":' * 100_000), 8 + 499_999),
    "JSON nested 100,000 deep and closed": (file(b'{"a":' * 100_000 + b"1" + b"}" * 100_000), 8),
    "lists nested 100,000 deep": (file(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), 8),
    "a Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", 0),
}  # fmt: skip


@pytest.mark.parametrize("shape", HEADER)
def test_a_hostile_header_is_a_bad_file_with_its_offset(tmp_path, shape):
    raw, offset = HEADER[shape]
    path = tmp_path / "a.safetensors"
    path.write_bytes(raw)
    with bounded(), pytest.raises(BadFile) as caught:
        refimpl.open(path)
    assert (caught.value.path, caught.value.offset) == (str(path), offset)


def test_the_library_refuses_what_we_refuse(tmp_path):
    """Where the library reads a file that we refuse, the reason is written here."""
    from safetensors import SafetensorError, safe_open

    stricter = {
        "a key of an entry twice", "a tensor twice", "two names for one range", "metadata that is no map",
        "an entry with more", "100 axes", "junk after the header", "JSON nested 100,000 deep",
    }  # fmt: skip
    read = set()
    for shape, (raw, _) in HEADER.items():
        (tmp_path / "a.safetensors").write_bytes(raw)
        try:
            safe_open(tmp_path / "a.safetensors", framework="numpy")
            read.add(shape)
        except (SafetensorError, OSError):
            pass
    assert read <= stricter


def test_legal_oddities_are_read(tmp_path):
    path = tmp_path / "a.safetensors"
    odd = {
        "__metadata__": {"format": "pt"},
        "b": entry("BF16", (), (8, 10)),
        "a": entry(),
        "z": entry("F16", (0, 4), (10, 10)),
    }
    path.write_bytes(file(odd, bytes(10), pad=b"   "))
    with refimpl.open(path) as f:
        assert {n: t.shape for n, t in f.tensors.items()} == {"a": (2,), "b": (), "z": (0, 4)}
        assert [f.read(n).shape for n in "abz"] == [(1, 8), (1, 2), (0, 8)]
    path.write_bytes(file({}))
    with refimpl.open(path) as f:
        assert f.tensors == {}


@pytest.mark.parametrize(
    ("dtype", "shape", "size"), [("F8_E4M3", (2,), 2), ("F4", (2, 2), 2), ("I64", (1,), 8)]
)
def test_another_dtype_is_listed_and_unsupported_when_read(tmp_path, dtype, shape, size):
    (tmp_path / "a.safetensors").write_bytes(file({"w": entry(dtype, shape, (0, size))}, bytes(size)))
    with refimpl.open(tmp_path / "a.safetensors") as f:
        assert f.tensors["w"].nbytes == size
        with pytest.raises(Unsupported, match=dtype.lower()):
            f.read("w")


def test_a_file_cut_at_any_byte_is_a_bad_file(tmp_path):
    raw = file(A | B, bytes(16))
    for cut in range(len(raw)):
        (tmp_path / "a.safetensors").write_bytes(raw[:cut])
        with pytest.raises(BadFile):
            refimpl.open(tmp_path / "a.safetensors")


def test_a_sparse_terabyte_is_a_bad_file(tmp_path):
    path = tmp_path / "a.safetensors"
    for raw, offset in (
        (file(b"", length=2**39), 0),
        (file(b"", length=20_000_000), 8),
        (file(A), 8 + len(json.dumps(A)) + 8),
    ):
        sparse(path, raw, TERA)
        with bounded(), pytest.raises(BadFile) as caught:
            refimpl.open(path)
        assert caught.value.offset == offset


def many(count):
    return {f"tensor.{i:06}": entry(shape=(1,), offsets=(4 * i, 4 * i + 4)) for i in range(count)}


def lists(separator, size):
    return b'{"a":[' + separator * (size // len(separator)) + b"[]]}"


COSTLY = {
    "30 MB of small lists": lists(b"[],", 30_000_000),
    "30 MB of zeros": lists(b"0,", 30_000_000),
    "30 MB of strings": lists(b'"",', 30_000_000),
    "30 MB of objects": lists(b"{},", 30_000_000),
    "500,000 numbers": lists(b"0,", 1_000_000),
    "65,000 objects": lists(b'{"a":1},', 65_000 * 8),
    "one string of 30 MB": b'{"a":"' + b"x" * 30_000_000 + b'"}',
    "a number of 30 MB": b'{"a":' + b"9" * 30_000_000 + b"}",
    "spaces": b"{" + b" " * 30_000_000 + b"}",
}


@pytest.mark.parametrize("shape", COSTLY)
def test_the_costliest_headers_stay_within_bounds(tmp_path, shape):
    (tmp_path / "a.safetensors").write_bytes(file(COSTLY[shape]))
    assert measure(tmp_path / "a.safetensors") == ("opened" if shape == "spaces" else "bad")


def test_as_many_tensors_as_are_read_stay_within_bounds(tmp_path):
    for count, word in ((60_000, "opened"), (100_000, "bad")):
        (tmp_path / "a.safetensors").write_bytes(file(many(count), bytes(4 * count)))
        assert measure(tmp_path / "a.safetensors") == word


# --- directories --------------------------------------------------------------------------------------------


def change_index(folder, change):
    path = folder / INDEX
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


def first(index):
    return next(iter(index["weight_map"]))


@pytest.mark.parametrize(
    "shard",
    ["../evil.safetensors", "/etc/passwd", "sub/a.safetensors", "..", ".", "", "a\\b.safetensors", "a\0b",
     7, None, ["a"]],
)  # fmt: skip
def test_an_index_that_leads_out_of_the_directory_is_a_bad_file(tmp_path, shard):
    write_checkpoint(tmp_path / "hf")
    (tmp_path / "evil.safetensors").write_bytes(file({}))
    change_index(tmp_path / "hf", lambda index: index["weight_map"].update({first(index): shard}))
    with pytest.raises(BadFile, match="not the name of a file beside it") as caught:
        refimpl.open(tmp_path / "hf")
    assert caught.value.path.endswith(INDEX)


LIES = {
    "a shard that is missing": lambda index: index["weight_map"].update({first(index): "gone.safetensors"}),
    "a tensor that no shard holds": lambda index: index["weight_map"].update(
        ghost="model-00001-of-00002.safetensors"),
    "a tensor that the index lacks": lambda index: index["weight_map"].pop(first(index)),
    "a tensor in the other shard": lambda index: index["weight_map"].update(
        {first(index): "model-00002-of-00002.safetensors"}),
    "no weight_map": lambda index: index.pop("weight_map"),
    "an empty weight_map": lambda index: index.update(weight_map={}),
    "a weight_map that is a list": lambda index: index.update(weight_map=[]),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_an_index_that_lies_is_a_bad_file(tmp_path, lie):
    write_checkpoint(tmp_path / "hf")
    change_index(tmp_path / "hf", LIES[lie])
    with bounded(), pytest.raises(BadFile):
        refimpl.open(tmp_path / "hf")


def test_a_tensor_in_two_shards_is_a_bad_file(tmp_path):
    write_checkpoint(tmp_path / "hf")
    with refimpl.open(tmp_path / "hf") as f:
        name = next(n for n, t in f.tensors.items() if t.part == 0)
    from safetensors.numpy import load_file, save_file

    second = tmp_path / "hf" / "model-00002-of-00002.safetensors"
    save_file(load_file(second) | {name: np.zeros(3, np.float32)}, second)
    with pytest.raises(BadFile, match="is also in"):
        refimpl.open(tmp_path / "hf")


@pytest.mark.parametrize("size", [0, 1, 2**70, "many", -1, 1.5])
def test_a_total_size_that_lies_is_noted_and_the_tensors_can_be_read(tmp_path, size):
    write_checkpoint(tmp_path / "hf")
    change_index(tmp_path / "hf", lambda index: index["metadata"].update(total_size=size))
    with refimpl.open(tmp_path / "hf") as f:
        assert [(d.code, d.tensor) for d in f.defects] == [("total-size", None)]
        assert f.read("model.norm.weight").shape == (1, 64)


def test_an_index_or_config_that_is_broken_is_a_bad_file(tmp_path):
    for broken in (INDEX, "config.json"):
        for raw in (b"", b"[]", b'{"a":1,"a":2}', b"{" * 200_000, b"\xff", b'{"a": Infinity}'):
            write_checkpoint(tmp_path / "hf")
            (tmp_path / "hf" / broken).write_bytes(raw)
            with bounded(), pytest.raises(BadFile) as caught:
                refimpl.open(tmp_path / "hf")
            assert caught.value.path.endswith(broken)
            assert caught.value.offset is not None


def test_a_sparse_index_is_a_bad_file(tmp_path):
    write_checkpoint(tmp_path / "hf")
    sparse(tmp_path / "hf" / INDEX, b"{", TERA)
    with bounded(), pytest.raises(BadFile, match="more than"):
        refimpl.open(tmp_path / "hf")


def test_a_directory_without_an_index_is_read(tmp_path):
    weights = write_checkpoint(tmp_path / "hf")
    (tmp_path / "hf" / INDEX).unlink()
    with refimpl.open(tmp_path / "hf") as f:
        assert (f.kind, len(f.parts), set(f.tensors)) == ("hf", 2, set(weights))
        assert names.hparams(f).hidden_size == 32
    (tmp_path / "hf" / "config.json").unlink()
    with refimpl.open(tmp_path / "hf") as f, pytest.raises(Unsupported):
        names.hparams(f)


def test_a_directory_without_safetensors_is_unsupported(tmp_path):
    with pytest.raises(Unsupported, match=r"without \.safetensors"):
        refimpl.open(tmp_path)


def test_a_link_to_a_shard_elsewhere_is_followed(tmp_path):
    write_checkpoint(tmp_path / "hf")
    blob = tmp_path / "blob"
    shard = tmp_path / "hf" / "model-00001-of-00002.safetensors"
    shard.rename(blob)
    shard.symlink_to(blob)
    refimpl.open(tmp_path / "hf").close()
