"""Hostile GGUF files: each is one clear error with its offset, in under a second and 200 MB."""

import struct
import subprocess
import sys
import time
import tracemalloc

import pytest

import refimpl
from refimpl.errors import BadFile, Unsupported
from refimpl.files import names
from refimpl.files.gguf import GGUFValueType as V
from refimpl.files.gguf import header_bytes, write
from refimpl.quants.formats import F32, Q4_K, Q8_0

TERA = 1 << 40


def u32(n):
    return struct.pack("<I", n & 0xFFFFFFFF)


def u64(n):
    return struct.pack("<Q", n & 0xFFFFFFFFFFFFFFFF)


def text(raw, length=None):
    return u64(len(raw) if length is None else length) + raw


def key(value, name=b"k"):
    return text(name) + value


def array(element, count, body=b""):
    return u32(9) + u32(element) + u64(count) + body


def tensor(name=b"w", dims=(32,), kind=0, offset=0, axes=None):
    return (
        text(name)
        + u32(len(dims) if axes is None else axes)
        + b"".join(map(u64, dims))
        + u32(kind)
        + u64(offset)
    )


def gguf(keys=(), tensors=(), data=b"", version=3, n_keys=None, n_tensors=None):
    """A file of these keys and tensor rows, padded to 32 before the data; counts may lie."""
    head = b"GGUF" + u32(version) + u64(len(tensors) if n_tensors is None else n_tensors)
    head += u64(len(keys) if n_keys is None else n_keys) + b"".join(keys) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + data


VALUE = 24 + 9 + 4  # where the value of the only key, "k", starts
TABLE = 24 + 9  # where the axes of the only tensor, "w", are written
ALIGNMENT = text(b"general.alignment")
DATA = bytes(128)  # the 32 F32 weights of a tensor row

