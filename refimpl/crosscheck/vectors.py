"""Conformance vectors: inputs and the bytes or bits that they must give, for runners in any language.

    DIR/index.tsv              one case a line: what to call, and where inputs and the result lie in the files
    DIR/manifest.json          the same with shapes, dtypes, sha256 and what each case pins down
    DIR/<format>.safetensors   blocks and results; weights.safetensors: what is encoded and multiplied
    DIR/README.md              how to write a runner

The cases are the trials of `refimpl native`, the expected results refimpl's own, in every build and order.
"""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from refimpl import dots, quants
from refimpl.arith.builds import list_builds
from refimpl.crosscheck import native_codecs
from refimpl.crosscheck.native import list_trials
from refimpl.crosscheck.native_dots import encode_tokens
from refimpl.crosscheck.native_inputs import list_importances, list_weights
from refimpl.crosscheck.native_symbols import Symbol, list_symbols, spell
from refimpl.crosscheck.native_trial import Array, Trial
from refimpl.errors import Usage

EDITION = 1  # of the layout of these files and of the list of cases
SHARED = "weights"  # the file of the float32 inputs
MOST = 256  # blocks of the largest case
# What the compact edition keeps of a case.
THIN_BLOCKS, THIN_ROWS, RANDOM_BLOCKS, THIN_WEIGHTS = 8, 5, 24, 128
TABLE = ("id", "op", "format", "type", "text", "function", "equality", "rows", "n")
PLACES = ("x", "y", "want")
NOWHERE: dict[str, Any] = {"file": "-", "offset": 0, "bytes": 0}
README = Path(__file__).with_name("vectors_readme.md")


@dataclass(frozen=True)
class Case:
    """One call: its inputs and what they must give."""

    id: str
    op: str  # decode, encode, row, activation, dot
    format: str
    type: int  # its number in GGUF
    text: str  # the build, encoder or order; "any": there is one answer
    function: str  # of ggml's with this signature and, compiled so, this result; "-": none
    equality: str  # "bytes", or "bits": float32, any NaN as good as another
    rows: int
    n: int  # weights of a row
    pins: str
    arrays: dict[str, Array]  # x, y (imatrix or token, if any), want


