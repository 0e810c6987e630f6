"""One block on a terminal: the bytes with the differing ones marked, the sub-blocks, the worst weights."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from refimpl.report.terminal import clean
from refimpl.verifier.explain import Explanation, Field, Sub

BYTES_PER_LINE = 16
WORST = 8


def print_explanation(e: Explanation, console: Console) -> None:
    """Print a block taken apart."""
    where = "" if e.expert is None else f"expert {e.expert}, "
    last = e.column + len(e.values) - 1
    console.print(Text.assemble((clean(e.tensor), "bold"), f"  {e.format.upper()}  block {e.block:,}"))
    console.print(
        f"{where}row {e.row:,}, columns {e.column:,} to {last:,}; byte {e.offset:,} of {clean(e.part)}"
    )
    if e.source_name is not None:
        console.print(f"source  {clean(e.source_name)}")
    console.print()
    for field in e.fields:
        _print_field(field, console)
    if e.subs:
        console.print(_sub_table(e.subs))
    if e.source is not None:
        console.print(_worst_weights(e, e.source))


def _print_field(field: Field, console: Console) -> None:
    stored = bytes.fromhex(field.stored)
    expected = None if field.expected is None else bytes.fromhex(field.expected)
    console.print(Text.assemble((f"{field.name:7}", "cyan"), field.meaning))
    for start in range(0, len(stored), BYTES_PER_LINE):
        line = Text(f"  {field.start + start:4}  ")
        for i in range(start, min(start + BYTES_PER_LINE, len(stored))):
            odd = expected is not None and stored[i] != expected[i]
            line.append(f"{stored[i]:02x}", "bold red" if odd else "")
            line.append(" ")
        ends = range(start, min(start + BYTES_PER_LINE, len(stored)))
        differ = [i for i in ends if expected is not None and stored[i] != expected[i]]
        if differ and expected is not None:
            said = ", ".join(f"{field.start + i}: {expected[i]:02x}" for i in differ[:3])
            line.append(f"  encoder: {said}{' …' if len(differ) > 3 else ''}", "red")
        console.print(line)


def _sub_table(subs: list[Sub]) -> Table:
    table = Table(box=None, padding=(0, 1), header_style="cyan")
    heads = ("sub", "scale", "min", "step", "offset", "rmse", "codes")
    shown = [True, subs[0].scale is not None, subs[0].min is not None, True, subs[0].min is not None,
             subs[0].rmse is not None, True]  # fmt: skip
    for head, show in zip(heads, shown, strict=True):
        if show:
            table.add_column(head, justify="left" if head == "codes" else "right", overflow="fold")
    for j, sub in enumerate(subs):
        nibbles = min(sub.codes) >= 0 and max(sub.codes) < 16
        codes = "".join(f"{c:x}" for c in sub.codes) if nibbles else " ".join(map(str, sub.codes))
        cells = (j, sub.scale, sub.min, f"{sub.step:.5g}", f"{sub.offset:.5g}", f"{sub.rmse or 0:.3g}", codes)
        table.add_row(*(str(c) for c, show in zip(cells, shown, strict=True) if show))
    return table


def _worst_weights(e: Explanation, source: list[float]) -> Table:
    """The weights that lie farthest from their source."""
    codes = [str(code) for sub in e.subs for code in sub.codes] or [""] * len(e.values)
    ranked = sorted(range(len(source)), key=lambda i: -abs(e.values[i] - source[i]))[:WORST]
    table = Table(box=None, padding=(0, 1), header_style="cyan", title=None)
    for head in ("column", "code", "value", "source", "error"):
        table.add_column(head, justify="right")
    for i in ranked:
        error = e.values[i] - source[i]
        table.add_row(
            f"{e.column + i:,}", codes[i], f"{e.values[i]:.6g}", f"{source[i]:.6g}", f"{error:+.3g}"
        )
    return table
