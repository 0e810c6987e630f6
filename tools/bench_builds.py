"""Rows of the benchmark: what the builds that fuse cost, each against our own strict encoder."""

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from refimpl import quants
from refimpl.arith.builds import BUILDS, SITED
from refimpl.quants.formats import find_codec
from tools.bench_rows import COLUMNS, Row, draw, same

GOAL = 0.7
CHECKED = 2  # rows that are compared with the definition first


def list_rows(rows: int) -> Iterator[Callable[[], Row]]:
    """Every format with sites, plain and with an imatrix, under every build but strict."""
    for fmt in sorted(SITED):
        for weighed in (False, True):
            for build in BUILDS[1:]:
                yield partial(make_row, rows, fmt, weighed, build)


def make_row(rows: int, fmt: str, weighed: bool, build: str) -> Row:
    """One encoder under one build; its peer is the same encoder under strict."""
    x = draw(rows)
    imatrix = np.random.default_rng(1).gamma(0.5, 1, COLUMNS).astype(np.float32) if weighed else None
    out = quants.allocate((rows, find_codec(fmt).row_bytes(COLUMNS)), np.uint8)

    def run(name: str) -> None:
        quants.quantize(x, fmt, imatrix, name, out=out)

    def check() -> None:
        run(build)
        want = quants.quantize(x[:CHECKED], fmt, imatrix, build, reference=True)
        same(out[:CHECKED], want, f"{fmt} under {build}")
        run("strict")

    name = f"encode {fmt.upper()} as {build}{', imatrix' if weighed else ''}"
    return Row(name, "our own strict", GOAL, x.size, check, partial(run, build), partial(run, "strict"))
