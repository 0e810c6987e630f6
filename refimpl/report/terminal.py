"""What every report on a terminal shares: safe text, and numbers as people read them."""

import sys
from typing import TYPE_CHECKING, TextIO

from refimpl.errors import printable
from refimpl.verifier.labels import show as count

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["clean", "console", "count", "gigabytes"]

WIDE = 200  # columns where the output is no terminal: nothing is wrapped for a width nobody has


def clean(text: str, most: int = 500) -> str:
    """Text from a file, made safe for a terminal as errors are; cut off with an ellipsis beyond `most` characters."""
    text = printable(text[: most + 1])
    return text if len(text) <= most else text[: most - 1] + "…"


def gigabytes(size: int) -> str:
    """A size in decimal units: "348.13 GB"."""
    for unit, letters in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size >= unit:
            return f"{size / unit:,.2f} {letters}"
    return f"{size:,} B"


def console(file: TextIO | None = None) -> "Console":
    """A console for a report: colours on a terminal, plain text elsewhere; file text is never markup."""
    from rich.console import Console

    out = sys.stdout if file is None else file
    if hasattr(out, "reconfigure"):
        out.reconfigure(errors="replace")  # a terminal that lacks "·" still gets its report
    width = None if out.isatty() else WIDE
    return Console(file=out, width=width, markup=False, highlight=False, emoji=False)