HEADER = {
    "an empty file": (b"", 0),
    "three bytes": (b"GGU", 0),
    "another magic": (b"GGML" + bytes(40), 0),
    "a Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", 0),
    "2**63 tensors": (gguf(n_tensors=2**63), 8),
    "-1 tensors": (gguf(n_tensors=-1), 8),
    "2**40 tensors": (gguf(n_tensors=2**40), 8),
    "2**63 keys": (gguf(n_keys=2**63), 16),
    "-1 keys": (gguf(n_keys=-1), 16),
    "many keys in a tiny file": (gguf([key(u32(0) + b"\1")], n_keys=16_000), 16),
    "more keys than there are": (gguf([key(u32(0) + b"\1")] * 1, n_keys=2, data=bytes(64)), 38),
    "an empty key": (gguf([key(u32(0) + b"\1", b"")]), 24),
    "a key of 64 KiB": (gguf([key(u32(0) + b"\1", b"k" * 65_536)]), 24),
    "a key of 2**63 bytes": (gguf([text(b"k", 2**63)], data=bytes(64)), 32),
    "a key longer than the file": (gguf([text(b"k", 999)], data=bytes(64)), 32),
    "a key that is not UTF-8": (gguf([key(u32(0) + b"\1", b"\xff\xfe")]), 24),
    "a key with a NUL": (gguf([key(u32(0) + b"\1", b"a\0b")]), 24),
    "a key twice": (gguf([key(u32(0) + b"\1")] * 2), 38),
    "a value type that does not exist": (gguf([key(u32(13) + bytes(8))]), 33),
    "value type -1": (gguf([key(u32(-1) + bytes(8))]), 33),
    "a bool of 2": (gguf([key(u32(7) + b"\2")]), VALUE),
    "a bool of 255 in an array": (gguf([key(array(7, 3, b"\0\1\xff"))]), VALUE + 14),
    "a string of 2**63 bytes": (gguf([key(u32(8) + u64(2**63))], data=bytes(64)), VALUE + 8),
    "a string of -1 bytes": (gguf([key(u32(8) + u64(-1))], data=bytes(64)), VALUE + 8),
    "a string longer than the file": (gguf([key(u32(8) + u64(9999))], data=bytes(64)), VALUE + 8),
    "a string that is not UTF-8": (gguf([key(u32(8) + text(b"\xc3\x28"))]), VALUE + 8),
    "an array of 2**63 bytes": (gguf([key(array(0, 2**63))])[:49], VALUE + 12),
    "an array of -1 doubles": (gguf([key(array(12, -1))]), VALUE + 12),
    "an array of 2**61 + 1 doubles": (gguf([key(array(12, 2**61 + 1))]), VALUE + 12),
    "an array of 2**63 strings": (gguf([key(array(8, 2**63))]), VALUE),
    "an array of 2**61 strings": (gguf([key(array(8, 2**61))]), VALUE),
    "an array of 2**63 arrays": (gguf([key(array(9, 2**63))]), VALUE),
    "an array whose string is too long": (gguf([key(array(8, 2, text(b"a") + u64(2**62)))]),
    VALUE + 12 + 9 + 8),
    "an array whose strings wrap": (gguf([key(array(8, 2, text(b"a") + u64(-24)))]), VALUE + 12 + 9 + 8),
    "array elements of type 13": (gguf([key(array(13, 1, bytes(8)))]), VALUE),
    "array elements of type -1": (gguf([key(array(-1, 1, bytes(8)))]), VALUE),
    "arrays nested 5,000 deep": (gguf([key(u32(9) + (u32(9) + u64(1)) * 5000)]), VALUE + 7 * 12),
    "arrays nested 3,000 deep and wide": (gguf([key(u32(9) + (u32(9) + u64(9)) * 3000)]), VALUE + 7 * 12),
    "a tensor's name of 64 bytes": (gguf([], [tensor(b"w" * 64)], DATA), 24),
    "a tensor's name of 2**63 bytes": (gguf([], [text(b"w", 2**63)], DATA), 32),
    "an empty tensor's name": (gguf([], [tensor(b"")], DATA), 24),
    "a tensor's name with a NUL": (gguf([], [tensor(b"a\0b")], DATA), 24),
    "a tensor's name that is not UTF-8": (gguf([], [tensor(b"\xff")], DATA), 24),
    "a tensor twice": (gguf([], [tensor(), tensor(offset=128)], DATA * 2), 24 + 33),
    "no axes": (gguf([], [tensor(dims=())], DATA), TABLE),
    "5 axes": (gguf([], [tensor(dims=(1,) * 5)], DATA), TABLE),
    "a million axes": (gguf([], [tensor(axes=10**6)], DATA), TABLE),
    "2**32 - 1 axes": (gguf([], [tensor(axes=-1)], DATA), TABLE),
    "an axis of 0": (gguf([], [tensor(dims=(32, 0))], DATA), TABLE + 4),
    "axes of 2**32 and 2**32": (gguf([], [tensor(dims=(2**32, 2**32))], DATA), TABLE + 4),
    "axes of 2**63 + 2 and 2": (gguf([], [tensor(dims=(2**63 + 2, 2))], DATA), TABLE + 4),
    "an axis of -1": (gguf([], [tensor(dims=(-1,))], DATA), TABLE + 4),
    "axes whose bytes wrap": (gguf([], [tensor(dims=(2**31, 2**31))], DATA), TABLE + 4 + 16 + 4),
    "rows of no whole blocks": (gguf([], [tensor(dims=(48,), kind=8)], DATA), TABLE + 12),
    "an offset of 2**64 - 32": (gguf([], [tensor(offset=-32)], DATA), TABLE + 16),
    "an offset of 2**63": (gguf([], [tensor(offset=2**63)], DATA), TABLE + 16),
    "alignment 0": (gguf([ALIGNMENT + u32(4) + u32(0)]), 24 + 25 + 4),
    "alignment 3": (gguf([ALIGNMENT + u32(4) + u32(3)]), 24 + 25 + 4),
    "alignment 2**31": (gguf([ALIGNMENT + u32(4) + u32(2**31)]), 24 + 25 + 4),
    "alignment as INT32": (gguf([ALIGNMENT + u32(5) + u32(32)]), 24 + 25 + 4),
    "alignment as a string": (gguf([ALIGNMENT + u32(8) + text(b"32")]), 24 + 25 + 4),
} | {
    f"tensor type {kind}": (gguf([], [tensor(kind=kind)], DATA), TABLE + 12)
    for kind in (-1, 4, 5, 31, 32, 33, 36, 37, 38, 200, 2**31)
}  # fmt: skip


