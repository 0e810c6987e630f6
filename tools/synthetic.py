"""A checkpoint of GLM-5.1's true layers with random weights, of any size: what the writers are measured on.

    python -m tools.synthetic DIR                    # 1 dense and 1 sparse layer, 192 experts: 19 GB
    python -m tools.synthetic DIR --experts 24 --vocab 1024 --heads 8

Every width is the real model's unless it is given. Weights are drawn once and used again from other starts: speed
does not depend on them, and encoders see no two equal rows. The tokenizer is the tiny model's, padded.
"""

import argparse
import json
import shutil
import struct
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.files import names
from refimpl.files.golden import tiny_model
from tools.variants import REAL

POOL = 1 << 24
SHARD_BYTES = 5 << 30
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def make(place: Path, layers: int = 2, dense: int = 1, **sizes: int) -> Path:
    """Write config, tokenizer and shards; a checkpoint that is there already is kept. sizes: keys of config.json."""
    if (place / "config.json").exists():
        return place
    place.mkdir(parents=True, exist_ok=True)
    config = REAL | {"num_hidden_layers": layers, "first_k_dense_replace": dense} | sizes
    config |= {"architectures": ["GlmMoeDsaForCausalLM"]}
    for file in TOKENIZER:
        shutil.copyfile(tiny_model() / file, place / file)
    tensors = tensors_of(names.Hparams.from_config(config))
    need, free = sum(_bytes(*t) for t in tensors.values()), shutil.disk_usage(place).free
    if need > free:
        raise OSError(f"the checkpoint needs {need:,} bytes, the disk has {free:,} left")
    _write_shards(place, tensors)
    (place / "config.json").write_text(json.dumps(config, indent=1))  # last: it says that all is there
    return place


def tensors_of(hp: names.Hparams) -> dict[str, tuple[str, tuple[int, ...]]]:
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


def _write_shards(place: Path, tensors: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    shards: list[list[str]] = [[]]
    size = 0
    for name, (dtype, shape) in tensors.items():
        if size > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += _bytes(dtype, shape)
    pool = np.random.default_rng(0).normal(0, 0.02, POOL).astype(np.float32)
    bits = (pool.view(np.uint32) >> 16).astype("<u2")
    mapped, total = {}, 0
    for i, part in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        _write_shard(place / file, {name: tensors[name] for name in part}, {"F32": pool, "BF16": bits}, i)
        mapped |= dict.fromkeys(part, file)
        total += sum(_bytes(*tensors[name]) for name in part)
    index = {"metadata": {"total_size": total}, "weight_map": mapped}
    (place / "model.safetensors.index.json").write_text(json.dumps(index))


def _bytes(dtype: str, shape: tuple[int, ...]) -> int:
    return prod(shape) * (4 if dtype == "F32" else 2)


def _write_shard(
    path: Path, tensors: dict[str, tuple[str, tuple[int, ...]]], pools: dict[str, NDArray[Any]], seed: int
) -> None:
    header, place = {}, 0
    for name, (dtype, shape) in tensors.items():
        end = place + _bytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for i, (dtype, shape) in enumerate(tensors.values()):
            for part in _draw(pools[dtype], prod(shape), 4099 * (i + 7919 * seed) % POOL):
                file.write(part.data)


def _draw(pool: NDArray[Any], count: int, start: int) -> Iterator[NDArray[Any]]:
    while count:
        part = pool[start : start + count]
        yield part
        count, start = count - len(part), 0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("place", type=Path)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--dense", type=int, default=1)
    parser.add_argument("--experts", type=int, default=192)
    parser.add_argument("--vocab", type=int, default=REAL["vocab_size"])
    parser.add_argument("--heads", type=int, default=REAL["num_attention_heads"])
    given = parser.parse_args()
    sizes = {"n_routed_experts": given.experts, "vocab_size": given.vocab, "num_attention_heads": given.heads}
    print(make(given.place, given.layers, given.dense, **sizes))


if __name__ == "__main__":
    main()
