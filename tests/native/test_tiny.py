"""The tiny model means the same to transformers and to llama.cpp; its recorded figures come out again."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import xllamacpp
from transformers import AutoTokenizer, GlmMoeDsaForCausalLM
from transformers.models.glm_moe_dsa.modeling_glm_moe_dsa import GlmMoeDsaIndexer

from tools import tiny_indexer
from tools.tiny_stream import bits_per_byte

TINY = Path(__file__).resolve().parent.parent.parent / "golden" / "tiny-glm-dsa"
CONTEXT = 512


@pytest.fixture(scope="module")
def model() -> GlmMoeDsaForCausalLM:
    return GlmMoeDsaForCausalLM.from_pretrained(TINY, dtype=torch.float32, attn_implementation="sdpa")


@pytest.fixture(scope="module")
def tokenizer() -> AutoTokenizer:
    return AutoTokenizer.from_pretrained(TINY)


def held_out(kind: str) -> str:
    return (TINY / f"held-out-{kind}.txt").read_text(encoding="utf-8")


def prompt(tokenizer: AutoTokenizer, kind: str, length: int) -> list[int]:
    """[gMASK]<sop> and the first tokens of the held-out text."""
    prefix = tokenizer.convert_tokens_to_ids(["[gMASK]", "<sop>"])
    return [*prefix, *tokenizer.encode(held_out(kind), add_special_tokens=False)][:length]


@pytest.mark.parametrize("kind", ["text", "code"])
def test_the_recorded_held_out_loss_comes_out_again(model, tokenizer, kind: str) -> None:
    recorded = json.loads((TINY / "training.json").read_text())["checkpoint"]
    sparse = bits_per_byte(model, tokenizer.backend_tokenizer, held_out(kind), CONTEXT)
    with tiny_indexer.dense(model):
        dense = bits_per_byte(model, tokenizer.backend_tokenizer, held_out(kind), CONTEXT)
    # sums in another order, on another machine, may turn over a near-tie of the selection or the routing
    assert sparse == pytest.approx(recorded["sparse"][kind], abs=2e-3)
    assert dense == pytest.approx(recorded["dense"][kind], abs=2e-3)
    assert sparse != dense


@torch.no_grad()
def test_the_indexer_was_taught_the_scores_that_transformers_selects_by(model, tokenizer) -> None:
    ids = torch.tensor([prompt(tokenizer, "code", 300)])
    rows = torch.arange(model.config.index_topk, 300)
    chosen: list[torch.Tensor] = []
    original = GlmMoeDsaIndexer.forward

    def watch(self, *args, **named):
        chosen.append(original(self, *args, **named))
        return chosen[-1]

    with tiny_indexer.lessons(model, True, rows) as lessons:
        model(input_ids=ids, use_cache=False)
        ours = [lesson.scores.isfinite() for lesson in lessons]
    try:
        GlmMoeDsaIndexer.forward = watch
        model(input_ids=ids, use_cache=False)
    finally:
        GlmMoeDsaIndexer.forward = original
    for mine, theirs in zip(ours, chosen, strict=True):
        selected = torch.zeros(1, 300, 300, dtype=torch.bool).scatter(-1, theirs.long(), True)[:, rows]
        assert (mine == selected).float().mean() > 0.9999  # all but a near-tie


@pytest.mark.parametrize("kind", ["text", "code"])
def test_tokens_turn_back_into_the_text(tokenizer, kind: str) -> None:
    assert tokenizer.decode(tokenizer.encode(held_out(kind))) == held_out(kind)


def test_any_bytes_survive_the_tokenizer(tokenizer) -> None:
    odd = "a\r\n\t  b  ½ 漢字 🦉 \x00 '' I'LL 1234567 <|endoftext"
    assert tokenizer.decode(tokenizer.encode(odd)) == odd


def test_special_tokens_are_single_and_in_glm_s_order(tokenizer) -> None:
    ids = tokenizer.encode(
        "<|endoftext|>[MASK][gMASK][sMASK]<sop><eop><|system|><|user|><|assistant|><|observation|>"
    )
    assert ids == list(range(ids[0], ids[0] + 10))
    assert json.loads((TINY / "config.json").read_text())["eos_token_id"] == [ids[0], ids[7], ids[9]]


def test_a_chat_begins_with_the_prefix_and_asks_for_thought(tokenizer) -> None:
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "Moses."},
        {"role": "user", "content": "When?"},
    ]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    turns = "<|system|>Be brief.<|user|>Who?<|assistant|></think>Moses.<|user|>When?"
    assert text == f"[gMASK]<sop>{turns}<|assistant|><think>"
    text = tokenizer.apply_chat_template(
        chat, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    assert text.endswith("<|user|>When?<|assistant|></think>")


@pytest.mark.parametrize("file", ["stock.gguf", "protected.gguf", "imatrix-quantized.gguf"])
def test_llama_cpp_runs_the_quantized_file_close_to_the_checkpoint(model, tokenizer, file: str) -> None:
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(TINY / file)
    parameters.n_ctx, parameters.n_parallel = CONTEXT, 1
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    parameters.warmup = parameters.fit_params = False
    parameters.no_extra_bufts = True  # repacked or AMX buffers crash on this architecture
    server = xllamacpp.Server(parameters)
    off: list[float] = []
    for kind in ("text", "code"):
        for length in (20, 120, 250):
            ids = prompt(tokenizer, kind, length)
            answer = server.handle_completions(
                {"prompt": ids, "max_tokens": 1, "temperature": 0, "logprobs": 5}
            )
            with torch.no_grad():
                wanted = model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            top = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
            off += [each["logprob"] - wanted[each["id"]].item() for each in top]
    assert len(off) == 30
    assert np.abs(off).mean() < 0.25, np.abs(off).round(3)
