"""The layout of a GGUF's data section: one region after the other, nothing between, nothing after.

Each tensor starts where the one before it ends, rounded up to the alignment, in table order; the file ends
with the last region or its padding. Everything else is a Defect: the table can be read, the data not trusted.
Source: gguf_init_from_reader, ggml/src/gguf.cpp, llama.cpp 0c1e570.
"""

from typing import TYPE_CHECKING

from refimpl.files.source import Defect, Tensor

if TYPE_CHECKING:
    from refimpl.files.gguf import Header


def check_regions(header: "Header") -> list[Defect]:
    """Compare every region with its place, its neighbours and the file's end; defects in table order."""
    overlaps = _find_overlaps(header.tensors)
    path, size, align = header.source.path, header.source.size, header.alignment
    defects: list[Defect] = []
    expected = header.data_offset

    def add(tensor: Tensor, code: str, words: str) -> None:
        defects.append(Defect(path, tensor.offset, f"{tensor.name}: {words}", code, tensor.name))

    for tensor in header.tensors:
        end = tensor.offset + tensor.nbytes
        if (tensor.offset - header.data_offset) % align:
            add(tensor, "unaligned", f"the offset is no multiple of the alignment {align:,}")
        if end > size:
            add(tensor, "past-end", f"the region ends {end - size:,} bytes after the file's end")
        for code, words in overlaps.get(tensor.name, ()):
            add(tensor, code, words)
        if tensor.offset > expected:
            add(tensor, "gap", f"{tensor.offset - expected:,} bytes before the region belong to no tensor")
        elif tensor.offset < expected and tensor.name not in overlaps:
            add(
                tensor,
                "order",
                f"the region lies {expected - tensor.offset:,} bytes before its place in order",
            )
        expected = -(-end // align) * align
    last = max(
        (-(-(t.offset + t.nbytes) // align) * align for t in header.tensors), default=header.data_offset
    )
    if size > last:
        words = f"{size - last:,} bytes after the last region belong to no tensor"
        defects.append(Defect(path, last, words, "trailing", None))
    return defects


def _find_overlaps(tensors: list[Tensor]) -> dict[str, list[tuple[str, str]]]:
    """Tensors that share bytes: the earlier region is short, the later one overlaps it."""
    found: dict[str, list[tuple[str, str]]] = {}
    reach: Tensor | None = None
    for tensor in sorted(tensors, key=lambda t: t.offset):
        if reach is not None and tensor.offset < reach.offset + reach.nbytes:
            room = tensor.offset - reach.offset
            if reach.name not in found:
                words = (
                    f"the region has room for {room:,} of {reach.nbytes:,} bytes, {tensor.name} starts there"
                )
                found[reach.name] = [("short", words)]
            shared = min(reach.nbytes - room, tensor.nbytes)
            found.setdefault(tensor.name, []).append(
                ("overlap", f"{shared:,} bytes are also part of {reach.name}")
            )
        if reach is None or tensor.offset + tensor.nbytes > reach.offset + reach.nbytes:
            reach = tensor
    return found
