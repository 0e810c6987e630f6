"""The writers' rows of the benchmark: quantize against the native encoders, convert against the clock.

Sources and results lie in the page cache. Left out of the timed calls: the sync to the disk at the end, since it
measures the disk, and the removal of the result before (0.4 s a GB: its pages are given back one by one). The
native side gets its weights as float32 in memory and writes nothing to a file.

What a virtual machine adds: pages that the guest has never used are made by the host when they are first written,
at 0.5 GB/s where this was measured, and used again at 6 GB/s. So plain pwrite of the same bytes stands beside.
"""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numba
import numpy as np

from refimpl import quants
from refimpl.files import names
from refimpl.files import source as model_files
from refimpl.writers import output
from refimpl.writers.convert import convert
from refimpl.writers.plan import Plan
from refimpl.writers.quantize import quantize
from tools import ggml, synthetic
from tools.bench_rows import Differ, Row, native_encoder

EXPERTS = 6
SIZES = {
    "n_routed_experts": EXPERTS, "num_experts_per_tok": 2, "intermediate_size": 512,
    "num_attention_heads": 4, "q_lora_rank": 512, "vocab_size": 1280,
}  # fmt: skip
BLOCK = 4 << 20  # bytes that plain pwrite writes at a time, as many as convert


def unsynced(work: Callable[[], Any]) -> Any:
    """Run without syncing files to the disk."""
    with mock.patch.object(output.os, "fsync"), mock.patch.object(output.os, "fdatasync"):
        return work()


def list_writer_rows(place: Path) -> Iterator[Callable[[], Row]]:
    """Builders of rows; `place` keeps a checkpoint of 0.32 billion weights, experts of the real width."""
    yield lambda: _mix_row(place, "q4_k_m")
    yield lambda: _mix_row(place, "q4_k_m-protected")
    yield lambda: _cores_row(place, "q4_k_m")
    yield lambda: _cores_row(place, "q4_k_m-protected")


def make_source(place: Path) -> Path:
    return synthetic.make(place / "writers", **SIZES)


def describe(recipe: str, plan: Plan) -> str:
    """The recipe and what it makes of the weights."""
    shares: Counter[str] = Counter()
    for t in plan.tensors:
        shares[t.format.name] += t.weights
    parts = [f"{n / plan.weights:.0%} {k.upper()}" for k, n in shares.most_common() if n > plan.weights / 100]
    return f"quantize {recipe}, {EXPERTS} experts of true width ({', '.join(parts)})"


def _remove(*paths: Path) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def _mix_row(place: Path, recipe: str) -> Row:
    """The whole command on one core, against the native encoders alone, called row by row from compiled code."""
    source, out = make_source(place), place / "bench-out.gguf"
    plan = quantize(source, None, recipe).plan
    encoders = {
        fmt: _row_by_row(native_encoder(ggml.LIBRARY, fmt))
        for fmt in {t.format.name for t in plan.tensors if t.format.weights > 1}
    }
    tensors = []
    with model_files.open(source) as model:
        hp = names.hparams(model)
        for t in plan.tensors:
            if t.format.weights > 1:
                x = names.source_rows(model, t.link, hp, slice(None))
                wide = x if x.dtype == np.float32 else (x.astype(np.uint32) << 16).view(np.float32)
                raw = quants.allocate((len(wide), t.format.row_bytes(wide.shape[1])), np.uint8)
                tensors.append((t, np.ascontiguousarray(wide), raw))

    def run() -> None:
        unsynced(lambda: quantize(source, out, recipe, jobs=1, force=True))

    def peer() -> None:
        for t, x, raw in tensors:
            encoders[t.format.name](x.ctypes.data, raw.ctypes.data, len(x), x.shape[1], raw.shape[1])

    def check() -> None:
        run(), peer()
        with model_files.open(out) as made:
            for t, _, raw in tensors:
                if not np.array_equal(made.read(t.name), raw):
                    raise Differ(f"quantize {recipe}: {t.name} differs")

    weights = sum(x.size for _, x, _ in tensors)
    name = f"{describe(recipe, plan)}, the whole command, one core"
    return Row(name, "native, encoding alone", 8, weights, check, run, peer, lambda: _remove(out))


def _row_by_row(encode: Callable[..., Any]) -> Callable[..., Any]:
    """(x, out, rows, n, row bytes) as addresses and sizes."""

    @numba.njit(nogil=True)
    def run(x: int, out: int, rows: int, n: int, size: int) -> None:
        for row in range(rows):
            encode(x + 4 * row * n, out + row * size, 1, n, 0)

    return run


def _cores_row(place: Path, recipe: str) -> Row:
    """The whole command on two cores against itself on one."""
    source = make_source(place)
    files = [place / "bench-out.gguf", place / "bench-one.gguf"]

    def run() -> None:
        unsynced(lambda: quantize(source, files[0], recipe, jobs=2, force=True))

    def peer() -> None:
        unsynced(lambda: quantize(source, files[1], recipe, jobs=1, force=True))

    def check() -> None:
        run(), peer()
        if files[0].read_bytes() != files[1].read_bytes():
            raise Differ("two threads write another file than one")

    weights = quantize(source, None, recipe).plan.weights
    name = f"quantize {recipe}, the whole command, two cores"
    return Row(name, "one core", 1.8, weights, check, run, peer, lambda: _remove(*files))


def time_writers(place: Path, runs: int) -> Iterator[str]:
    """Lines of the table: quantize and convert end to end, from page cache to page cache, one thread."""
    source, out = make_source(place), place / "bench-out.gguf"
    for recipe in ("q4_k_m", "q4_k_m-protected"):
        wall, cpu = _time(lambda r=recipe: quantize(source, out, r, jobs=1), out, runs)  # type: ignore[misc]
        weights = quantize(source, None, recipe).plan.weights
        name = f"quantize {recipe} end to end, {weights / 1e9:.2f} billion weights, one thread"
        mine, alone = (f"{weights / 1e6 / t:,.0f} M/s" for t in (wall, cpu))
        yield f"| {name} | {mine} | CPU time alone | {alone} | | ≥ 100 M/s |"
    wall, cpu = _time(lambda: convert(source, out, jobs=1), out, runs)
    size = out.stat().st_size
    mine, alone = (f"{size / 1e9 / t:.2f} GB/s" for t in (wall, cpu))
    yield f"| convert end to end, {size / 1e9:.2f} GB, one thread | {mine} | CPU time alone | {alone} | | ≥ 1 GB/s |"
    wall, cpu = _time(lambda: _write_plainly(out, size), out, runs)
    mine, alone = (f"{size / 1e9 / t:.2f} GB/s" for t in (wall, cpu))
    yield f"| pwrite of as many bytes, nothing else | {mine} | CPU time alone | {alone} | | |"


def _write_plainly(out: Path, size: int) -> None:
    """What any writer of so many bytes must at least do."""
    block = np.ones(BLOCK, np.uint8)
    fd = os.open(out, os.O_WRONLY | os.O_CREAT)
    os.ftruncate(fd, size)
    for at in range(0, size, BLOCK):
        os.pwrite(fd, block[: size - at].data, at)
    os.close(fd)


def _time(work: Callable[[], Any], out: Path, runs: int) -> tuple[float, float]:
    """Median wall-clock and processor seconds; the first run fills the page cache and compiles."""
    times = []
    for _ in range(runs + 1):
        _remove(out)
        wall, cpu = time.perf_counter(), time.process_time()
        unsynced(work)
        times.append((time.perf_counter() - wall, time.process_time() - cpu))
    wall, cpu = np.median(times[1:], axis=0)
    return float(wall), float(cpu)
