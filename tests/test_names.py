"""The map of GLM-5.1's tensors, both ways, and the source's rows under each transform."""

import re
from dataclasses import replace
from math import prod

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_checkpoint import CONFIG, draw_weights, write_checkpoint

import refimpl
from refimpl.errors import BadFile, Unsupported
from refimpl.files import names
from refimpl.files.gguf import GGUFValueType as V
from refimpl.files.gguf import write
from refimpl.quants.formats import BF16, F16, F32

REAL = names.Hparams(
    hidden_size=6144, num_hidden_layers=78, num_nextn_predict_layers=0, first_k_dense_replace=3,
    intermediate_size=12288, moe_intermediate_size=2048, n_routed_experts=256, n_shared_experts=1,
    num_experts_per_tok=8, n_group=1, topk_group=1, routed_scaling_factor=2.5, num_attention_heads=64,
    q_lora_rank=2048, kv_lora_rank=512, qk_nope_head_dim=192, qk_rope_head_dim=64, v_head_dim=256,
    index_n_heads=32, index_head_dim=128, index_topk=2048, vocab_size=154880, max_position_embeddings=202752,
    rms_norm_eps=1e-5, rope_theta=1e6,
)  # fmt: skip
MTP = CONFIG | {"num_nextn_predict_layers": 1}
METADATA = {
    "general.architecture": "glm-dsa", "glm-dsa.block_count": 79, "glm-dsa.context_length": 202752,
    "glm-dsa.embedding_length": 6144, "glm-dsa.feed_forward_length": 12288,
    "glm-dsa.attention.head_count": 64, "glm-dsa.attention.head_count_kv": 1, "glm-dsa.expert_count": 256,
    "glm-dsa.expert_used_count": 8,
    "glm-dsa.expert_group_count": 1, "glm-dsa.expert_group_used_count": 1, "glm-dsa.expert_gating_func": 2,
    "glm-dsa.attention.key_length": 576, "glm-dsa.attention.value_length": 512,
    "glm-dsa.attention.key_length_mla": 256, "glm-dsa.attention.value_length_mla": 256,
    "glm-dsa.leading_dense_block_count": 3, "glm-dsa.vocab_size": 154880,
    "glm-dsa.attention.q_lora_rank": 2048, "glm-dsa.attention.kv_lora_rank": 512,
    "glm-dsa.expert_feed_forward_length": 2048,
    "glm-dsa.expert_shared_count": 1, "glm-dsa.rope.dimension_count": 64, "glm-dsa.nextn_predict_layers": 1,
    "glm-dsa.attention.indexer.head_count": 32, "glm-dsa.attention.indexer.key_length": 128,
    "glm-dsa.attention.indexer.top_k": 2048, "glm-dsa.rope.freq_base": 1e6,
    "glm-dsa.attention.layer_norm_rms_epsilon": 1e-5, "glm-dsa.expert_weights_scale": 2.5,
}  # fmt: skip


def tiny_hp(config=CONFIG):
    return names.Hparams.from_config(config)


# --- hyperparameters --------------------------------------------------------------------------------------


def test_metadata_and_config_give_the_same_hyperparameters():
    assert names.Hparams.from_metadata(METADATA) == replace(REAL, num_nextn_predict_layers=1)
    config = vars(REAL) | {"model_type": "glm_moe_dsa"}
    assert names.Hparams.from_config(config) == REAL


SOME = (
    "block_count", "embedding_length", "feed_forward_length", "head_count", "expert_count",
    "expert_used_count",
    "key_length_mla", "q_lora_rank", "vocab_size", "context_length", "freq_base", "layer_norm_rms_epsilon",
)  # fmt: skip


@pytest.mark.parametrize("key", [k for k in METADATA if k.split(".")[-1] in SOME])
@pytest.mark.parametrize("value", [None, "many", True, -1, 0, 2**62, float("nan"), [1]])
def test_absurd_metadata_is_a_bad_file(key, value):
    metadata = dict(METADATA) | {key: value}
    if value is None:
        del metadata[key]
    if isinstance(value, int) and value == 2**62 and key.endswith(("freq_base", "epsilon")):
        assert names.Hparams.from_metadata(metadata)
        return
    with pytest.raises(BadFile, match=key.replace(".", r"\.")):
        names.Hparams.from_metadata(metadata)


