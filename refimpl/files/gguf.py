"""GGUF files, versions 2 and 3: header, table of tensors, splits; and their writer, `write`.

    magic "GGUF" | version u32 | tensor count u64 | key count u64 | keys | tensor infos | pad | data
    tensor info : name (u64 length, bytes) | axes u32 | lengths u64, innermost first | type u32 | offset u64

The data section starts at the next multiple of general.alignment (32 where absent); offsets count from there.
Source: docs/gguf.md and ggml/src/gguf.cpp, llama.cpp 0c1e570.
"""

import os
import re
import struct
from dataclasses import replace
from math import prod

from gguf.constants import GGUFValueType

from refimpl.errors import BadFile, Unsupported
from refimpl.files.encode import header_bytes, write
from refimpl.files.metadata import KEYS, Cursor, Metadata
from refimpl.files.regions import check_regions
from refimpl.files.source import LocalFile, Model, PathLike, Source, Tensor, local_files
from refimpl.quants.formats import Format, known

__all__ = ["GGUFValueType", "Gguf", "Header", "header_bytes", "read_header", "write"]

TENSORS = 1 << 15  # real files have under 3,000
ALIGNMENT = 1 << 24
_SHARD = re.compile(r"(?P<prefix>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)
_SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")


class Header:
    """What one file says before its data.

    tensors      : in table order, offsets from the start of the file
    header_bytes : where the last tensor info ends
    data_offset  : where the data section starts
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.metadata = Metadata(source.path)
        self.tensors: list[Tensor] = []
        cursor = Cursor(source)
        self.version = _read_version(cursor)
        count, keys = _read_counts(cursor)
        self.metadata_offset = cursor.position
        for _ in range(keys):
            self.metadata.parse(cursor)
        self.metadata_end = cursor.position
        self.alignment = _read_alignment(source, self.metadata)
        relative = [_read_tensor(cursor) for _ in range(count)]
        self.header_bytes = cursor.position
        self.data_offset = -(-cursor.position // self.alignment) * self.alignment
        names: set[str] = set()
        for place, name, fmt, shape, offset, nbytes in relative:
            if name in names:
                raise cursor.fail(f"the tensor name {name!r} occurs twice", place)
            names.add(name)
            self.tensors.append(Tensor(name, fmt, shape, offset + self.data_offset, nbytes))


def read_header(source: Source) -> Header:
    """Read the header of one file. Raises BadFile or Unsupported."""
    return Header(source)


def _read_version(cursor: Cursor) -> int:
    magic = cursor.take(4, "the magic")
    if magic == b"FUGG":
        raise Unsupported(f"{cursor.source.path}: a byte-swapped GGUF (big-endian)")
    if magic != b"GGUF":
        raise cursor.fail(f"the magic is {magic!r}, not b'GGUF'", 0)
    version = cursor.u32("the version")
    if version in (2, 3):
        return version
    if version and version & 0xFFFF == 0:
        raise Unsupported(f"{cursor.source.path}: a big-endian GGUF (its version reads {version:#010x})")
    raise Unsupported(f"{cursor.source.path}: GGUF version {version} (versions 2 and 3 are read)")


def _read_counts(cursor: Cursor) -> tuple[int, int]:
    """Tensor and key counts, each bounded by what the file could hold."""
    left = cursor.source.size - cursor.position - 16
    counts = []
    for what, least, limit in (("tensors", 33, TENSORS), ("keys", 14, KEYS)):
        start = cursor.position
        count = cursor.u64(f"the number of {what}")
        if count * least > max(left, 0):
            raise cursor.fail(f"{count:,} {what} do not fit in a file of {cursor.source.size:,} bytes", start)
        if count > limit:
            raise cursor.fail(f"{count:,} {what} are more than {limit:,}", start)
        counts.append(count)
    return counts[0], counts[1]


def _read_alignment(source: Source, metadata: Metadata) -> int:
    key = "general.alignment"
    if key not in metadata:
        return 32
    offset, kind, value = metadata.offsets[key], metadata.types[key], metadata[key]
    if kind != GGUFValueType.UINT32:
        raise BadFile(source.path, offset, f"{key} is {kind.name}, not UINT32")
    if value == 0 or value & (value - 1) or value > ALIGNMENT:
        raise BadFile(source.path, offset, f"{key} is {value:,}, not a power of two up to {ALIGNMENT:,}")
    return int(value)


def _read_tensor(cursor: Cursor) -> tuple[int, str, Format, tuple[int, ...], int, int]:
    """One row of the table: where it stands, name, format, shape, offset in the data section, bytes."""
    start = cursor.position
    raw = cursor.text("a tensor's name", 63)
    try:
        name = raw.decode()
    except UnicodeDecodeError:
        raise cursor.fail("a tensor's name is not UTF-8", start) from None
    if not name or "\0" in name:
        raise cursor.fail("a tensor's name is empty" if not name else "a tensor's name holds a NUL", start)
    at = cursor.position
    axes = cursor.u32("a number of axes")
    if not 1 <= axes <= 4:
        raise cursor.fail(f"{name!r} has {axes:,} axes, not 1 to 4", at)
    at = cursor.position
    shape = struct.unpack(f"<{axes}Q", cursor.take(8 * axes, "a shape"))[::-1]
    if 0 in shape or prod(shape) >= 1 << 63:
        raise cursor.fail(
            f"{name!r} has shape {list(shape)}: no axis may be 0, and 2**63 weights are too many", at
        )
    at = cursor.position
    kind, offset = struct.unpack("<IQ", cursor.take(12, "a type and an offset"))
    fmt = known(kind)
    if fmt is None:
        raise cursor.fail(
            f"{name!r} has a type id that does not exist (or is newer than the gguf package)", at
        )
    if shape[-1] % fmt.weights:
        raise cursor.fail(
            f"{name!r}: rows of {shape[-1]:,} weights, {fmt.name} blocks hold {fmt.weights}", at
        )
    nbytes = prod(shape) // fmt.weights * fmt.block.itemsize
    if nbytes >= 1 << 63 or offset >= 1 << 63:
        raise cursor.fail(f"{name!r}: {nbytes:,} bytes at offset {offset:,} overflow 63 bits", at + 4)
    return start, name, fmt, shape, offset, nbytes


class Gguf(Model):
    """A GGUF file, or a split one as a whole.

    metadata     : keys of the (first) file; arrays are lazy
    alignment    : general.alignment
    data_offset  : start of the (first) file's data section
    header_bytes : end of the (first) file's table of tensors
    """

    kind = "gguf"

    def __init__(self, path: PathLike) -> None:
        file = LocalFile(path)
        try:
            header = Header(file)
            shards = _shard_paths(os.fspath(path), header)
        except BaseException:
            file.close()
            raise
        if len(shards) == 1:
            super().__init__(path, [file])
            self._gather([header])
            return
        file.close()
        super().__init__(path, local_files(shards))
        try:
            headers = [Header(source) for source in self.sources]
            _check_shards(headers)
            self._gather(headers)
        except BaseException:
            self.close()
            raise

    def _gather(self, headers: list[Header]) -> None:
        first = headers[0]
        self.metadata, self.version, self.alignment = first.metadata, first.version, first.alignment
        self.data_offset, self.header_bytes = first.data_offset, first.header_bytes
        self._metadata_span = first.metadata_offset, first.metadata_end
        for part, header in enumerate(headers):
            for tensor in header.tensors:
                if tensor.name in self.tensors:
                    other = self.parts[self.tensors[tensor.name].part]
                    raise BadFile(header.source.path, None, f"the tensor {tensor.name!r} is also in {other}")
                self.tensors[tensor.name] = replace(tensor, part=part) if part else tensor
            self.add_defects(check_regions(header))

    def raw_metadata(self) -> bytes:
        """The (first) file's key-value bytes, as stored."""
        start, end = self._metadata_span
        return self.sources[0].read(start, end - start)


def _split_values(header: Header) -> tuple[int, int, int] | None:
    """split.no, split.count, split.tensors.count; None where the file is whole."""
    metadata, path = header.metadata, header.source.path
    values = []
    for key, absent in zip(_SPLIT_KEYS, (0, 0, -1), strict=True):
        value = metadata.get(key, absent)
        if not isinstance(value, int) or isinstance(value, bool) or (key in metadata and value < 0):
            raise BadFile(path, metadata.offsets[key], f"{key} is not a count: {value!r}")
        values.append(value)
    number, count, total = values
    if number >= max(count, 1):
        raise BadFile(path, metadata.offsets["split.no"], f"split.no is {number} of split.count {count}")
    if count == 1 and total not in (-1, len(header.tensors)):
        offset = metadata.offsets[_SPLIT_KEYS[2]]
        raise BadFile(path, offset, f"split.tensors.count is {total:,}, the file has {len(header.tensors):,}")
    return (number, count, total) if count > 1 else None


def _shard_paths(path: str, header: Header) -> list[str]:
    """Paths of all shards, from the name of one. They stay in its directory."""
    split = _split_values(header)
    if split is None:
        return [path]
    number, count, _ = split
    directory, name = os.path.split(path)
    match = _SHARD.fullmatch(name)
    if match is None or (int(match["number"]), int(match["count"])) != (number + 1, count):
        offset = header.metadata.offsets["split.count"]
        defect = f"shard {number + 1} of {count} by its metadata, but not by its name ({name})"
        raise BadFile(path, offset, defect)
    names = [f"{match['prefix']}-{i + 1:05}-of-{count:05}.gguf" for i in range(count)]
    return [os.path.join(directory, name) for name in names]


def _check_shards(headers: list[Header]) -> None:
    """Every shard must be the one its name says, and agree with the first on how much there is."""
    first, found = _split_values(headers[0]), sum(len(header.tensors) for header in headers)
    for number, header in enumerate(headers):
        path, split = header.source.path, _split_values(header)
        if split is None or first is None:
            raise BadFile(
                path, None, f"shard {number + 1} of {len(headers)} by its name, but not by its metadata"
            )
        for key, said, expected in zip(_SPLIT_KEYS, split, (number, len(headers), first[2]), strict=True):
            if said != expected:
                defect = f"{key} is {said:,}, not {expected:,} (shard {number + 1} of {len(headers)})"
                raise BadFile(path, header.metadata.offsets.get(key), defect)
        if split[2] not in (-1, found):
            offset = header.metadata.offsets[_SPLIT_KEYS[2]]
            raise BadFile(
                path, offset, f"{_SPLIT_KEYS[2]} is {split[2]:,}, the shards hold {found:,} tensors"
            )
