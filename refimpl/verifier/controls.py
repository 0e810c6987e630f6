"""Must-fail controls: every way in which a file is known to go wrong, made on purpose, and what verify must say.

`refimpl selftest` runs them all on this machine, and so do the tests. A control holds when verify fails the
file, gives the damaged tensor (and no other) the expected verdict, and names the expert and the block.
The few must-pass controls at the end guard the other side: a sound file is never condemned.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from refimpl.files import imatrix
from refimpl.files.golden import tiny_model
from refimpl.quants.formats import formats
from refimpl.verifier import mutate
from refimpl.verifier.mutate import Copy
from refimpl.verifier.result import PASSING, Report

UP, GATE, DOWN = (f"blk.1.ffn_{m}_exps.weight" for m in ("up", "gate", "down"))
Q6, Q5 = "blk.2.ffn_down_exps.weight", "blk.1.attn_k_b.weight"
V_B, OUT = "blk.1.attn_v_b.weight", "blk.1.attn_output.weight"
ROUTER, BIAS, NORM = "blk.1.ffn_gate_inp.weight", "blk.1.exp_probs_b.bias", "blk.1.attn_norm.weight"
STACKED = [GATE, UP, DOWN]
KEPT = [14, 3, 0, 9, 11, 5, 1, 15, 8, 2, 12, 6]  # 12 of 16, renumbered


@dataclass(frozen=True)
class Expect:
    """What verify has to say. The verdicts are by tensor; whatever is not listed must stay in the pass set."""

    code: str  # of the finding
    verdicts: dict[str, str]  # tensor -> verdict
    expert: int | None = None
    block: int | None = None  # within the tensor
    fits: int | None = None  # source expert that the misplaced expert really is


@dataclass
class Bench:
    """Where a control works: the golden model, a scratch directory, and what the next verify is called with."""

    golden: Path
    scratch: Path
    source: Path
    recipe: str | None = None
    imatrix: Path | None = None

    def copy(self, kind: str = "stock") -> Copy:
        """One of llama.cpp's files, in memory."""
        return Copy(self.golden / f"{kind}.gguf")

    def write(self, copy: Copy) -> Path:
        """Put a damaged copy where verify will read it."""
        return copy.write(self.scratch / "model.gguf")

    def own_source(self) -> Path:
        """From now on verify against a copy of the source that may be changed."""
        self.source = mutate.copy_source(self.golden, self.scratch / "source")
        return self.source


Damage = Callable[[Bench], Expect | None]  # writes scratch/model.gguf; None: the file is sound
CONTROLS: dict[str, Damage] = {}


def control(damage: Damage) -> Damage:
    """Register a control under its function's name."""
    CONTROLS[damage.__name__.replace("_", "-")] = damage
    return damage


def run_controls(scratch: Path, names: list[str] | None = None) -> Iterator[tuple[str, str, str | None]]:
    """Run the controls: (name, what was done, None or how verify failed to see it)."""
    from refimpl.verifier.run import verify

    golden = tiny_model()
    for name in names or CONTROLS:
        place = scratch / name
        place.mkdir()
        bench = Bench(golden, place, golden)
        expect = CONTROLS[name](bench)
        report = verify(
            place / "model.gguf", bench.source, recipe=bench.recipe, imatrix=bench.imatrix, jobs=1
        )
        yield name, (CONTROLS[name].__doc__ or "").strip(), check(report, expect)


def check(report: Report, expect: Expect | None) -> str | None:
    """None where the report says what it must, else what it says instead."""
    if expect is None:
        return (
            None if report.passed else f"a sound file was failed: {[f.message for f in report.findings][:3]}"
        )
    if report.passed:
        return "the damaged file passed"
    got = {t.name: t.verdict for t in report.tensors if t.verdict not in PASSING}
    if got != expect.verdicts:
        return f"verdicts {got}, expected {expect.verdicts}"
    named = [f for f in report.findings if f.code == expect.code and f.severity == "error"]
    named = [f for f in named if f.tensor is None or f.tensor in expect.verdicts or not expect.verdicts]
    if not named:
        return f"no finding {expect.code}; found {[f.code for f in report.findings]}"
    if expect.expert is not None and not any(f.expert == expect.expert for f in named):
        return f"experts {[f.expert for f in named]} named, not {expect.expert}"
    if expect.block is not None and not any(f.block == expect.block for f in named):
        return f"blocks {[f.block for f in named]} named, not {expect.block}"
    if expect.fits is not None:
        fits = {e.fits for t in report.tensors for e in t.experts if e.index == expect.expert}
        if expect.fits not in fits:
            return f"expert {expect.expert} was said to fit {fits}, not {expect.fits}"
    return None


