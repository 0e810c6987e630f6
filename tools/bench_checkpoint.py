"""A checkpoint of GLM-5.1's true layers: make it, quantize it, verify it, and say what that took.

    python -m tools.bench_checkpoint DIR                 # 1 dense and 1 sparse layer, 192 experts: 19 GB, and 6 GB out
    python -m tools.bench_checkpoint DIR --experts 8 --vocab 1280      # a small one, to try this out

Each command runs in a process of its own, from a kernel cache that is warm. Wall-clock time is what a busy machine
makes of it; processor time is the work. The peak is the largest resident memory of the process.

Beside it llama-quantize works on one thread at a smaller model of nearly the same mix of types (`bench_writers`), and
so do we; both files must be the same bytes. The ratio is that of weights per second of processor time. A
folder that was not there before is removed in the end, unless --keep is given.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from refimpl.writers.convert import convert
from refimpl.writers.quantize import quantize
from tools import bench, bench_writers, check_mixes, llama_cpp, synthetic

CHILD = """
import json, os, sys, time
from refimpl.cli.main import run
wall, code = time.perf_counter(), run(sys.argv[1:])
wall = time.perf_counter() - wall
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps([code, wall, *os.times()[:2], 1024 * peak]), file=sys.stderr)
"""
PROTECTION = (  # what recipes/q4_k_m-protected.toml says, as options of llama-quantize
    *("--tensor-type", "attn_=q8_0", "--tensor-type", "indexer=q8_0", "--tensor-type", "shexp=q8_0"),
    *("--tensor-type", r"ffn_(gate|up|down)\.weight=q8_0"),
    *("--token-embedding-type", "q8_0", "--output-tensor-type", "q8_0"),
)
OPTIONS = {"q4_k_m": (), "q4_k_m-protected": PROTECTION}
HEAD = (
    "| what | wall | CPU | of it the kernel | weights a second of CPU | peak memory | |\n"
    "|---|--:|--:|--:|--:|--:|---|"
)


@dataclass(frozen=True)
class Taken:
    """Seconds and bytes that one command took, and what it printed. cpu: of it `kernel` in the operating system."""

    wall: float
    cpu: float
    kernel: float
    peak: int
    said: str

    def row(self, what: str, weights: int, words: str) -> str:
        """A line of the table."""
        rate = f"{weights / 1e6 / self.cpu:,.0f} M/s"
        memory = f"{self.peak / (1 << 20):,.0f} MiB" if self.peak else ""
        seconds = " | ".join(f"{s:.1f} s" for s in (self.wall, self.cpu, self.kernel))
        return f"| {what} | {seconds} | {rate} | {memory} | {words} |"


def refimpl(*arguments: str) -> Taken:
    """Run one of our commands in a new process. Raises RuntimeError where it fails."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *arguments], capture_output=True, text=True, check=True
    )
    code, wall, user, kernel, peak = json.loads(done.stderr.splitlines()[-1])
    if code:
        raise RuntimeError(f"refimpl {' '.join(arguments)} ended with {code}: {done.stdout[-2000:]}")
    return Taken(wall, user + kernel, kernel, peak, done.stdout)


def llama_quantize(llama: llama_cpp.LlamaCpp, work: Path, recipe: str) -> Taken:
    """Run llama-quantize on one thread: work/bf16.gguf to work/theirs.gguf."""
    before, start = os.times(), time.perf_counter()
    llama.run("llama-quantize", [*OPTIONS[recipe], "bf16.gguf", "theirs.gguf", "Q4_K_M", "1"], work)
    wall, after = time.perf_counter() - start, os.times()
    user, kernel = (after[i] - before[i] for i in (2, 3))
    return Taken(wall, user + kernel, kernel, 0, "")


