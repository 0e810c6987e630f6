"""Whole models against llama.cpp in the xllamacpp wheel: tokens per second, side by side in one process.

    python -m tools.bench_model [--slice FILE] [--threads 1] [--prompt 512]
    python -m tools.bench_model --context [--plot X.png]     # what sparse attention saves as the context grows

(a) is the tiny model; (b) a slice with GLM-5.1's true dimensions, one dense and one MoE layer, 32 experts, random
blocks of Q4_K, Q6_K and Q8_0 (1.6 GB, made where it is missing; a vocabulary of 8,192, which neither side gains by).
Both sides run in turn on the same file, the same threads, f32 caches, no flash attention; a ratio is the median of
neighbours'. llama.cpp runs without repacked buffers, which crash on this architecture.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from refimpl import recipes
from refimpl.files import gguf, names
from refimpl.files.gguf import GGUFValueType as Kind
from refimpl.files.hparams import MODEL_TYPE, Hparams
from refimpl.model import dsa, mla
from refimpl.model.cache import Cache
from refimpl.model.config import conventions
from refimpl.model.glm import load
from refimpl.quants.formats import Format, formats
from refimpl.report.plots import FINE, WRONG, open_figure
from refimpl.writers.keys import hyperparameters
from tools.llama_run import Llama

TINY = Path(__file__).resolve().parent.parent / "golden" / "tiny-glm-dsa" / "protected.gguf"
CONFIG = {
    "model_type": MODEL_TYPE, "hidden_size": 6144, "num_hidden_layers": 2, "num_nextn_predict_layers": 0,
    "first_k_dense_replace": 1, "intermediate_size": 12288, "moe_intermediate_size": 2048, "n_routed_experts": 32,
    "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.5,
    "num_attention_heads": 64, "q_lora_rank": 2048, "kv_lora_rank": 512, "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64, "v_head_dim": 256, "index_n_heads": 32, "index_head_dim": 128, "index_topk": 2048,
    "vocab_size": 8192, "max_position_embeddings": 202752, "rms_norm_eps": 1e-5, "rope_theta": 1e6,
    "scoring_func": "sigmoid", "tie_word_embeddings": False,
}  # fmt: skip
PIECE = 1 << 24  # bytes made at a time


def make_slice(path: Path, **changes: Any) -> Path:
    """Write slice (b): random codes under scales that give every matrix's output about the size of its input."""
    config = CONFIG | changes
    hp = Hparams.from_config(config)
    shapes = {link.gguf: shape for link, shape in names.expected(hp)}
    types = recipes.load("q4_k_m-protected").types(hp, shapes)
    keys = dict(hyperparameters(config, hp, 15)) | {
        "general.architecture": (Kind.STRING, "glm-dsa"),
        "tokenizer.ggml.model": (Kind.STRING, "none"),
        "glm-dsa.vocab_size": (Kind.UINT32, hp.vocab_size),
    }
    tensors = [
        (name, shape, formats[types[name]], fill(shape, formats[types[name]]))
        for name, shape in shapes.items()
    ]
    gguf.write(path, keys, tensors)
    return path


