"""A GLM-5.1 model, quantized by a recipe: the bytes of llama-quantize, from a GGUF or straight from a checkpoint.

Rows of many tensors are read, widened, encoded and written at the same time, a million weights a piece, so
that memory does not depend on the model and no BF16 file of a terabyte stands between.
"""

import os
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf.constants import GGUFValueType as Kind
from numpy.typing import NDArray

from refimpl import quants, recipes
from refimpl.errors import BadFile, Usage
from refimpl.files import encode, names
from refimpl.files import imatrix as imatrix_file
from refimpl.files import source as model_files
from refimpl.files.gguf import Gguf
from refimpl.files.imatrix import Imatrix
from refimpl.files.names import Hparams
from refimpl.files.safetensors import Checkpoint
from refimpl.quants.formats import BF16, F16
from refimpl.writers import keys, output
from refimpl.writers.checkpoint import ordered_links, without_mtp
from refimpl.writers.output import PathLike, Piece, Progress
from refimpl.writers.plan import (
    Plan,
    Planned,
    describe,
    imatrix_keys,
    make_plan,
    refuse_fallbacks,
    require_encoders,
    require_importance,
)

PIECE_WEIGHTS = 1 << 20
SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")


@dataclass(frozen=True)
class Rows:
    """Rows [start, stop) of one tensor, all of one expert or head."""

    tensor: Planned
    start: int
    stop: int


@dataclass
class Quantized:
    """What was written, or would be (file None). done: pieces that an earlier run had finished."""

    file: str | None
    source: str
    recipe: recipes.Recipe
    build: str
    imatrix: str | None
    size: int
    plan: Plan
    done: int = 0

    def to_json(self) -> dict[str, Any]:
        """The document of `quantize --json`."""
        plan = self.plan
        return {
            "file": self.file,
            "bytes": self.size,
            "source": self.source,
            "recipe": {"name": self.recipe.name, "version": self.recipe.version},
            "build": self.build,
            "imatrix": self.imatrix,
            "tensors": len(plan.tensors),
            "weights": plan.weights,
            "bits_per_weight": round(8 * plan.nbytes / plan.weights, 6),
            "classes": plan.classes(),
            "fallbacks": describe(plan, plan.fallbacks),
            "notes": [
                {"kind": n.kind, "tensor": n.tensor, "expert": n.expert, "message": n.message}
                for n in plan.notes
            ],
        }


