"""Encoders and decoders of tensor types: their bytes and bits against quantize and dequantize."""

from importlib import import_module

import numpy as np

from refimpl import quants
from refimpl.crosscheck.native_library import NULL, Argument, Buffer, Library
from refimpl.crosscheck.native_mistakes import read
from refimpl.crosscheck.native_symbols import Symbol
from refimpl.crosscheck.native_trial import Array, Result, Trial, alignment, compared, died
from refimpl.quants import iq4_nl
from refimpl.quants.formats import CODEBOOKS, IQ4_NL, Format
from refimpl.quants.grids import Refused
from refimpl.quants.search import EPSILON

INIT = "ggml_quantize_init"
MANY = 4096  # blocks: of more, all ordinary, the first stands for the others


def is_defined(fmt: Format, trial: Trial) -> bool:
    """Whether there are bytes to be written: some types need an imatrix, and on some weights ggml aborts."""
    some = trial.cut(0, 1) if trial.blocks > MANY else trial
    imatrix = some.inputs.get("imatrix")
    if fmt.needy and imatrix is None:
        return False
    try:
        write(fmt, some.inputs["x"].reshape(some.rows, -1), imatrix)
    except (quants.TooLarge, Refused):
        return False
    return True


def write(fmt: Format, x: Array, imatrix: Array | None, build: str = "strict") -> Array:
    """What an encoder must write for x [rows, n]: [rows, bytes] uint8.

    Codebook types are encoded by their portable kernels: there are few weights, and the tuned ones compile for
    half a minute each.
    """
    row = None if imatrix is None else imatrix.reshape(-1)
    if fmt not in CODEBOOKS:
        return quants.quantize(x, fmt, row, build=build)
    out = np.empty((len(x), fmt.row_bytes(x.shape[1])), np.uint8)
    weights = np.empty((0, x.shape[1]), np.float32) if row is None else row[None]
    import_module(f"refimpl.quants.{fmt.name}_jit").quantize(x, weights, len(x), out)
    return out


def decode(library: Library, symbol: Symbol, trial: Trial) -> Result:
    """Decode blocks; the weights must have the bits of dequantize."""
    raw, fmt = trial.inputs["blocks"], symbol.format
    n = len(raw) * fmt.weights
    shift = (alignment(fmt), 4) if trial.shifted else (0, 0)
    arguments: list[Argument] = [Buffer(raw, shift[0]), Buffer(4 * n, shift[1]), ("l", n)]
    outcome = library.call(symbol.name, "v", arguments)
    want = read(fmt, raw).reshape(-1, fmt.weights)
    if outcome.crash is not None or outcome.output is None:
        return died(outcome, want)
    got = outcome.output.view(np.float32).reshape(want.shape)
    if np.array_equal(got.view(np.uint32), want.view(np.uint32)):
        return compared(got, want, np.zeros(len(got), np.bool_), outcome.spill)
    odd = (got != want) & ~(np.isnan(got) & np.isnan(want))
    if not odd.any():
        signs = (got == 0) & (np.signbit(got) != np.signbit(want))
        return compared(got, want, signs.any(1), outcome.spill, " in the sign of zeros")
    return compared(got, want, odd.any(1), outcome.spill)


def encode(library: Library, symbol: Symbol, trial: Trial, build: str) -> Result:
    """Encode weights; the bytes must be those of the build."""
    fmt, rows = symbol.format, trial.rows
    x = np.ascontiguousarray(trial.inputs["x"])
    n = x.size // rows
    size = rows * fmt.row_bytes(n)
    imatrix = trial.inputs.get("imatrix")
    shift = (4, alignment(fmt)) if trial.shifted else (0, 0)
    arguments: list[Argument] = [Buffer(x.view(np.uint8), shift[0]), Buffer(size, shift[1])]
    if fmt in CODEBOOKS and library.find([INIT]):  # builds the tables that their encoders look up, once
        library.call(INIT, "v", [("i", fmt.id)])
    if symbol.kind == "row":
        outcome = library.call(symbol.name, "v", [*arguments, ("l", n)])
    else:
        weights: Argument = NULL
        if imatrix is not None:
            weights = Buffer(np.ascontiguousarray(imatrix).view(np.uint8), shift[0])
        outcome = library.call(symbol.name, "z", [*arguments, ("l", rows), ("l", n), weights])
    if is_unsearched(symbol):
        with np.errstate(all="ignore"):
            want = iq4_nl.quantize_row(x.reshape(rows, n)).view(np.uint8)
    else:
        want = write(fmt, x.reshape(rows, n), imatrix, build)
    want = want.reshape(-1, fmt.block.itemsize)
    if outcome.crash is not None or outcome.output is None:
        return died(outcome, want)
    got = outcome.output.reshape(want.shape)
    spill = outcome.spill
    if spill is None and symbol.kind == "encode" and outcome.value != size:
        spill = f"returns {outcome.value}, not the {size} bytes written"
    differ = got != want
    if is_unsearched(symbol):  # of zeros, C writes d alone
        differ[(np.abs(x.reshape(len(x), -1)) < EPSILON).all(1), fmt.offset("qs") :] = False
    return compared(got, want, differ.any(1), spill)


def is_unsearched(symbol: Symbol) -> bool:
    """The row encoders of IQ4_NL search no scale: others than quantize_iq4_nl."""
    return symbol.kind == "row" and symbol.format is IQ4_NL
