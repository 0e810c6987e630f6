"""llama.cpp runs a pruned model, and says what refimpl says with its conventions."""

from pathlib import Path

import numpy as np
import pytest

import refimpl
from refimpl.model import perplexity
from refimpl.reap.audit import audit
from refimpl.reap.prune import prune
from tests import float_gguf
from tests.test_reap_prune import TWELVE, write_list
from tools.llama_run import Llama

TINY = Path(__file__).resolve().parent.parent.parent / "golden" / "tiny-glm-dsa"
IDS = np.random.default_rng(1).integers(0, 1256, 150).tolist()


def cut(whole, folder):
    child = folder / "child.gguf"
    prune(whole, child, write_list(folder / "kept.json", whole, TWELVE))
    assert audit(child, whole).kept == TWELVE
    return child


def theirs(file):
    llama = Llama(file)
    logits = llama.decode(IDS)
    llama.close()
    return logits


def test_a_pruned_models_logits_are_llama_cpps(tmp_path):
    """In float32, as of whole models (test_model_native); the parent's are others."""
    whole = float_gguf.write(tmp_path / "whole.gguf", TINY)
    child = cut(whole, tmp_path)
    want, bound = theirs(child), 2e-6
    for path, same in ((child, True), (whole, False)):
        got = refimpl.load(path, engine="llama.cpp", kv="f32", activations="float").logits(IDS)
        assert (np.abs(got - want).max() <= bound * np.abs(want).max()) == same, path


@pytest.mark.parametrize("file", ["stock", "protected"])
def test_a_pruned_quantized_file_says_to_us_what_it_says_to_llama_cpp(tmp_path, file):
    """Selections are chaotic in quantized runs: what two engines say is held against how far the prune went."""
    child = cut(TINY / f"{file}.gguf", tmp_path)
    want = perplexity.log_softmax(theirs(child))
    kl = []
    for path in (child, TINY / f"{file}.gguf"):
        got = perplexity.log_softmax(refimpl.load(path, engine="llama.cpp", kv="f32").logits(IDS))
        kl.append(float((np.exp(want) * (want - got)).sum(axis=1).mean()))
    assert kl[0] < kl[1] / 4, kl
