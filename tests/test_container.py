"""Metadata that tensors contradict, regions that are not in their place: each has a finding of its own."""

from dataclasses import replace

import models
import pytest
from models import REAL, TINY

from refimpl.files import source
from refimpl.files.gguf import GGUFValueType as T
from refimpl.verifier import container


def check(path):
    with source.open(path) as f:
        return container.check(f)


def codes(findings):
    return [finding.code for finding in findings]


def with_key(key, value, hp=TINY, kind=T.UINT32):
    return models.metadata(hp) | {f"glm-dsa.{key}": (kind, value)}


def without_key(key):
    keys = models.metadata(TINY)
    del keys[f"glm-dsa.{key}"]
    return keys


@pytest.mark.parametrize(
    "hp", [TINY, replace(TINY, num_nextn_predict_layers=1), REAL, replace(REAL, n_routed_experts=8)]
)
def test_a_sound_file_has_no_findings(tmp_path, hp):
    keys = models.metadata(hp) | models.vocabulary(hp.vocab_size)
    assert check(models.write(tmp_path / "a.gguf", hp, keys)) == []


@pytest.mark.parametrize(
    ("key", "value", "code", "tensor"),
    [
        ("expert_count", 12, "expert-count", "blk.1.ffn_gate_inp.weight"),
        ("expert_count", 0, "expert-count", "blk.1.ffn_gate_inp.weight"),
        ("expert_used_count", 17, "expert-used-count", "blk.1.ffn_gate_inp.weight"),
        ("expert_used_count", 0, "expert-used-count", "blk.1.ffn_gate_inp.weight"),
        ("block_count", 2, "block-count", "blk.2.attn_norm.weight"),
        ("block_count", 5, "block-count", "blk.3.attn_norm.weight"),
        ("attention.head_count_kv", 2, "head-count-kv", "blk.0.attn_kv_a_mqa.weight"),
        ("attention.head_count", 4, "head-count", "blk.0.attn_k_b.weight"),
        ("attention.key_length", 256, "key-length", "blk.0.attn_kv_a_mqa.weight"),
        ("attention.value_length", 256, "value-length", "blk.0.attn_kv_a_mqa.weight"),
        ("attention.key_length_mla", 192, "key-length-mla", "blk.0.attn_q_b.weight"),
        ("attention.value_length_mla", 128, "value-length-mla", "blk.0.attn_v_b.weight"),
        ("attention.q_lora_rank", 320, "q-lora-rank", "blk.0.attn_q_a.weight"),
        ("attention.kv_lora_rank", 256, "kv-lora-rank", "blk.0.attn_kv_a_norm.weight"),
        ("rope.dimension_count", 32, "rope-dimension-count", "blk.0.attn_k_b.weight"),
        ("embedding_length", 512, "embedding-length", "token_embd.weight"),
        ("feed_forward_length", 256, "feed-forward-length", "blk.0.ffn_gate.weight"),
        ("expert_feed_forward_length", 512, "expert-feed-forward-length", "blk.1.ffn_gate_exps.weight"),
        ("expert_shared_count", 2, "expert-shared-count", "blk.1.ffn_gate_shexp.weight"),
        ("vocab_size", 1281, "vocab-size", "token_embd.weight"),
        ("leading_dense_block_count", 0, "leading-dense-block-count", "blk.0.ffn_gate.weight"),
        ("leading_dense_block_count", 2, "leading-dense-block-count", "blk.1.ffn_gate_inp.weight"),
        ("nextn_predict_layers", 1, "nextn-predict-layers", "blk.2.nextn.eh_proj.weight"),
        ("attention.indexer.head_count", 16, "indexer-head-count", "blk.0.indexer.proj.weight"),
        ("attention.indexer.key_length", 64, "indexer-key-length", "blk.0.indexer.attn_k.weight"),
    ],
)
def test_each_key_that_disagrees_has_its_own_finding(tmp_path, key, value, code, tensor):
    (finding,) = check(models.write(tmp_path / "a.gguf", keys=with_key(key, value)))
    assert (finding.code, finding.severity, finding.tensor) == (code, "error", tensor)
    assert key in finding.message


def test_a_finding_about_a_key_says_where_the_key_is(tmp_path):
    path = models.write(tmp_path / "a.gguf", keys=with_key("expert_count", 12))
    (finding,) = check(path)
    assert path.read_bytes()[finding.offset :][:4] == (12).to_bytes(4, "little")


def test_experts_that_differ_in_one_tensor_are_told_on_that_tensor(tmp_path):
    tensors = models.shapes(TINY) | {"blk.2.ffn_up_exps.weight": (12, 256, 256)}
    (finding,) = check(models.write(tmp_path / "a.gguf", tensors=tensors))
    assert (finding.code, finding.tensor) == ("expert-count", "blk.2.ffn_up_exps.weight")
    assert "expert_count is 16" in finding.message and "[12, 256, 256]" in finding.message


def test_a_router_bias_of_the_parent_is_told(tmp_path):
    tensors = models.shapes(TINY) | {"blk.1.exp_probs_b.bias": (24,)}
    (finding,) = check(models.write(tmp_path / "a.gguf", tensors=tensors))
    assert (finding.code, finding.tensor) == ("expert-count", "blk.1.exp_probs_b.bias")


