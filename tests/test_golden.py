"""golden/ is what its manifest says, small enough, and the tiny model in it has truly learned."""

import hashlib
import json
from collections import Counter
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors import safe_open

from tools import manifest

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
TINY = GOLDEN / "tiny-glm-dsa"
QUANTIZED = ("stock.gguf", "protected.gguf", "imatrix-quantized.gguf")


@pytest.fixture(scope="module")
def training() -> dict:
    return json.loads((TINY / "training.json").read_text())


@pytest.fixture(scope="module")
def bf16() -> dict:
    return json.loads((TINY / "bf16-tensors.json").read_text())["tensors"]


def hf(name: str) -> np.ndarray:
    """Read a BF16 tensor of the checkpoint as its 16-bit patterns."""
    header, data = read_safetensors()
    entry = header[name]
    start, end = entry["data_offsets"]
    assert entry["dtype"] == "BF16"
    return np.frombuffer(data[start:end], "<u2").reshape(entry["shape"])


def read_safetensors() -> tuple[dict, bytes]:
    raw = (TINY / "model.safetensors").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def metadata(file: str) -> dict:
    return {k: f.contents() for k, f in gguf.GGUFReader(TINY / file).fields.items()}


def test_every_file_is_listed_with_its_hash_and_size() -> None:
    listed = {entry["file"]: entry for entry in manifest.files(manifest.read(GOLDEN))}
    found = {p.relative_to(GOLDEN).as_posix(): p for p in GOLDEN.rglob("*") if p.is_file()}
    found.pop(manifest.NAME)
    assert sorted(listed) == sorted(found)
    for name, path in found.items():
        assert hashlib.sha256(path.read_bytes()).hexdigest() == listed[name]["sha256"], name
        assert listed[name].get("bytes", path.stat().st_size) == path.stat().st_size, name


def test_golden_stays_small() -> None:
    assert (TINY / "model.safetensors").stat().st_size <= 26_000_000
    assert sum(p.stat().st_size for p in GOLDEN.rglob("*") if p.is_file()) <= 60_000_000


def test_llama_cpp_made_the_ggufs_and_is_named() -> None:
    table = manifest.read(GOLDEN)["tiny-glm-dsa"]
    for file in (*QUANTIZED, "imatrix.gguf", "bf16-tensors.json"):
        assert table[file]["oracle"] == "llama.cpp"
        assert table[file]["version"].startswith("0c1e57098")
        assert table[file]["command"]
    assert all(entry["oracle"] and entry["licence"] for entry in manifest.files(table))


@pytest.mark.parametrize("kind", ["text", "code"])
def test_the_model_has_learned_each_kind(training: dict, kind: str) -> None:
    assert training["untrained"][kind] > 3.5
    assert training["trained"]["dense"][kind] < 2.2
    assert training["trained"]["sparse"][kind] < 2.2


@pytest.mark.parametrize("kind", ["text", "code"])
def test_selecting_64_tokens_costs_little(training: dict, kind: str) -> None:
    assert abs(training["trained"]["sparse"][kind] - training["trained"]["dense"][kind]) < 0.05


def test_the_indexer_finds_what_attention_looks_at(training: dict) -> None:
    before = training["excerpts"]["dense"]["attention_selected"]
    after = training["excerpts"]["sparse"]["attention_selected"]
    assert after["indexer"] > 0.9 * after["best"]
    assert before["indexer"] < 0.9 * before["best"]


def test_the_router_bias_matters(training: dict) -> None:
    changed = training["checkpoint"]["without_bias"]["choices_changed"]
    assert len(changed) == 2 and min(changed) > 0.05


def test_only_the_router_bias_is_float32() -> None:
    header, _ = read_safetensors()
    header.pop("__metadata__", None)
    wide = {name for name, entry in header.items() if entry["dtype"] != "BF16"}
    assert wide == {f"model.layers.{i}.mlp.gate.e_score_correction_bias" for i in (1, 2)}
    assert {header[name]["dtype"] for name in wide} == {"F32"}
    with safe_open(TINY / "model.safetensors", "np") as checkpoint:
        assert all(np.ptp(checkpoint.get_tensor(name)) > 0.01 for name in wide)


