"""GGUF's key-value section: a cursor that never trusts a length, and values decoded when asked for.

    key : u64 length, bytes | type : u32 | value
    value of an array : element type u32, count u64, elements      (of strings: u64 length, bytes each)

Source: docs/gguf.md and ggml/src/gguf.cpp, llama.cpp 0c1e570.
"""

import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, overload

import numpy as np
from gguf.constants import GGUFValueType

from refimpl.errors import BadFile
from refimpl.files.source import Memory, Source

# Limits on what a header may cost. Real ones have under 100 keys, 0.9 million strings and 25 MiB.
HEADER_BYTES = 1 << 27
KEYS = 1 << 14
STRINGS = 1 << 21
ARRAYS = 1 << 16
TEXT_BYTES = 1 << 24
DEPTH = 8

_WINDOW = 1 << 20
_KEPT_TEXT = 256
_U64 = struct.Struct("<Q")
NUMBERS: dict[int, np.dtype[Any]] = {
    int(GGUFValueType[name]): np.dtype(dtype)
    for name, dtype in {
        "UINT8": "u1", "INT8": "i1", "UINT16": "<u2", "INT16": "<i2", "UINT32": "<u4", "INT32": "<i4",
        "UINT64": "<u8", "INT64": "<i8", "FLOAT32": "<f4", "FLOAT64": "<f8", "BOOL": "u1",
    }.items()
}  # fmt: skip
BOOL, STRING, ARRAY = int(GGUFValueType.BOOL), int(GGUFValueType.STRING), int(GGUFValueType.ARRAY)


class Cursor:
    """Walks a source forward through a small window; every step is checked against the file's end."""

    def __init__(self, source: Source, position: int = 0) -> None:
        self.source, self.position = source, position
        self.strings = self.arrays = 0
        self._base, self._window = position, b""

    def fail(self, defect: str, offset: int | None = None) -> BadFile:
        """The error for a defect, at the cursor or at `offset`."""
        return BadFile(self.source.path, self.position if offset is None else offset, defect)

    def need(self, length: int, what: str) -> None:
        """Raise BadFile unless `length` more bytes are in the file and in the header's limit."""
        left = self.source.size - self.position
        if length > left:
            raise self.fail(f"{what} needs {length:,} bytes, the file has {left:,} left")
        if self.position + length > HEADER_BYTES:
            raise self.fail(f"{what} of {length:,} bytes makes the header longer than {HEADER_BYTES:,} bytes")

    def look(self, length: int) -> tuple[bytes, int]:
        """A window of at least `length` bytes (need() first) and the cursor's place in it."""
        at = self.position - self._base
        if at < 0 or at + length > len(self._window):
            size = min(max(length, _WINDOW), self.source.size - self.position)
            self._base, self._window, at = self.position, self.source.read(self.position, size), 0
        return self._window, at

    def take(self, length: int, what: str) -> bytes:
        """The next `length` bytes."""
        self.need(length, what)
        window, at = self.look(length)
        self.position += length
        return window[at : at + length]

    def skip(self, length: int, what: str) -> None:
        """Step over bytes without reading them."""
        self.need(length, what)
        self.position += length

    def u32(self, what: str) -> int:
        """The next 4 bytes as an unsigned integer."""
        return int.from_bytes(self.take(4, what), "little")

    def u64(self, what: str) -> int:
        """The next 8 bytes as an unsigned integer."""
        return int.from_bytes(self.take(8, what), "little")

    def text(self, what: str, limit: int) -> bytes:
        """The next string, as bytes."""
        start = self.position
        length = self.u64(f"the length of {what}")
        if length > limit and length <= self.source.size - self.position:
            raise self.fail(f"{what} is {length:,} bytes long, more than {limit:,}", start)
        self.need(length, what)
        return self.take(length, what)

    def skip_strings(self, count: int, what: str) -> None:
        """Step over `count` strings without decoding them."""
        self.strings += count
        if self.strings > STRINGS:
            raise self.fail(f"{what} brings the header to {self.strings:,} strings, more than {STRINGS:,}")
        unpack, left = _U64.unpack_from, count
        while left:
            self.need(8, f"the length of a string of {what}")
            window, at = self.look(8)
            last, end = at, len(window) - 8
            while left and at <= end:
                last = at
                at += 8 + unpack(window, at)[0]
                left -= 1
            self.position = self._base + last + 8
            self.skip(at - last - 8, f"a string of {what}")


class Array(Sequence[Any]):
    """An array of the metadata, read from the file when first used.

    element : GGUFValueType of its elements
    """

    def __init__(self, source: Source, offset: int, end: int, element: int, length: int) -> None:
        self.source, self.offset, self.end = source, offset, end
        self.element, self.length = GGUFValueType(element), length
        self._values: Any = None

    def values(self) -> Any:
        """All elements: a NumPy array of numbers or bools, or a list of strings or Arrays."""
        if self._values is None:
            cursor = Cursor(self.source, self.offset)
            if self.element == STRING:
                self._values = self._read_texts()
            elif self.element == ARRAY:
                self._values = [_skip_array(cursor, "a nested array", 1) for _ in range(self.length)]
            else:
                raw = np.empty(self.end - self.offset, np.uint8)
                self.source.read_into(self.offset, raw)
                self._values = raw.view(np.bool_ if self.element == BOOL else NUMBERS[self.element])
        return self._values

    def _read_texts(self) -> list[str]:
        raw, at, texts = self.source.read(self.offset, self.end - self.offset), 0, []
        for _ in range(self.length):
            start = at + 8
            at = start + _U64.unpack_from(raw, at)[0]
            try:
                texts.append(raw[start:at].decode())
            except UnicodeDecodeError:
                raise BadFile(self.source.path, self.offset + start, "a string is not UTF-8") from None
        return texts

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        got = self.values()[index]
        return got.tolist() if isinstance(got, np.ndarray | np.generic) else got

    def __iter__(self) -> Iterator[Any]:
        values = self.values()
        return iter(values.tolist() if isinstance(values, np.ndarray) else values)

    def __len__(self) -> int:
        return self.length

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<Array of {self.length:,} {self.element.name}>"