@pytest.mark.parametrize(
    ("change", "word"),
    [({"num_experts_per_tok": 300}, "num_experts_per_tok is 300"), ({"first_k_dense_replace": 99},
     "first_k_dense"),
     ({"hidden_size": 1.5}, "hidden_size"), ({"mlp_layer_types": ["sparse"] * 3}, "disagree"),
     ({"mlp_layer_types": "dense"}, "mlp_layer_types")],
)  # fmt: skip
def test_an_absurd_config_is_a_bad_file(change, word):
    with pytest.raises(BadFile, match=word):
        tiny_hp(CONFIG | change)


@pytest.mark.parametrize(
    "change",
    [{"model_type": "llama"}, {"norm_topk_prob": False}, {"tie_word_embeddings": True},
     {"rope_parameters": {"rope_theta": 1e6, "rope_type": "yarn"}}, {"scoring_func": "softmax"},
     {"mlp_layer_types": ["dense", "sparse", "dense"]}],
)  # fmt: skip
def test_another_architecture_is_unsupported(change):
    with pytest.raises(Unsupported):
        tiny_hp(CONFIG | change)


def test_layers_that_share_an_indexer_have_no_tensors_of_it():
    hp = tiny_hp(CONFIG | {"indexer_types": ["full", "shared", "full"]})
    assert [hp.has_indexer(n) for n in range(4)] == [True, False, True, True]
    found = [link.gguf for link, _ in names.expected(hp) if "indexer" in link.gguf]
    assert len(found) == 2 * 5 and not any(name.startswith("blk.1.") for name in found)
    assert tiny_hp(CONFIG | {"indexer_types": 3 * ["full"]}) == tiny_hp(CONFIG)


@pytest.mark.parametrize("kinds", [["full"], ["shared", "full", "full"], ["full", "half", "full"], "full"])
def test_absurd_indexer_types_are_a_bad_file(kinds):
    with pytest.raises(BadFile, match="indexer"):
        tiny_hp(CONFIG | {"indexer_types": kinds})


def test_metadata_of_another_architecture_is_unsupported():
    with pytest.raises(Unsupported, match="'llama'"):
        names.Hparams.from_metadata({"general.architecture": "llama"})


# --- the map ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("experts", "nextn", "count", "millions"),
    [(256, 0, 1782, 743_911), (256, 1, 1809, 753_864), (192, 0, 1782, 562_688), (154, 0, 1782, 455_086)],
)
def test_the_real_model_has_the_tensors_and_weights_of_its_card(experts, nextn, count, millions):
    tensors = names.expected(replace(REAL, n_routed_experts=experts, num_nextn_predict_layers=nextn))
    assert len(tensors) == count
    assert round(sum(prod(shape) for _, shape in tensors) / 1e6) == millions


def test_our_map_is_that_of_gguf_py():
    hp = replace(REAL, num_nextn_predict_layers=1)
    theirs = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GLM_DSA, hp.layers)
    for link, _ in names.expected(hp):
        hf = link.hf.replace("experts.{e}.", "experts.").replace(
            "e_score_correction_bias", "e_score_correction.bias"
        )
        if link.transform in ("k_b", "v_b"):
            hf = hf.replace("kv_b_proj", f"{link.transform}_proj")
        stem, suffix = hf.rsplit(".", 1)
        assert theirs.get_name(stem) == link.gguf.removesuffix(f".{suffix}")


def test_every_name_leads_to_the_other_and_back():
    hp = tiny_hp(MTP)
    links = [link for link, _ in names.expected(hp)]
    assert len({link.gguf for link in links}) == len(links)
    for link in links:
        assert names.link(link.gguf, hp) == link
        back = names.from_hf(link.hf.format(e=4), hp)
        kv_b = link.gguf.replace("attn_v_b", "attn_k_b")
        assert back == (names.link(kv_b, hp), 4 if link.transform == "stack" else None)


def test_the_checkpoint_and_the_map_name_the_same_tensors():
    hp = tiny_hp(MTP)
    ours = set()
    for link, _ in names.expected(hp):
        ours |= {link.hf.format(e=e) for e in range(hp.n_routed_experts)}
    assert ours == set(draw_weights(MTP))


