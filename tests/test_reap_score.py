"""Scoring a model: every token counted once, the same bits for any threads, and runs that go on."""

import os
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

import refimpl
from refimpl.cli.main import run as command
from refimpl.errors import BadFile, Usage
from refimpl.model.moe import run_expert
from refimpl.reap import score as scoring
from refimpl.reap import state
from refimpl.reap.presets import Router, find_preset, presets, weigh
from refimpl.reap.saliency import derive
from refimpl.reap.score import Text, read_texts, score
from tests.tiny_checkpoint import CONFIG, draw_weights, scale, write_checkpoint

LENGTH = 20
TINY = Path(__file__).resolve().parent.parent / "golden" / "tiny-glm-dsa"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("score") / "model"
    write_checkpoint(folder)
    return folder


def draw(seed, count=50):
    return Text(f"text {seed}", np.random.default_rng(seed).integers(0, CONFIG["vocab_size"], count))


def run(model, path, *texts, preset="model", **options):
    score(model, texts, path, find_preset(preset), LENGTH, **options)
    return state.load(path)


@pytest.mark.parametrize("preset", presets)
def test_the_statistics_are_those_of_the_traced_outputs(model, tmp_path, preset):
    text = draw(1)
    _, layers = run(model, tmp_path / "s.safetensors", text, preset=preset)
    m = refimpl.load(model)
    router = Router(m.hp.num_experts_per_tok, True, m.hp.routed_scaling_factor)
    for layer, saliency in layers.items():
        want = np.zeros(6)
        count = np.zeros(6, int)
        for start in range(0, 50, LENGTH):
            seen = m.trace(text.tokens[start : start + LENGTH])
            logits, chosen = seen[f"ffn_moe_logits-{layer}"], seen[f"ffn_moe_topk-{layer}"]
            picked, weights = weigh(logits, chosen, router, presets[preset])
            for e in range(6):
                out = run_expert(e, seen[f"ffn_norm-{layer}"], m.layer[layer], m.conv)
                norms = np.linalg.norm(out.astype(np.float64), axis=1)
                for t, slot in zip(*np.nonzero(picked == e), strict=True):
                    want[e] += norms[t] * weights[t, slot]
                    count[e] += 1
        np.testing.assert_array_equal(saliency.sums["frequency"], count)
        np.testing.assert_allclose(saliency.sums["weighted_ean_sum"], want, rtol=1e-12)
        assert saliency.tokens == 50


def test_presets_that_choose_by_logits_run_experts_that_the_model_did_not(model, tmp_path):
    found = [run(model, tmp_path / p, draw(1), preset=p)[1] for p in ("model", "paper")]
    assert any(
        (found[0][n].sums["frequency"] != found[1][n].sums["frequency"]).any() for n in found[0]
    )  # the bias matters here, so the test above has seen both kinds of outputs


def test_the_bytes_do_not_depend_on_threads(model, tmp_path):
    for jobs in (1, 3):
        run(model, tmp_path / f"{jobs}.safetensors", draw(1), draw(2), jobs=jobs)
    assert (tmp_path / "1.safetensors").read_bytes() == (tmp_path / "3.safetensors").read_bytes()


def test_runs_of_two_texts_merge_to_the_run_of_both(model, tmp_path):
    both_run, both = run(model, tmp_path / "both.safetensors", draw(1), draw(2))
    parts = [run(model, tmp_path / f"{i}.safetensors", draw(i)) for i in (1, 2)]
    merged_run, merged = state.merge(parts)
    assert merged_run == both_run and merged_run.tokens == 100
    for layer, saliency in both.items():
        for name, values in saliency.sums.items():
            np.testing.assert_allclose(merged[layer].sums[name], values, rtol=1e-12)
        assert (derive(saliency.sums)["reap"] > 0).any()


