"""Where bytes come from: files read by ranges, the tensors they hold, and `open`, which tells kinds apart.

A range is checked against the file's size before anything is allocated; sizes are Python ints, so that no
product or sum can wrap. Nothing is mapped into memory: a file that shrinks meanwhile is an error, no signal.
"""

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from refimpl.errors import BadFile, Unsupported
from refimpl.quants.formats import Format

if TYPE_CHECKING:
    from refimpl.files.gguf import Gguf
    from refimpl.files.safetensors import Checkpoint

Bytes = NDArray[np.uint8]
PathLike = str | os.PathLike[str]

_KEEP_OPEN = 256  # parts of one model that hold a file descriptor; beyond, each read opens its file
_LFS = b"version https://git-lfs"


class Source(Protocol):
    """Bytes that can be read by ranges."""

    path: str
    size: int

    def read(self, offset: int, length: int) -> bytes: ...

    def read_into(self, offset: int, out: Bytes) -> None: ...

    def close(self) -> None: ...


def check_range(source: Source, offset: int, length: int) -> None:
    """Raise BadFile where [offset, offset + length) is not inside the source."""
    if offset < 0 or length < 0:
        raise ValueError(f"a range cannot be negative: {length} bytes at {offset}")
    if offset + length > source.size:
        left = max(0, source.size - offset)
        raise BadFile(source.path, offset, f"{length:,} bytes are needed here, the file has {left:,} left")


