"""compare: every mistake that engines make is caught at the operation where it is made, and only there."""

import importlib.resources
import json
from dataclasses import replace

import jsonschema
import numpy as np
import pytest
import tiny_checkpoint
from safetensors.numpy import save_file

import refimpl
from refimpl.cli.main import run
from refimpl.crosscheck.compare import compare
from refimpl.crosscheck.trace import HF_NAMES, Trace, read_trace, write_trace
from refimpl.errors import BadFile, Unsupported
from refimpl.files.golden import tiny_model
from refimpl.model import block, cache, dsa, mla, moe, rope
from refimpl.model.weights import Layer

TINY = tiny_model()
CONFIG = tiny_checkpoint.SOUND | {
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
}  # of one size, so that any two can be swapped
IDS = np.random.default_rng(1).integers(0, CONFIG["vocab_size"], 40).tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    weights = tiny_checkpoint.scale(tiny_checkpoint.draw_weights(CONFIG, seed=3), CONFIG)
    tiny_checkpoint.write_checkpoint(path, CONFIG, weights)
    return path


@pytest.fixture(scope="module")
def right(folder):
    return Trace("right", refimpl.load(folder).trace(IDS))


def split_halves(patch):
    patch.setattr(dsa, "rotate", lambda x, turn: rope.rotate(x, turn, halves=True))


def weigh_with_bias(patch):
    def wrong(x, w, hp, conv, original=moe.route):
        found = original(x, w, hp, conv)
        p = np.take_along_axis(found.probs + w.vector("exp_probs_b"), found.chosen, 1)
        return replace(found, weights=(p / p.sum(1, keepdims=True) * 2.5).astype(np.float32))

    patch.setattr(moe, "route", wrong)


def forget_scale(patch):
    def wrong(x, w, hp, conv, original=moe.route):
        return original(x, w, replace(hp, routed_scaling_factor=1.0), conv)

    patch.setattr(moe, "route", wrong)


def swap_k_b_and_v_b(patch):
    other = {"attn_k_b": "attn_v_b", "attn_v_b": "attn_k_b"}
    original = Layer.__getitem__
    patch.setattr(Layer, "__getitem__", lambda self, name: original(self, other.get(name, name)))


def keep_expanded_keys(patch):
    """The cache holds a head's restored keys, and absorbed queries meet them."""

    def wrong(self, layer, new, original=cache.Cache.append_latents):
        expanded = new.copy()
        expanded[:, :32] = new[:, :32] @ wrong.k_b
        return original(self, layer, expanded)

    def attention(x, w, *rest, original=mla.attention):
        wrong.k_b = w["attn_k_b"][0].values()
        return original(x, w, *rest)

    patch.setattr(cache.Cache, "append_latents", wrong)
    patch.setattr(block, "attention", attention)


def select_from_the_future(patch):
    def wrong(scores, first, count):
        chosen = [np.argsort(-row, kind="stable")[:count] for row in scores]
        return [np.union1d(c[c <= first + t], [first + t]) for t, c in enumerate(chosen)]

    patch.setattr(dsa, "select_topk", wrong)


def select_one_less(patch):
    patch.setattr(
        dsa, "select_topk", lambda s, first, count, original=dsa.select_topk: original(s, first, count - 1)
    )


def forget_shared_expert(patch):
    def wrong(x, w, hp, conv, tap, original=moe.moe):
        kept = {}

        def listen(name, value):
            kept[name] = value
            return tap(name, value)

        original(x, w, hp, conv, listen)
        return kept["ffn_moe_out"]

    patch.setattr(block, "moe", wrong)


def weigh_in_half_precision(patch):
    def wrong(outputs, routing, conv):
        terms = outputs.astype(np.float16) * routing.weights[..., None].astype(np.float16)
        return terms.astype(np.float32).sum(axis=1)

    patch.setattr(moe, "combine", wrong)


