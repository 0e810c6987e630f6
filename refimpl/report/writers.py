"""What the writers say on a terminal."""

from collections import Counter
from typing import TYPE_CHECKING

from refimpl.report.terminal import clean, count, gigabytes

if TYPE_CHECKING:
    from rich.console import Console

    from refimpl.writers.convert import Converted
    from refimpl.writers.difference import Difference, Pair
    from refimpl.writers.plan import Note
    from refimpl.writers.quantize import Quantized
    from refimpl.writers.slice import Sliced

LISTED = 50  # tensors that differ
SHOWN = 3  # notes of one kind, fallbacks


def print_converted(done: "Converted", out: "Console", seconds: float) -> None:
    """One line, and a line for what F16 could not hold."""
    for what, counts in (("became infinite", done.overflow), ("became zero", done.underflow)):
        if counts:
            name, most = max(counts.items(), key=lambda item: item[1])
            words = f"{counts.total():,} weights {what} in F16, most of them in {clean(name)} ({most:,})"
            out.print(words, style="yellow", soft_wrap=True)
    out.print(
        f"{clean(done.file)}   {done.outtype} · {gigabytes(done.size)} · {done.tensors:,} tensors · "
        f"{count(done.weights)} weights   {seconds:,.1f} s, {gigabytes(round(done.size / seconds))}/s",
        soft_wrap=True,
    )


def print_quantized(done: "Quantized", out: "Console", seconds: float) -> None:
    """The price by class, what fell back, what is doubtful about the imatrix, and the file."""
    plan = done.plan
    for row in plan.classes():
        types = " · ".join(f"{number:,} {kind}" for kind, number in row["types"].items())
        out.print(f"{row['class']:12} {gigabytes(row['bytes']):>12}   {types}", soft_wrap=True)
    for t in plan.fallbacks[:SHOWN]:
        words = f"{clean(t.name)}: {t.format.name} instead of {t.wanted}, for rows of {t.shape[-1]:,} weights"
        out.print(f"{'fallback':12} {words}", style="yellow", soft_wrap=True)
    _print_rest(out, "fallback", len(plan.fallbacks))
    _print_notes(plan.notes, out)
    if done.done:
        out.print(f"{'resumed':12} {done.done:,} pieces were on the disk already", soft_wrap=True)
    name = "would be" if done.file is None else clean(done.file)
    bits = 8 * plan.nbytes / plan.weights
    rate = (
        "" if done.file is None else f"   {seconds:,.1f} s, {count(round(plan.weights / seconds))} weights/s"
    )
    out.print(
        f"{name}   {done.recipe.name} · {done.build} · {gigabytes(done.size)} · {len(plan.tensors):,} tensors · "
        f"{count(plan.weights)} weights · {bits:.2f} bits/weight{rate}",
        soft_wrap=True,
    )


def print_sliced(done: "Sliced", out: "Console", seconds: float) -> None:
    """One line."""
    out.print(
        f"{clean(done.file)}   {len(done.layers):,} layers · {len(done.experts):,} experts · {gigabytes(done.size)} · "
        f"{done.tensors:,} tensors · {count(done.weights)} weights   {seconds:,.1f} s",
        soft_wrap=True,
    )


def print_difference(found: "Difference", out: "Console") -> None:
    """What differs, the largest relative error first; then the counts."""
    apart = [p for p in found.pairs if p.status != "same"]
    apart.sort(key=lambda p: (p.status == "same-values", -(p.rmse() or 0) / (p.ssx or 1) ** 0.5))
    for pair in apart[:LISTED]:
        out.print(f"{clean(pair.name):44} {_say_pair(pair)}", soft_wrap=True)
    if len(apart) > LISTED:
        out.print(f"and {len(apart) - LISTED:,} more: see --json", soft_wrap=True)
    for what, names in found.keys.items():
        if names:
            out.print(f"keys {what.replace('_', ' in ')}: {clean(', '.join(names), 2000)}", soft_wrap=True)
    counts = " · ".join(f"{number:,} {status}" for status, number in found.counts().items())
    out.print(f"{'same' if found.same else 'different'}   {counts}", style="bold", soft_wrap=True)


def _say_pair(pair: "Pair") -> str:
    a, b = (t or "-" for t in pair.types)
    if pair.status in ("only-a", "only-b"):
        return f"only in {pair.status[-1].upper()} ({a if pair.status == 'only-a' else b})"
    if pair.status == "same-values":
        return f"same values, {a} and {b}" if a != b else "same values, other bytes"
    if not pair.comparable:
        return f"shapes {list(pair.shapes[0] or ())} and {list(pair.shapes[1] or ())}"
    words = f"{a} and {b}" if a != b else f"{a}, {pair.blocks_differ:,} of {pair.blocks:,} blocks"
    rmse = pair.rmse()
    if rmse is None or pair.worst is None:
        return f"{words} differ"
    place = f"row {pair.worst[0]:,}, column {pair.worst[1]:,}: {pair.worst[2]:.6g} and {pair.worst[3]:.6g}"
    experts = f", {len(pair.experts):,} along the first axis" if pair.experts else ""
    return f"{words}{experts} · {pair.weights_differ:,} weights, rmse {rmse:.3g}, most at {place}"


def _print_notes(notes: list["Note"], out: "Console") -> None:
    shown: Counter[str] = Counter()
    for note in notes:
        shown[note.kind] += 1
        if shown[note.kind] <= SHOWN:
            out.print(f"{'imatrix':12} {clean(note.message)}", style="yellow", soft_wrap=True)
    for kind, number in shown.items():
        _print_rest(out, kind, number)


def _print_rest(out: "Console", what: str, number: int) -> None:
    if number > SHOWN:
        out.print(f"{'':12} and {number - SHOWN:,} more ({what}): see --json", style="yellow", soft_wrap=True)
