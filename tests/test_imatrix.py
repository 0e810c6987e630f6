"""Importance matrices, GGUF and legacy, with the meaning that llama-quantize gives them."""

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.errors import BadFile
from refimpl.files import imatrix
from refimpl.files.gguf import GGUFValueType as V
from refimpl.files.gguf import write
from refimpl.quants.formats import F16, F32

KEYS = {
    "general.type": (V.STRING, "imatrix"), "imatrix.datasets": (V.ARRAY, ["a.txt", "b.txt"]),
    "imatrix.chunk_count": (V.UINT32, 20), "imatrix.chunk_size": (V.UINT32, 512),
}  # fmt: skip


def write_gguf(path, entries, keys=KEYS, fmt=F32):
    """entries: {name: (sums [E, n] float32, counts [E])}"""
    tensors = []
    for name, (sums, counts) in entries.items():
        sums, counts = np.asarray(sums, np.float32), np.asarray(counts, np.float32)
        tensors.append((f"{name}.in_sum2", sums.shape, fmt, [sums.astype(fmt.block)]))
        tensors.append((f"{name}.counts", (len(counts), 1), F32, [counts]))
    write(path, keys, tensors)


def legacy(entries, chunks=7, dataset=b"c.txt"):
    """entries: [(name bytes, calls, sums)]"""
    raw = struct.pack("<i", len(entries))
    for name, calls, sums in entries:
        raw += struct.pack("<i", len(name)) + name + struct.pack("<ii", calls, len(sums))
        raw += np.asarray(sums, np.float32).tobytes()
    if chunks is not None:
        raw += struct.pack("<i", chunks)
        raw += b"" if dataset is None else struct.pack("<i", len(dataset)) + dataset
    return raw


def test_sums_are_divided_by_each_experts_count_and_an_unused_expert_weighs_all_columns_alike(tmp_path):
    sums = [[1, 2, 3, 4], [10, 20, 30, 40], [0, 0, 0, 0]]
    write_gguf(
        tmp_path / "i", {"blk.1.ffn_up_exps.weight": (sums, [3, 4, 0]), "blk.0.attn_q_a.weight": ([[6]], [2])}
    )
    with imatrix.read(tmp_path / "i") as got:
        assert (got.kind, got.datasets, got.chunks, got.chunk_size) == ("gguf", ["a.txt", "b.txt"], 20, 512)
        assert list(got) == ["blk.0.attn_q_a.weight", "blk.1.ffn_up_exps.weight"]
        third = np.float32(3)
        want = [[np.float32(x) / third for x in (1, 2, 3, 4)], [2.5, 5, 7.5, 10], [1, 1, 1, 1]]
        values = got.get("blk.1.ffn_up_exps.weight", 3)
        assert values.dtype == np.float32
        np.testing.assert_array_equal(values, np.array(want, np.float32))
        np.testing.assert_array_equal(got.get("blk.0.attn_q_a.weight"), np.array([3], np.float32))
        assert got.get("output.weight") is None
        assert "output.weight" not in got
        assert [(p.tensor, p.expert, p.kind) for p in got.problems] == [
            ("blk.1.ffn_up_exps.weight", 2, "unused")
        ]


def test_one_count_divides_the_rows_of_every_head(tmp_path):
    write_gguf(tmp_path / "i", {"blk.0.attn_k_b.weight": ([[2, 4], [6, 8]], [2])})
    with imatrix.read(tmp_path / "i") as got:
        np.testing.assert_array_equal(
            got.get("blk.0.attn_k_b.weight", 2, 2), np.array([[1, 2], [3, 4]], np.float32)
        )


def test_counts_are_rounded_as_lround_does(tmp_path):
    write_gguf(tmp_path / "i", {"w": ([[1]] * 5, [0.5, 1.5, 2.4, 0.49, -3.5])})
    with imatrix.read(tmp_path / "i") as got:
        want = np.float32(1) / np.array([1, 2, 2, 1, 1], np.float32)
        np.testing.assert_array_equal(got.get("w", 5)[:, 0], want)


