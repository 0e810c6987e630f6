"""Controls that damage, move or exchange experts, tensors, metadata or the source."""

import numpy as np

from refimpl.quants.formats import formats
from refimpl.verifier import mutate
from refimpl.verifier.damage import BIAS, DOWN, GATE, KEPT, NORM, Q5, STACKED, UP, V_B, Bench, Expect, control


@control
def expert_zeroed(b: Bench) -> Expect:
    """one expert is all zero bytes, scales and all"""
    copy = b.copy()
    copy[DOWN].expert(11)[:] = 0
    b.write(copy)
    return Expect("all-zero", {DOWN: "wrong"}, 11)


@control
def expert_zeroed_imatrix(b: Bench) -> Expect:
    """one expert is all zero bytes in a file made with an imatrix that we do not have"""
    copy = b.copy("imatrix-quantized")
    copy[DOWN].expert(11)[:] = 0
    b.write(copy)
    return Expect("all-zero", {DOWN: "wrong"}, 11)


@control
def block_zeroed_imatrix(b: Bench) -> Expect:
    """one block is all zero bytes in a file made with an imatrix that we do not have"""
    copy = b.copy("imatrix-quantized")
    copy[UP].block(3, 1).view(np.uint8)[:] = 0
    b.write(copy)
    return Expect("zero-scale", {UP: "degraded"}, 1, 256 + 3)


@control
def blocks_swapped_imatrix(b: Bench) -> Expect:
    """two blocks of an expert are exchanged in a file made with an imatrix that we do not have"""
    copy = b.copy("imatrix-quantized")
    rows = copy[UP].expert(4)
    rows[[3, 200]] = rows[[200, 3]].copy()
    b.write(copy)
    return Expect("block-error", {UP: "degraded"}, 4, 4 * 256 + 3)


@control
def experts_swapped(b: Bench) -> Expect:
    """two experts are exchanged in one of the three matrices"""
    copy = b.copy()
    mutate.swap_experts(copy, [UP], 2, 9)
    b.write(copy)
    return Expect("misplaced", {UP: "misplaced"}, 2, fits=9)


@control
def experts_swapped_but_not_the_router(b: Bench) -> Expect:
    """two experts are exchanged in gate, up and down; their router rows stay"""
    copy = b.copy()
    mutate.swap_experts(copy, STACKED, 2, 9)
    b.write(copy)
    return Expect("misplaced", dict.fromkeys(STACKED, "misplaced"), 9, fits=2)


@control
def gate_and_up_swapped(b: Bench) -> Expect:
    """the gate and up matrices of a layer are exchanged"""
    copy = b.copy()
    copy[GATE].raw, copy[UP].raw = copy[UP].raw, copy[GATE].raw
    b.write(copy)
    return Expect("misplaced", {GATE: "misplaced", UP: "misplaced"}, 0)


@control
def expert_of_another_layer(b: Bench) -> Expect:
    """one expert holds the same expert of the next layer"""
    copy = b.copy()
    copy[UP].expert(3)[:] = copy["blk.2.ffn_up_exps.weight"].expert(3)
    b.write(copy)
    return Expect("misplaced", {UP: "misplaced"}, 3)


@control
def k_b_not_transposed(b: Bench) -> Expect:
    """attn_k_b holds the k part of kv_b_proj without the transpose"""
    copy = b.copy()
    mutate.untranspose(copy, b.golden, Q5)
    b.write(copy)
    return Expect("misplaced", {Q5: "misplaced"})


@control
def v_b_transposed(b: Bench) -> Expect:
    """the heads of attn_v_b are transposed as if they were attn_k_b's, and the shape does not show it"""
    copy = b.copy()
    values = mutate.source_values(b.golden, V_B)
    mutate.replace_values(copy[V_B], values.transpose(0, 2, 1).reshape(values.shape))
    b.write(copy)
    return Expect("misplaced", {V_B: "misplaced"})


@control
def k_b_from_the_v_part(b: Bench) -> Expect:
    """attn_k_b holds the last rows of kv_b_proj's heads, which are the v part's, instead of the first"""
    copy = b.copy()
    k, v = mutate.source_values(b.golden, Q5), mutate.source_values(b.golden, V_B)
    heads = np.concatenate([k.transpose(0, 2, 1), v], axis=1)
    mutate.replace_values(copy[Q5], heads[:, -k.shape[2] :].transpose(0, 2, 1).reshape(k.shape))
    b.write(copy)
    return Expect("misplaced", {Q5: "misplaced"})


