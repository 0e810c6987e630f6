"""The benchmark: the only source of figures about speed. Prints a Markdown table for the README.

    python -m tools.bench                 # kernels against the native library (extra `oracle`), gguf-py, cold start
    python -m tools.bench --slice DIR     # verify, quantize, convert end to end too, on slices of 4 GB made in DIR
    python -m tools.bench --topic dots    # only one subject's rows
    python -m tools.bench --topic writers --slice DIR     # of those on slices, only quantize and convert
    python -m tools.bench --only Q6_K     # only rows whose name contains this

Both sides run alternately in one process, on one thread each, on the same arrays; a ratio is the median of the
ratios of neighbouring turns, its quartiles stand beside it. A side repeats its work until a turn has lasted TURN
seconds: the first run after the other side's is slower than the next (measured: 0.48 ms, then 0.36 ms; the cause is
not known). The native functions are called from compiled code through their C pointers. Before a row is timed its
results are compared bit for bit: where they differ, the program says so instead of printing figures, and ends with
status 1.
"""

import argparse
import importlib.metadata
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import llvmlite.binding
import numpy as np

from tests import models
from tools import bench_builds, bench_dots, bench_grids, bench_kquants, bench_reap, bench_small, bench_writers
from tools.bench_rows import Differ, Row, list_rows

COLD = """
import time; wall, cpu = time.perf_counter(), time.process_time()
import numpy as np, refimpl
from refimpl import quants
x = np.random.default_rng(0).standard_normal((64, 2048)).astype(np.float32)
bits = (x.view(np.uint32) >> 16).astype(np.uint16)
for fmt in ("q4_k", "q6_k", "q8_0", "q5_0", "f16", "bf16"):
    raw = quants.quantize(bits, fmt)
    quants.quantize(x, fmt), refimpl.dequantize(raw, fmt)
    if fmt[0] == "q":
        quants.compare(raw, fmt, bits), quants.compare(raw, fmt, x), quants.nearest(raw, fmt, x)
if {imatrix}:
    for fmt in ("q4_k", "q6_k", "q5_0"):
        refimpl.quantize(x, fmt, x[0] * x[0])
print(time.perf_counter() - wall, time.process_time() - cpu)
"""

TOPICS = {
    "formats": list_rows,
    "kquants": bench_kquants.list_rows,
    "small": bench_small.list_rows,
    "grids": bench_grids.list_rows,
    "builds": bench_builds.list_rows,
    "dots": bench_dots.list_rows,
    "reap": bench_reap.list_rows,
}
SLICED = ("writers", "verify")  # what is timed on slices
TURN = 0.02  # seconds
HEAD = "| Job | refimpl | against | | ratio (quartiles) | goal |\n|---|--:|---|--:|--:|--:|"


def time_repeated(work: Callable[[], Any], repeats: int) -> float:
    """Seconds that a piece of work takes, on average over so many runs in a row."""
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    return (time.perf_counter() - start) / repeats


def race(row: Row, runs: int) -> str:
    """Time both sides in turn; return a line of the table."""
    row.check()
    sides = [(row.run, 1), (row.peer, 1)]
    if row.turns is None:
        sides = [(work, max(1, round(TURN / time_repeated(work, 1)))) for work, _ in sides]
    turns = range(row.turns or runs)
    times = np.array([[_take_turn(row, *side) for side in sides] for _ in turns])
    low, ratio, high = np.quantile(times[:, 1] / times[:, 0], (0.25, 0.5, 0.75))
    counted = row.weights / (1e6 if row.unit == "M/s" else 1)
    mine, theirs = (f"{counted / t:,.0f} {row.unit}" for t in np.median(times, axis=0))
    goal = "" if row.goal is None else f"≥ {row.goal:g}×"
    return f"| {row.name} | {mine} | {row.against} | {theirs} | **{ratio:.2f}×** ({low:.2f} to {high:.2f}) | {goal} |"


def _take_turn(row: Row, work: Callable[[], Any], repeats: int) -> float:
    row.prepare()
    return time_repeated(work, repeats)


