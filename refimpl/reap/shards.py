"""The pruned files themselves: a GGUF, or the shards, index and config of an HF directory.

Tensors stream through in pieces; the output stands at its place only when it is whole.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGUFValueType

from refimpl.files import encode, names
from refimpl.files.gguf import Gguf
from refimpl.files.hparams import ARCHITECTURE
from refimpl.files.links import Link
from refimpl.files.metadata import Metadata
from refimpl.files.safetensors import CONFIG, INDEX, Checkpoint
from refimpl.files.source import Bytes, Tensor
from refimpl.reap import kept as kept_file
from refimpl.reap.select import Lists

Progress = Callable[[int, int], None]  # bytes done, bytes in all
PROVENANCE = "refimpl.reap"  # GGUF key; an HF directory has the same document as reap.json
PROVENANCE_FILE = "reap.json"
PIECE = 1 << 24  # bytes
PER_EXPERT = frozenset({"routed", "router", "router_bias"})


def _pieces(model: Gguf | Checkpoint, tensor: Tensor, rows: range) -> Iterator[Bytes]:
    """The bytes of some neighbouring rows, a piece at a time."""
    step = max(1, PIECE // max(1, tensor.row_bytes))
    for start in range(rows.start, rows.stop, step):
        yield model.read(tensor.name, slice(start, min(rows.stop, start + step)))


def _cut(model: Gguf | Checkpoint, tensor: Tensor, link: Link | None, lists: Lists) -> Iterator[Bytes]:
    """What stays of a tensor's bytes: slabs of its first axis where it has one per expert, else all."""
    experts = lists.get(link.layer) if link is not None and link.layer is not None else None
    if link is None or experts is None or link.role not in PER_EXPERT:
        yield from _pieces(model, tensor, range(tensor.rows))
    elif link.role == "router_bias":
        size = tensor.format.block.itemsize
        yield model.read(tensor.name).reshape(-1, size)[experts].reshape(1, -1)
    else:
        slab = tensor.rows // tensor.shape[0]
        for e in experts:
            yield from _pieces(model, tensor, range(e * slab, (e + 1) * slab))


def write_gguf(
    model: Gguf,
    out: Path,
    lists: Lists,
    dropped: set[int],
    provenance: dict[str, Any],
    progress: Progress | None,
) -> None:
    hp = names.hparams(model)
    count = len(next(iter(lists.values())))
    changed: dict[str, Any] = {f"{ARCHITECTURE}.expert_count": count}
    if dropped:
        changed |= {
            f"{ARCHITECTURE}.block_count": hp.num_hidden_layers,
            f"{ARCHITECTURE}.nextn_predict_layers": 0,
        }
    metadata = _typed(model.metadata, changed)
    metadata[PROVENANCE] = (GGUFValueType.STRING, json.dumps(provenance))
    listed, done, total = [], 0, 0

    def counted(chunks: Iterator[Bytes]) -> Iterator[Bytes]:
        nonlocal done
        for chunk in chunks:
            yield chunk
            done += chunk.nbytes
            if progress is not None:
                progress(done, total)

    for name, tensor in model.tensors.items():
        link = names.link(name, hp)
        if link is not None and link.layer in dropped:
            continue
        shape = tensor.shape
        if link is not None and link.role in PER_EXPERT and link.layer in lists:
            shape = (count, *shape[1:])
        total += tensor.nbytes // tensor.shape[0] * shape[0]
        listed.append((name, shape, tensor.format, counted(_cut(model, tensor, link, lists))))
    encode.write(out, metadata, listed, alignment=model.alignment)


def _typed(metadata: Metadata, changed: dict[str, Any]) -> dict[str, tuple[GGUFValueType, Any]]:
    """A file's keys with their types, some with another value; those of a split are left out."""
    return {
        key: (metadata.types[key], changed.get(key, metadata[key]))
        for key in metadata
        if not key.startswith("split.")
    }


