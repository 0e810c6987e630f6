"""Everything refimpl raises on purpose. The command line turns each into one line and an exit code."""

import os

_LONGEST = 1000


def printable(text: str) -> str:
    """Text of a stranger, safe to print: what a terminal acts on is escaped, the middle of long text cut.

    Names and values in a file are whatever its maker wrote: control sequences, line breaks, reversed text.
    """
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST // 2]}…{text[-_LONGEST // 2 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class RefimplError(Exception):
    """Base of all errors that are about the input, not about refimpl."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class BadFile(RefimplError):
    """A file breaks its own format: which file, at which byte, and how.

    path   : the file
    offset : byte offset of the defect, or None where it has no place (a missing file)
    defect : one short sentence
    """

    exit_code = 3

    def __init__(self, path: str | os.PathLike[str], offset: int | None, defect: str) -> None:
        self.path, self.offset, self.defect = os.fspath(path), offset, printable(defect)
        where = self.path if offset is None else f"{self.path}: byte {offset:,}"
        super().__init__(f"{where}: {defect}")


class Unsupported(RefimplError):
    """Legal input that refimpl does not handle (a type, a version, an architecture)."""

    exit_code = 4


class Usage(RefimplError):
    """The caller asked for something that makes no sense for this input (an unknown recipe, say)."""

    exit_code = 2