class bounded:
    """Fail where the block takes over a second of the processor or 200 MB (traced: both are upper bounds)."""

    def __enter__(self):
        tracemalloc.start()
        self.start = time.process_time()

    def __exit__(self, *_):
        seconds, (_, peak) = time.process_time() - self.start, tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert seconds < 1
        assert peak < 200e6


@pytest.mark.parametrize("shape", HEADER)
def test_a_hostile_header_is_a_bad_file_with_its_offset(tmp_path, shape):
    raw, offset = HEADER[shape]
    path = tmp_path / "a.gguf"
    path.write_bytes(raw)
    with bounded(), pytest.raises(BadFile) as caught:
        refimpl.open(path)
    assert (caught.value.path, caught.value.offset) == (str(path), offset)


@pytest.mark.parametrize(
    ("raw", "word"),
    [(gguf(version=1), "version 1"), (gguf(version=0), "version 0"), (gguf(version=4), "version 4"),
     (gguf(version=2**31 - 1), "version 2147483647"), (gguf(version=0x03000000), "big-endian"),
     (gguf(version=0x02000000), "big-endian"), (b"FUGG" + bytes(40), "big-endian")],
)  # fmt: skip
def test_another_version_is_unsupported(tmp_path, raw, word):
    (tmp_path / "a.gguf").write_bytes(raw)
    with pytest.raises(Unsupported, match=word):
        refimpl.open(tmp_path / "a.gguf")


def test_a_string_of_an_array_that_is_not_utf8_is_a_bad_file_when_it_is_read(tmp_path):
    (tmp_path / "a.gguf").write_bytes(gguf([key(array(8, 2, text(b"a") + text(b"\xff")))]))
    with refimpl.open(tmp_path / "a.gguf") as f, pytest.raises(BadFile) as caught:
        list(f.metadata["k"])
    assert caught.value.offset == VALUE + 12 + 9 + 8


# --- regions: the table is readable, the defects are listed, their tensors refuse to be read ---------------


def region(*tensors, data=256, keys=()):
    return gguf(keys, tensors, bytes(data))


REGIONS = {
    "an unaligned offset": (region(tensor(offset=16), data=160), [("unaligned", "w"), ("gap", "w")], "w"),
    "an offset past the end": (region(tensor(offset=TERA), data=128), [("past-end", "w"), ("gap", "w")], "w"),
    "an offset just past the end": (region(tensor(offset=32), data=128), [("past-end", "w"), ("gap", "w")],
    "w"),
    "a tensor cut short": (region(tensor(), data=96), [("past-end", "w")], "w"),
    "two tensors at one place": (
        region(tensor(b"a"), tensor(b"b"), data=128), [("short", "a"), ("overlap", "b")], "b"),
    "a tensor that reaches into the next": (
        region(tensor(b"a"), tensor(b"b", offset=64), data=192), [("short", "a"), ("overlap", "b")], "a"),
    "a tensor inside another": (
        region(tensor(b"a", dims=(64,)), tensor(b"b", dims=(8,), offset=64), tensor(b"c", offset=256),
        data=384),
        [("short", "a"), ("overlap", "b"), ("gap", "c")], "b"),
    "tensors whose sizes add up past 2**64": (
        region(*(tensor(bytes([97 + i]), dims=(2**60,), offset=2**62 * i) for i in range(2)), data=128),
        [("past-end", "a"), ("past-end", "b")], "a"),
}  # fmt: skip
READABLE = {
    "decreasing offsets": (region(tensor(b"a", offset=128), tensor(b"b")), [("gap", "a"), ("order", "b")]),
    "a gap larger than padding": (region(tensor(b"a"), tensor(b"b", offset=160), data=288), [("gap", "b")]),
    "a gap before the first": (region(tensor(b"a", offset=32), data=160), [("gap", "a")]),
    "bytes after the last tensor": (region(tensor(), data=128 + 32), [("trailing", None)]),
    "bytes after no tensor": (region(data=33), [("trailing", None)]),
}  # fmt: skip