def test_legacy_sums_are_divided_by_the_number_of_calls(tmp_path):
    entries = [(b"blk.0.a", 3, [1, 2, 3]), (b"blk.0.b", 0, [5, 6]), (b"blk.0.c", -1, [7])]
    (tmp_path / "i").write_bytes(legacy(entries))
    with imatrix.read(tmp_path / "i") as got:
        assert (got.kind, got.datasets, got.chunks) == ("legacy", ["c.txt"], 7)
        np.testing.assert_array_equal(got.get("blk.0.a"), np.array([1, 2, 3], np.float32) / np.float32(3))
        np.testing.assert_array_equal(got.get("blk.0.b", 2), np.array([[5], [6]], np.float32))
        np.testing.assert_array_equal(got.get("blk.0.c"), np.array([7], np.float32))


@pytest.mark.parametrize("tail", [{"chunks": None}, {"dataset": None}, {"dataset": b""}])
def test_a_legacy_file_may_lack_its_tail(tmp_path, tail):
    (tmp_path / "i").write_bytes(legacy([(b"w", 1, [1])], **tail))
    with imatrix.read(tmp_path / "i") as got:
        assert (list(got), got.datasets, got.chunks) == (["w"], [], 0 if "chunks" in tail else 7)


def test_another_number_of_values_is_refused_but_for_the_embedding(tmp_path):
    write_gguf(tmp_path / "i", {"token_embd.weight": ([[1, 2, 3]], [1]), "w": ([[1, 2, 3]], [1])})
    with imatrix.read(tmp_path / "i") as got:
        assert got.get("token_embd.weight", None, 4) is None
        np.testing.assert_array_equal(got.get("token_embd.weight", None, 3), np.array([1, 2, 3], np.float32))
        with pytest.raises(BadFile, match="w has 3 importances, not 1 x 4"):
            got.get("w", None, 4)
        with pytest.raises(BadFile, match="not a multiple of 2"):
            got.get("w", 2)


