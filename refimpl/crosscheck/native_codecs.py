"""Encoders and decoders of tensor types: their bytes and bits against quantize and dequantize."""

import numpy as np

from refimpl import quants
from refimpl.crosscheck.native_library import NULL, Argument, Buffer, Library
from refimpl.crosscheck.native_symbols import Symbol
from refimpl.crosscheck.native_trial import Result, Trial, alignment, compared, died
from refimpl.quants.formats import CODEBOOKS, Format

INIT = "ggml_quantize_init"
MANY = 4096  # blocks: of more, all ordinary, the first stands for the others


def is_defined(fmt: Format, trial: Trial) -> bool:
    """Whether there are bytes to be written: some types need an imatrix, and on some weights ggml aborts."""
    some = trial.cut(0, 1) if trial.blocks > MANY else trial
    rows, imatrix = some.rows, some.inputs.get("imatrix")
    try:
        quants.quantize(
            some.inputs["x"].reshape(rows, -1), fmt, None if imatrix is None else imatrix.reshape(-1)
        )
    except ValueError:  # this is how quantize says so; it finds no fault in finite weights otherwise
        return False
    return True


def decode(library: Library, symbol: Symbol, trial: Trial) -> Result:
    """Decode blocks; the weights must have the bits of dequantize."""
    raw, fmt = trial.inputs["blocks"], symbol.format
    n = len(raw) * fmt.weights
    shift = (alignment(fmt), 4) if trial.shifted else (0, 0)
    arguments: list[Argument] = [Buffer(raw, shift[0]), Buffer(4 * n, shift[1]), ("l", n)]
    outcome = library.call(symbol.name, "v", arguments)
    want = quants.dequantize(raw, fmt).reshape(-1, fmt.weights)
    if outcome.crash is not None or outcome.output is None:
        return died(outcome, want)
    got = outcome.output.view(np.float32).reshape(want.shape)
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
    row = None if imatrix is None else imatrix.reshape(-1)
    want = quants.quantize(x.reshape(rows, n), fmt, row, build=build).reshape(-1, fmt.block.itemsize)
    if outcome.crash is not None or outcome.output is None:
        return died(outcome, want)
    got = outcome.output.reshape(want.shape)
    spill = outcome.spill
    if spill is None and symbol.kind == "encode" and outcome.value != size:
        spill = f"returns {outcome.value}, not the {size} bytes written"
    return compared(got, want, (got != want).any(1), spill)
