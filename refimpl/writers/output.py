"""How a large file comes into being: piece by piece, from many threads, under another name until it is whole.

    .NAME.partial   the file as it grows; a lock on it keeps a second run out
    .NAME.journal   which job it is (a fingerprint), and how many of its pieces are safe on the disk

A run that is killed leaves these two and never a NAME; `resume` goes on behind the last piece in the journal,
and a run without it starts over. Pieces are cut the same way for any number of threads.
"""

import fcntl
import hashlib
import json
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from refimpl import engine
from refimpl.errors import BadFile, Usage

PathLike = str | os.PathLike[str]
Progress = Callable[[int, int], None]  # bytes of the output done, bytes in all
T = TypeVar("T")

JOURNAL_SECONDS = 10.0  # between two syncs of the partial file, each followed by a new journal
SPARE = 1 << 20  # bytes of free space that the output must leave, for the journal and the directory


@dataclass(frozen=True)
class Piece(Generic[T]):
    """Bytes that lie together in the output; `what` tells the producer which."""

    offset: int
    nbytes: int
    what: T


def check_target(target: PathLike, inputs: Sequence[PathLike], force: bool) -> None:
    """Raise Usage where the output exists (unless `force`), is a directory, or is one of the inputs."""
    path = os.fspath(target)
    for one in inputs:
        if os.path.exists(path) and os.path.exists(one) and os.path.samefile(path, one):
            raise Usage(f"{path} is an input of this job; an output never overwrites its input")
    if os.path.isdir(path):
        raise Usage(f"{path} is a directory; the output is a file")
    if os.path.lexists(path) and not force:
        raise Usage(f"{path} exists; --force overwrites it")
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        raise BadFile(path, None, f"there is no directory {folder}")


def identify(paths: Sequence[PathLike]) -> list[list[Any]]:
    """What tells whether the inputs of an unfinished job are still the same: names, sizes, times of change."""
    found = []
    for path in paths:
        info = os.stat(path)
        found.append([os.path.abspath(path), info.st_size, info.st_mtime_ns])
    return found


def write_pieces(
    target: PathLike,
    head: bytes,
    size: int,
    pieces: Iterable[Piece[T]],
    produce: Callable[[T], NDArray[Any]],
    job: object,
    resume: bool = False,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> int:
    """Write head and pieces to the partial file, sync it, and rename it over `target`.

    size    : bytes of the whole; what no piece covers is zero
    produce : the bytes of one piece; called in threads
    job     : what decides the bytes besides the head, as JSON; a partial file of another job is not resumed
    return  : pieces that an earlier run had done

    Raises Usage where the disk is too full or another run writes the same file, BadFile where writing fails.
    """
    path = os.path.abspath(os.fspath(target))
    folder, name = os.path.split(path)
    partial, journal = (os.path.join(folder, f".{name}.{what}") for what in ("partial", "journal"))
    fingerprint = hashlib.sha256(head + json.dumps([size, job], sort_keys=True).encode()).hexdigest()
    try:
        fd = _open_locked(partial)
    except OSError as error:
        raise BadFile(path, None, f"cannot be written: {error.strerror}") from None
    kept = False
    try:
        done = _resume_from(fd, path, journal, fingerprint) if resume else 0
        if not done and os.fstat(fd).st_size:  # a file cut to nothing is flushed by ext4 when it is closed
            os.ftruncate(fd, 0)
        _require_space(folder, fd, size)
        os.ftruncate(fd, size)
        _pwrite(fd, memoryview(head), 0)
        _write_rest(fd, size, pieces, produce, _Journal(journal, fingerprint, done), jobs, progress)
        _publish(fd, partial, path, journal)
        kept = True
        return done
    except OSError as error:
        raise BadFile(path, None, f"cannot be written: {error.strerror}") from None
    except KeyboardInterrupt:
        kept = True
        raise
    finally:
        if not kept and not resume:
            _remove(partial, journal)
        os.close(fd)


@dataclass
class _Journal:
    """The journal file, and how far it is."""

    path: str
    fingerprint: str
    done: int

    def save(self) -> None:
        fresh = f"{self.path}.new"
        with open(fresh, "w", encoding="utf-8") as file:
            json.dump({"fingerprint": self.fingerprint, "done": self.done}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, self.path)


def _write_rest(
    fd: int,
    size: int,
    pieces: Iterable[Piece[T]],
    produce: Callable[[T], NDArray[Any]],
    journal: _Journal,
    jobs: int | None,
    progress: Progress | None,
) -> None:
    def work(piece: Piece[T]) -> None:
        data = produce(piece.what)
        assert data.nbytes == piece.nbytes, (piece, data.shape, data.dtype)
        _pwrite(fd, data.reshape(-1).view(np.uint8).data, piece.offset)

    remaining = iter(pieces)
    written = sum(piece.nbytes for piece in islice(remaining, journal.done))
    saved = time.monotonic()
    for piece, _ in engine.map_units(remaining, work, jobs):
        written += piece.nbytes
        journal.done += 1
        if progress is not None:
            progress(written, size)
        if time.monotonic() - saved >= JOURNAL_SECONDS:
            os.fdatasync(fd)
            journal.save()
            saved = time.monotonic()


def _open_locked(partial: str) -> int:
    """The partial file, open for reading and writing, ours alone. Raises Usage where another run holds it."""
    fd = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode) or info.st_nlink != 1:
            raise Usage(f"{partial} is not a file of ours; remove it")
    except BlockingIOError:
        os.close(fd)
        raise Usage(f"another run is writing {partial}") from None
    except BaseException:
        os.close(fd)
        raise
    return fd


def _resume_from(fd: int, target: str, journal: str, fingerprint: str) -> int:
    """How many pieces of this very job are on the disk already."""
    if os.fstat(fd).st_size == 0 or not os.path.exists(journal):
        return 0
    try:
        with open(journal, encoding="utf-8") as file:
            said = json.loads(file.read(4096))
        whose, done = said["fingerprint"], said["done"]
    except (ValueError, KeyError, TypeError):
        raise BadFile(journal, None, "not a journal; remove it to start over") from None
    if whose != fingerprint:
        raise Usage(f"the unfinished {target} is of another job; without --resume it is started over")
    if not isinstance(done, int) or done < 0:
        raise BadFile(journal, None, "not a journal; remove it to start over")
    return done


def _require_space(folder: str, fd: int, size: int) -> None:
    have = shutil.disk_usage(folder).free + os.fstat(fd).st_blocks * 512
    if size + SPARE > have:
        raise Usage(f"the output needs {size:,} bytes, the disk has {have:,} left")


def _pwrite(fd: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written


def _publish(fd: int, partial: str, target: str, journal: str) -> None:
    """Sync the file, give it the mode of a new file, and move it to its name."""
    os.fsync(fd)
    mask = os.umask(0)
    os.umask(mask)
    os.fchmod(fd, 0o666 & ~mask)
    os.replace(partial, target)
    folder = os.open(os.path.dirname(target), os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    _remove(journal)


def _remove(*paths: str) -> None:
    for path in paths:
        if os.path.lexists(path):
            os.unlink(path)