def test_an_mtp_layer_that_the_metadata_deny_is_told(tmp_path):
    hp = replace(TINY, num_nextn_predict_layers=1)
    keys = models.metadata(hp) | {"glm-dsa.nextn_predict_layers": (T.UINT32, 0)}
    (finding,) = check(models.write(tmp_path / "a.gguf", hp, keys))
    assert (finding.code, finding.tensor) == ("nextn-predict-layers", "blk.3.nextn.eh_proj.weight")


@pytest.mark.parametrize("layer", [0, 2])
def test_every_layer_has_an_indexer(tmp_path, layer):
    tensors = {n: s for n, s in models.shapes(TINY).items() if not n.startswith(f"blk.{layer}.indexer.")}
    found = check(models.write(tmp_path / "a.gguf", tensors=tensors))
    assert set(codes(found)) == {"indexer-missing"}
    assert found[0].tensor == f"blk.{layer}.indexer.attn_q_b.weight"
    assert "one of 5" in found[0].message


@pytest.mark.parametrize("name", ["output_norm.weight", "blk.1.attn_k_b.weight", "blk.2.ffn_up_exps.weight"])
def test_a_missing_tensor_is_told(tmp_path, name):
    tensors = models.shapes(TINY)
    del tensors[name]
    (finding,) = check(models.write(tmp_path / "a.gguf", tensors=tensors))
    assert (finding.code, finding.tensor) == ("tensor-missing", name)


def test_a_tensor_with_too_few_axes_is_told(tmp_path):
    tensors = models.shapes(TINY) | {"blk.0.attn_k_b.weight": (640, 192)}
    (finding,) = check(models.write(tmp_path / "a.gguf", tensors=tensors))
    assert (finding.code, finding.tensor) == ("tensor-shape", "blk.0.attn_k_b.weight")


@pytest.mark.parametrize("key", ["expert_count", "block_count", "attention.key_length_mla"])
def test_a_missing_key_is_told(tmp_path, key):
    (finding,) = check(models.write(tmp_path / "a.gguf", keys=without_key(key)))
    assert finding.code == "key-missing"
    assert key in finding.message


@pytest.mark.parametrize(
    ("kind", "value"), [(T.STRING, "16"), (T.INT32, -16), (T.FLOAT32, 16.0), (T.BOOL, True), (T.ARRAY, [16])]
)
def test_a_key_that_is_no_count_is_told(tmp_path, kind, value):
    found = check(models.write(tmp_path / "a.gguf", keys=with_key("expert_count", value, kind=kind)))
    assert codes(found) == ["key-missing"]


@pytest.mark.parametrize(
    ("keys", "code"),
    [
        ({"tokenizer.ggml.tokens": (T.ARRAY, ["a", "b"])}, "token-count"),
        ({"tokenizer.ggml.token_type": (T.ARRAY, [1, 1, 1])}, "token-count"),
        ({"tokenizer.ggml.tokens": (T.STRING, "no list")}, "token-count"),
        ({"tokenizer.ggml.eos_token_id": (T.UINT32, 1280)}, "token-id"),
        ({"tokenizer.ggml.bos_token_id": (T.INT32, -1)}, "token-id"),
        ({"tokenizer.ggml.eot_token_id": (T.STRING, "7")}, "token-id"),
    ],
)
def test_tokens_and_vocabulary_agree(tmp_path, keys, code):
    found = check(models.write(tmp_path / "a.gguf", keys=models.metadata(TINY) | keys))
    assert codes(found) == [code]


def test_another_architecture_is_not_judged(tmp_path):
    keys = models.metadata(TINY) | {"general.architecture": (T.STRING, "llama")}
    assert check(models.write(tmp_path / "a.gguf", keys=keys)) == []


def patch_offset(path, name, add):
    """Move a tensor's offset in the table."""
    data = path.read_bytes()[: 1 << 20]
    with source.open(path) as f:
        entry = len(name).to_bytes(8, "little") + name.encode()
        at = data.index(entry) + len(entry) + 4 + 8 * len(f.tensors[name].shape) + 4
    old = int.from_bytes(data[at : at + 8], "little")
    with open(path, "r+b") as file:
        file.seek(at)
        file.write((old + add).to_bytes(8, "little"))


def test_a_tensor_that_the_next_one_overlaps_is_short(tmp_path):
    path = models.write(tmp_path / "a.gguf")
    patch_offset(path, "blk.0.attn_q_b.weight", -64)
    found = [(finding.code, finding.tensor) for finding in check(path)]
    assert ("region-short", "blk.0.attn_q_a_norm.weight") in found
    assert ("region-overlap", "blk.0.attn_q_b.weight") in found
    assert not any(finding.message.startswith(finding.tensor) for finding in check(path))


def test_a_file_that_ends_early_is_told_at_its_last_tensor(tmp_path):
    path = models.write(tmp_path / "a.gguf")
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size - 1000)
    (finding,) = check(path)
    assert (finding.code, finding.tensor, finding.severity) == ("region-past-end", "output.weight", "error")


def test_bytes_after_the_last_tensor_are_a_warning(tmp_path):
    path = models.write(tmp_path / "a.gguf")
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size + 1000)
    (finding,) = check(path)
    assert (finding.code, finding.tensor, finding.severity) == ("trailing-bytes", None, "warning")


@pytest.mark.parametrize(("add", "code"), [(64, "region-gap"), (8, "region-unaligned")])
def test_a_tensor_out_of_its_place_is_told(tmp_path, add, code):
    path = models.write(tmp_path / "a.gguf")
    patch_offset(path, "output.weight", add)
    found = check(path)
    assert code in codes(found)
    assert {finding.tensor for finding in found} == {"output.weight"}