class LocalFile:
    """A regular file on this machine. Reads carry their offset, so threads may share it."""

    def __init__(self, path: PathLike, keep_open: bool = True) -> None:
        self.path = os.fspath(path)
        self._fd = -1
        fd = self._open()
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            os.close(fd)
            raise BadFile(self.path, None, "not a regular file")
        self.size = info.st_size
        if keep_open:
            self._fd = fd
        else:
            os.close(fd)

    def _open(self) -> int:
        try:
            # O_NONBLOCK: a named pipe must be refused below, not waited for
            return os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except (OSError, ValueError) as error:
            words = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise BadFile(self.path, None, words.lower()) from None

    def read(self, offset: int, length: int) -> bytes:
        """The bytes [offset, offset + length)."""
        check_range(self, offset, length)
        out = np.empty(length, np.uint8)
        self.read_into(offset, out)
        return out.tobytes()

    def read_into(self, offset: int, out: Bytes) -> None:
        """Fill `out` with the bytes from `offset` on."""
        check_range(self, offset, out.nbytes)
        fd = self._fd if self._fd >= 0 else self._open()
        try:
            left = out.reshape(-1).data
            while left:
                got = os.preadv(fd, [left], offset)
                if got == 0:
                    raise BadFile(self.path, offset, "the file became shorter while it was read")
                left, offset = left[got:], offset + got
        except OSError as error:
            raise BadFile(self.path, offset, f"cannot be read: {error.strerror}") from None
        finally:
            if fd != self._fd:
                os.close(fd)

    def close(self) -> None:
        """Give the file descriptor back; later reads open the file anew."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Memory:
    """Bytes in memory behind the same interface."""

    def __init__(self, data: bytes, path: str = "<memory>") -> None:
        self.path, self.data, self.size = path, data, len(data)

    def read(self, offset: int, length: int) -> bytes:
        """The bytes [offset, offset + length)."""
        check_range(self, offset, length)
        return self.data[offset : offset + length]

    def read_into(self, offset: int, out: Bytes) -> None:
        """Fill `out` with the bytes from `offset` on."""
        out.reshape(-1)[:] = np.frombuffer(self.read(offset, out.nbytes), np.uint8)

    def close(self) -> None:
        """Nothing to give back."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """Where one tensor lies, and how its bytes are to be read.

    shape  : NumPy order, rows first
    offset : bytes from the start of its file
    part   : index of that file in the model's `parts`
    """

    name: str
    format: Format
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    part: int = 0

    @property
    def n(self) -> int:
        """Weights in a row."""
        return self.shape[-1] if self.shape else 1

    @property
    def rows(self) -> int:
        """Rows, all leading axes together."""
        return prod(self.shape[:-1])

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.format.row_bytes(self.n)


class Defect(BadFile):
    """A region that breaks the layout of a file whose table of tensors is readable.

    code   : "unaligned", "past-end", "short", "overlap", "order", "gap", "trailing" or "total-size"
    tensor : the tensor it is about, None where it is about none
    fatal  : the tensor's bytes cannot be trusted: reading it raises this
    """

    def __init__(self, path: PathLike, offset: int, defect: str, code: str, tensor: str | None) -> None:
        super().__init__(path, offset, defect)
        self.code, self.tensor = code, tensor
        self.fatal = code in ("unaligned", "past-end", "short", "overlap")


class Model:
    """What a GGUF and a checkpoint have in common: parts, tensors, and rows read by ranges."""

    kind: str

    def __init__(self, path: PathLike, parts: Sequence[Source]) -> None:
        self.path = os.fspath(path)
        self.sources = list(parts)
        self.tensors: dict[str, Tensor] = {}
        self.defects: list[Defect] = []
        self._refused: dict[str, Defect] = {}

    @property
    def parts(self) -> list[str]:
        """Paths of the files, in order."""
        return [source.path for source in self.sources]

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(source.size for source in self.sources)

    def add_defects(self, defects: Sequence[Defect]) -> None:
        """Note region defects; the first fatal one of a tensor is what its reads raise."""
        self.defects += defects
        for defect in defects:
            if defect.fatal and defect.tensor is not None:
                self._refused.setdefault(defect.tensor, defect)

    def read(self, name: str, rows: slice | None = None, out: Bytes | None = None) -> Bytes:
        """Read rows of a tensor as stored.

        rows   : which rows, a slice of step 1 (None: all); leading axes count as rows, 1-D is one row
        out    : [R, row_bytes] uint8 to fill, or None
        return : [R, row_bytes] uint8

        Raises KeyError for a name the model lacks, BadFile where the tensor's region is defective.
        """
        tensor = self.tensors[name]
        if name in self._refused:
            raise self._refused[name]
        first, last, step = (rows or slice(None)).indices(tensor.rows)
        if step != 1:
            raise ValueError(f"rows need step 1, not {step}")
        row_bytes = tensor.row_bytes
        shape = (max(0, last - first), row_bytes)
        offset = tensor.offset + first * row_bytes
        source = self.sources[tensor.part]
        if out is None:
            check_range(source, offset, shape[0] * shape[1])
            out = np.empty(shape, np.uint8)
        elif out.shape != shape or out.dtype != np.uint8 or not out.flags.c_contiguous:
            raise ValueError(f"out must be contiguous uint8 {shape}, not {out.dtype} {out.shape}")
        source.read_into(offset, out)
        return out

    def close(self) -> None:
        """Give all file descriptors back."""
        for source in self.sources:
            source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def local_files(paths: Sequence[PathLike]) -> list[LocalFile]:
    """Open the parts of one model."""
    files: list[LocalFile] = []
    try:
        for path in paths:
            files.append(LocalFile(path, keep_open=len(paths) <= _KEEP_OPEN))
    except BadFile:
        for file in files:
            file.close()
        raise
    return files


def open(path: PathLike) -> "Gguf | Checkpoint":
    """Open a model: a .gguf (one shard of a split stands for all), a .safetensors, or an HF directory.

    Raises BadFile where the header cannot be read, Unsupported where it is of a kind we do not know.
    """
    from refimpl.files.gguf import Gguf
    from refimpl.files.safetensors import Checkpoint

    path = os.fspath(path)
    if os.path.isdir(path):
        return Checkpoint(path)
    file = LocalFile(path)
    start = file.read(0, min(len(_LFS), file.size))
    file.close()
    suffix = Path(path).suffix.lower()
    if start.startswith(_LFS):
        raise BadFile(path, 0, "a Git LFS pointer, not the file it stands for: fetch it with `git lfs pull`")
    if start.startswith(b"GGUF") or suffix == ".gguf":
        return Gguf(path)
    if suffix == ".safetensors" or start[8:9] == b"{":
        return Checkpoint(path)
    if not start:
        raise BadFile(path, 0, "the file is empty")
    raise Unsupported(f"{path}: neither GGUF nor safetensors")