@pytest.mark.parametrize("shape", REGIONS)
def test_a_hostile_region_is_listed_and_not_read(tmp_path, shape):
    raw, defects, name = REGIONS[shape]
    (tmp_path / "a.gguf").write_bytes(raw)
    with bounded(), refimpl.open(tmp_path / "a.gguf") as f:
        assert [(d.code, d.tensor) for d in f.defects] == defects
        with pytest.raises(BadFile) as caught:
            f.read(name)
        assert caught.value.offset == f.tensors[name].offset


@pytest.mark.parametrize("shape", READABLE)
def test_a_gap_or_tail_is_listed_and_the_tensors_can_be_read(tmp_path, shape):
    raw, defects = READABLE[shape]
    (tmp_path / "a.gguf").write_bytes(raw)
    with bounded(), refimpl.open(tmp_path / "a.gguf") as f:
        assert [(d.code, d.tensor) for d in f.defects] == defects
        assert all(isinstance(d, BadFile) and d.offset is not None for d in f.defects)
        for name in f.tensors:
            assert f.read(name).shape == (1, 128)


def test_missing_padding_after_the_last_tensor_is_no_defect(tmp_path):
    for data in (12, 16, 32):
        (tmp_path / "a.gguf").write_bytes(gguf([], [tensor(dims=(3,))], bytes(data)))
        with refimpl.open(tmp_path / "a.gguf") as f:
            assert f.defects == []


# --- cut anywhere ----------------------------------------------------------------------------------------


def test_a_file_cut_at_any_byte_is_a_bad_file_or_lists_the_cut(tmp_path):
    metadata = {
        "general.architecture": (V.STRING, "glm-dsa"), "a": (V.ARRAY, ["x", "yz"]), "b": (V.ARRAY, [True,
        False]),
        "c": (V.ARRAY, [[1, 2], [3]]), "d": (V.FLOAT64, 1.0), "general.alignment": (V.UINT32, 32),
    }  # fmt: skip
    path = tmp_path / "a.gguf"
    write(path, metadata, [("w", (2, 256), Q4_K, [bytes(288)]), ("v", (3, 32), Q8_0, [bytes(102)])])
    raw = path.read_bytes()
    with refimpl.open(path) as f:
        end, last = f.header_bytes, f.tensors["v"].offset + f.tensors["v"].nbytes
    for cut in range(end):
        path.write_bytes(raw[:cut])
        with pytest.raises(BadFile) as caught:
            refimpl.open(path)
        assert caught.value.offset <= cut
    for cut in range(end, last):
        path.write_bytes(raw[:cut])
        with refimpl.open(path) as f:
            assert f.defects[-1].tensor == "v"
            with pytest.raises(BadFile):
                f.read("v")
    path.write_bytes(raw[:last])
    with refimpl.open(path) as f:
        assert f.defects == []


# --- sparse files of a terabyte, and headers that cost -----------------------------------------------------


def sparse(path, raw, size=TERA):
    with open(path, "wb") as file:
        file.write(raw)
        file.truncate(size)


SPARSE = {
    "zeros after the counts": (gguf(n_keys=1000)[:24], 24),
    "a tensor table of zeros": (gguf(n_tensors=30_000)[:24], 24),
    "an array of 2**39 bytes": (gguf([key(array(0, 2**39))])[:49], VALUE + 12),
    "an array of 2**39 bools": (gguf([key(array(7, 2**39))])[:49], VALUE + 12),
    "an array of 2**36 empty strings": (gguf([key(array(8, 2**36))])[:49], VALUE + 12),
    "an array of 2**36 empty arrays": (gguf([key(array(9, 2**36))])[:49], VALUE),
    "an array of 130,000,000 bools, and a bad key": (gguf([key(array(7, 130_000_000))], n_keys=9)[:49],
    130_000_049),
    "a string of 2**39 bytes": (gguf([key(u32(8) + u64(2**39))])[:45], VALUE),
    "a string of 15 MB, and a bad key": (gguf([key(u32(8) + u64(15_000_000))], n_keys=9)[:45], 15_000_045),
    "2**17 tensors": (gguf(n_tensors=2**17)[:24], 8),
    "2**40 keys": (gguf(n_keys=2**35)[:24], 16),
}  # fmt: skip