def compare_with_native(llama: llama_cpp.LlamaCpp, place: Path, recipe: str) -> tuple[list[str], float]:
    """Both quantizers, one thread each, on the small model; return lines of the table, native weights a second."""
    source = bench_writers.make_source(place)
    convert(source, place / "bf16.gguf", provenance=False, force=True)
    weights = quantize(place / "bf16.gguf", None, recipe).plan.weights
    arguments = [
        "quantize",
        str(place / "bf16.gguf"),
        str(place / "ours.gguf"),
        "--recipe",
        recipe,
        "--quiet",
    ]
    refimpl(*arguments, "--force", "--jobs", "1")  # compiles
    mine, theirs = refimpl(*arguments, "--force", "--jobs", "1"), llama_quantize(llama, place, recipe)
    found = check_mixes.compare(place / "ours.gguf", place / "theirs.gguf")
    if found != "same":
        raise RuntimeError(f"ours and llama-quantize's file differ: {found}")
    refimpl(
        "verify", str(place / "ours.gguf"), "--source", str(source), "--recipe", recipe, "--quiet"
    )  # compiles
    mix = bench_writers.describe(recipe, quantize(source, None, recipe).plan).removeprefix("quantize ")
    what = f"{mix}, {weights / 1e9:.2f} billion weights, one thread"
    lines = [
        theirs.row(f"llama-quantize, {what}", weights, ""),
        mine.row(f"refimpl, {what}", weights, "same bytes; the start of the process weighs here"),
    ]
    return lines, weights / theirs.cpu


def measure(place: Path, source: Path, recipe: str, native: float) -> list[str]:
    """Quantize and verify the checkpoint; return lines of the table."""
    out = place / "quantized.gguf"
    out.unlink(missing_ok=True)
    plan = quantize(source, None, recipe).plan
    made = refimpl("quantize", str(source), str(out), "--recipe", recipe, "--quiet")
    checked = refimpl("verify", str(out), "--source", str(source), "--recipe", recipe, "--json", "--quiet")
    report = json.loads(checked.said)
    if (report["verdict"], report["passed"]) != ("exact", True):
        raise RuntimeError(f"the file is {report['verdict']}")
    big = f"{plan.weights / 1e9:.2f} billion weights"
    ratio = f"**{plan.weights / made.cpu / native:.1f}×** llama-quantize's rate per core"
    return [
        made.row(f"quantize {recipe}, {big}, synced to disk", plan.weights, ratio),
        checked.row(f"verify it: {report['verdict']}", plan.weights, f"{len(report['tensors'])} tensors"),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("place", type=Path, help="folder for all that is made")
    parser.add_argument("--experts", type=int, default=192)
    parser.add_argument("--vocab", type=int, default=synthetic.REAL["vocab_size"])
    parser.add_argument("--recipe", choices=OPTIONS, default="q4_k_m-protected")
    parser.add_argument("--llama", type=Path, default=Path("build/llama"), help="llama.cpp's folder")
    parser.add_argument("--keep", action="store_true", help="do not remove what was made")
    given = parser.parse_args()
    llama = llama_cpp.prepare(given.llama, ["llama-quantize"])
    fresh = not given.place.exists()
    given.place.mkdir(parents=True, exist_ok=True)
    try:
        print(f"{bench.describe_machine()}\n\n{HEAD}", flush=True)
        lines, native = compare_with_native(llama, given.place, given.recipe)
        print(*lines, sep="\n", flush=True)
        start = time.perf_counter()
        sizes = {"n_routed_experts": given.experts, "vocab_size": given.vocab}
        source = synthetic.make(given.place / f"checkpoint-{given.experts}-{given.vocab}", **sizes)
        size, took = sum(f.stat().st_size for f in source.iterdir()), time.perf_counter() - start
        print(f"| make the checkpoint, {size / 1e9:.2f} GB | {took:.1f} s | | | | | |", flush=True)
        print(*measure(given.place, source, given.recipe, native), sep="\n", flush=True)
    finally:
        if fresh and not given.keep:
            shutil.rmtree(given.place)
    return 0


if __name__ == "__main__":
    sys.exit(main())