def time_cold_start(imatrix: bool) -> str:
    """Compile every kernel that verify uses, in a new process with an empty cache; return a line of the table."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "NUMBA_CACHE_DIR": cache}
        code = COLD.format(imatrix=imatrix)
        run = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
        )
    wall, cpu = map(float, run.stdout.split())
    name = "with an imatrix" if imatrix else "without"
    return f"| compile all that verify needs, {name} | {wall:.1f} s | | {cpu:.1f} s of CPU | | < 30 s |"


def time_commands(runs: int) -> Iterator[str]:
    """Yield a line of the table for each command that must answer at once, timed as a whole process."""
    with tempfile.TemporaryDirectory() as place:
        file = models.write(
            Path(place) / "real.gguf", models.REAL, models.metadata(models.REAL) | models.vocabulary(154_880)
        )
        for name, goal, words in (
            ("--help", 0.3, ["--help"]),
            (
                f"inspect the header of a file of {file.stat().st_size / 1e9:.0f} GB",
                2,
                ["inspect", str(file)],
            ),
        ):
            times = []
            for _ in range(runs + 1):  # the first run reads the modules from disk
                wall, before = time.perf_counter(), os.times()
                subprocess.run([sys.executable, "-m", "refimpl", *words], capture_output=True, check=True)
                after = os.times()
                cpu = (
                    after.children_user
                    + after.children_system
                    - before.children_user
                    - before.children_system
                )
                times.append((time.perf_counter() - wall, cpu))
            wall, cpu = np.median(times[1:], axis=0)
            yield f"| {name} | {wall:.2f} s | | {cpu:.2f} s of CPU | | < {goal:g} s |"


def time_verify(place: Path, runs: int) -> str:
    """Verify a slice of the real model's widths end to end, from the page cache; return a line of the table."""
    import refimpl
    from tools import bench_slice

    file, source = bench_slice.make(place, experts=24)
    times = []
    for _ in range(runs + 1):  # the first run fills the page cache
        wall, cpu = time.perf_counter(), time.process_time()
        report = refimpl.verify(file, source=source, jobs=1)
        times.append((time.perf_counter() - wall, time.process_time() - cpu))
        if report.verdict != "exact":
            raise Differ(f"the slice is {report.verdict}, not exact")
    with refimpl.open(file) as f:
        weights = sum(int(np.prod(t.shape)) for t in f.tensors.values())
    mine, alone = (f"{weights / 1e6 / t:,.0f} M/s" for t in np.median(times[1:], axis=0))
    name = f"verify end to end, {weights / 1e9:.2f} billion weights, one thread"
    return f"| {name} | {mine} | CPU time alone | {alone} | | ≥ 120 M/s |"


def time_writers(place: Path, runs: int, only: str) -> None:
    """Print the writers' lines; the native side is slow, so that three runs must do."""
    for build in bench_writers.list_writer_rows(place):
        row = build()
        if only in row.name:
            print(race(row, min(runs, 3) if "native" in row.against else runs), flush=True)
    if not only:
        for line in bench_writers.time_writers(place, min(runs, 5)):
            print(line, flush=True)


def describe_machine() -> str:
    """CPU, cores, versions and how busy the machine is: without these a figure says nothing."""
    names = [line.split(":")[1].strip() for line in _read_cpus() if line.startswith("model name")]
    cpu = f"{names[0] if names else platform.processor()} ({llvmlite.binding.get_host_cpu_name()})"
    versions = (
        f"{p} {importlib.metadata.version(p)}" for p in ("numpy", "numba", "llvmlite", "gguf", "xllamacpp")
    )
    load = ", ".join(f"{v:.1f}" for v in os.getloadavg())
    return f"{cpu}, {os.cpu_count()} cores, Python {platform.python_version()}, {', '.join(versions)}; load {load}"


def _read_cpus() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=256, help="matrix rows of 6,144 weights to encode")
    parser.add_argument("--runs", type=int, default=11)
    parser.add_argument(
        "--topic",
        choices=[*TOPICS, *SLICED],
        action="append",
        help="rows of a subject; by default of all but reap",
    )
    parser.add_argument("--only", default="", help="only rows whose name contains this")
    parser.add_argument("--slice", type=Path, help="folder for the slices that whole commands are timed on")
    arguments = parser.parse_args()
    print(f"{describe_machine()}\n\n{HEAD}", flush=True)
    try:
        chosen = arguments.topic or [topic for topic in (*TOPICS, *SLICED) if topic != "reap"]
        for build in chain.from_iterable(
            TOPICS[topic](arguments.rows) for topic in chosen if topic in TOPICS
        ):
            row = build()
            if arguments.only in row.name:
                print(race(row, arguments.runs), flush=True)
        if not arguments.only and not arguments.topic:
            print(time_cold_start(imatrix=False), time_cold_start(imatrix=True), sep="\n", flush=True)
            for line in time_commands(arguments.runs):
                print(line, flush=True)
        if arguments.slice and "writers" in chosen:
            time_writers(arguments.slice, arguments.runs, arguments.only)
        if arguments.slice and "verify" in chosen and not arguments.only:
            print(time_verify(arguments.slice, 3), flush=True)
    except Differ as difference:
        print(f"no figures: {difference}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
