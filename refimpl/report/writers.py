"""What the writers say on a terminal."""

from typing import TYPE_CHECKING

from refimpl.report.terminal import clean, count, gigabytes

if TYPE_CHECKING:
    from rich.console import Console

    from refimpl.writers.convert import Converted


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
