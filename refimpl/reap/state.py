"""Saved statistics: a .safetensors with one entry per statistic and MoE layer, and what run they come from.

    layers.L.<statistic>   [experts], sums, counts and maxima as well as the means derived from them
    layers.L.characteristic_sum   [experts, hidden], the sum of each expert's outputs

What was run stands as JSON in the metadata entry "refimpl.reap": model, preset, data, versions.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from typing import Any

import numpy as np

from refimpl import __version__
from refimpl.errors import BadFile, Usage
from refimpl.files import names
from refimpl.files.gguf import Gguf
from refimpl.files.replace import replacing
from refimpl.files.safetensors import Checkpoint
from refimpl.files.source import LocalFile
from refimpl.reap.saliency import Saliency, derive
from refimpl.verifier.requantize import widen

KEY, VERSION = "refimpl.reap", 1
_COUNTS = ("frequency",)
_MAXIMA = ("max_activations", "max_abs")


@dataclass(frozen=True)
class Identity:
    """Which model was scored: a list of experts means nothing for another one.

    layers      : its MoE layers that were scored
    fingerprint : sha256 over the float32 router rows of these layers, in order
    """

    experts: int
    top_k: int
    layers: tuple[int, ...]
    fingerprint: str


def identify(model: Gguf | Checkpoint, layers: Sequence[int] | None = None) -> Identity:
    """The identity of a model, or of some of its layers; a GGUF and its checkpoint have the same."""
    hp = names.hparams(model)
    wanted = range(hp.first_k_dense_replace, hp.num_hidden_layers) if layers is None else layers
    digest = sha256()
    for layer in wanted:
        link = names.link(f"blk.{layer}.ffn_gate_inp.weight", hp)
        if link is None:
            raise Usage(f"{model.path}: layer {layer} has no router")
        rows = names.source_rows(model, link, hp, slice(None))
        digest.update(np.ascontiguousarray(widen(rows), "<f4").tobytes())
    return Identity(hp.n_routed_experts, hp.num_experts_per_tok, tuple(wanted), digest.hexdigest())


@dataclass(frozen=True)
class Run:
    """What the statistics come from.

    preset : every switch of it (presets.Preset.to_json)
    data   : one entry per text or token file: its sha256, name, tokens, and the tokens of a sequence
    """

    model: Identity
    preset: dict[str, Any]
    data: tuple[dict[str, Any], ...]
    refimpl: str = __version__

    @property
    def tokens(self) -> int:
        return sum(int(one["tokens"]) for one in self.data)


def save(path: str | os.PathLike[str], run: Run, layers: dict[int, Saliency]) -> None:
    """Write a state, beside its place first and then renamed."""
    from safetensors.numpy import save as encode

    tensors = {}
    for layer, saliency in sorted(layers.items()):
        for name, values in (saliency.sums | derive(saliency.sums)).items():
            tensors[f"layers.{layer}.{name}"] = np.ascontiguousarray(values)
        tensors[f"layers.{layer}.tokens"] = np.array(saliency.tokens, np.int64)
    header = {"version": VERSION, **asdict(run)}
    raw = encode(tensors, {KEY: json.dumps(header)})
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(raw)


def load(path: str | os.PathLike[str]) -> tuple[Run, dict[int, Saliency]]:
    """Read a state. Raises BadFile where it is none, or not whole."""
    from refimpl.files.safetensors import parse_json, read_header

    file = LocalFile(path)
    try:
        tensors, metadata, _ = read_header(file)
        if KEY not in metadata:
            raise BadFile(file.path, 8, f"no REAP statistics: the metadata lacks {KEY}")
        header = parse_json(file.path, metadata[KEY].encode(), 8)
        run = _parse(file.path, header)
        values = {}
        for t in tensors:
            raw = file.read(t.offset, t.nbytes)
            dtype = {"f32": "<f4", "f64": "<f8", "i64": "<i8"}.get(t.format.name)
            if dtype is None:
                raise BadFile(file.path, t.offset, f"{t.name} is {t.format.name}, no statistic")
            values[t.name] = np.frombuffer(raw, dtype).reshape(t.shape).copy()
    finally:
        file.close()
    return run, {layer: _gather(file.path, run.model, layer, values) for layer in run.model.layers}


def _parse(path: str, header: dict[str, Any]) -> Run:
    if header.get("version") != VERSION:
        raise BadFile(path, 8, f"statistics of version {header.get('version')!r}, {VERSION} is read")
    try:
        model = header["model"]
        identity = Identity(
            int(model["experts"]),
            int(model["top_k"]),
            tuple(map(int, model["layers"])),
            str(model["fingerprint"]),
        )
        data = tuple(dict(one, tokens=int(one["tokens"])) for one in header["data"])
        return Run(identity, dict(header["preset"]), data, str(header["refimpl"]))
    except (KeyError, TypeError, ValueError) as error:
        raise BadFile(path, 8, f"{KEY} is incomplete: {error!r}") from None


def _gather(path: str, model: Identity, layer: int, values: dict[str, Any]) -> Saliency:
    """One layer's sums, of the right shapes and kinds."""
    width = np.shape(values.get(f"layers.{layer}.characteristic_sum", np.zeros(0)))[-1]
    saliency = Saliency(model.experts, width)
    for name, empty in saliency.sums.items():
        found = values.get(f"layers.{layer}.{name}")
        if found is None or found.shape != empty.shape or found.dtype != empty.dtype:
            raise BadFile(
                path, None, f"layers.{layer}.{name} is missing or not {empty.dtype} {list(empty.shape)}"
            )
        if not np.isfinite(found).all():
            raise BadFile(path, None, f"layers.{layer}.{name} holds NaN or infinity")
        saliency.sums[name] = found
    tokens = values.get(f"layers.{layer}.tokens")
    if tokens is None or tokens.shape != () or (saliency.sums["frequency"] < 0).any():
        raise BadFile(path, None, f"layer {layer} has no count of its tokens")
    saliency.tokens = int(tokens)
    if saliency.sums["frequency"].sum() != saliency.tokens * model.top_k:
        routed = int(saliency.sums["frequency"].sum())
        raise BadFile(
            path, None, f"layer {layer}: {saliency.tokens:,} tokens, but {routed:,} routed to experts"
        )
    return saliency


def merge(states: Sequence[tuple[Run, dict[int, Saliency]]]) -> tuple[Run, dict[int, Saliency]]:
    """Add the statistics of several runs, as if their data had been one.

    Raises Usage for runs of other presets, switches or models.
    """
    (run, layers), *others = states
    for other, found in others:
        if other.preset != run.preset:
            raise Usage(
                f"states of two presets do not add up: {run.preset['name']} and {other.preset['name']}"
            )
        if other.model != run.model:
            raise Usage("states of two models do not add up: their routers differ")
        run = replace(run, data=run.data + other.data)
        for layer, saliency in layers.items():
            saliency.merge(found[layer])
    return run, layers