class Metadata(Mapping[str, Any]):
    """The keys of a GGUF, in file order. Long strings and arrays are read from the file when asked for."""

    def __init__(self, path: str = "") -> None:
        self.path = path
        self.types: dict[str, GGUFValueType] = {}
        self.offsets: dict[str, int] = {}
        self._values: dict[str, Any] = {}
        self._long: dict[str, tuple[Source, int, int]] = {}

    def __getitem__(self, key: str) -> Any:
        if key in self._long:
            source, offset, length = self._long[key]
            return source.read(offset, length).decode()
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"<Metadata of {len(self)} keys>"

    def typed(self, skip: Sequence[str] = ()) -> dict[str, tuple[GGUFValueType, Any]]:
        """The form that gguf.write takes, but for the keys in `skip`."""
        return {key: (self.types[key], self[key]) for key in self if key not in skip}

    def parse(self, cursor: Cursor) -> None:
        """Read one key and its value."""
        start = cursor.position
        raw = cursor.text("a key", 65_535)
        if not raw or b"\0" in raw or not raw.isascii():
            raise cursor.fail("a key is empty" if not raw else "a key is not plain ASCII", start)
        key, at = raw.decode(), cursor.position
        if key in self._values:
            raise cursor.fail(f"the key {key!r} occurs twice", start)
        kind = cursor.u32(f"the type of {key!r}")
        if kind not in NUMBERS and kind not in (STRING, ARRAY):
            raise cursor.fail(f"{key!r} has value type {kind}, which does not exist", at)
        self.types[key], self.offsets[key] = GGUFValueType(kind), cursor.position
        if kind == ARRAY:
            self._values[key] = _skip_array(cursor, repr(key), 0)
        elif kind == STRING:
            self._values[key] = self._parse_text(cursor, key)
        else:
            self._values[key] = _parse_number(cursor, kind, key)

    def _parse_text(self, cursor: Cursor, key: str) -> str | None:
        text = cursor.text(f"the value of {key!r}", TEXT_BYTES)
        start = cursor.position - len(text)
        try:
            value = text.decode()
        except UnicodeDecodeError:
            raise cursor.fail(f"the value of {key!r} is not UTF-8", start) from None
        if len(text) <= _KEPT_TEXT:
            return value
        self._long[key] = cursor.source, start, len(text)
        return None


def _parse_number(cursor: Cursor, kind: int, key: str) -> int | float | bool:
    start, dtype = cursor.position, NUMBERS[kind]
    value = np.frombuffer(cursor.take(dtype.itemsize, f"the value of {key!r}"), dtype)[0].item()
    if kind == BOOL:
        if value not in (0, 1):
            raise cursor.fail(f"{key!r} is a bool of value {value}", start)
        return bool(value)
    return value  # type: ignore[no-any-return]


def _skip_array(cursor: Cursor, what: str, depth: int) -> Array:
    """Check an array's lengths, step over it, and return its lazy form."""
    start = cursor.position
    element = cursor.u32(f"the element type of {what}")
    count = cursor.u64(f"the length of {what}")
    first = cursor.position
    if element in NUMBERS:
        cursor.skip(count * NUMBERS[element].itemsize, what)
        if element == BOOL:
            _check_bools(cursor, first, what)
    elif element == STRING:
        if count * 8 > cursor.source.size - first:
            raise cursor.fail(f"{what} claims {count:,} strings, more than the file can hold", start)
        cursor.skip_strings(count, what)
    elif element == ARRAY:
        if depth + 1 >= DEPTH:
            raise cursor.fail(f"{what} nests arrays more than {DEPTH} deep", start)
        if count * 12 > cursor.source.size - first:
            raise cursor.fail(f"{what} claims {count:,} arrays, more than the file can hold", start)
        cursor.arrays += count
        if cursor.arrays > ARRAYS:
            raise cursor.fail(
                f"{what} brings the header to {cursor.arrays:,} arrays, more than {ARRAYS:,}", start
            )
        for _ in range(count):
            _skip_array(cursor, what, depth + 1)
    else:
        raise cursor.fail(f"{what} has elements of type {element}, which does not exist", start)
    return Array(cursor.source, first, cursor.position, element, count)


def _check_bools(cursor: Cursor, first: int, what: str) -> None:
    """Raise BadFile where a byte between `first` and the cursor is neither 0 nor 1."""
    for start in range(first, cursor.position, _WINDOW):
        raw = cursor.source.read(start, min(_WINDOW, cursor.position - start))
        bad = np.frombuffer(raw, np.uint8) > 1
        if bad.any():
            at = int(np.argmax(bad))
            raise cursor.fail(
                f"element {start + at - first:,} of {what} is a bool of value {raw[at]}", start + at
            )


def parse_all(raw: bytes) -> Metadata:
    """Read key-value bytes up to their end."""
    cursor, metadata = Cursor(Memory(raw)), Metadata()
    while cursor.position < len(raw):
        metadata.parse(cursor)
    return metadata