def fill(shape: tuple[int, ...], fmt: Format) -> Iterator[np.ndarray[Any, Any]]:
    """Random rows of a tensor, piece by piece."""
    random, n = np.random.default_rng(len(shape) + shape[-1]), shape[-1]
    rows = int(np.prod(shape[:-1], dtype=np.int64))
    for start in range(0, rows, max(1, PIECE // fmt.row_bytes(n))):
        count = min(max(1, PIECE // fmt.row_bytes(n)), rows - start)
        if fmt.name == "f32":
            x = np.ones((count, n)) if len(shape) == 1 else random.standard_normal((count, n)) / n**0.5
            yield np.ascontiguousarray(x.astype(np.float32)).view(np.uint8)
            continue
        blocks = random.integers(0, 256, (count, fmt.row_bytes(n)), np.uint8).view(fmt.block)
        step = {"q8_0": 73, "q5_0": 9, "q4_k": 32 * 8, "q6_k": 64 * 18}[
            fmt.name
        ]  # rms of what d is multiplied with
        blocks["d"] = np.float16(1 / step / n**0.5)
        if "dmin" in (fmt.block.names or ()):
            blocks["dmin"] = np.float16(7.5 / step / n**0.5)
        yield blocks.view(np.uint8)


def race(ours: Callable[[], Any], theirs: Callable[[], Any], runs: int) -> tuple[float, float, float]:
    """Median seconds of both, and the median ratio of neighbours (over 1: ours is faster)."""
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        ours()
        middle = time.perf_counter()
        theirs()
        times.append((middle - start, time.perf_counter() - middle))
    mine, peer = (statistics.median(t[i] for t in times) for i in (0, 1))
    return mine, peer, statistics.median(b / a for a, b in times)


def bench(name: str, file: Path, threads: int, prompt: int, runs: int) -> None:
    """Decode and prefill of one file; logits must agree before anything is timed."""
    model = load(file, "llama.cpp", kv="f32", jobs=threads)
    llama = Llama(file, context=prompt + 64, threads=threads, batch=prompt)
    ids = np.random.default_rng(0).integers(0, min(1256, llama.vocab), prompt).tolist()
    start = time.perf_counter()
    mine = model.step(ids[:16], Cache(model.conv), last=True)[0]
    first = time.perf_counter() - start
    peer = llama.decode(ids[:16])[-1]
    off = float(np.abs(mine - peer).max() / np.abs(peer).max())
    print(
        f"{name}, {threads} threads: logits {off:.1e} apart; first call with reading {first:.2f} s",
        flush=True,
    )

    def prefill() -> None:
        model.step(ids, Cache(model.conv), last=True)

    def prefill_llama() -> None:
        llama.clear()
        llama.decode(ids, last=True)

    cache = Cache(model.conv)
    model.step(ids[:16], cache, last=True)
    llama.clear()
    llama.decode(ids[:16])
    for what, count, *sides in (
        ("decode", 1, lambda: model.step([7], cache, last=True), lambda: llama.decode([7])),
        (f"prefill of {prompt}", prompt, prefill, prefill_llama),
    ):
        for side in sides:
            side()
        a, b, ratio = race(*sides, runs if count == 1 else max(3, runs // 4))
        print(
            f"| {name} {what}, {threads} thr. | {count / a:,.1f} tok/s | {count / b:,.1f} tok/s | {ratio:.2f}x |",
            flush=True,
        )
    llama.close()


def attentions(length: int, topk: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """One query on so many keys: selected (scoring and choosing included), and all of them."""
    hp, conv = Hparams.from_config(CONFIG | {"index_topk": topk}), conventions("refimpl")
    random = np.random.default_rng(0)
    latents, keys, q, queries, weights = (
        random.standard_normal(shape).astype(np.float32)
        for shape in ((length, 576), (length, 128), (1, 64, 576), (1, 32, 128), (1, 32))
    )

    def attend(rows: list[Any]) -> Any:
        return mla.attend(q, latents, latents[:, :512], rows, 256**-0.5, conv)

    def sparse() -> Any:
        return attend(dsa.select(queries, keys, weights, length - 1, hp, conv))

    return sparse, lambda: attend([np.arange(length)])


def bench_context(picture: Path | None, topk: int = 256, longest: int = 8192) -> None:
    """One query's attention and indexer at GLM-5.1's widths against the context's length: sparse beside dense."""
    lengths, times = [256 << i for i in range(6) if 256 << i <= longest], (list[float](), list[float]())
    for length in lengths:
        mine, peer, ratio = race(*attentions(length, topk), 15)
        for kept, seconds in zip(times, (mine, peer), strict=True):
            kept.append(seconds * 1e3)
        speeds = f"{mine * 1e3:.2f} ms | dense {peer * 1e3:.2f} ms"
        print(f"| attention over {length:,} keys, top {topk} | {speeds} | {ratio:.1f}x |", flush=True)
    if picture is not None:
        figure, axes = open_figure(picture, 1, 1, 7, 4)
        for name, values, colour in zip(("sparse", "dense"), times, (FINE, WRONG), strict=True):
            axes[0][0].plot(lengths, values, color=colour, marker="o", label=name)
        title = f"attention of 64 heads, index_topk {topk}"
        axes[0][0].set(xlabel="keys", ylabel="ms a token and layer", title=title)
        axes[0][0].legend()
        figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--slice", type=Path, default=Path(tempfile.gettempdir()) / "refimpl-bench-slice.gguf"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--runs", type=int, default=12)
    parser.add_argument("--only", default="")
    parser.add_argument(
        "--context", action="store_true", help="time attention against the context's length instead"
    )
    parser.add_argument("--plot", type=Path, help="a .png of that")
    arguments = parser.parse_args()
    if arguments.context:
        bench_context(arguments.plot)
        raise SystemExit
    if not arguments.slice.exists():
        make_slice(arguments.slice)
    for label, path in (("(a) tiny", TINY), ("(b) true dimensions", arguments.slice)):
        if arguments.only in label:
            bench(label, path, arguments.threads, arguments.prompt, arguments.runs)
