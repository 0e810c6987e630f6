"""The expert map: 192 of 256, renumbered, found by the router's rows, and by content where those are damaged."""

import numpy as np
import pytest
from gguf import GGUFValueType

from refimpl import quants
from refimpl.files import encode, names
from refimpl.files import source as model_files
from refimpl.quants.formats import formats
from refimpl.verifier.experts import match_rows
from refimpl.verifier.mutate import Copy
from refimpl.verifier.requantize import widen
from refimpl.verifier.run import verify
from tests.models import metadata
from tests.tiny_checkpoint import CONFIG, write_checkpoint

PARENT = CONFIG | {
    "num_hidden_layers": 2, "mlp_layer_types": ["dense", "sparse"], "n_routed_experts": 256, "num_experts_per_tok": 8,
    "intermediate_size": 64, "moe_intermediate_size": 32, "q_lora_rank": 32, "kv_lora_rank": 32,
    "qk_nope_head_dim": 32, "v_head_dim": 32, "vocab_size": 64,
}  # fmt: skip
ROUTER, GATE = "blk.1.ffn_gate_inp.weight", "blk.1.ffn_gate_exps.weight"
KEPT = np.random.default_rng(5).permutation(256)[:192].tolist()


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parent")
    write_checkpoint(folder, PARENT)
    return folder


@pytest.fixture
def child(parent, tmp_path):
    """A Q8_0 file of the parent with 192 of its 256 experts, renumbered."""
    with model_files.open(parent) as source:
        hp, listed = names.hparams(source), []
        for link, shape in names.expected(hp):
            kept = KEPT if link.role in ("routed", "router", "router_bias") else None
            shape = (len(kept), *shape[1:]) if kept else shape
            rows = widen(names.source_rows(source, link, hp, slice(None), kept))
            fmt = formats["f32" if link.f32 or shape[-1] % 32 else "q8_0"]
            listed.append((link.gguf, shape, fmt, [quants.quantize(rows, fmt)]))
        child_hp = names.Hparams.from_config(PARENT | {"n_routed_experts": 192})
        keys = metadata(child_hp) | {"glm-dsa.expert_weights_norm": (GGUFValueType.BOOL, True)}
        encode.write(tmp_path / "child.gguf", keys, listed)
    return tmp_path / "child.gguf"


def test_192_of_256_renumbered_experts_are_found(parent, child):
    report = verify(child, parent)
    assert report.verdict == "exact" and report.passed, [f.message for f in report.findings]
    assert report.maps == {1: KEPT} and (report.experts, report.source_experts) == (192, 256)


def test_content_decides_where_a_router_row_is_no_source_row(parent, child, tmp_path):
    copy = Copy(child)
    copy[ROUTER].raw[17] = 0
    report = verify(copy.write(tmp_path / "damaged.gguf"), parent)
    assert report.maps[1] == KEPT
    verdicts = {t.name: t.verdict for t in report.tensors if t.verdict not in ("exact", "copied")}
    assert list(verdicts) == [ROUTER] and not report.passed
    [row] = [f for f in report.findings if f.code == "router-row-unknown"]
    assert row.expert == 17 and f"source expert {KEPT[17]}" in row.message


def test_experts_that_agree_against_the_router_are_reported(parent, child, tmp_path):
    copy = Copy(child)
    for matrix in ("gate", "up", "down"):
        part = copy[f"blk.1.ffn_{matrix}_exps.weight"]
        part.expert(3)[:], part.expert(8)[:] = part.expert(8).copy(), part.expert(3).copy()
    report = verify(copy.write(tmp_path / "swapped.gguf"), parent)
    found = {f.expert: f.message for f in report.findings if f.code == "router-disagrees"}
    assert set(found) == {3, 8} and f"source expert {KEPT[8]}" in found[3]


def test_equal_rows_are_handed_out_in_ascending_order():
    row = np.ones((1, 8), np.float32)
    want = np.concatenate([row, row * 2, row])
    assert match_rows(np.concatenate([row, row]), want) == [0, 2]


def test_a_quantized_router_is_matched_by_distance():
    want = np.random.default_rng(0).standard_normal((256, 64)).astype(np.float32)
    have = quants.dequantize(quants.quantize(want[KEPT], "q8_0"), "q8_0")
    assert match_rows(have, want) == KEPT


def test_a_row_of_nothing_in_the_source_is_matched_with_nothing():
    want = np.random.default_rng(0).standard_normal((16, 64)).astype(np.float32)
    have = np.random.default_rng(1).standard_normal((2, 64)).astype(np.float32)
    assert match_rows(have, want) == [-1, -1]
