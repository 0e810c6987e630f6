"""The judgement of a native library on a terminal: one line a function, what is wrong in full below."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from refimpl.crosscheck.native import Judgement, Report
from refimpl.report.terminal import clean, count

STYLES = {"same bits": "green", "inside the bound": "cyan", "absent": "dim"}


def print_judgements(report: Report, console: Console) -> None:
    """Print the table, then every finding."""
    console.print(Text(clean(report.library), "bold cyan"))
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    for head in ("function", "format", "verdict", "against", "weights"):
        table.add_column(head, justify="right" if head == "weights" else "left", no_wrap=head == "function")
    for j in report.judgements:
        against = (j.against or "") if j.ratio is None else f"{j.ratio:.2g} of the bound"
        weights = count(j.weights) if j.weights else ""
        style = STYLES.get(j.verdict, "bold red")
        table.add_row(j.symbol, j.format.upper(), Text(j.verdict, style), against, weights)
    console.print(table)
    for j in report.judgements:
        if j.problem is not None:
            _print_finding(j, console)
    counts = " · ".join(f"{n} {verdict}" for verdict, n in report.counts.items() if n)
    style = "bold green" if report.passed else "bold red"
    console.print(Text.assemble(("PASS" if report.passed else "FAIL", style), f" · {counts}"))


def _print_finding(j: Judgement, console: Console) -> None:
    console.print(
        Text.assemble((f"\n{j.verdict}  ", "bold red"), (j.symbol, "bold"), f": {clean(j.problem or '')}")
    )
    console.print(f"  on        {j.case}")
    if j.mistake is not None:
        console.print(f"  likely    {j.mistake}")
    console.print(f"  smallest  {j.smallest}")
    console.print(f"  shown by  {clean(j.reproducer or '')}")