@pytest.mark.parametrize(
    "name",
    ["blk.3.attn_norm.weight", "blk.00.attn_norm.weight", "blk.0.ffn_gate_exps.weight",
     "blk.1.ffn_gate.weight",
     "blk.0.token_embd.weight", "attn_norm.weight", "blk.1.nextn.enorm.weight", "blk.-1.attn_norm.weight", "",
     "blk.99999999999999.attn_norm.weight", "output.bias"],
)  # fmt: skip
def test_a_name_without_a_place_has_no_link(name):
    assert names.link(name, tiny_hp()) is None
    assert names.from_hf(name.replace("blk", "model.layers"), tiny_hp()) is None


def test_roles_and_types_follow_convert():
    hp = tiny_hp(MTP)
    f32 = {re.sub(r"^blk\.\d+\.", "", link.gguf) for link, _ in names.expected(hp) if link.f32}
    assert f32 == {
        "attn_norm.weight", "ffn_norm.weight", "attn_q_a_norm.weight", "attn_kv_a_norm.weight",
        "output_norm.weight", "indexer.k_norm.weight", "indexer.k_norm.bias", "indexer.proj.weight",
        "ffn_gate_inp.weight",
        "exp_probs_b.bias", "nextn.enorm.weight", "nextn.hnorm.weight", "nextn.shared_head_norm.weight",
    }  # fmt: skip
    routed = names.link("blk.2.ffn_down_exps.weight", hp)
    assert (routed.role, routed.matrix, routed.layer, routed.transform) == ("routed", "down", 2, "stack")
    assert names.link("blk.1.ffn_gate_inp.weight", hp).matrix is None
    assert names.link("blk.3.ffn_up_exps.weight", hp).role == "routed"
    assert names.link("output.weight", hp).layer is None


# --- the source's rows ------------------------------------------------------------------------------------


def convert(weights, link, hp, kept):
    """The GGUF tensor as convert makes it, whole and simply."""
    if link.transform == "stack":
        return np.stack([weights[link.hf.format(e=e)] for e in kept])
    x = weights[link.hf]
    if link.transform in ("k_b", "v_b"):
        x = x.reshape(hp.num_attention_heads, hp.qk_nope_head_dim + hp.v_head_dim, hp.kv_lora_rank)
        k, v = x[:, : hp.qk_nope_head_dim], x[:, hp.qk_nope_head_dim :]
        return k.transpose(0, 2, 1) if link.transform == "k_b" else v
    return x[list(kept)] if link.role in ("router", "router_bias") else x