MISTAKES = {
    "half-split rope in the indexer": (split_halves, {}, "indexer_k-0"),
    "bias added to the router's weights": (weigh_with_bias, {}, "ffn_moe_weights_scaled-1"),
    "the 2.5 is missing": (forget_scale, {}, "ffn_moe_weights_scaled-1"),
    "k_b and v_b swapped": (swap_k_b_and_v_b, {}, "q_nope_absorbed-0"),
    "absorbed queries on expanded keys": (keep_expanded_keys, {}, "kqv-0"),
    "no causal mask in the indexer": (select_from_the_future, {}, "top_k-0"),
    "top-k off by one": (select_one_less, {}, "top_k-0"),
    "eps of the latents' norms": (None, {"latent_eps": 1e-6}, "qr-0"),
    "eps of the indexer's norm": (None, {"key_eps": 1e-3}, "indexer_k_norm-0"),
    "shared expert forgotten": (forget_shared_expert, {}, "ffn_out-1"),
    "experts weighted in half precision": (weigh_in_half_precision, {}, "ffn_moe_out-1"),
    "no Hadamard where there should be none": (None, {"hadamard": True}, "indexer_k-0"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_caught_where_it_is_made(folder, right, monkeypatch, mistake):
    make, changes, place = MISTAKES[mistake]
    model = refimpl.load(folder)
    with monkeypatch.context() as patch:
        if make is not None:
            make(patch)
        wrong = Trace("wrong", refimpl.load(folder, **changes).trace(IDS))
    found = compare(right, wrong, model)
    assert not found.passed and found.first.key == place
    base = place.rpartition("-")[0]
    made_alike = {"indexer_k": {"indexer_k", "indexer_q"}, "q_nope_absorbed": {"q_nope_absorbed", "kqv_out"},
                  "qr": {"qr", "kv_cmpr"}}.get(base, {base})  # fmt: skip
    assert {row.name for row in found.rows if row.verdict == "wrong"} <= made_alike
    last = found.rows[-1]
    assert last.name == "result_output" and last.ratio < 1  # right itself, whatever it was fed
    assert (last.deviation > 0) is (
        place != "indexer_k_norm-0" and "hadamard" not in changes
    )  # these select alike


def as_hooks_see(trace):
    """What forward hooks of Hugging Face's modules record of it: no rotated keys, no scores, no probabilities."""
    return Trace(
        trace.path, {n: v for n, v in trace.values.items() if n.rpartition("-")[0] in ("", *HF_NAMES)}
    )


@pytest.mark.parametrize("seed", range(6))
def test_absorbed_and_expanded_attention_agree_inside_the_bound(tmp_path, seed):
    """Of random sizes, weights and tokens: float32 results of both lie in one bound around one float64 value."""
    rng = np.random.default_rng(seed)
    heads, nope, rank, value = (int(n) for n in (rng.integers(1, 5), *(8 * rng.integers(1, 6, 3))))
    config = CONFIG | {"num_attention_heads": heads, "num_key_value_heads": heads, "qk_nope_head_dim": nope,
                       "kv_lora_rank": rank, "v_head_dim": value, "index_topk": int(rng.integers(3, 30))}  # fmt: skip
    weights = tiny_checkpoint.scale(tiny_checkpoint.draw_weights(config, seed), config)
    tiny_checkpoint.write_checkpoint(tmp_path, config, weights)
    ids = rng.integers(0, config["vocab_size"], 50).tolist()
    for kind in ("absorbed", "expanded"):
        model = refimpl.load(tmp_path, attention=kind)
        trace = as_hooks_see(Trace(kind, model.trace(ids)))
        ratios = [row.ratio for row in compare(trace, trace, model).rows if row.name == "attn_out"]
        assert len(ratios) == 3 and 0 < max(ratios) < 1
        values = dict(trace.values)
        values["attn_out-1"] = np.roll(values["attn_out-1"], 1, axis=1)  # must fail
        assert compare(trace, Trace(kind, values), model).first.key == "attn_out-1"


def forget_relu(patch):
    def wrong(q, k, weights, conv, first=None):
        return np.einsum("thn,sn,th->ts", q, k, weights).astype(np.float32)

    patch.setattr(dsa, "add_heads", wrong)


@pytest.mark.parametrize("mistake", [split_halves, forget_relu, select_from_the_future, select_one_less])
def test_a_wrong_selection_is_caught_where_scores_were_not_recorded(folder, right, monkeypatch, mistake):
    model = refimpl.load(folder)
    with monkeypatch.context() as patch:
        mistake(patch)
        wrong = as_hooks_see(Trace("wrong", refimpl.load(folder).trace(IDS)))
    found = compare(as_hooks_see(right), wrong, model)
    assert found.first.key == "top_k-0" and found.first.wrong > 10
    assert {row.name for row in found.rows if row.verdict == "wrong"} == {"top_k"}
    found = compare(right, as_hooks_see(right), model)
    assert found.passed and all(row.wrong == 0 for row in found.rows if row.name == "top_k")


@pytest.mark.parametrize(
    "mistake, place",
    [(weigh_with_bias, "ffn_moe_weights_scaled-1"), (forget_scale, "ffn_moe_weights_scaled-1"),
     (weigh_in_half_precision, "ffn_moe_out-1"), (forget_shared_expert, "ffn_out-1"),
     (swap_k_b_and_v_b, "attn_out-0"), (keep_expanded_keys, "attn_out-0")],
)  # fmt: skip
def test_mistakes_are_caught_where_hooks_record_what_modules_return(
    folder, right, monkeypatch, mistake, place
):
    model = refimpl.load(folder)
    with monkeypatch.context() as patch:
        mistake(patch)
        wrong = as_hooks_see(Trace("wrong", refimpl.load(folder).trace(IDS)))
    assert compare(as_hooks_see(right), wrong, model).first.key == place
    found = compare(right, as_hooks_see(right), model)
    assert found.passed and all(row.wrong == 0 for row in found.rows if row.name == "ffn_moe_topk")
    assert all(row.ratio is not None or row.wrong == 0 for row in found.rows if row.name != "inp_embd")


def test_half_split_rope_shows_in_logits_only_past_index_topk(folder, monkeypatch):
    want = refimpl.load(folder).logits(IDS)
    split_halves(monkeypatch)
    got = refimpl.load(folder).logits(IDS)
    assert np.array_equal(got[: CONFIG["index_topk"]], want[: CONFIG["index_topk"]])
    assert np.abs(got - want).max() > 0.01


@pytest.mark.parametrize(
    "engine, file, changes",
    [("refimpl", "stock.gguf", {}), ("transformers", "", {}), ("llama.cpp", "stock.gguf", {}), ("deepseek", "", {}),
     ("deepseek", "stock.gguf", {"index": "fp8", "kv": "f16"}), ("transformers", "", {"kv": "q8_0"}),
     ("transformers", "", {"kv": "f16"})],
)  # fmt: skip
def test_what_we_compute_is_inside_its_own_bounds(engine, file, changes):
    model = refimpl.load(TINY / file, engine=engine, **changes)
    trace = Trace("x", model.trace(range(100, 180)))
    found = compare(trace, trace, model)
    assert found.passed
    ratios = [row.ratio for row in found.rows if row.ratio is not None]
    assert len(ratios) > 70 and 0.1 < max(ratios) <= 1
    assert all(row.wrong == 0 for row in found.rows if row.name in ("top_k", "ffn_moe_topk"))


def test_float64_is_far_inside(folder, right):
    model = refimpl.load(folder)
    found = compare(right, Trace("x", model.trace(IDS, float64=True)), model)
    assert max(row.ratio for row in found.rows if row.ratio is not None and row.name != "inp_embd") < 0.01


def test_a_flip_is_nobody_s_fault(folder, right):
    """Two experts so near that rounding decides: both choices are right by the chooser's own scores."""
    values = dict(right.values)
    model = refimpl.load(folder)
    bias = model.layer[1].vector("exp_probs_b")
    chosen, probs = values["ffn_moe_topk-1"].copy(), values["ffn_moe_probs-1"].copy()
    out = next(e for e in range(16) if e not in chosen[0])
    probs[0, out] = (probs[0, chosen[0, -1]] + bias[chosen[0, -1]]) - bias[out]  # now a tie, up to rounding
    assert 0 < probs[0, out] < 1
    chosen[0, -1] = out
    values |= {"ffn_moe_probs-1": probs, "ffn_moe_topk-1": chosen}
    row = next(r for r in compare(right, Trace("x", values), model).rows if r.name == "ffn_moe_topk")
    assert (row.verdict, row.flips, row.wrong) == ("flip", 1, 0)
    probs[0, out] -= np.float32(1e-5)
    row = next(r for r in compare(right, Trace("x", values), model).rows if r.name == "ffn_moe_topk")
    assert (row.verdict, row.wrong) == ("wrong", 1)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_one_absurd_number_is_found(folder, right, value):
    q = right.values["q-1"].copy()
    q[7, 3] = value
    found = compare(right, Trace("x", right.values | {"q-1": q}), refimpl.load(folder))
    assert found.first.key == "q-1" and found.first.at == [7, 3]


def test_without_the_model_there_are_only_distances(folder, right):
    assert compare(right, right).passed
    found = compare(right, Trace("x", refimpl.load(folder, latent_eps=1e-3).trace(IDS)))
    assert found.first.key == "qr-0" and found.first.verdict == "differs" and not found.judged


# --- files --------------------------------------------------------------------------------------------------


def test_traces_survive_the_disk(tmp_path, right):
    write_trace(tmp_path / "t.safetensors", right.values, {"engine": "refimpl"})
    back = read_trace(tmp_path / "t.safetensors")
    assert list(back.values) == list(right.values) and back.metadata["engine"] == "refimpl"
    assert all(np.array_equal(back.values[n], right.values[n]) for n in right.values)
    (tmp_path / "n").mkdir()
    for name, value in right.values.items():
        np.save(tmp_path / "n" / f"{name}.npy", value)
    assert compare(right, read_trace(tmp_path / "n")).passed


def test_hugging_face_names_are_understood(tmp_path, right):
    dump = {}
    for ours, theirs in HF_NAMES.items():
        for layer in range(3):
            value = right.values.get(f"{ours}-{layer}")
            if value is not None and ours != "top_k":
                dump[f"model.layers.{layer}.{theirs}".rstrip(".")] = np.ascontiguousarray(value[None])
    chosen = np.argsort(~right.values["top_k-0"], axis=1, kind="stable")[None, :, :12].astype(np.int32)
    save_file(
        dump | {"model.layers.0.self_attn.indexer": np.ascontiguousarray(chosen)}, tmp_path / "t.safetensors"
    )
    back = read_trace(tmp_path / "t.safetensors")
    found = compare(right, back)
    assert found.passed and len(found.rows) == len(back.values) > 40
    assert np.array_equal(back.values["top_k-0"], right.values["top_k-0"])


def test_llama_cpp_s_callbacks_are_told_apart_by_their_order(tmp_path):
    raw, kept, mixed = np.random.default_rng(0).standard_normal((3, 1, 1, 5, 8)).astype(np.float32)
    heads = np.arange(2 * 5 * 4, dtype=np.float32).reshape(1, 2, 5, 4)
    dump = {"0000.attn_norm-0": mixed, "0001.qr-0": raw, "0002.norm-0": raw, "0003.qr-0": kept, "0004.qr-0 (view)": raw,
            "0005.kqv-0": heads, "0006.result_norm": mixed}  # fmt: skip
    save_file(dump, tmp_path / "t.safetensors")
    values = read_trace(tmp_path / "t.safetensors").values
    assert set(values) == {"attn_norm-0", "qr_raw-0", "qr-0", "kqv-0", "result_norm"}
    assert np.array_equal(values["qr-0"], kept[0, 0]) and np.array_equal(values["qr_raw-0"], raw[0, 0])
    assert np.array_equal(values["kqv-0"], heads[0].transpose(1, 0, 2))


def test_no_trace_is_a_clear_error(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    with pytest.raises(BadFile, match="no trace"):
        read_trace(tmp_path / "x.safetensors")
    (tmp_path / "e").mkdir()
    with pytest.raises(Unsupported, match="no activation"):
        read_trace(tmp_path / "e")
    (tmp_path / "e" / "q-0.npy").write_bytes(b"x")
    with pytest.raises(BadFile, match="no array"):
        read_trace(tmp_path / "e")


# --- commands -----------------------------------------------------------------------------------------------


def trace(folder, out, *options):
    return run(["trace", str(folder), "-o", str(out), *options])


def test_trace_and_compare_as_a_user_meets_them(folder, tmp_path, capsys):
    tokens = ["--tokens", ",".join(map(str, IDS))]
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    assert trace(folder, a, *tokens) == 0
    assert trace(folder, b, *tokens, "--dense-attention") == 0
    assert read_trace(a).metadata["tokens"] == tokens[1] and len(read_trace(a).metadata["sha256"]) == 129
    capsys.readouterr()
    assert run(["compare", str(a), str(a), "--model", str(folder)]) == 0
    assert "nothing is wrong" in capsys.readouterr().out
    assert run(["compare", str(a), str(b), "--model", str(folder), "--json"]) == 1
    schema = json.loads(
        importlib.resources.files("refimpl.report").joinpath("schemas/compare.json").read_text()
    )
    document = json.loads(capsys.readouterr().out)
    jsonschema.Draft202012Validator(schema).validate(document)
    assert document["first"] == "top_k-0"
    assert run(["compare", str(a), str(b), "--model", str(folder), "--all"]) == 1
    out = capsys.readouterr().out
    assert "first wrong:" in out and "DIVERGES" in out and "result_output" in out
    assert run(["compare", str(a), str(b)]) == 1
    assert "without --model" in capsys.readouterr().out


def test_one_layer_alone_reads_only_its_bytes(folder, tmp_path, right, monkeypatch):
    np.save(tmp_path / "h.npy", right.values["l_out-0"])
    names = []
    original = refimpl.model.weights.Weights.read
    monkeypatch.setattr(
        refimpl.model.weights.Weights,
        "read",
        lambda self, name, e: names.append(name) or original(self, name, e),
    )
    out = tmp_path / "t.safetensors"
    assert trace(folder, out, "--layers", "1:2", "--hidden", str(tmp_path / "h.npy")) == 0
    assert {name.partition(".")[0] + name.split(".")[1] for name in names} == {"blk1"}
    values = read_trace(out).values
    assert np.array_equal(values["l_out-1"], right.values["l_out-1"])
    assert compare(read_trace(out), read_trace(out), refimpl.load(folder, layers=(1, 2))).passed


@pytest.mark.parametrize(
    "options, code",
    [([], 2), (["--tokens", "1", "--hidden", "x.npy"], 2), (["--tokens", "1", "--layers", "1:2"], 2),
     (["--tokens", "1", "--layers", "a"], 2), (["--hidden", "/nowhere.npy"], 3),
     (["--tokens", "1", "--layers", "7"], 2)],
)  # fmt: skip
def test_bad_options_of_trace_are_said(folder, tmp_path, capsys, options, code):
    assert trace(folder, tmp_path / "t.safetensors", *options) == code
    assert "Traceback" not in capsys.readouterr().err and not list(tmp_path.iterdir())