def write_directory(
    model: Checkpoint,
    out: Path,
    lists: Lists,
    dropped: set[int],
    provenance: dict[str, Any],
    progress: Progress | None,
) -> None:
    """Shard by shard into a new directory beside the place, which is then renamed."""
    hp = names.hparams(model)
    count = len(next(iter(lists.values())))
    target = out.resolve()
    work = Path(tempfile.mkdtemp(prefix=".refimpl-", dir=target.parent))
    try:
        index: dict[str, str] = {}
        done = 0
        for part, path in enumerate(model.parts):
            plan = list(_plan_shard(model, part, hp, lists, dropped, count))
            if not plan:
                continue
            file = os.path.basename(path)
            done = _write_shard(work / file, model, plan, lists, done, progress)
            index |= {name: file for name, *_ in plan}
        config = model.config | {"n_routed_experts": count}
        if dropped:
            config["num_nextn_predict_layers"] = 0
        (work / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (work / PROVENANCE_FILE).write_text(kept_file.dump(provenance), encoding="utf-8")
        _copy_rest(model, work)
        if os.path.lexists(os.path.join(model.path, INDEX)):
            weights = sum(_sizes(work, index))
            listed = {"metadata": {"total_size": weights}, "weight_map": dict(sorted(index.items()))}
            (work / INDEX).write_text(json.dumps(listed, indent=2) + "\n", encoding="utf-8")
        os.chmod(work, 0o755)
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=".refimpl-", dir=target.parent)) / "old"
            os.replace(target, old)
            os.replace(work, target)
            shutil.rmtree(old.parent)
        else:
            os.replace(work, target)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def _plan_shard(
    model: Checkpoint, part: int, hp: names.Hparams, lists: Lists, dropped: set[int], count: int
) -> Iterator[tuple[str, tuple[int, ...], Tensor, Link | None]]:
    """(new name, new shape, tensor, link) of what stays of a shard, in its order."""
    for tensor in sorted((t for t in model.tensors.values() if t.part == part), key=lambda t: t.offset):
        found = names.from_hf(tensor.name, hp)
        link, expert = found if found is not None else (None, None)
        name, shape = tensor.name, tensor.shape
        if link is not None and link.layer in dropped:
            continue
        experts = lists.get(link.layer) if link is not None and link.layer is not None else None
        if link is not None and experts is not None and link.role in PER_EXPERT:
            if expert is None:
                shape = (count, *shape[1:])
            elif expert in experts:
                name, link = link.hf.format(e=experts.index(expert)), None  # its bytes stay as they are
            else:
                continue
        yield name, shape, tensor, link


def _write_shard(
    path: Path,
    model: Checkpoint,
    plan: list[tuple[str, tuple[int, ...], Tensor, Link | None]],
    lists: Lists,
    done: int,
    progress: Progress | None,
) -> int:
    """Write one .safetensors; returns the bytes done so far."""
    header, place = {}, 0
    for name, shape, tensor, _ in plan:
        size = tensor.nbytes // max(1, tensor.shape[0]) * shape[0] if shape else tensor.nbytes
        header[name] = {
            "dtype": tensor.format.name.upper(),
            "shape": list(shape),
            "data_offsets": [place, place + size],
        }
        place += size
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, _, tensor, link in plan:
            for piece in _cut(model, tensor, link, lists):
                file.write(np.ascontiguousarray(piece).data)
                done += piece.nbytes
                if progress is not None:
                    progress(done, model.size)
        file.flush()
        os.fsync(file.fileno())
    return done


def _sizes(folder: Path, index: dict[str, str]) -> Iterator[int]:
    """Bytes of tensors in each shard."""
    for file in sorted(set(index.values())):
        path = folder / file
        with open(path, "rb") as opened:
            yield path.stat().st_size - 8 - int.from_bytes(opened.read(8), "little")


def _copy_rest(model: Checkpoint, work: Path) -> None:
    """The small files of a checkpoint: tokenizer, template, licence; nothing that leads out of the directory."""
    for path in sorted(Path(model.path).iterdir()):
        fresh = path.name not in (CONFIG, INDEX, PROVENANCE_FILE) and path.suffix != ".safetensors"
        if fresh and path.is_file() and not path.name.startswith("."):
            shutil.copyfile(path, work / path.name)