def widen(x):
    return (x.astype(np.uint32) << 16).view(np.float32) if x.dtype == np.uint16 else x


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The same random model as checkpoint and as BF16, F16 and F32 GGUF, with its weights."""
    folder, hp = tmp_path_factory.mktemp("sources"), tiny_hp(MTP)
    weights = write_checkpoint(folder / "hf", MTP)
    weights = {
        k: v.astype(np.float16).astype(np.float32) if "bias" not in k else v for k, v in weights.items()
    }
    write_checkpoint(folder / "hf", MTP, weights)
    weights = read_back(folder / "hf")
    paths = {"hf": folder / "hf"}
    for fmt in (BF16, F16, F32):
        tensors = []
        for link, shape in names.expected(hp):
            x = np.ascontiguousarray(convert(weights, link, hp, range(hp.n_routed_experts)))
            assert x.shape == shape
            as_f32 = link.f32 or fmt is F32
            bits = (
                x
                if as_f32
                else x.astype(np.float16)
                if fmt is F16
                else (x.view(np.uint32) >> 16).astype(np.uint16)
            )
            tensors.append((link.gguf, shape, F32 if as_f32 else fmt, [bits]))
        paths[fmt.name] = folder / f"{fmt.name}.gguf"
        write(paths[fmt.name], {"general.architecture": (V.STRING, "glm-dsa")}, tensors)
    opened = {k: refimpl.open(p) for k, p in paths.items()}
    yield opened, weights, hp
    for source in opened.values():
        source.close()


def read_back(folder):
    """The weights as the checkpoint has them (BF16 and F16 meet there)."""
    with refimpl.open(folder) as f:
        return {n: widen(f.read(n).view(np.uint16 if t.format is BF16 else np.float32)).reshape(t.shape)
                for n, t in f.tensors.items()}  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_the_rows_of_any_range_are_those_of_convert(sources, data):
    opened, weights, hp = sources
    kind = data.draw(st.sampled_from(sorted(opened)))
    link, _ = data.draw(st.sampled_from(names.expected(hp)))
    kept = data.draw(st.none() | st.lists(st.integers(0, 5), min_size=1, max_size=6, unique=True))
    want = convert(weights, link, hp, range(6) if kept is None else kept)
    assert names.source_shape(opened[kind], link, hp, kept) == want.shape
    flat = want.reshape(-1, want.shape[-1]) if want.ndim > 1 else want[None]
    rows = slice(*sorted(data.draw(st.tuples(st.integers(0, len(flat)), st.integers(0, len(flat))))))
    got = names.source_rows(opened[kind], link, hp, rows, kept)
    stays_bf16 = kind in ("hf", "bf16") and not (kind == "bf16" and link.f32) and link.role != "router_bias"
    assert got.dtype == (np.uint16 if stays_bf16 else np.float32)
    np.testing.assert_array_equal(widen(got), flat[rows])


def test_a_missing_source_has_no_shape_and_no_rows(sources, tmp_path):
    _, weights, hp = sources
    weights = {k: v for k, v in weights.items() if "experts.3.up" not in k and "kv_b" not in k}
    write_checkpoint(tmp_path / "hf", MTP, weights)
    with refimpl.open(tmp_path / "hf") as source:
        up = names.link("blk.1.ffn_up_exps.weight", hp)
        assert names.source_shape(source, up, hp, [0, 1, 3]) is None
        assert names.source_shape(source, up, hp, [0, 1, 5]) == (3, 16, 32)
        assert names.source_shape(source, up, hp) == (3, 16, 32)
        assert names.source_shape(source, names.link("blk.1.attn_k_b.weight", hp), hp) is None
        assert names.source_shape(source, names.link("blk.1.ffn_gate_inp.weight", hp), hp, [6]) is None
        with pytest.raises(BadFile, match=r"experts\.3\.up_proj\.weight is missing"):
            names.source_rows(source, up, hp, slice(0, 100))


def test_experts_of_different_types_become_float32(tmp_path):
    hp, weights = tiny_hp(), draw_weights(CONFIG)
    write_checkpoint(tmp_path / "hf", CONFIG, weights)
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    from safetensors.numpy import load_file, save_file

    for shard in (tmp_path / "hf").glob("*.safetensors"):
        tensors = load_file(shard)
        if name in tensors:
            save_file(tensors | {name: weights[name]}, shard)
    with refimpl.open(tmp_path / "hf") as source:
        assert source.tensors[name].format is F32
        link = names.link("blk.1.ffn_up_exps.weight", hp)
        got = names.source_rows(source, link, hp, slice(20, 60))
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, convert(weights, link, hp, range(6)).reshape(-1, 32)[20:60])
        assert names.source_rows(source, link, hp, slice(0, 16)).dtype == np.uint16


def test_a_source_of_another_shape_is_refused_with_both(tmp_path):
    hp, weights = tiny_hp(), draw_weights(CONFIG)
    weights["model.layers.1.self_attn.q_a_proj.weight"] = np.zeros((10, 31), np.float32)
    weights["model.layers.1.mlp.experts.1.up_proj.weight"] = np.zeros((15, 32), np.float32)
    write_checkpoint(tmp_path / "hf", CONFIG, weights)
    with refimpl.open(tmp_path / "hf") as source:
        link = names.link("blk.1.attn_q_a.weight", hp)
        assert names.source_shape(source, link, hp) == (10, 31)
        with pytest.raises(BadFile, match=r"\[10, 31\]"):
            names.source_rows(source, link, hp, slice(None))
        link = names.link("blk.1.ffn_up_exps.weight", hp)
        with pytest.raises(BadFile, match=r"is not \[16, 32\]"):
            names.source_shape(source, link, hp)
        with pytest.raises(BadFile, match=r"\[15, 32\]"):
            names.source_rows(source, link, hp, slice(None))


def test_a_quantized_gguf_is_no_source(tmp_path):
    from refimpl.quants.formats import Q8_0

    write(tmp_path / "a.gguf", {}, [("token_embd.weight", (40, 32), Q8_0, [bytes(40 * 34)])])
    with refimpl.open(tmp_path / "a.gguf") as source, pytest.raises(Unsupported, match="q8_0"):
        names.source_rows(source, names.link("token_embd.weight", tiny_hp()), tiny_hp(), slice(None))