def write_vectors(
    folder: Path,
    compact: bool = False,
    only: Collection[str] = (),
    tell: Callable[[str, int, int], None] = lambda *_: None,
) -> dict[str, Any]:
    """Write the vectors to a folder that does not exist yet; the manifest.

    compact : a few blocks and rows of each case only
    only    : these formats; none means all
    tell    : called with each format, its number and how many there are

    Raises: Usage where the folder exists.
    """
    from refimpl import __version__

    if folder.exists():
        raise Usage(f"{folder} exists; vectors are written to a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        place = Path(scratch) / "vectors"
        place.mkdir()
        cases = list(list_cases(compact, only, tell))
        files, arrays, entries = _write_files(place, cases)
        manifest = {"refimpl": __version__, "edition": EDITION, "compact": compact, "files": files}
        manifest |= {"arrays": arrays, "cases": entries}
        text = README.read_text(encoding="utf-8").replace("{version}", f"{__version__}, edition {EDITION}")
        for name, content in (
            ("manifest.json", _manifest(manifest)),
            ("index.tsv", _index(manifest)),
            ("README.md", text),
        ):
            (place / name).write_text(content, encoding="utf-8")
        for path in place.iterdir():
            path.chmod(0o644)
        os.rename(place, folder)
    return manifest


def list_cases(
    compact: bool, only: Collection[str], tell: Callable[[str, int, int], None] = lambda *_: None
) -> Iterator[Case]:
    """Every case, format by format."""
    symbols = [s for s in list_symbols() if s.kind != "product" and s.name != "dequantize_row_q8_K"]
    symbols = [s for s in symbols if not only or s.format.name in only]
    names = list(dict.fromkeys(s.format.name for s in symbols))
    done: set[str] = set()
    for symbol in symbols:
        op = "encode" if symbol.kind == "row" and symbol.format.weights == 1 else symbol.kind
        key = f"{op}/{symbol.format.name}"
        if (symbol.kind == "row" and symbol.format.weights > 1) or key in done:
            continue  # what quantize_row_* writes, quantize_* does
        done.add(key)
        tell(symbol.format.name, names.index(symbol.format.name), len(names))
        for trial in _select(symbol, compact):
            yield from _make_cases(symbol, op, trial, compact)


def _select(symbol: Symbol, compact: bool) -> Iterator[Trial]:
    """The trials of a function that pin down its result; alignment and bulk do not."""
    if compact and symbol.kind == "encode":
        trials = list(_weigh_every_kind(symbol))
    else:
        trials = list(list_trials(symbol, MOST))
        trials = [_thin(symbol, trial) for trial in trials[:-1]] if compact else trials
    wanted = [t for t in trials if not t.shifted and (symbol.format.weighed or "imatrix" not in t.inputs)]
    if symbol.format.name == "q8_k":  # of zeros, C leaves the bsums unwritten
        wanted = [t for t in wanted if t.inputs["x"].any(1).all()]
    if compact and symbol.kind in ("encode", "row", "activation"):
        yield from _stack(wanted)
    else:
        yield from wanted


def _weigh_every_kind(symbol: Symbol) -> Iterator[Trial]:
    """A few weights of every kind, plain and with every kind of imatrix."""
    fmt = symbol.format
    for case, x, shifted in list(list_weights(fmt, MOST))[:-1]:
        n = max(2 * fmt.weights, THIN_WEIGHTS)
        some = x.reshape(-1)[:n].reshape(-1, fmt.weights)
        importances = list(list_importances(fmt, some.size)) if fmt.weighed else []
        for name, row in ("", None), *importances[: 1 if case == "one block" else None]:
            inputs = {"x": some} if row is None else {"x": some, "imatrix": row.reshape(-1, fmt.weights)}
            trial = Trial(f"{case}, {name}" if name else case, inputs, 1, shifted)
            if native_codecs.is_defined(fmt, trial):
                yield trial


def _thin(symbol: Symbol, trial: Trial) -> Trial:
    """A few blocks of a trial; of a dot product a few rows."""
    fmt, rows, shifted = symbol.format, trial.rows, trial.shifted
    if symbol.kind in ("encode", "row", "activation"):
        keep = slice(max(2, THIN_WEIGHTS // fmt.weights))
        return Trial(trial.case, {name: a[keep] for name, a in trial.inputs.items()}, 1, shifted)
    units, most = (rows, THIN_ROWS) if symbol.kind == "dot" else (trial.blocks, THIN_BLOCKS)
    if trial.case == "random bytes":
        most = RANDOM_BLOCKS
    chosen = np.unique(np.linspace(0, units - 1, most).astype(int))
    blocks = trial.inputs["blocks"].reshape(units, -1, fmt.block.itemsize)[chosen]
    inputs = {**trial.inputs, "blocks": blocks.reshape(-1, fmt.block.itemsize)}
    return Trial(trial.case, inputs, len(chosen) if symbol.kind == "dot" else 1, shifted)


def _stack(trials: list[Trial]) -> Iterator[Trial]:
    """One trial of all weights that have the same imatrix: one row of each kind."""
    groups: dict[tuple[str, int], list[Trial]] = {}
    for trial in trials:
        imatrix = trial.case.partition(", ")[2] if "imatrix" in trial.inputs else ""
        groups.setdefault((imatrix, trial.blocks), []).append(trial)
    for (imatrix, _), group in groups.items():
        if len(group) == 1:
            yield group[0]
            continue
        kinds = [trial.case.partition(", ")[0] if imatrix else trial.case for trial in group]
        x = np.concatenate([trial.inputs["x"] for trial in group])
        case = f"{len(group)} kinds{', ' if imatrix else ''}{imatrix}: {', '.join(kinds)}"
        yield Trial(case, {**group[0].inputs, "x": x}, len(group))


def _make_cases(symbol: Symbol, op: str, trial: Trial, compact: bool) -> Iterator[Case]:
    """One case a build, encoder or order; of the compact edition other builds are tried with one imatrix."""
    fmt, rows = symbol.format, trial.rows
    n = trial.blocks // rows * fmt.weights
    own = spell(fmt.name)

    def case(text: str, function: str, want: Array, **inputs: Array) -> Case:
        equality = "bits" if want.dtype == np.float32 else "bytes"
        name = f"{op}/{fmt.name}/{slug(trial.case.partition(': ')[0])}/{text}"
        pins = PINS[op].format(format=fmt.name.upper(), case=trial.case, text=text)
        arrays = {**inputs, "want": want}
        return Case(name, op, fmt.name, fmt.id, text, function, equality, rows, n, pins, arrays)

    if op == "decode":
        raw = trial.inputs["blocks"]
        yield case("any", symbol.name, quants.dequantize(raw, fmt), x=raw)
    elif op == "encode":
        x = trial.inputs["x"].reshape(rows, n)
        imatrix = trial.inputs.get("imatrix")
        weights = {} if imatrix is None else {"y": imatrix.reshape(-1)}
        few = compact and imatrix is not None and "uniform" not in trial.case
        for build in list_builds(fmt.name)[: 1 if few else None]:
            coded = native_codecs.write(fmt, x, imatrix, build)
            yield case(build, symbol.name, coded, x=x, **weights)
    elif op == "activation":
        x = trial.inputs["x"].reshape(1, -1)
        for encoder, ending in (("reference", "_ref"), ("avx2", "")):
            if encoder == "reference" or fmt.name != "q8_k":  # there, both are one
                yield case(encoder, f"quantize_row_{own}{ending}", dots.encode(x, fmt.name, encoder), x=x)
    elif fmt.name in dots.PARTNERS:
        raw = trial.inputs["blocks"].reshape(rows, -1)
        tokens = trial.inputs["tokens"]
        token = encode_tokens(symbol, tokens)
        base = f"ggml_vec_dot_{own}_{spell(symbol.partner)}"
        for order, function in (
            ("generic", f"{base}_generic"),
            ("generic-fma", f"{base}_generic"),
            ("avx2", base),
        ):
            want = dots.matmul(raw, fmt, tokens.reshape(1, -1), symbol.partner, order).reshape(-1)
            yield case(order, function, want, x=raw, y=token)


PINS = {
    "decode": "what {format} blocks mean: {case}",
    "encode": "the bytes that build {text} writes for {format}: {case}",
    "activation": "the {format} activations of encoder {text}: {case}",
    "dot": "a product with {format}, added in the order {text}: {case}",
}


def slug(text: str) -> str:
    """A name for files and identifiers: "one block" is one-block."""
    return re.sub(r"[^a-z0-9.+-]+", "-", text.lower()).strip("-")


def _write_files(
    folder: Path, cases: list[Case]
) -> tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]]:
    """Write each array once; what the manifest says of the files, the arrays and the cases."""
    tensors: dict[str, dict[str, Array]] = {}
    arrays: list[dict[str, Any]] = []
    numbers: dict[tuple[str, str], int] = {}  # dtype and sha256 -> which of the arrays
    entries = []
    for case in cases:
        entry: dict[str, Any] = {key: getattr(case, key) for key in (*TABLE, "pins")}
        for role, array in case.arrays.items():
            dtype, digest = _identify(array)
            if (dtype, digest) not in numbers:
                file = SHARED if array.dtype == np.float32 and role != "want" else case.format
                numbers[dtype, digest] = len(arrays)
                tensors.setdefault(file, {})[f"{case.id}/{role}"] = np.ascontiguousarray(array)
                place = {"file": f"{file}.safetensors", "tensor": f"{case.id}/{role}", "dtype": dtype}
                arrays.append({**place, "bytes": array.nbytes, "sha256": digest})
            entry[role] = numbers[dtype, digest]
        entries.append(entry)
    files: dict[str, Any] = {}
    starts: dict[str, int] = {}
    for name, some in sorted(tensors.items()):
        path = folder / f"{name}.safetensors"
        save_file(some, path)
        data = path.read_bytes()
        files[path.name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        starts |= {tensor: 8 + size + header[tensor]["data_offsets"][0] for tensor in some}
    return files, [{**array, "offset": starts[array["tensor"]]} for array in arrays], entries


def _identify(array: Array) -> tuple[str, str]:
    """The dtype and the sha256 of the bytes."""
    return str(array.dtype), hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def _manifest(manifest: dict[str, Any]) -> str:
    """JSON with a line for each array and each case."""
    head = {key: value for key, value in manifest.items() if key not in ("arrays", "cases")}
    text = json.dumps(head, indent=1)[:-2]
    for key in ("arrays", "cases"):
        lines = ",\n".join(json.dumps(entry, separators=(",", ":")) for entry in manifest[key])
        text += f',\n "{key}": [\n{lines}\n]'
    return text + "\n}\n"


def _index(manifest: dict[str, Any]) -> str:
    """The cases as a table: words without spaces, tabs between them, "-" 0 0 for an input that is not there."""
    heads = [*TABLE, *(f"{role}_{what}" for role in PLACES for what in ("file", "offset", "bytes"))]
    lines = ["#" + "\t".join(heads)]
    for entry in manifest["cases"]:
        words: list[str] = [str(entry[key]) for key in TABLE]
        for role in PLACES:
            place = manifest["arrays"][entry[role]] if role in entry else NOWHERE
            words += [place["file"], str(place["offset"]), str(place["bytes"])]
        lines.append("\t".join(words))
    return "\n".join(lines) + "\n"