@control
def rows_of_an_expert_reversed(b: Bench) -> Expect:
    """the rows of one expert stand in reverse order"""
    copy = b.copy()
    rows = copy[DOWN].expert(6)
    rows[:] = rows[::-1].copy()
    b.write(copy)
    return Expect("misplaced", {DOWN: "misplaced"}, 6)


@control
def router_bias_unpruned(b: Bench) -> Expect:
    """a pruned child still carries its parent's selection bias"""
    copy = b.copy()
    whole = copy[BIAS]
    raw, shape = whole.raw.copy(), whole.shape
    mutate.prune(copy, KEPT)
    copy[BIAS].raw, copy[BIAS].shape = raw, shape
    b.write(copy)
    return Expect("shape-differs", {BIAS: "misplaced"})


@control
def router_bias_not_reordered(b: Bench) -> Expect:
    """a pruned child has the first entries of its parent's bias instead of the kept ones"""
    copy = b.copy()
    raw = copy[BIAS].raw.copy()
    mutate.prune(copy, KEPT)
    copy[BIAS].raw = raw[:, : copy[BIAS].raw.shape[1]].copy()
    b.write(copy)
    return Expect("misplaced", {BIAS: "misplaced"})


@control
def tensor_cut_short(b: Bench) -> Expect:
    """a tensor is cut short and the next one begins within it"""
    path = b.write(b.copy())
    after = mutate.overlap_next(path, UP)
    return Expect("region-overlap", {UP: "corrupt", after: "corrupt"})


@control
def wrong_type(b: Bench) -> Expect:
    """one expert tensor is Q6_K where the recipe says Q4_K"""
    copy = b.copy("protected")
    mutate.replace_values(copy[UP], mutate.source_values(b.golden, UP), formats["q6_k"])
    b.write(copy)
    b.recipe = "q4_k_m-protected"
    return Expect("recipe-mismatch", {})


@control
def norm_plus_one(b: Bench) -> Expect:
    """a norm has 1 added to every weight, as another architecture would have it"""
    copy = b.copy()
    copy[NORM].raw = (copy[NORM].raw.view("<f4") + np.float32(1)).view(np.uint8)
    b.write(copy)
    return Expect("constant-offset", {NORM: "degraded"})


@control
def norm_of_the_next_layer(b: Bench) -> Expect:
    """the norms are off by one layer"""
    copy = b.copy()
    copy[NORM].raw = copy["blk.2.attn_norm.weight"].raw
    b.write(copy)
    return Expect("misplaced", {NORM: "misplaced"})


@control
def f16_overflow(b: Bench) -> Expect:
    """a BF16 value beyond 65504 became Inf in an F16 tensor"""
    name, hf = "blk.1.indexer.attn_k.weight", "model.layers.1.self_attn.indexer.wk.weight"
    mutate.set_source_value(b.own_source(), hf, 300, 0x47C3)  # 99840
    copy = b.copy()
    with np.errstate(over="ignore"):
        mutate.replace_values(copy[name], mutate.source_values(b.source, name), formats["f16"])
    b.write(copy)
    return Expect("overflow", {name: "corrupt"})


@control
def expert_count_lies(b: Bench) -> Expect:
    """the metadata names fewer experts than the tensors hold"""
    copy = b.copy()
    copy.set(mutate.EXPERT_COUNT, 15)
    b.write(copy)
    return Expect("expert-count", {})


@control
def block_count_lies(b: Bench) -> Expect:
    """the metadata names one layer more than there is"""
    copy = b.copy()
    copy.set("glm-dsa.block_count", 4)
    b.write(copy)
    return Expect("block-count", {})


@control
def head_count_kv_lies(b: Bench) -> Expect:
    """head_count_kv is the number of heads, where MLA has one"""
    copy = b.copy()
    copy.set("glm-dsa.attention.head_count_kv", 2)
    b.write(copy)
    return Expect("head-count-kv", {})


@control
def another_checkpoint(b: Bench) -> Expect:
    """the source is another checkpoint of the same shape"""
    b.write(b.copy())
    mutate.scramble_source(b.own_source(), seed=1)
    copy = b.copy()
    return Expect("other-source", {n: "wrong" for n in copy.parts if n != BIAS and "2.exp_probs" not in n})
