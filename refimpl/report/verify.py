"""The report of verify on a terminal: one line a stage, the damage on top when there is any."""

import shlex
import statistics
from collections import Counter

from rich.console import Console
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from refimpl.report.terminal import clean, count, gigabytes
from refimpl.verifier.findings import Finding
from refimpl.verifier.identify import NEAR
from refimpl.verifier.result import RANK, Errors, Report

WIDTH = 100  # columns at most; wider terminals gain nothing
SHOWN = 8  # findings printed in full; the JSON has all
STYLE = {"ok": "green", "exact": "green", "rounded": "green", "equivalent": "yellow", "note": "cyan"}
BYTES = {
    "exact": "every block's bytes are the reference encoder's, build {build}",
    "rounded": "every code is nearest under the stored scales; the scales come from an imatrix or a search "
    "we were not given",
    "equivalent": "another quantizer: error within the format's range, codes within a step of the nearest or unproven",
}


def print_report(report: Report, console: Console, seconds: float, peak: int) -> None:
    """Print the whole report.

    seconds : wall time of the run;  peak : peak memory in bytes
    """
    errors = _worst_first(report)
    if errors:
        _print_damage(report, errors, console)
    console.print(_headline(report))
    table = Table.grid(padding=(0, 2), expand=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for stage, said, text in _stages(report):
        table.add_row(stage, Text(said, STYLE.get(said, "bold red")), Text(text))
    console.print(table)
    for note in (f for f in report.findings if f.severity != "error"):
        console.print(
            Padding(Text(f"{note.severity}: {_place(note)}{clean(note.message)}", "dim"), (0, 0, 0, 2))
        )
    console.print(Rule(style="dim"), width=min(console.width, WIDTH))
    console.print(_verdict_line(report, seconds, peak), width=min(console.width, WIDTH))


def _worst_first(report: Report) -> list[Finding]:
    """The findings that fail the run: those about the file, then by the verdict of their tensor."""
    rank = {t.name: RANK[t.verdict] for t in report.tensors}
    errors = [f for f in report.findings if f.severity == "error"]
    return sorted(errors, key=lambda f: -rank.get(f.tensor or "", len(RANK)))


def _headline(report: Report) -> Text:
    c = report.census
    parts = [
        gigabytes(report.size),
        f"{len(report.tensors):,} tensors",
        f"{count(c.weights)} weights, {count(c.active)} active",
        f"{c.bits_per_weight:.2f} bits/weight",
    ]
    name = clean(report.file.rsplit("/", 1)[-1])
    return Text.assemble((name, "bold"), "\n", " · ".join(parts))


def _stages(report: Report) -> list[tuple[str, str, str]]:
    """(stage, its word, its sentence), in the order of the work."""
    container = [f for f in report.stages["container"] if f.severity == "error"]
    rows = [("container", *_say(container, f"header, {len(report.tensors):,} regions, alignment, metadata"))]
    rows.append(("recipe", *_recipe(report)))
    rows.append(("experts", *_experts(report)))
    compared = [t for t in report.tensors if t.blocks]
    if compared:
        text = (
            BYTES[report.verdict].format(build=report.build) if report.verdict in BYTES else _counts(report)
        )
        rows.append(("bytes", report.verdict, text))
        rows.append(("fidelity", *_fidelity(report)))
    return rows


def _say(errors: list[Finding], fine: str) -> tuple[str, str]:
    return ("failed", clean(errors[0].message)) if errors else ("ok", fine)


def _recipe(report: Report) -> tuple[str, str]:
    types = Counter(t.format for t in report.tensors if t.format)
    mix = " · ".join(f"{name.upper()} {n:,}" for name, n in types.most_common())
    if report.conforms:
        return "ok", f"{report.recipe}: {mix}"
    if not report.recipe_declared:
        return "note", f"closest known recipe {report.recipe}, not conformed to (none was asked for): {mix}"
    return "failed", f"not {report.recipe}: {len(report.stages['recipe']):,} tensors of another type"


def _experts(report: Report) -> tuple[str, str]:
    errors = [f for f in report.stages["experts"] if f.severity == "error"]
    moved = [(t, e) for t in report.tensors for e in t.experts if e.verdict == "misplaced"]
    if errors:
        return "failed", clean(errors[0].message)
    if moved:
        tensor, expert = moved[0]
        return "failed", f"{len(moved):,} misplaced; the first: {clean(tensor.name)}, expert {expert.index}"
    straight = all(kept == sorted(kept) for kept in report.maps.values())
    order = "in the source's order" if straight else "renumbered"
    layers = f"in each of {len(report.maps)} MoE layers, {order}"
    return "ok", f"{report.experts} of {report.source_experts} {layers}; router, bias, gate, up, down agree"


def _fidelity(report: Report) -> tuple[str, str]:
    known = []
    for t in report.tensors:
        parts: list[tuple[Errors, int | None]] = [(e.errors, e.index) for e in t.experts]
        parts = parts or [(t.errors, None)]
        if t.format not in ("f32", "f16", "bf16"):
            known += [(e.rel_rmse, t.name, expert) for e, expert in parts if e.rel_rmse is not None]
    if not known:
        return "note", "nothing quantized to measure"
    value, name, expert = max(known, key=lambda k: k[0])
    median = statistics.median(k[0] for k in known)
    place = clean(name.removesuffix(".weight")) + ("" if expert is None else f", expert {expert}")
    return (
        "ok" if value < NEAR else "failed",
        f"relative rmse {median:.3f} median, {value:.3f} worst: {place}",
    )


def _counts(report: Report) -> str:
    return ", ".join(f"{n:,} {verdict}" for verdict, n in report.counts.items())


def _verdict_line(report: Report, seconds: float, peak: int) -> Table:
    counts = report.counts
    whole = counts.get("exact", 0) + counts.get("copied", 0)
    soft = sum(counts.get(v, 0) for v in ("rounded", "equivalent"))
    damaged = sum(n for v, n in counts.items() if RANK[v] >= RANK["degraded"])
    word = Text("PASS", "bold green") if report.passed else Text("FAIL", "bold red")
    faithful = "faithful to the source" if report.passed else "not faithful to the source"
    if not report.passed and RANK[report.verdict] <= RANK["equivalent"]:
        faithful = "not as required"
    line = Table.grid(expand=True, padding=(0, 2))
    line.add_column()
    line.add_column(justify="right")
    line.add_row(
        word + Text(f" · {report.verdict} · {faithful}"), f"{_duration(seconds)}, {peak / 2**30:.1f} GiB"
    )
    line.add_row(f"{whole:,} copied or exact, {soft:,} rounded or equivalent, {damaged:,} damaged", "")
    return line


def _plural(errors: int) -> str:
    return f"{errors:,} findings that fail the run" if errors > 1 else "1 finding that fails the run"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def _place(f: Finding) -> str:
    return f"{clean(f.tensor)}: " if f.tensor else ""


def _print_damage(report: Report, errors: list[Finding], console: Console) -> None:
    console.print(Text(_plural(len(errors)), "bold red"))
    for f in errors[:SHOWN]:
        body = Text.assemble(
            (f"{f.code}  ", "red"), (clean(f.tensor or "the file"), "bold"), "\n", clean(f.message)
        )
        if f.tensor and f.block is not None:
            command = f"refimpl explain {shlex.quote(report.file)} {shlex.quote(f.tensor)} --block {f.block}"
            body.append(f"\n{clean(command)} --source {clean(shlex.quote(report.source))}", "dim")
        console.print(Padding(body, (0, 0, 0, 2)))
    if len(errors) > SHOWN:
        console.print(Text(f"  … and {len(errors) - SHOWN:,} more (--json lists them all)", "dim"))
    console.print()
