"""What every report on a terminal shares: safe text, and numbers as people read them."""

import sys
import unicodedata
from typing import TYPE_CHECKING, TextIO

from refimpl.verifier.labels import show as count

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["clean", "console", "count", "gigabytes"]

WIDE = 200  # columns where the output is no terminal: nothing is wrapped for a width nobody has
_HIDDEN = frozenset(("Cc", "Cf", "Cs", "Cn", "Co", "Zl", "Zp"))


def clean(text: str, most: int = 500) -> str:
    """Text from a file, made safe for a terminal: no control, invisible or direction-changing characters.

    They are shown as escapes, such as \\x1b; text beyond `most` characters is cut off with an ellipsis.
    """
    if not text.isprintable() or not text.isascii():
        text = "".join(_escape(c) if unicodedata.category(c) in _HIDDEN else c for c in text[: most + 1])
    return text if len(text) <= most else text[: most - 1] + "…"


def _escape(char: str) -> str:
    code = ord(char)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"


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