def test_a_run_that_was_stopped_goes_on_behind_its_last_layer(model, tmp_path, monkeypatch):
    run(model, tmp_path / "whole.safetensors", draw(1), draw(2))
    out, layers, real = tmp_path / "s.safetensors", [], scoring.add_attention

    def interrupted(h, w, n, *rest):
        layers.append(n)
        if n == 2 and layers.count(2) == 4:
            raise KeyboardInterrupt
        return real(h, w, n, *rest)

    monkeypatch.setattr(scoring, "add_attention", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(model, out, draw(1), draw(2), jobs=1)
    assert not out.exists() and (tmp_path / "s.safetensors.work").is_dir()
    with pytest.raises(Usage, match="of another run"):
        run(model, out, draw(3))
    layers[:] = []
    monkeypatch.setattr(
        scoring, "add_attention", lambda h, w, n, *rest: layers.append(n) or real(h, w, n, *rest)
    )
    run(model, out, draw(1), draw(2), jobs=1)
    assert set(layers) == {2}
    assert out.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert not (tmp_path / "s.safetensors.work").exists()


KILLED = """
import os, signal, sys
import numpy as np
from refimpl.reap import score as scoring
from refimpl.reap.presets import presets
real, seen = scoring.add_attention, []
def add_attention(h, w, n, *rest):
    seen.append(n)
    if n == 2 and seen.count(2) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(h, w, n, *rest)
scoring.add_attention = add_attention
text = scoring.Text("text 1", np.array({tokens}))
scoring.score(sys.argv[1], [text], sys.argv[2], presets["model"], {length}, jobs=1)
"""


def test_a_run_that_was_killed_goes_on_to_the_same_bytes(model, tmp_path):
    run(model, tmp_path / "whole.safetensors", draw(1))
    out = tmp_path / "s.safetensors"
    code = KILLED.format(tokens=draw(1).tokens.tolist(), length=LENGTH)
    assert subprocess.run([sys.executable, "-c", code, model, out]).returncode == -signal.SIGKILL
    left = sorted(os.listdir(tmp_path / "s.safetensors.work"))
    assert not out.exists() and left == ["hidden-2.npy", "hidden-3.part", "layer-1.npz", "run.json"]
    (tmp_path / "s.safetensors.work" / "hidden-3.part").write_bytes(
        b"torn"
    )  # half a layer counts for nothing
    run(model, out, draw(1))
    assert out.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["s.safetensors", "whole.safetensors"]


@pytest.mark.parametrize("preset", ["model", "llm-compressor"])
def test_only_routed_experts_are_computed_where_the_preset_asks_for_no_others(
    model, tmp_path, monkeypatch, preset
):
    monkeypatch.setattr(scoring, "run_expert", lambda *_: pytest.fail("an expert that nobody chose"))
    run(model, tmp_path / "s.safetensors", draw(1), preset=preset)
    with pytest.raises(pytest.fail.Exception):
        run(model, tmp_path / "t.safetensors", draw(1), preset="paper")


def test_memory_does_not_grow_with_layers(tmp_path):
    """More layers, the same peak: each layer's experts are let go before the next layer's come."""
    peaks, size = [], {"hidden_size": 128, "moe_intermediate_size": 512, "n_routed_experts": 8}
    for count in (3, 3, 7):  # the first run also fills caches
        config = (
            CONFIG
            | size
            | {"num_hidden_layers": count, "mlp_layer_types": ["dense"] + (count - 1) * ["sparse"]}
        )
        write_checkpoint(tmp_path / str(count), config, scale(draw_weights(config), config))
        tracemalloc.start()
        run(tmp_path / str(count), tmp_path / "s.safetensors", draw(1), jobs=1, force=True)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    layer = 8 * 3 * 128 * 512 * 2  # bytes of a layer's experts
    assert layer < peaks[1] and peaks[2] < peaks[1] + layer / 4


def test_only_one_layer_is_in_memory(model, tmp_path, monkeypatch):
    asked, real = [], scoring.Layer

    class Watched(real):
        def __init__(self, weights, number):
            asked.append(number)
            super().__init__(weights, number)

    monkeypatch.setattr(scoring, "Layer", Watched)
    run(model, tmp_path / "s.safetensors", draw(1))
    assert asked == [0, 1, 2]  # one after the other, none of them kept by the model


def test_progress_counts_tokens_times_layers(model, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(scoring, "BATCH", 20)
    run(model, tmp_path / "s.safetensors", draw(1), progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == [20, 40, 50, 70, 90, 100, 120, 140, 150]
    assert {total for _, total in seen} == {150}


def test_sequences_together_or_alone_give_the_same(model, tmp_path, monkeypatch):
    found = []
    for most, count in ((1, 3), (45, 2), (2048, 1)):
        monkeypatch.setattr(scoring, "BATCH", most)
        assert len(list(scoring._batches([np.arange(n) for n in (20, 20, 10)]))) == count
        run(model, tmp_path / f"{most}.safetensors", draw(1))
        found.append(state.load(tmp_path / f"{most}.safetensors"))
    for run_, layers in found[1:]:
        assert run_ == found[0][0]
        for layer, saliency in layers.items():
            assert saliency.tokens == 50
            for name, values in saliency.sums.items():
                np.testing.assert_allclose(values, found[0][1][layer].sums[name], rtol=1e-12)


def test_nothing_is_replaced_and_nothing_is_scored_over_nothing(model, tmp_path):
    (tmp_path / "s.safetensors").write_text("mine")
    with pytest.raises(Usage, match="exists"):
        run(model, tmp_path / "s.safetensors", draw(1))
    with pytest.raises(Usage, match="nothing to score"):
        run(model, tmp_path / "t.safetensors")
    with pytest.raises(Usage, match="tokens must be"):
        run(model, tmp_path / "t.safetensors", Text("x", np.array([CONFIG["vocab_size"]])))


def test_tokens_come_as_lists_arrays_and_texts(tmp_path):
    np.save(tmp_path / "two.npy", np.arange(6, dtype=np.uint16).reshape(2, 3))
    np.save(tmp_path / "floats.npy", np.zeros(3))
    (tmp_path / "t.txt").write_text("In the beginning")
    found = read_texts(TINY / "stock.gguf", ["3,1,4", str(tmp_path / "two.npy")], [tmp_path / "t.txt"])
    assert [text.tokens.tolist() for text in found[:3]] == [[3, 1, 4], [0, 1, 2], [3, 4, 5]]
    assert [text.name for text in found[1:]] == [f"{tmp_path}/two.npy[0]", f"{tmp_path}/two.npy[1]", "t.txt"]
    same = read_texts(TINY, [], [tmp_path / "t.txt"])[0]  # GGUF and checkpoint have one tokenizer
    assert same.tokens.tolist() == found[3].tokens.tolist() != []
    for wrong, error in (("3,x", Usage), (str(tmp_path / "floats.npy"), BadFile), ("none.npy", BadFile)):
        with pytest.raises(error):
            read_texts(TINY, [wrong], [])
    (tmp_path / "t.txt").write_bytes(b"\xff")
    with pytest.raises(BadFile, match="no UTF-8 text"):
        read_texts(TINY, [], [tmp_path / "t.txt"])


def test_the_command_scores_a_text_and_names_the_preset(capsys, tmp_path):
    (tmp_path / "t.txt").write_text("In the beginning God created the heaven and the earth.")
    out = str(tmp_path / "s.safetensors")
    args = [
        "reap",
        "score",
        str(TINY / "stock.gguf"),
        "--text",
        str(tmp_path / "t.txt"),
        "-o",
        out,
        "--quiet",
    ]
    assert command([*args, "--preset", "paper", "--router", "sigmoid", "--jobs", "1"]) == 0
    assert "paper:router=sigmoid" in capsys.readouterr().err
    run, layers = state.load(out)
    assert run.preset["router"] == "sigmoid" and set(layers) == {1, 2}
    assert command([*args, "--preset", "paper"]) == 2
    assert command([*args, "--preset", "papers", "--force"]) == 2