def test_the_configuration_is_the_real_one_made_small() -> None:
    config = json.loads((TINY / "config.json").read_text())
    kept = {
        "model_type": "glm_moe_dsa",
        "qk_nope_head_dim": 192,
        "qk_rope_head_dim": 64,
        "v_head_dim": 256,
        "index_n_heads": 32,
        "index_head_dim": 128,
        "index_topk": 64,
        "n_routed_experts": 16,
        "num_experts_per_tok": 4,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "num_hidden_layers": 3,
        "num_nextn_predict_layers": 0,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    assert {key: config.get(key) for key in kept} == kept
    assert "bos_token_id" not in config


def test_untouched_tensors_of_the_bf16_gguf_are_the_checkpoint_bytes(bf16: dict) -> None:
    same = {
        "token_embd.weight": "model.embed_tokens.weight",
        "blk.0.ffn_down.weight": "model.layers.0.mlp.down_proj.weight",
        "blk.1.attn_q_b.weight": "model.layers.1.self_attn.q_b_proj.weight",
        "blk.2.indexer.attn_q_b.weight": "model.layers.2.self_attn.indexer.wq_b.weight",
    }
    for name, source in same.items():
        assert bf16[name]["sha256"] == hashlib.sha256(hf(source).tobytes()).hexdigest(), name


def test_experts_are_stacked_and_k_b_is_transposed_in_the_bf16_gguf(bf16: dict) -> None:
    experts = np.stack([hf(f"model.layers.1.mlp.experts.{e}.up_proj.weight") for e in range(16)])
    assert bf16["blk.1.ffn_up_exps.weight"]["sha256"] == hashlib.sha256(experts.tobytes()).hexdigest()
    kv = hf("model.layers.2.self_attn.kv_b_proj.weight").reshape(2, 192 + 256, 256)
    k, v = kv[:, :192].transpose(0, 2, 1), kv[:, 192:]
    assert bf16["blk.2.attn_k_b.weight"]["sha256"] == hashlib.sha256(k.tobytes()).hexdigest()
    assert bf16["blk.2.attn_v_b.weight"]["sha256"] == hashlib.sha256(v.tobytes()).hexdigest()


@pytest.mark.parametrize("file", QUANTIZED)
def test_the_quantized_files_hold_the_same_tensors_as_the_bf16_gguf(bf16: dict, file: str) -> None:
    found = {t.name: [int(n) for n in reversed(t.shape)] for t in gguf.GGUFReader(TINY / file).tensors}
    assert found == {name: entry["shape"] for name, entry in bf16.items()}


def test_protection_raises_all_but_the_routed_experts_to_q8_0() -> None:
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(TINY / "protected.gguf").tensors}
    routed = {name for name in types if "_exps" in name}
    assert {types[name] for name in routed} == {"Q4_K", "Q6_K"}
    assert {kind for name, kind in types.items() if name not in routed} == {"Q8_0", "F32"}
    stock = Counter(t.tensor_type.name for t in gguf.GGUFReader(TINY / "stock.gguf").tensors)
    # F32: 6 norms a layer, the last norm, 2 routers, 2 biases. Q5_0: k_b. Q6_K: output and layer 2's two downs.
    assert stock == {"F32": 3 * 6 + 1 + 2 + 2, "Q5_0": 3, "Q6_K": 3, "Q4_K": 67 - 23 - 3 - 3}


def test_the_vocabulary_of_the_ggufs_is_the_tokenizers() -> None:
    tokenizer = json.loads((TINY / "tokenizer.json").read_text())
    config = json.loads((TINY / "config.json").read_text())
    tokens = dict(tokenizer["model"]["vocab"]) | {t["content"]: t["id"] for t in tokenizer["added_tokens"]}
    by_id = {i: token for token, i in tokens.items()}
    wanted = [by_id.get(i, f"[PAD{i}]") for i in range(config["vocab_size"])]
    assert metadata("stock.gguf")["tokenizer.ggml.tokens"] == wanted
    assert wanted[metadata("stock.gguf")["tokenizer.ggml.bos_token_id"]] == "[gMASK]"


def test_the_imatrix_file_is_the_one_that_was_used() -> None:
    imatrix, quantized = metadata("imatrix.gguf"), metadata("imatrix-quantized.gguf")
    assert imatrix["imatrix.datasets"] == ["calibration.txt"]
    assert quantized["quantize.imatrix.file"] == "imatrix.gguf"
    assert quantized["quantize.imatrix.chunks_count"] == imatrix["imatrix.chunk_count"] > 20
    names = {t.name for t in gguf.GGUFReader(TINY / "imatrix.gguf").tensors}
    assert "blk.1.ffn_down_exps.weight.in_sum2" in names and "token_embd.weight.in_sum2" not in names