def _flip(
    b: Bench, kind: str, tensor: str, field: str, at: int, bit: int, expert: int = 5, i: int = 77
) -> int:
    """Flip one bit of one block; the block's index within the tensor is returned."""
    copy = b.copy(kind)
    part = copy[tensor]
    part.block(i, expert)[field].view(np.uint8).reshape(-1)[at] ^= 1 << bit
    b.write(copy)
    per_expert = part.raw.nbytes // part.shape[0] // part.format.block.itemsize
    return i + (expert * per_expert if len(part.shape) == 3 and tensor != Q5 else 0)


@control
def code_bit_q4_k(b: Bench) -> Expect:
    """the highest bit of one Q4_K code is flipped"""
    block = _flip(b, "stock", UP, "qs", 100, 7)
    return Expect("code-far-off", {UP: "degraded"}, 5, block)


@control
def lowest_code_bit_q4_k(b: Bench) -> Expect:
    """the lowest bit of one Q4_K code is flipped"""
    block = _flip(b, "stock", UP, "qs", 100, 0)
    return Expect("code-off-nearest", {UP: "degraded"}, 5, block)


@control
def lowest_code_bit_imatrix(b: Bench) -> Expect:
    """the lowest bit of one code of a file made with an imatrix that we do not have"""
    block = _flip(b, "imatrix-quantized", UP, "qs", 41, 0)
    return Expect("code-off-nearest", {UP: "degraded"}, 5, block)


@control
def lowest_code_bit_q6_k(b: Bench) -> Expect:
    """the lowest bit of one Q6_K code is flipped"""
    block = _flip(b, "stock", Q6, "ql", 9, 0)
    return Expect("code-off-nearest", {Q6: "degraded"}, 5, block)


@control
def lowest_code_bit_q5_0(b: Bench) -> Expect:
    """the lowest bit of one Q5_0 code is flipped"""
    block = _flip(b, "stock", Q5, "qs", 3, 0, expert=0)
    return Expect("code-off-nearest", {Q5: "degraded"}, None, block)


@control
def lowest_code_bit_q8_0(b: Bench) -> Expect:
    """the lowest bit of one Q8_0 code is flipped"""
    name = "blk.2.attn_output.weight"
    block = _flip(b, "protected", name, "qs", 30, 0)
    return Expect("code-off-nearest", {name: "degraded"}, None, block)


@control
def lowest_scale_bit_q8_0(b: Bench) -> Expect:
    """the lowest bit of one Q8_0 scale is flipped"""
    name = "blk.2.attn_output.weight"
    block = _flip(b, "protected", name, "d", 0, 0)
    return Expect("scale-changed", {name: "degraded"}, None, block)


@control
def scale_byte_q4_k(b: Bench) -> Expect:
    """one byte of a block's packed 6-bit scales is inverted"""
    copy = b.copy()
    copy[UP].block(30, 2)["scales"][0, 1] ^= 0x3F
    b.write(copy)
    return Expect("code-far-off", {UP: "degraded"}, 2, 2 * 256 + 30)


@control
def scale_of_q5_0_imatrix(b: Bench) -> Expect:
    """d of one Q5_0 block is doubled in a file made with an imatrix that we do not have"""
    copy = b.copy("imatrix-quantized")
    copy[Q5].block(77)["d"] *= 2
    b.write(copy)
    return Expect("scale-impossible", {Q5: "degraded"}, None, 77)


