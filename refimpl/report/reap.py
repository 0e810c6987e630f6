"""The audit of a pruned model on a terminal."""

from typing import TYPE_CHECKING

from refimpl.reap.audit import Audit
from refimpl.report.terminal import clean
from refimpl.verifier.findings import Finding

if TYPE_CHECKING:
    from rich.console import Console

SHOWN = 12


def print_audit(found: Audit, out: "Console") -> None:
    """Damage first, then what was kept, then what each criterion says of it."""
    from rich.table import Table

    errors = [f for f in found.findings if f.severity == "error"]
    for finding in errors[:SHOWN]:
        out.print(f"{finding.code}  {_where(finding)}\n  {clean(finding.message)}")
    if len(errors) > SHOWN:
        out.print(f"… and {len(errors) - SHOWN:,} more")
    out.print(f"{clean(found.child)}  of  {clean(found.parent)}")
    layers = list(found.kept)
    out.print(
        f"experts  {found.experts} of {found.parent_experts} in each of {len(layers)} layers, compared by {found.how}"
    )
    for layer in layers[:3] if len(layers) > 6 else layers:
        out.print(f"  layer {layer}: {_ranges(found.kept[layer])}")
    if len(layers) > 6:
        out.print(f"  … {len(layers) - 3} more with --json")
    if found.mtp != "none":
        out.print(f"mtp      {found.mtp}")
    if found.choices:
        table = Table("criterion", "overlap", "regret", "score lost", "same set", box=None, pad_edge=False)
        for one in found.choices:
            row = (f"{one.overlap:.1%}", f"{one.regret:.2%}", f"{one.lost:.1%}", "yes" if one.same else "no")
            table.add_row(one.criterion, *row)
        out.print(table)
    state = "PASS · a child of that parent" if found.passed else f"FAIL · {len(errors):,} findings"
    out.print(state, style="bold green" if found.passed else "bold red")


def _where(finding: Finding) -> str:
    expert = "" if finding.expert is None else f", expert {finding.expert}"
    return clean(finding.tensor or "") + expert


def _ranges(experts: list[int]) -> str:
    """Experts as ranges, if they ascend: 0–3 5 7–9; else as they stand."""
    if experts != sorted(experts):
        return " ".join(map(str, experts))
    parts: list[list[int]] = []
    for e in experts:
        if parts and parts[-1][-1] == e - 1:
            parts[-1][1:] = [e]
        else:
            parts.append([e])
    return " ".join("–".join(map(str, part)) for part in parts)