def test_doubtful_values_are_reported_with_their_place(tmp_path):
    good = np.ones((4, 512), np.float32)
    good[0, 7], good[0, 9] = np.nan, np.inf
    good[1, 3] = -1
    good[2] = 0
    good[3, 256:] = 0
    write_gguf(tmp_path / "i", {"w": (good, [1, 1, 1, 1]), "v": (np.zeros((1, 3)), [5])})
    with imatrix.read(tmp_path / "i") as got:
        found = [(p.tensor, p.expert, p.kind) for p in got.problems]
        assert found == [("v", None, "zero-row"), ("w", 0, "not-finite"), ("w", 1, "negative"), ("w", 2,
        "zero-row"),
                         ("w", 3, "zero-block")]  # fmt: skip
        messages = {p.kind: p.message for p in got.problems}
        assert messages["not-finite"] == "w, expert 0: 2 values are NaN or Inf, the first in column 7"
        assert messages["zero-block"] == "w, expert 3: 1 blocks are all zero, the first is block 1"


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_both_kinds_read_what_was_written(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("imatrix")
    experts, n = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    floats = st.lists(st.floats(0, 2.0**99, width=32), min_size=experts * n, max_size=experts * n)
    sums = np.array(data.draw(floats), np.float32).reshape(experts, n)
    counts = np.array(data.draw(st.lists(st.integers(0, 2**24), min_size=experts, max_size=experts)))
    write_gguf(folder / "i", {"w": (sums, counts)})
    (folder / "j").write_bytes(legacy([(b"w", int(counts[0]), sums.reshape(-1))]))
    with imatrix.read(folder / "i") as got:
        divided = sums / np.maximum(counts, 1)[:, None].astype(np.float32)
        want = np.where(counts[:, None] > 0, divided, np.float32(1))
        np.testing.assert_array_equal(got.get("w", experts).reshape(experts, n), want)
    with imatrix.read(folder / "j") as got:
        want = sums / np.float32(counts[0]) if counts[0] else sums
        np.testing.assert_array_equal(got.get("w", experts).reshape(experts, n), want)


def test_a_broken_gguf_imatrix_is_a_bad_file(tmp_path):
    path, one = tmp_path / "i", {"w": ([[1, 2, 3]], [1])}
    for lacking in ("imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"):
        write_gguf(path, one, {k: v for k, v in KEYS.items() if k != lacking})
        with pytest.raises(BadFile, match=lacking):
            imatrix.read(path)
    for keys in ({"imatrix.datasets": (V.UINT32, 1)}, {"imatrix.chunk_count": (V.STRING, "x")}):
        write_gguf(path, one, KEYS | keys)
        with pytest.raises(BadFile, match="imatrix keys"):
            imatrix.read(path)
    write_gguf(path, {})
    with pytest.raises(BadFile, match="empty"):
        imatrix.read(path)
    write_gguf(path, one, fmt=F16)
    with pytest.raises(BadFile, match="f16, not f32"):
        imatrix.read(path)
    write_gguf(path, {"w": ([[1, 2, 3]], [1, 2])})
    with pytest.raises(BadFile, match="3 sums for 2 counts"):
        imatrix.read(path)
    write_gguf(path, {"w": ([[1, 2, 3]], [np.nan])})
    with pytest.raises(BadFile, match="no number of tokens"):
        imatrix.read(path)
    write(path, KEYS, [("w.in_sum2", (3,), F32, [bytes(12)])])
    with pytest.raises(BadFile, match="no counterpart"):
        imatrix.read(path)
    write_gguf(path, one)
    path.write_bytes(path.read_bytes()[:-64])
    with pytest.raises(BadFile, match="after the file's end"):
        imatrix.read(path)


GOOD = legacy([(b"blk.0.a", 3, [1, 2, 3]), (b"blk.0.b", 1, [5])])


@pytest.mark.parametrize(
    ("raw", "offset"),
    [(b"", 0), (b"abc", 0), (struct.pack("<i", 0), 0), (struct.pack("<i", -1), 0), (struct.pack("<i",
     2**30), 0),
     (struct.pack("<ii", 1, -5), 4), (struct.pack("<ii", 1, 2**31 - 1), 4), (struct.pack("<ii", 1, 0), 4),
     (struct.pack("<ii", 1, 900) + b"x", 8), (legacy([(b"w", 1, [])]), 13), (legacy([(b"\xff", 1, [1])]), 8),
     (legacy([(b"a\0b", 1, [1])]), 4), (legacy([(b"w", 1, [1]), (b"w", 1, [1])]), 21),
     (struct.pack("<ii", 1, 1) + b"w" + struct.pack("<ii", 1, 2**31 - 1) + bytes(40), 13),
     (legacy([(b"w", 1, [1])])[:-9] + struct.pack("<i", -9), 25),
     (b"version https://git-lfs.github.com/spec/v1", 0)],
)  # fmt: skip
def test_a_broken_legacy_imatrix_is_a_bad_file(tmp_path, raw, offset):
    (tmp_path / "i").write_bytes(raw)
    with pytest.raises(BadFile) as caught:
        imatrix.read(tmp_path / "i")
    assert caught.value.offset == offset


def test_a_legacy_imatrix_cut_anywhere_before_its_tail_is_a_bad_file(tmp_path):
    end = len(GOOD) - len(b"....") * 2 - len(b"c.txt")
    for cut in range(end):
        (tmp_path / "i").write_bytes(GOOD[:cut])
        with pytest.raises(BadFile):
            imatrix.read(tmp_path / "i")
    (tmp_path / "i").write_bytes(GOOD[:end])
    imatrix.read(tmp_path / "i").close()
