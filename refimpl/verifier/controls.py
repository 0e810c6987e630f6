"""Must-fail controls: every way in which a file is known to go wrong, made on purpose, and what verify must say.

`refimpl selftest` runs them all on this machine, and so do the tests. A control holds when verify fails the
file, gives the damaged tensor (and no other) the expected verdict, and names the expert and the block.
The few must-pass controls here guard the other side: a sound file is never condemned.
"""

from collections.abc import Iterator
from pathlib import Path

from refimpl.files.golden import tiny_model
from refimpl.verifier import damaged_blocks, damaged_tensors, mutate
from refimpl.verifier.damage import CONTROLS, KEPT, Bench, Expect, control
from refimpl.verifier.result import PASSING, Report

__all__ = [
    "CONTROLS",
    "check",
    "damaged_blocks",
    "damaged_tensors",
    "run_controls",
]  # the two register theirs


def run_controls(scratch: Path, names: list[str] | None = None) -> Iterator[tuple[str, str, str | None]]:
    """Run the controls: (name, what was done, None or how verify failed to see it)."""
    from refimpl.verifier.run import verify

    golden = tiny_model()
    for name in names or CONTROLS:
        place = scratch / name
        place.mkdir()
        bench = Bench(golden, place, golden)
        expect = CONTROLS[name](bench)
        report = verify(
            place / "model.gguf", bench.source, recipe=bench.recipe, imatrix=bench.imatrix, jobs=1
        )
        yield name, (CONTROLS[name].__doc__ or "").strip(), check(report, expect)


def check(report: Report, expect: Expect | None) -> str | None:
    """None where the report says what it must, else what it says instead."""
    if expect is None:
        return (
            None if report.passed else f"a sound file was failed: {[f.message for f in report.findings][:3]}"
        )
    if report.passed:
        return "the damaged file passed"
    got = {t.name: t.verdict for t in report.tensors if t.verdict not in PASSING}
    if got != expect.verdicts:
        return f"verdicts {got}, expected {expect.verdicts}"
    named = [f for f in report.findings if f.code == expect.code and f.severity == "error"]
    named = [f for f in named if f.tensor is None or f.tensor in expect.verdicts or not expect.verdicts]
    if not named:
        return f"no finding {expect.code}; found {[f.code for f in report.findings]}"
    if expect.expert is not None and not any(f.expert == expect.expert for f in named):
        return f"experts {[f.expert for f in named]} named, not {expect.expert}"
    if expect.block is not None and not any(f.block == expect.block for f in named):
        return f"blocks {[f.block for f in named]} named, not {expect.block}"
    if expect.fits is not None:
        fits = {e.fits for t in report.tensors for e in t.experts if e.index == expect.expert}
        if expect.fits not in fits:
            return f"expert {expect.expert} was said to fit {fits}, not {expect.fits}"
    return None


@control
def sound_stock(b: Bench) -> None:
    """llama.cpp's own Q4_K_M passes"""
    b.write(b.copy())


@control
def sound_imatrix(b: Bench) -> None:
    """llama.cpp's own Q4_K_M with an imatrix passes without the imatrix"""
    b.write(b.copy("imatrix-quantized"))


@control
def sound_codebook_imatrix(b: Bench) -> None:
    """a tensor in IQ2_XS, made with an imatrix, passes without the imatrix"""
    b.write(b.codebook())


@control
def sound_child(b: Bench) -> None:
    """a child pruned from 16 to 12 experts and renumbered passes against its unpruned parent"""
    copy = b.copy()
    mutate.prune(copy, KEPT)
    b.write(copy)
