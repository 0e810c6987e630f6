"""Progress of long work on stderr: a bar on a terminal, a plain line every few seconds elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from refimpl.report.terminal import gigabytes

Progress = Callable[[int, int], None]  # units done, units in all; bytes unless said otherwise

EVERY = 5.0  # seconds between plain lines


@contextmanager
def progress_bar(what: str, hidden: bool = False, unit: str = "") -> Iterator[Progress]:
    """Show how far some work on bytes (or on other units) is; the value is called with units done and in all."""
    if hidden:
        yield _ignore
    elif sys.stderr.isatty():
        yield from _bar(what, unit)
    else:
        yield _Lines(what, unit)


def _ignore(done: int, total: int) -> None:
    """Show nothing."""


def _bar(what: str, unit: str) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    counts = (MofNCompleteColumn(), TextColumn(unit)) if unit else (DownloadColumn(), TransferSpeedColumn())
    columns = (BarColumn(None), *counts, TimeRemainingColumn())
    with Progress(
        TextColumn("{task.description}"), *columns, console=Console(stderr=True), transient=True
    ) as bar:
        task = bar.add_task(what, total=None)

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield show


class _Lines:
    """Prints units done, share, rate and time left, at most every EVERY seconds."""

    def __init__(self, what: str, unit: str = "") -> None:
        self.what, self.unit, self.start = what, unit, time.monotonic()
        self.last = self.start

    def _show(self, count: float) -> str:
        return f"{count:,.0f} {self.unit}" if self.unit else gigabytes(round(count))

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self.last < EVERY or not 0 < done <= total:
            return
        self.last = now
        rate = done / (now - self.start)
        left = f"{(total - done) / rate:,.0f} s left"
        share = f"{self._show(done)} of {self._show(total)} ({done / total:.0%})"
        print(f"{self.what}: {share}, {self._show(rate)}/s, {left}", file=sys.stderr, flush=True)


@contextmanager
def item_bar(what: str, hidden: bool = False) -> Iterator[Callable[[int, int, str], None]]:
    """Show how far work on a few things is; the value is to be called with things done, things in all, and a name."""
    if hidden:
        yield lambda done, total, name: None
        return
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        columns = (TextColumn("{task.description}"), BarColumn(None), MofNCompleteColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(what, total=None)
            yield lambda done, total, name: bar.update(
                task, completed=done, total=total, description=f"{what} {name}"
            )
        return
    last = time.monotonic()

    def line(done: int, total: int, name: str) -> None:
        nonlocal last
        if time.monotonic() - last >= EVERY:
            last = time.monotonic()
            print(f"{what}: {done} of {total}, {name}", file=sys.stderr, flush=True)

    yield line
