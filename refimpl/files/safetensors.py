"""Hugging Face checkpoints: a .safetensors file, or a directory of shards with their index and config.json.

    u64 header length | header, JSON: {name: {"dtype", "shape", "data_offsets": [begin, end]}, …} | data

Offsets count from the end of the header. The ranges must tile the data: no hole, no overlap, no tail, so that
no byte of the file is outside the format's reach. The safetensors library is asked too; both must agree.
Source: safetensors 0.8, src/tensor.rs.
"""

import json
import os
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np

from refimpl.errors import BadFile, Unsupported
from refimpl.files.source import Bytes, Defect, LocalFile, Model, PathLike, Source, Tensor, local_files
from refimpl.quants.formats import BF16, F16, F32, Format

INDEX, CONFIG = "model.safetensors.index.json", "config.json"
HEADER_BYTES = 1 << 25
TENSORS = 1 << 16  # of one file; GLM-5.1 has 59,000 in all
_AXES = 32
_KEYS = {"dtype", "shape", "data_offsets"}

# dtype -> (weights, bytes) of the smallest whole number of bytes
_SIZES = {
    "BOOL": (1, 1), "U8": (1, 1), "I8": (1, 1), "F8_E5M2": (1, 1), "F8_E4M3": (1, 1), "F8_E8M0": (1, 1),
    "F8_E4M3FNUZ": (1, 1), "F8_E5M2FNUZ": (1, 1), "F4": (2, 1), "F6_E2M3": (4, 3), "F6_E3M2": (4, 3),
    "I16": (1, 2), "U16": (1, 2), "I32": (1, 4), "U32": (1, 4), "I64": (1, 8), "U64": (1, 8), "F64": (1, 8),
    "C64": (1, 8),
}  # fmt: skip
_FORMATS = {"F32": F32, "F16": F16, "BF16": BF16} | {
    name: Format(-1, name.lower(), weights, np.dtype((np.void, size)))
    for name, (weights, size) in _SIZES.items()
}


