"""A slice of GLM-5.1's real width for the benchmark of verify: BF16 checkpoint and quantized GGUF.

    python tools/bench_slice.py DIR [--experts 24]

Widths are the real model's (hidden 6144, expert width 2048), layers and experts few, so that 24 experts make
about 1 billion weights: 2 GB of BF16 and 0.6 GB of GGUF. The weights are random: speed does not depend on them.
"""

import argparse
import json
import struct
import sys
from collections.abc import Iterator
from math import prod
from pathlib import Path

import numpy as np
from gguf.constants import GGUFValueType as Kind

from refimpl import quants, recipes
from refimpl.files import encode, names
from refimpl.files import source as model_files
from refimpl.files.hparams import ARCHITECTURE, MODEL_TYPE
from refimpl.files.links import Link
from refimpl.quants.formats import formats
from refimpl.verifier.requantize import widen

CONFIG = {
    "model_type": MODEL_TYPE, "architectures": ["GlmMoeDsaForCausalLM"], "hidden_size": 6144,
    "num_hidden_layers": 2, "num_nextn_predict_layers": 0, "first_k_dense_replace": 1, "intermediate_size": 2048,
    "moe_intermediate_size": 2048, "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 1, "topk_group": 1,
    "routed_scaling_factor": 2.5, "num_attention_heads": 8, "q_lora_rank": 512, "kv_lora_rank": 512,
    "qk_nope_head_dim": 192, "qk_rope_head_dim": 64, "v_head_dim": 256, "index_n_heads": 32, "index_head_dim": 128,
    "index_topk": 2048, "vocab_size": 1024, "max_position_embeddings": 202752, "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}, "scoring_func": "sigmoid",
}  # fmt: skip
INTEGERS = {
    "block_count": 2, "nextn_predict_layers": 0, "leading_dense_block_count": 1, "embedding_length": 6144,
    "feed_forward_length": 2048, "expert_feed_forward_length": 2048, "expert_shared_count": 1,
    "expert_used_count": 8, "expert_group_count": 1, "expert_group_used_count": 1, "expert_gating_func": 2,
    "attention.head_count": 8, "attention.head_count_kv": 1, "attention.q_lora_rank": 512,
    "attention.kv_lora_rank": 512, "attention.key_length": 576, "attention.value_length": 512,
    "attention.key_length_mla": 256, "attention.value_length_mla": 256, "rope.dimension_count": 64,
    "attention.indexer.head_count": 32, "attention.indexer.key_length": 128, "attention.indexer.top_k": 2048,
    "vocab_size": 1024, "context_length": 202752,
}  # fmt: skip
FLOATS = {"expert_weights_scale": 2.5, "attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": 1e6}
POOL = 1 << 24  # random weights, used again and again from other starts
CHUNK_ROWS = 512


def make(place: Path, experts: int, recipe: str = "q4_k_m-protected") -> tuple[Path, Path]:
    """Write both files; they are kept when they are already there. Returns (GGUF, checkpoint directory)."""
    source, file = place / f"slice-{experts}", place / f"slice-{experts}-{recipe}.gguf"
    if not file.exists():
        source.mkdir(parents=True, exist_ok=True)
        config = CONFIG | {"n_routed_experts": experts}
        (source / "config.json").write_text(json.dumps(config))
        hp = names.Hparams.from_config(config)
        _write_checkpoint(source / "model.safetensors", hp)
        _write_gguf(file, source, hp, recipe)
    return file, source


def _hf_tensors(hp: names.Hparams) -> dict[str, tuple[str, tuple[int, ...]]]:
    """{name: (dtype, shape)} of the checkpoint."""
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for link, shape in names.expected(hp):
        dtype = "F32" if link.role == "router_bias" else "BF16"
        if link.transform == "stack":
            found |= {link.hf.format(e=e): (dtype, shape[1:]) for e in range(shape[0])}
        elif link.transform in ("k_b", "v_b"):
            width = hp.qk_nope_head_dim + hp.v_head_dim
            found[link.hf] = (dtype, (hp.num_attention_heads * width, hp.kv_lora_rank))
        else:
            found[link.hf] = (dtype, shape)
    return found


def _write_checkpoint(path: Path, hp: names.Hparams) -> None:
    tensors = _hf_tensors(hp)
    header, place = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = prod(shape) * (4 if dtype == "F32" else 2)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    pool = np.random.default_rng(0).normal(0, 0.02, POOL).astype(np.float32)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for i, (dtype, shape) in enumerate(tensors.values()):
            left, start = prod(shape), 4099 * i % POOL
            while left:
                part = pool[start : start + left]
                file.write(
                    part.tobytes() if dtype == "F32" else (part.view(np.uint32) >> 16).astype("<u2").tobytes()
                )
                left, start = left - len(part), 0


def _write_gguf(path: Path, source: Path, hp: names.Hparams, recipe: str) -> None:
    metadata = {"general.architecture": (Kind.STRING, ARCHITECTURE)}
    metadata |= {f"{ARCHITECTURE}.{k}": (Kind.UINT32, v) for k, v in INTEGERS.items()}
    metadata |= {f"{ARCHITECTURE}.{k}": (Kind.FLOAT32, v) for k, v in FLOATS.items()}
    metadata[f"{ARCHITECTURE}.expert_count"] = (Kind.UINT32, hp.n_routed_experts)
    metadata[f"{ARCHITECTURE}.expert_weights_norm"] = (Kind.BOOL, True)
    types = recipes.load(recipe).types(hp, {link.gguf: shape for link, shape in names.expected(hp)})
    with model_files.open(source) as s:

        def encoded(link: Link, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
            rows = prod(shape[:-1])
            for start in range(0, rows, CHUNK_ROWS):
                part = names.source_rows(s, link, hp, slice(start, min(rows, start + CHUNK_ROWS)))
                yield quants.quantize(widen(part), types[link.gguf])

        listed = [
            (k.gguf, shape, formats[types[k.gguf]], encoded(k, shape)) for k, shape in names.expected(hp)
        ]
        encode.write(path, metadata, listed)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("place", type=Path)
    parser.add_argument("--experts", type=int, default=24)
    arguments = parser.parse_args()
    print(*make(arguments.place, arguments.experts), sep="\n", file=sys.stdout)
