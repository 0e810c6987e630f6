"""llama.cpp runs a slice, and says what refimpl says with its conventions."""

from pathlib import Path

import numpy as np
import pytest
import xllamacpp

import refimpl
from refimpl.writers.slice import slice_model

TINY = Path(__file__).resolve().parent.parent.parent / "golden" / "tiny-glm-dsa"


@pytest.mark.parametrize("cut", [("0,2", "0:8"), (None, "2:12")])
def test_llama_cpp_runs_a_slice_close_to_refimpl(tmp_path, cut) -> None:
    file = tmp_path / "slice.gguf"
    slice_model(TINY / "protected.gguf", file, *cut)
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(file)
    parameters.n_ctx, parameters.n_parallel = 512, 1
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    parameters.warmup = parameters.fit_params = False
    parameters.no_extra_bufts = True  # repacked or AMX buffers crash on this architecture
    server = xllamacpp.Server(parameters)
    ids = [1258, 1260, *(np.arange(30) * 37 % 1200).tolist()]
    answer = server.handle_completions({"prompt": ids, "max_tokens": 1, "temperature": 0, "logprobs": 5})
    logits = refimpl.load(file, engine="llama.cpp").logits(ids)[-1].astype(np.float64)
    wanted = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
    top = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    off = [each["logprob"] - wanted[each["id"]] for each in top]
    assert len(off) == 5 and np.abs(off).mean() < 0.25, off