def parse_json(path: str, raw: bytes, base: int = 0) -> dict[str, Any]:
    """A JSON object without duplicate keys, of bounded size; anything else is BadFile at base + its place."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise BadFile(path, base + find_key(raw, twice, last=True), f"the key {twice!r} occurs twice")
        return made

    def refuse(word: str) -> None:
        raise BadFile(path, base + max(0, raw.find(word.encode())), f"{word} is not JSON")

    if len(raw) > HEADER_BYTES:
        raise BadFile(path, base, f"{len(raw):,} bytes of JSON are more than {HEADER_BYTES:,}")
    if raw.count(b"{") + raw.count(b"[") > 3 * TENSORS or raw.count(b",") > 8 * TENSORS:
        raise BadFile(path, base, f"the JSON holds more than {TENSORS:,} tensors can need")
    try:
        text = raw.decode()
        got = json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except UnicodeDecodeError as error:
        raise BadFile(path, base + error.start, "the JSON is not UTF-8") from None
    except json.JSONDecodeError as error:
        place = base + len(text[: error.pos].encode())
        raise BadFile(path, place, f"the JSON breaks off: {error.msg.lower()}") from None
    except RecursionError:
        raise BadFile(path, base, "the JSON nests too deep") from None
    except ValueError as error:  # an integer of thousands of digits
        raise BadFile(path, base, f"the JSON holds a number that is none: {error}") from None
    if not isinstance(got, dict):
        raise BadFile(path, base, "the JSON is not an object")
    return got


def find_key(raw: bytes, key: str, last: bool = False) -> int:
    """Where a key stands in JSON bytes, for error messages; 0 where it is spelled with escapes."""
    spelled = json.dumps(key, ensure_ascii=False).encode(errors="replace")
    return max(0, raw.rfind(spelled) if last else raw.find(spelled))


def read_header(source: Source, part: int = 0) -> tuple[list[Tensor], dict[str, str], int]:
    """Tensors of one .safetensors in file order, its __metadata__, and where its data starts."""
    path = source.path
    length = int.from_bytes(source.read(0, 8), "little")
    if not 2 <= length <= HEADER_BYTES:
        raise BadFile(path, 0, f"the header's length is {length:,}, not 2 to {HEADER_BYTES:,}")
    raw = source.read(8, length)
    if raw[:1] != b"{" or raw.rstrip(b" ")[-1:] != b"}":
        place = 8 if raw[:1] != b"{" else 8 + len(raw.rstrip(b" ")) - 1
        raise BadFile(path, place, "the header does not start with '{' or does not end with '}' and spaces")
    header, start = parse_json(path, raw, 8), 8 + length
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise BadFile(path, 8 + find_key(raw, "__metadata__"), "__metadata__ is not a map of strings")
    tensors = []
    for name, entry in header.items():
        try:
            tensors.append(_check_entry(name, entry, start, source.size - start, part))
        except ValueError as error:
            raise BadFile(path, 8 + find_key(raw, name), f"{name!r}: {error}") from None
    tensors.sort(key=lambda t: (t.offset, t.nbytes))
    _check_tiling(source, raw, tensors, start)
    return tensors, metadata, start


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63  # a bool is no size


def _check_entry(name: str, entry: object, start: int, room: int, part: int) -> Tensor:
    """One entry of the header as a Tensor. Raises ValueError."""
    if not isinstance(entry, dict) or entry.keys() != _KEYS:
        raise ValueError("the entry is not one of dtype, shape and data_offsets")
    dtype, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
    fmt = _FORMATS.get(dtype) if isinstance(dtype, str) else None
    if fmt is None:
        raise ValueError(f"the dtype {dtype!r} does not exist")
    if not isinstance(shape, list) or len(shape) > _AXES or not all(map(_is_size, shape)):
        raise ValueError(f"the shape is not a list of at most {_AXES} sizes")
    if not isinstance(span, list) or len(span) != 2 or not all(map(_is_size, span)):
        raise ValueError("data_offsets is not a pair of sizes")
    begin, end = span
    if not begin <= end <= room:
        raise ValueError(f"the range {begin:,} to {end:,} is not inside the data's {room:,} bytes")
    blocks, rest = divmod(prod(shape), fmt.weights)
    if rest or blocks * fmt.block.itemsize != end - begin:
        raise ValueError(
            f"the shape {shape} of {dtype} does not fill a range of {end - begin:,} bytes exactly"
        )
    return Tensor(name, fmt, tuple(shape), start + begin, end - begin, part)


def _check_tiling(source: Source, raw: bytes, tensors: list[Tensor], start: int) -> None:
    """Sorted ranges must follow each other from the first byte of the data to the last of the file."""
    path = source.path
    first = Tensor("the header", F32, (), start, 0)
    for before, tensor in pairwise([first, *tensors]):
        end = before.offset + before.nbytes
        if tensor.offset != end:
            word = "overlaps" if tensor.offset < end else "leaves a hole after"
            defect = f"{tensor.name!r} {word} {before.name!r}: it starts at {tensor.offset:,}, not {end:,}"
            raise BadFile(path, 8 + find_key(raw, tensor.name), defect)
    end = max((t.offset + t.nbytes for t in tensors), default=start)
    if end != source.size:
        raise BadFile(path, end, f"{source.size - end:,} bytes after the last tensor belong to no tensor")


def _ask_library(path: str, tensors: list[Tensor]) -> None:
    """The safetensors library must read the same names."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            names = set(file.keys())
    except SafetensorError as error:
        raise BadFile(path, None, f"the safetensors library refuses it: {error}") from None
    if names != {tensor.name for tensor in tensors}:
        raise BadFile(path, 8, "the safetensors library reads other tensor names")


