"""Save a failing trial as a program that needs nothing but Python: ctypes, and the bytes beside it."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from refimpl.crosscheck import native_dots
from refimpl.crosscheck.native_symbols import Symbol
from refimpl.crosscheck.native_trial import Array, Result, Trial, alignment
from refimpl.quants.formats import activations

PROGRAM = '''#!/usr/bin/env python3
"""{name}: {problem}

    python3 {name}.py [LIBRARY]      ends with 1 while the library is wrong

{inputs}
Written by refimpl native; needs ctypes only.
"""

import ctypes
import pathlib
import struct
import sys

HERE = pathlib.Path(__file__).resolve().parent
GUARD = 4096


def read(key):
    return (HERE / f"{name}.{{key}}.bin").read_bytes()


def place(data, shift):
    """Memory between guards, `shift` bytes past a multiple of 64: its room, start, address and content."""
    room = ctypes.create_string_buffer(bytes([0xC5]) * (len(data) + 2 * GUARD + 128))
    start = -(-(ctypes.addressof(room) + GUARD) // 64) * 64 + shift - ctypes.addressof(room)
    room[start : start + len(data)] = data
    return room, start, ctypes.addressof(room) + start, data


library = ctypes.CDLL(sys.argv[1] if len(sys.argv) > 1 else {library!r})
if hasattr(library, "ggml_cpu_init"):
    library.ggml_cpu_init()
if hasattr(library, "ggml_quantize_init"):
    library.ggml_quantize_init({type})
inputs = [{places}]
size = {size}
room, start, out, _ = place(bytes([0xAA]) * size, {out_shift})
function = library.{name}
function.restype = {returns}
function.argtypes = [{types}]
for row in range({rows}):
    value = function({arguments})
got = bytes(room[start : start + size])
spilled = any(b != 0xC5 for b in bytes(room[start - GUARD : start]) + bytes(room[start + size : start + size + GUARD]))
if spilled or any(bytes(room[at : at + len(data)]) != data for room, at, _, data in inputs):
    print("bytes outside the output were written")
    spilled = True
if {wrong_value}:
    print(f"{{value}} was returned, not {{size}}")
    spilled = True
{check}
sys.exit(1 if spilled or differ else 0)
'''

BYTES = """want = read("want")
differ = [i for i in range(size) if got[i] != want[i]]
for i in differ[:8]:
    print(f"byte {i}: {got[i]:02x}, must be {want[i]:02x}")
print(f"{len(differ)} of {size} bytes differ")"""

PRODUCTS = """got = struct.unpack(f"{size // 4}f", got)
want, bound = (struct.unpack(f"{size // 4}d", read(key)) for key in ("want", "bound"))
differ = [i for i in range(len(got)) if not abs(got[i] - want[i]) <= bound[i]]
for i in differ[:8]:
    print(f"product {i}: {got[i]!r}, must be {want[i]!r} within {bound[i]:.3g}")
print(f"{len(differ)} of {len(got)} products are wrong")"""


@dataclass(frozen=True)
class Call:
    """What differs between the kinds of functions: memory, types and arguments as Python source."""

    memory: dict[str, Array]  # name -> bytes, in the order of `inputs`
    shifts: tuple[int, ...]  # of the memory, then of the output
    size: int  # of the output
    types: str
    arguments: str
    returns: str = "None"
    rows: int = 1


def save(folder: Path, library: Path, symbol: Symbol, trial: Trial, result: Result) -> Path:
    """Write the program and its inputs to a folder; the program's path."""
    folder.mkdir(parents=True, exist_ok=True)
    call = (
        _describe_product(symbol, trial)
        if symbol.kind in ("dot", "product")
        else _describe_codec(symbol, trial)
    )
    wanted = {"want": np.asarray(result.want)}
    if symbol.kind in ("dot", "product"):
        partner = native_dots.encode_tokens(symbol, trial.inputs["tokens"])
        wanted["bound"] = native_dots.evaluate(symbol, trial, partner)[1]
    for key, array in {**call.memory, **wanted}.items():
        (folder / f"{symbol.name}.{key}.bin").write_bytes(np.ascontiguousarray(array).tobytes())
    shifts = call.shifts if trial.shifted else (0,) * len(call.shifts)
    text = PROGRAM.format(
        name=symbol.name,
        type=symbol.format.id,
        problem=result.problem,
        inputs="\n".join(f"{k}: {a.dtype} {list(a.shape)}" for k, a in trial.inputs.items()) + "\n",
        library=str(library),
        places=", ".join(f'place(read("{k}"), {s})' for k, s in zip(call.memory, shifts, strict=False)),
        size=call.size,
        out_shift=shifts[-1],
        returns=call.returns,
        types=", ".join(f"ctypes.{t}" for t in call.types.split()),
        rows=call.rows,
        arguments=call.arguments,
        wrong_value="value != size" if symbol.kind == "encode" else "False",
        check=PRODUCTS if symbol.kind in ("dot", "product") else BYTES,
    )
    path = folder / f"{symbol.name}.py"
    path.write_text(text, encoding="utf-8")
    return path


def _describe_codec(symbol: Symbol, trial: Trial) -> Call:
    fmt, n = symbol.format, trial.blocks * symbol.format.weights
    if symbol.kind == "decode":
        memory = {"blocks": trial.inputs["blocks"]}
        return Call(
            memory, (alignment(fmt), 4), 4 * n, "c_void_p c_void_p c_int64", f"inputs[0][2], out, {n}"
        )
    memory = {name: np.asarray(a, np.float32) for name, a in trial.inputs.items()}
    shifts = (4,) * len(memory) + (alignment(fmt),)
    size = trial.blocks * fmt.block.itemsize
    if symbol.kind != "encode":
        return Call(memory, shifts, size, "c_void_p c_void_p c_int64", f"inputs[0][2], out, {n}")
    imatrix = "inputs[1][2]" if "imatrix" in memory else "None"
    arguments = f"inputs[0][2], out, {trial.rows}, {n // trial.rows}, {imatrix}"
    return Call(
        memory, shifts, size, "c_void_p c_void_p c_int64 c_int64 c_void_p", arguments, "ctypes.c_size_t"
    )


def _describe_product(symbol: Symbol, trial: Trial) -> Call:
    fmt, rows = symbol.format, trial.rows
    raw = trial.inputs["blocks"]
    memory = {"blocks": raw, "tokens": native_dots.encode_tokens(symbol, trial.inputs["tokens"])}
    shifts = (alignment(fmt), alignment(activations.get(symbol.partner, fmt)), 4)
    n, stride = trial.blocks // rows * fmt.weights, raw.nbytes // rows
    arguments = f"{n}, out + 4 * row, 0, inputs[0][2] + {stride} * row, 0, inputs[1][2], 0, 1"
    types = "c_int c_void_p c_size_t c_void_p c_size_t c_void_p c_size_t c_int"
    return Call(memory, shifts, 4 * rows, types, arguments, rows=rows)