def _codebook(b: Bench, given: bool = False) -> Copy:
    """A sound file with one tensor in IQ2_XS, made with an imatrix that verify is given or not."""
    path = b.golden / "imatrix.gguf"
    with imatrix.read(path) as file:
        importance = file.get(OUT)
    copy = b.copy("imatrix-quantized")
    mutate.replace_values(copy[OUT], mutate.source_values(b.golden, OUT), formats["iq2_xs"], importance)
    b.imatrix = path if given else None
    return copy


@control
def point_of_iq2_xs(b: Bench) -> Expect:
    """one bit of a point's number in an IQ2_XS block, with the imatrix given"""
    copy = _codebook(b, given=True)
    copy[OUT].block(9)["qs"][0, 3] ^= 1
    b.write(copy)
    return Expect("block-differs", {OUT: "degraded"}, None, 9)


@control
def point_of_iq2_xs_imatrix(b: Bench) -> Expect:
    """one bit of a point's number in an IQ2_XS block, made with an imatrix that we do not have"""
    copy = _codebook(b)
    copy[OUT].block(9)["qs"][0, 3] ^= 64
    b.write(copy)
    return Expect("code-impossible", {OUT: "degraded"}, None, 9)


@control
def sign_of_iq2_xs_imatrix(b: Bench) -> Expect:
    """one sign in an IQ2_XS block, made with an imatrix that we do not have"""
    copy = _codebook(b)
    copy[OUT].block(9)["qs"][0, 3] ^= 1 << 9
    b.write(copy)
    return Expect("code-impossible", {OUT: "degraded"}, None, 9)


@control
def scale_of_iq2_xs_imatrix(b: Bench) -> Expect:
    """d of one IQ2_XS block is doubled, made with an imatrix that we do not have"""
    copy = _codebook(b)
    copy[OUT].block(9)["d"] *= 2
    b.write(copy)
    return Expect("block-error", {OUT: "degraded"}, None, 9)


@control
def scale_of_iq2_xs_not_finite(b: Bench) -> Expect:
    """d of one IQ2_XS block is NaN"""
    copy = _codebook(b, given=True)
    copy[OUT].block(9)["d"] = np.nan
    b.write(copy)
    return Expect("scale-not-finite", {OUT: "corrupt"}, None, 9)


@control
def last_bit_of_a_scale(b: Bench) -> Expect:
    """the last bit of one block's dmin, where every code stays the nearest"""
    copy = b.copy()
    block = mutate.nudge_mins(copy, mutate.source_values(b.golden, UP), UP, every=4096)[0]
    b.write(copy)
    return Expect("scale-changed", {UP: "degraded"}, block // 256, block)


@control
def codes_cut_off(b: Bench) -> Expect:
    """all codes of a tensor are cut off instead of rounded"""
    copy = b.copy()
    mutate.cut_off_codes(copy[UP], mutate.source_values(b.golden, UP))
    b.write(copy)
    return Expect("too-much-error", {UP: "degraded"}, 0)


@control
def scale_not_finite(b: Bench) -> Expect:
    """d of one block is NaN"""
    copy = b.copy()
    copy[UP].block(200, 7)["d"] = np.nan
    b.write(copy)
    return Expect("scale-not-finite", {UP: "corrupt"}, 7, 7 * 256 + 200)


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


@control
def sound_stock(b: Bench) -> None:
    """llama.cpp's own Q4_K_M passes"""
    b.write(b.copy())


@control
def sound_imatrix(b: Bench) -> None:
    """llama.cpp's own Q4_K_M with an imatrix passes without the imatrix"""
    b.write(b.copy("imatrix-quantized"))


@control
def sound_codebook_imatrix(b: Bench) -> None:
    """a tensor in IQ2_XS, made with an imatrix, passes without the imatrix"""
    b.write(_codebook(b))


@control
def sound_child(b: Bench) -> None:
    """a child pruned from 16 to 12 experts and renumbered passes against its unpruned parent"""
    copy = b.copy()
    mutate.prune(copy, KEPT)
    b.write(copy)
