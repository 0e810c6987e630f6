"""Whole models against llama.cpp in the xllamacpp wheel: tokens per second, side by side in one process.

    python -m tools.bench_model [--slice FILE] [--threads 1,2] [--prompt 128,512]
    python -m tools.bench_model --context [--plot X.png]     # what sparse attention saves as the context grows

(a) is the tiny model; (b) a slice with GLM-5.1's true dimensions, one dense and one MoE layer, 32 experts, random
blocks of Q4_K, Q6_K and Q8_0 (1.6 GB, made where it is missing; a vocabulary of 8,192, which neither side gains by).
Both sides run in turn on the same file, the same threads, f32 caches, no flash attention; a ratio is the median of
neighbours', its quartiles stand beside it. llama.cpp runs without repacked buffers, which crash on this architecture.
Logits of whole quantized models are chaotic (one rounded activation in 130,000 differs, and every layer multiplies
that); that each product has llama.cpp's bits is proven by tests/native/test_products_native.py.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from refimpl import dots, recipes
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
from tools.bench import HEAD, describe_machine
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
EACH = 5  # tokens that a side decodes in its turn


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


def race(
    ours: Callable[[], Any], theirs: Callable[[], Any], runs: int, each: int = 1
) -> tuple[float, float, list[float]]:
    """Median seconds of both sides run in turn, and the quartiles of neighbours' ratio (over 1: ours is faster).

    each : how often a turn does the work. Of several the first is not timed: a side's second thread stays awake for a
           while (libgomp's: 9 ms of CPU after llama.cpp's token) and would take a core from the other side
    """
    times = np.empty((runs, 2))
    for turn in times:
        for side, work in enumerate((ours, theirs)):
            for _ in range(each > 1):
                work()
            start = time.perf_counter()
            for _ in range(max(1, each - 1)):
                work()
            turn[side] = (time.perf_counter() - start) / max(1, each - 1)
    mine, peer = np.median(times, axis=0)
    return mine, peer, np.quantile(times[:, 1] / times[:, 0], (0.25, 0.5, 0.75)).tolist()


def row(name: str, mine: str, against: str, peer: str, ratio: list[float] | None, goal: str) -> None:
    """A line of the README's table."""
    share = "" if ratio is None else f"**{ratio[1]:.2f}×** ({ratio[0]:.2f} to {ratio[2]:.2f})"
    print(f"| {name} | {mine} | {against} | {peer} | {share} | {goal} |", flush=True)


def bench(name: str, file: Path, threads: int, prompts: list[int], runs: int) -> None:
    """Decode and prefill of one file, beside llama.cpp's."""
    model, longest = load(file, "llama.cpp", kv="f32", jobs=threads), max(prompts)
    llama = Llama(file, context=max(longest, 32 + EACH * runs) + 64, threads=threads, batch=longest)
    ids = np.random.default_rng(0).integers(0, min(1256, llama.vocab), longest).tolist()
    count = f"{threads} thread{'s'[: threads > 1]}"
    cache = Cache(model.conv)
    mine = model.step(ids[:16], cache, last=True)[0]
    peer = llama.decode(ids[:16])[-1]
    off = float(np.abs(mine - peer).max() / np.abs(peer).max())
    print(
        f"{name}, {count}: logits {off:.1e} of the largest apart, likeliest token {mine.argmax() == peer.argmax()}"
    )
    decode = lambda: model.step([7], cache, last=True), lambda: llama.decode([7])
    for side in decode:
        side()
    a, b, ratio = race(*decode, runs, each=EACH)
    goal = "≥ 1×, aim 1.2×" if name[1] == "b" else ""
    row(f"{name}, decode, {count}", f"{1 / a:,.1f} tok/s", "llama.cpp", f"{1 / b:,.1f} tok/s", ratio, goal)
    for n in prompts:

        def prefill(n: int = n) -> None:
            model.step(ids[:n], Cache(model.conv), last=True)

        def prefill_llama(n: int = n) -> None:
            llama.clear()
            llama.decode(ids[:n], last=True)

        prefill(), prefill_llama()
        a, b, ratio = race(prefill, prefill_llama, max(3, runs // 4))
        goal = "≥ 1×" if name[1] == "b" and n == 512 else ""
        row(
            f"{name}, prefill of {n}, {count}",
            f"{n / a:,.0f} tok/s",
            "llama.cpp",
            f"{n / b:,.0f} tok/s",
            ratio,
            goal,
        )
    llama.close()


def time_overhead(runs: int = 60) -> None:
    """What a token of the tiny model costs beside its products: Python, dispatch, norms, rope, attention."""
    model, inside, find = load(TINY, "llama.cpp", kv="f32"), [0.0], dots._find

    def watch(kernel: Any) -> Any:
        def timed(*arguments: Any) -> Any:
            start = time.process_time()
            result = kernel(*arguments)
            inside[0] += time.process_time() - start
            return result

        return timed

    def watched(module: str, name: str) -> Any:
        found = find(module, name)
        if name == "KERNELS":
            return {fmt: watch(kernel) for fmt, kernel in found.items()}
        return watch(found) if name == "multiply" else found

    cache = Cache(model.conv)
    for _ in range(20):
        model.step([7], cache, last=True)
    start = time.process_time()
    for _ in range(runs):
        model.step([7], cache, last=True)
    plain = (time.process_time() - start) / runs
    dots._find = watched  # type: ignore[assignment]
    for _ in range(runs):
        model.step([7], cache, last=True)
    dots._find = find
    spent = inside[0] / runs
    name = "(a) tiny, a token's time beside its products, CPU"
    row(name, f"{(plain - spent) * 1e3:.2f} ms", "all of it", f"{plain * 1e3:.2f} ms", None, "< 1 ms")


def time_start(runs: int = 5) -> None:
    """From the shell to the first token of the tiny model, kernels compiled before."""
    command = [sys.executable, "-m", "refimpl", "run", str(TINY), "--prompt", "In the beginning", "-n", "1"]
    times = np.empty((runs, 2))
    for turn in times:
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        turn[:] = (
            time.perf_counter() - start,
            after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        )
    wall, cpu = np.median(times[1:], axis=0)
    row(
        "(a) tiny, first token after a warm start",
        f"{wall:.2f} s",
        "CPU time alone",
        f"{cpu:.2f} s",
        None,
        "< 1 s",
    )


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
        mine, peer, (_, ratio, _) = race(*attentions(length, topk), 15)
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
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--prompt", default="128,512")
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
    print(f"{describe_machine()}\n\n{HEAD}", flush=True)
    prompts = [int(n) for n in arguments.prompt.split(",")]
    for label, path in (("(a) tiny", TINY), ("(b) true dimensions", arguments.slice)):
        if arguments.only in label:
            for count in arguments.threads.split(","):
                bench(label, path, int(count), prompts, arguments.runs)
    if arguments.only in "(a) tiny":
        time_start()
        time_overhead()
