"""The plain GGUF writer: values to bytes, a header, and a whole file, written beside its place and renamed.

The reader's counterpart (files/gguf.py, files/metadata.py); it lays tensors out in the order given.
"""

import struct
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
from gguf.constants import GGUFValueType
from numpy.typing import NDArray

from refimpl.files.metadata import ARRAY, BOOL, NUMBERS, STRING, Array, parse_all
from refimpl.files.replace import replacing
from refimpl.files.source import PathLike
from refimpl.quants.formats import Format

Typed = Mapping[str, tuple[GGUFValueType, Any]]
Chunks = Iterable[bytes | NDArray[Any]]


def header_bytes(
    metadata: Typed | bytes,
    tensors: Iterable[tuple[str, Sequence[int], Format]],
    alignment: int = 32,
    version: int = 3,
) -> tuple[bytes, list[int], int]:
    """Header of a GGUF: everything before the data section, padding included.

    metadata : {key: (type, value)}, or key-value bytes as another file has them
    tensors  : (name, shape in NumPy order, format)
    return   : the bytes, each tensor's offset in the file, the whole file's size
    """
    keys = parse_all(metadata) if isinstance(metadata, bytes) else metadata
    if alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"an alignment is a power of two, not {alignment}")
    raw = metadata if isinstance(metadata, bytes) else encode(metadata)
    count, stated = len(keys), "general.alignment" in keys
    if not stated and alignment != 32:
        raw += encode({"general.alignment": (GGUFValueType.UINT32, alignment)})
        count += 1
    elif stated and parse_all(raw)["general.alignment"] != alignment:
        raise ValueError(f"general.alignment in the metadata is not {alignment}")
    infos, offsets, place = [], [], 0
    for name, shape, fmt in tensors:
        infos.append(
            encode_text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], fmt.id, place)
        )
        offsets.append(place)
        place += -(-prod(shape[:-1]) * fmt.row_bytes(shape[-1]) // alignment) * alignment
    table = b"".join(infos)
    head = b"GGUF" + struct.pack("<IQQ", version, len(infos), count) + raw + table
    head += bytes(-len(head) % alignment)
    return head, [len(head) + offset for offset in offsets], len(head) + place


def write(
    path: PathLike,
    metadata: Typed | bytes,
    tensors: Iterable[tuple[str, Sequence[int], Format, Chunks]],
    alignment: int = 32,
) -> None:
    """Write a GGUF: to a temporary file in the same directory, synced, then renamed over `path`.

    tensors : (name, shape in NumPy order, format, chunks of its bytes in order); chunks are drawn one by one
    """
    listed = list(tensors)
    head, offsets, size = header_bytes(metadata, [t[:3] for t in listed], alignment)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(head)
        for (name, shape, fmt, chunks), offset in zip(listed, offsets, strict=True):
            file.seek(offset)
            for chunk in chunks:
                file.write(
                    chunk
                    if isinstance(chunk, bytes)
                    else np.ascontiguousarray(chunk).reshape(-1).view(np.uint8).data
                )
            want = prod(shape[:-1]) * fmt.row_bytes(shape[-1])
            if file.tell() != offset + want:
                raise ValueError(f"{name}: {file.tell() - offset:,} bytes given, {want:,} needed")
        file.truncate(size)


def encode(metadata: Mapping[str, tuple[GGUFValueType, Any]]) -> bytes:
    """Write key-value bytes."""
    parts = []
    for key, (kind, value) in metadata.items():
        parts += [encode_text(key), struct.pack("<I", kind), _encode_value(GGUFValueType(kind), value)]
    return b"".join(parts)


def encode_text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def _encode_value(kind: GGUFValueType, value: Any) -> bytes:
    if kind == STRING:
        return encode_text(value)
    if kind == ARRAY:
        return _encode_array(value)
    if kind == BOOL and value not in (0, 1):
        raise ValueError(f"a bool cannot be {value!r}")
    return _numbers([value], NUMBERS[kind]).tobytes()


def _numbers(values: Any, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Numbers as dtype; integers that do not fit, or are none, are a ValueError."""
    got = np.asarray(values)
    if dtype.kind in "iu" and got.size:
        info = np.iinfo(dtype)
        if got.dtype.kind not in "iub" or int(got.min()) < info.min or int(got.max()) > info.max:
            raise ValueError(f"not all values fit {dtype}")
    return got.astype(dtype)


def _encode_array(values: Any) -> bytes:
    """An array: an Array as it is, a NumPy array by its dtype, a list by its first element."""
    if isinstance(values, Array):
        body = values.source.read(values.offset, values.end - values.offset)
        return struct.pack("<IQ", values.element, values.length) + body
    if isinstance(values, np.ndarray):
        if values.ndim != 1:
            raise ValueError(f"an array of the metadata has one axis, not shape {values.shape}")
        dtype = values.dtype.newbyteorder("<")
        kind = BOOL if dtype.kind == "b" else next((k for k, d in NUMBERS.items() if d == dtype), None)
        if kind is None:
            raise ValueError(f"GGUF has no arrays of {values.dtype}")
        return struct.pack("<IQ", kind, len(values)) + values.astype(dtype).tobytes()
    if not values:
        raise ValueError("an empty list has no element type: pass an empty NumPy array")
    first, count = values[0], len(values)
    if isinstance(first, str):
        return struct.pack("<IQ", STRING, count) + b"".join(map(encode_text, values))
    if isinstance(first, bool | int | float):
        kind = (
            BOOL
            if isinstance(first, bool)
            else int(GGUFValueType["INT32" if isinstance(first, int) else "FLOAT32"])
        )
        return struct.pack("<IQ", kind, count) + _numbers(values, NUMBERS[kind]).tobytes()
    return struct.pack("<IQ", ARRAY, count) + b"".join(map(_encode_array, values))