@pytest.mark.parametrize("shape", SPARSE)
def test_a_sparse_terabyte_is_a_bad_file(tmp_path, shape):
    raw, offset = SPARSE[shape]
    sparse(tmp_path / "a.gguf", raw)
    with bounded(), pytest.raises(BadFile) as caught:
        refimpl.open(tmp_path / "a.gguf")
    assert caught.value.offset == offset


def test_a_header_alone_with_a_terabyte_of_data_is_read(tmp_path):
    head, _, size = header_bytes({"a": (V.UINT8, 1)}, [("w", (2**20, 2**18), F32)])
    sparse(tmp_path / "a.gguf", head, size)
    with bounded(), refimpl.open(tmp_path / "a.gguf") as f:
        assert f.defects == []
        assert f.size > TERA
        assert f.read("w", slice(2**20 - 1, 2**20)).shape == (1, 2**20)


def test_as_many_tensors_and_keys_as_are_read_cost_no_more_than_they_may(tmp_path):
    tensors = [tensor(b"%05d" % i, offset=128 * i) for i in range(1 << 15)]
    (tmp_path / "a.gguf").write_bytes(gguf([], tensors))
    sparse(tmp_path / "a.gguf", gguf([], tensors), len(gguf([], tensors)) + 128 * len(tensors))
    assert measure(tmp_path / "a.gguf") == "opened"
    keys = [key(u32(8) + text(b"x" * 300), b"%05d" % i) for i in range(1 << 14)]
    (tmp_path / "a.gguf").write_bytes(gguf(keys))
    assert measure(tmp_path / "a.gguf") == "opened"


MEASURE = """
import resource, sys, time, refimpl
from refimpl.errors import BadFile
from refimpl.files import gguf, safetensors
before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
try:
    refimpl.open(sys.argv[1])
    word = "opened"
except BadFile as error:
    word = "bad"
seconds, after = time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(word, seconds, (after - before) * 1024)
"""


def measure(path):
    """Open a file in a process of its own; fail over a second of it or 200 MB, return "opened" or "bad"."""
    for _ in range(5):  # processor time, and the best: other work on this machine is not what is measured
        run = subprocess.run(
            [sys.executable, "-c", MEASURE, path], capture_output=True, text=True, check=True
        )
        word, seconds, memory = run.stdout.split()
        if float(seconds) < 1:
            break
    assert float(seconds) < 1
    assert float(memory) < 200e6
    return word


COSTLY = {
    "2 million empty strings": key(array(8, 2**21)),
    "65,536 arrays": key(array(9, 2**16)),
    "130,000,000 bools": key(array(7, 130_000_000)),
    "a string of 15 MB": key(u32(8) + u64(15_000_000)),
}


@pytest.mark.parametrize("shape", COSTLY)
def test_the_costliest_headers_stay_within_bounds_untraced(tmp_path, shape):
    raw = gguf([COSTLY[shape]], n_keys=9)
    sparse(tmp_path / "a.gguf", raw[: 24 + len(COSTLY[shape])])
    assert measure(tmp_path / "a.gguf") == "bad"


# --- what the metadata claims ------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [0, 2**31, 2**32 - 1])
def test_an_absurd_block_count_is_a_bad_file_at_its_value(tmp_path, blocks):
    metadata = {"general.architecture": (V.STRING, "glm-dsa"), "glm-dsa.embedding_length": (V.UINT32, 32),
                "glm-dsa.block_count": (V.UINT32, blocks)}  # fmt: skip
    write(tmp_path / "a.gguf", metadata, [])
    with refimpl.open(tmp_path / "a.gguf") as f, pytest.raises(BadFile, match="block_count") as caught:
        names.hparams(f)
    assert caught.value.offset == f.header_bytes - 4
