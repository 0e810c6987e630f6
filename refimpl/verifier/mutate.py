"""A model held in memory so that a control can damage it on purpose, and ways to do so."""

import shutil
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl import quants
from refimpl.files import encode, names
from refimpl.files import source as model_files
from refimpl.files.gguf import Gguf
from refimpl.files.safetensors import Checkpoint
from refimpl.quants import q4_k
from refimpl.quants.formats import Format, formats
from refimpl.verifier.requantize import widen

Bytes = NDArray[np.uint8]
EXPERT_COUNT = "glm-dsa.expert_count"


@dataclass
class Part:
    """One tensor: its bytes are [rows, row bytes]."""

    shape: tuple[int, ...]
    format: Format
    raw: Bytes

    def expert(self, e: int) -> Bytes:
        """The bytes of one expert, a view: [rows of one expert, row bytes]."""
        rows = len(self.raw) // self.shape[0]
        return self.raw[e * rows : (e + 1) * rows]

    def block(self, i: int, expert: int = 0) -> NDArray[Any]:
        """Block i of an expert as one record of the format, a view."""
        rows = self.expert(expert) if len(self.shape) == 3 else self.raw
        return rows.reshape(-1).view(self.format.block)[i : i + 1]


class Copy:
    """A whole GGUF in memory."""

    def __init__(self, path: Path) -> None:
        with model_files.open(path) as f:
            assert isinstance(f, Gguf)
            self.metadata = f.metadata.typed()
            self.parts = {name: Part(t.shape, t.format, f.read(name).copy()) for name, t in f.tensors.items()}

    def __getitem__(self, name: str) -> Part:
        return self.parts[name]

    def set(self, key: str, value: int) -> None:
        """Change a number of the metadata."""
        self.metadata[key] = (self.metadata[key][0], value)

    def write(self, path: Path) -> Path:
        """Write the copy as a GGUF."""
        encode.write(path, self.metadata, [(n, p.shape, p.format, [p.raw]) for n, p in self.parts.items()])
        return path


def replace_values(
    part: Part,
    values: NDArray[np.float32],
    fmt: Format | None = None,
    imatrix: NDArray[np.float32] | None = None,
) -> None:
    """Encode other values into a tensor; their shape becomes the tensor's."""
    part.format = fmt or part.format
    part.shape = values.shape
    part.raw = quants.quantize(values.reshape(-1, values.shape[-1]), part.format, imatrix)


def cut_off_codes(part: Part, values: NDArray[np.float32]) -> None:
    """Replace the codes of a Q4_K tensor by those that a quantizer without rounding would write."""
    blocks = part.raw.reshape(-1).view(part.format.block)
    step, offset = (a[..., None] for a in q4_k.scale_subs(blocks))
    x = values.reshape(len(blocks), q4_k.SUBS, q4_k.SUB)
    with np.errstate(divide="ignore", invalid="ignore"):
        codes = np.where(step > 0, np.clip((x + offset) / step, 0, 15), 0).astype(np.uint8)
    codes = codes.reshape(len(blocks), -1, 2, q4_k.SUB)
    blocks["qs"] = (codes[:, :, 0] | codes[:, :, 1] << 4).reshape(len(blocks), -1)