class Checkpoint(Model):
    """A Hugging Face checkpoint directory, or one .safetensors file.

    kind   : "hf" or "safetensors"
    config : config.json; empty for a file or where the directory has none
    """

    def __init__(self, path: PathLike) -> None:
        path = os.fspath(path)
        self.kind = "hf" if os.path.isdir(path) else "safetensors"
        self.config: dict[str, Any] = {}
        index: dict[str, Any] | None = None
        shards = [path]
        if self.kind == "hf":
            index, shards = _find_shards(path)
            if os.path.lexists(os.path.join(path, CONFIG)):
                self.config = _read_json(os.path.join(path, CONFIG))
        super().__init__(path, local_files(shards))
        try:
            self._gather()
            if index is not None:
                self._check_index(index)
        except BaseException:
            self.close()
            raise

    def _gather(self) -> None:
        for part, source in enumerate(self.sources):
            tensors, _, _ = read_header(source, part)
            _ask_library(source.path, tensors)
            for t in tensors:
                if t.name in self.tensors:
                    other = self.parts[self.tensors[t.name].part]
                    raise BadFile(source.path, None, f"the tensor {t.name!r} is also in {other}")
                self.tensors[t.name] = t

    def _check_index(self, index: dict[str, Any]) -> None:
        """The index and the shards must name the same tensors in the same files."""
        path = os.path.join(self.path, INDEX)
        mapped: dict[str, str] = index["weight_map"]
        for name, shard in mapped.items():
            tensor = self.tensors.get(name)
            if tensor is None or os.path.basename(self.parts[tensor.part]) != shard:
                raise BadFile(path, None, f"{name!r} is not in {shard}, where the index has it")
        for name, tensor in self.tensors.items():
            if name not in mapped:
                raise BadFile(self.parts[tensor.part], None, f"the tensor {name!r} is not in the index")
        metadata = index.get("metadata")
        stated = metadata.get("total_size") if isinstance(metadata, dict) else None
        found = sum(tensor.nbytes for tensor in self.tensors.values())
        if stated is not None and stated != found:
            # stale in many honest checkpoints, and nothing here depends on it: noted, not refused
            words = f"total_size is {stated!r}, the shards hold {found:,} bytes of tensors"
            self.add_defects([Defect(path, 0, words, "total-size", None)])

    def read(self, name: str, rows: slice | None = None, out: Bytes | None = None) -> Bytes:
        """Read rows of a tensor as stored (Model.read). Raises Unsupported for all but F32, F16 and BF16."""
        fmt = self.tensors[name].format
        if fmt.id < 0:
            raise Unsupported(f"{self.path}: {name} is of dtype {fmt.name}; f32, f16 and bf16 are read")
        return super().read(name, rows, out)


def _read_json(path: str) -> dict[str, Any]:
    file = LocalFile(path)
    try:
        if file.size > HEADER_BYTES:
            raise BadFile(path, 0, f"{file.size:,} bytes of JSON are more than {HEADER_BYTES:,}")
        return parse_json(path, file.read(0, file.size))
    finally:
        file.close()


def _find_shards(folder: str) -> tuple[dict[str, Any] | None, list[str]]:
    """The index of a directory, where it has one, and the paths of its shards."""
    path = os.path.join(folder, INDEX)
    if not os.path.lexists(path):
        names = sorted(name for name in os.listdir(folder) if name.endswith(".safetensors"))
        if not names:
            raise Unsupported(f"{folder}: a directory without .safetensors")
        if "model.safetensors" in names:
            names = ["model.safetensors"]
        return None, [os.path.join(folder, name) for name in names]
    index = _read_json(path)
    mapped = index.get("weight_map")
    if not isinstance(mapped, dict) or not mapped:
        raise BadFile(path, 0, "the index has no weight_map")
    for name, shard in mapped.items():
        # a link inside the directory may lead outside (the hub's cache does so); a name may not
        if not isinstance(shard, str) or shard in ("", ".", "..") or set(shard) & set("/\\\0"):
            raise BadFile(
                path, 0, f"{name!r} is mapped to {shard!r}, which is not the name of a file beside it"
            )
    return index, [os.path.join(folder, shard) for shard in sorted(set(mapped.values()))]