def quantize(
    source: PathLike,
    target: PathLike | None,
    recipe: str = "q4_k_m",
    imatrix: PathLike | None = None,
    build: str = "strict",
    tensor_types: Sequence[str] = (),
    fallback: bool = True,
    name: str | None = None,
    mtp: bool = True,
    provenance: bool = True,
    force: bool = False,
    resume: bool = False,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> Quantized:
    """Write a quantized GGUF; with target None only plan it.

    source       : a GGUF (one shard of a split stands for all) of F32, F16 and BF16, or a checkpoint directory
    recipe       : name or TOML file
    imatrix      : GGUF or legacy .dat
    tensor_types : PATTERN=TYPE, before the recipe's rules, the first that is found wins
    fallback     : False: refuse where rows are no whole blocks of the type that the recipe wants
    name, mtp    : as of convert, for a checkpoint
    provenance   : add the key refimpl.provenance; without it the file is llama-quantize's, byte for byte

    Raises BadFile, Unsupported, or Usage.
    """
    if build not in quants.BUILDS:
        raise Usage(f"unknown build {build!r}; known: {', '.join(quants.BUILDS)}")
    chosen = recipes.override(recipes.load(os.fspath(recipe)), tensor_types)
    with ExitStack() as stack:
        model = stack.enter_context(closing(model_files.open(source)))
        inputs = [*model.parts, *([imatrix] if imatrix is not None else [])]
        if target is not None:
            output.check_target(target, inputs, force)
        hp = names.hparams(model)
        if isinstance(model, Checkpoint) and not mtp:
            hp = without_mtp(hp)
        weighed = None
        if imatrix is not None:
            weighed = stack.enter_context(imatrix_file.read(imatrix))
        plan = make_plan(model, hp, chosen, weighed)
        if not fallback:
            refuse_fallbacks(plan)
        given = os.fspath(imatrix) if imatrix is not None else None
        metadata = _metadata(model, hp, chosen, name, mtp)
        if weighed is not None and given is not None:
            metadata |= _typed(imatrix_keys(weighed, given))
        if provenance:
            metadata[keys.PROVENANCE] = _provenance(model, chosen, build, given, tensor_types)
        alignment = metadata.get("general.alignment", (Kind.UINT32, 32))[1]
        head, offsets, size = encode.header_bytes(
            metadata, [(t.name, t.shape, t.format) for t in plan.tensors], alignment
        )
        result = Quantized(None, model.path, chosen, build, given, size, plan)
        if target is None:
            return result
        require_encoders(plan, build)
        require_importance(plan, chosen, weighed)
        job = {"quantize": build, "inputs": output.identify(inputs), "piece": PIECE_WEIGHTS}
        pieces = [p for t, at in zip(plan.tensors, offsets, strict=True) for p in cut(t, at)]
        encoder = Encoder(model, hp, weighed, build)
        result.done = output.write_pieces(
            target, head, size, pieces, encoder.encode, job, resume, jobs, progress
        )
        result.file = os.fspath(target)
        return result


def cut(tensor: Planned, offset: int) -> list[Piece[Rows]]:
    """Pieces of one tensor: rows of one expert or head each, of at most PIECE_WEIGHTS weights (or one row)."""
    n, rows = tensor.shape[-1], tensor.weights // tensor.shape[-1]
    slab, step, row_bytes = rows // tensor.slabs, max(1, PIECE_WEIGHTS // n), tensor.format.row_bytes(n)
    spans = [
        (start, min(start + step, first + slab))
        for first in range(0, rows, slab)
        for start in range(first, first + slab, step)
    ]
    return [
        Piece(offset + start * row_bytes, (stop - start) * row_bytes, Rows(tensor, start, stop))
        for start, stop in spans
    ]


class Encoder:
    """Encodes rows, from many threads: each has its own buffers, and two tensors' importances are kept."""

    def __init__(self, model: Gguf | Checkpoint, hp: Hparams, imatrix: Imatrix | None, build: str) -> None:
        self.model, self.hp, self.imatrix, self.build = model, hp, imatrix, build
        self.room = threading.local()
        self.lock = threading.Lock()
        self.importances: dict[str, NDArray[np.float32] | None] = {}

    def encode(self, rows: Rows) -> NDArray[Any]:
        """The bytes of some rows. Raises BadFile for a weight that is NaN or infinite."""
        tensor, room = rows.tensor, self._buffers(rows)
        if tensor.copied:
            return self.model.read(tensor.name, slice(rows.start, rows.stop))
        x = self._read(rows, room)
        out = room.output[: len(x) * tensor.format.row_bytes(tensor.shape[-1])].reshape(len(x), -1)
        try:
            return quants.quantize(x, tensor.format, self._importance(rows), self.build, out=out)
        except quants.NotFinite as error:
            place = f"row {rows.start + error.row}, column {error.column}"
            defect = f"{tensor.name}: the source's weight at {place} is NaN or infinite"
            raise BadFile(self.model.path, None, defect) from None

    def _buffers(self, rows: Rows) -> threading.local:
        """The thread's buffers, large enough: fresh pages would cost more than the encoding."""
        weights = max(PIECE_WEIGHTS, (rows.stop - rows.start) * rows.tensor.shape[-1])
        if getattr(self.room, "weights", 0) < weights:
            self.room.weights = weights
            self.room.source = quants.allocate((4 * weights,), np.uint8)
            self.room.output = quants.allocate((4 * weights,), np.uint8)
        return self.room

    def _read(self, rows: Rows, room: threading.local) -> NDArray[Any]:
        """The rows as float32 or BF16 bits."""
        tensor, part = rows.tensor, slice(rows.start, rows.stop)
        if isinstance(self.model, Checkpoint):
            assert tensor.link is not None
            return names.source_rows(self.model, tensor.link, self.hp, part, buffer=room.source)
        stored = self.model.tensors[tensor.name]
        size = (rows.stop - rows.start) * stored.row_bytes
        raw = self.model.read(tensor.name, part, room.source[:size].reshape(rows.stop - rows.start, -1))
        if stored.format == BF16:
            return raw.view(np.uint16)
        return raw.view(np.float16).astype(np.float32) if stored.format == F16 else raw.view(np.float32)

    def _importance(self, rows: Rows) -> NDArray[np.float32] | None:
        tensor = rows.tensor
        if self.imatrix is None or tensor.format.weights == 1:
            return None
        with self.lock:
            if tensor.name not in self.importances:
                if len(self.importances) > 1:
                    del self.importances[next(iter(self.importances))]
                got = self.imatrix.get(tensor.name, tensor.slabs, tensor.shape[-1])
                self.importances[tensor.name] = got
            values = self.importances[tensor.name]
        if values is None or values.ndim == 1:
            return values
        per_slab = tensor.weights // tensor.shape[-1] // tensor.slabs
        row: NDArray[np.float32] = values[rows.start // per_slab]
        return row


def _metadata(
    model: Gguf | Checkpoint, hp: Hparams, recipe: recipes.Recipe, name: str | None, mtp: bool
) -> keys.Keys:
    """The source's keys; the quantizer's two come behind them, as llama-quantize has it."""
    if isinstance(model, Checkpoint):
        links = ordered_links(model, hp)
        metadata = keys.converted_keys(model, hp, links, keys.FILE_TYPES["bf16"], name, mtp)
    else:
        metadata = model.metadata.typed((*SPLIT_KEYS, keys.PROVENANCE))
    for key in ("general.quantization_version", "general.file_type"):
        metadata.pop(key, None)
    metadata["general.quantization_version"] = keys.QUANTIZATION_VERSION
    metadata["general.file_type"] = (Kind.UINT32, recipe.file_type)
    return metadata


def _typed(said: Mapping[str, Any]) -> keys.Keys:
    return {k: (Kind.STRING if isinstance(v, str) else Kind.UINT32, v) for k, v in said.items()}


def _provenance(
    model: Gguf | Checkpoint,
    recipe: recipes.Recipe,
    build: str,
    imatrix: str | None,
    tensor_types: Sequence[str],
) -> tuple[Kind, str]:
    facts: dict[str, Any] = {"source": os.path.basename(os.path.abspath(model.path)), "recipe": recipe.name}
    facts |= {"recipe_version": recipe.version, "build": build}
    if tensor_types:
        facts["tensor_types"] = list(tensor_types)
    if imatrix is not None:
        facts["imatrix"] = os.path.basename(imatrix)
    before = keys.parse_provenance(model.metadata) if isinstance(model, Gguf) else None
    return keys.provenance("quantize", **facts, **({"before": before} if before is not None else {}))