def nudge_mins(copy: Copy, values: NDArray[np.float32], name: str, every: int) -> list[int]:
    """Flip the last bit of dmin of about one Q4_K block in `every` (of one at least) where no code minds.

    return : the blocks
    """
    part = copy[name]
    nudged = part.raw.copy()
    nudged.reshape(-1).view(part.format.block)["dmin"].view(np.uint16)[:] ^= 1
    x = values.reshape(len(nudged), -1)
    fine = np.flatnonzero(quants.nearest(nudged, part.format, x)["off"].reshape(-1) == 0)
    chosen = fine[:: max(1, every * len(fine) // (x.size // part.format.weights))]
    size = part.format.block.itemsize
    part.raw.reshape(-1, size)[chosen] = nudged.reshape(-1, size)[chosen]
    return [int(i) for i in chosen]


def source_values(source: Path, name: str) -> NDArray[np.float32]:
    """A GGUF tensor's values as the source implies them, in its GGUF shape."""
    with model_files.open(source) as s:
        hp = names.hparams(s)
        link = names.link(name, hp)
        assert link is not None
        shape = names.source_shape(s, link, hp)
        assert shape is not None
        return widen(names.source_rows(s, link, hp, slice(None))).reshape(shape)


def requantize_all(copy: Copy, source: Path) -> None:
    """Encode every tensor anew from the source, each in the type that it has."""
    for name, part in copy.parts.items():
        replace_values(part, source_values(source, name))


def swap_experts(copy: Copy, tensors: list[str], a: int, b: int) -> None:
    """Exchange the bytes of two experts in some stacked tensors."""
    for name in tensors:
        first, second = copy[name].expert(a), copy[name].expert(b)
        held = first.copy()
        first[:] = second
        second[:] = held


def prune(copy: Copy, kept: list[int]) -> None:
    """Keep some experts, in the order given: expert matrices, router rows, bias and the count alike."""
    copy.set(EXPERT_COUNT, len(kept))
    for name, part in copy.parts.items():
        if "_exps." in name:
            part.raw = np.concatenate([part.expert(e) for e in kept])
            part.shape = (len(kept), *part.shape[1:])
        elif "ffn_gate_inp." in name:
            part.raw, part.shape = part.raw[kept], (len(kept), part.shape[1])
        elif "exp_probs_b." in name:
            values = part.raw.reshape(-1, part.format.block.itemsize)
            part.raw, part.shape = values[kept].reshape(1, -1), (len(kept),)


def untranspose(copy: Copy, source: Path, name: str) -> None:
    """Store attn_k_b as kv_b_proj has it, [heads, nope, latent], under the transposed tensor's shape."""
    values = source_values(source, name)
    heads, latent, nope = values.shape
    replace_values(copy[name], values.transpose(0, 2, 1).reshape(heads, latent, nope))


def copy_source(source: Path, to: Path) -> Path:
    """A copy of a checkpoint directory that may be changed."""
    shutil.copytree(source, to, ignore=shutil.ignore_patterns("*.gguf"))
    return to


def set_source_value(source: Path, name: str, index: int, bf16: int) -> None:
    """Overwrite one BF16 value of a checkpoint tensor."""
    with model_files.open(source) as s:
        tensor = s.tensors[name]
        path = s.parts[tensor.part]
    with open(path, "r+b") as file:
        file.seek(tensor.offset + 2 * index)
        file.write(struct.pack("<H", bf16))


def scramble_source(source: Path, seed: int) -> None:
    """Replace every BF16 weight of a checkpoint by another one: same shapes, another model."""
    rng = np.random.default_rng(seed)
    with model_files.open(source) as s:
        assert isinstance(s, Checkpoint)
        for tensor in s.tensors.values():
            if tensor.format is formats["bf16"]:
                values = rng.normal(0, 0.05, tensor.nbytes // 2).astype(np.float32)
                with open(s.parts[tensor.part], "r+b") as file:
                    file.seek(tensor.offset)
                    file.write((values.view(np.uint32) >> 16).astype("<u2").tobytes())


def overlap_next(path: Path, name: str) -> str:
    """Cut a tensor short in a written file: the next one begins 32 bytes before its end. Its name is returned."""
    with model_files.open(path) as f:
        listed = list(f.tensors)
        after = listed[listed.index(name) + 1]
    data = bytearray(path.read_bytes())
    at = data.index(encode.encode_text(after)) + len(encode.encode_text(after))
    dims = struct.unpack_from("<I", data, at)[0]
    at += 4 + 8 * dims + 4
    struct.pack_into("<Q", data, at, struct.unpack_from("<Q", data, at)[0] - 32)
    path.write_bytes(data)
    return after
