"""Save a failing trial as a program that needs nothing but Python: ctypes, and the bytes beside it."""

from pathlib import Path
from typing import Any

import numpy as np

from refimpl.crosscheck.native_symbols import Symbol
from refimpl.crosscheck.native_trial import Result, Trial

PROGRAM = '''#!/usr/bin/env python3
"""{symbol}: {problem}

    python3 {name}.py [LIBRARY]      ends with 1 while the library is wrong

{inputs}
Written by refimpl native; needs ctypes only.
"""

import ctypes
import pathlib
import sys

HERE = pathlib.Path(__file__).resolve().parent
GUARD = 4096


def place(data, shift):
    """Memory between guards: {{buffer, address}}, `shift` bytes past a multiple of 64."""
    room = ctypes.create_string_buffer(bytes([0xC5]) * (len(data) + 2 * GUARD + 128))
    start = -(-(ctypes.addressof(room) + GUARD) // 64) * 64 + shift - ctypes.addressof(room)
    room[start : start + len(data)] = data
    return room, start, ctypes.addressof(room) + start, data


library = ctypes.CDLL(sys.argv[1] if len(sys.argv) > 1 else {library!r})
if hasattr(library, "ggml_cpu_init"):
    library.ggml_cpu_init()
{prepare}
size = {size}
out, start, address, _ = place(bytes([0xAA]) * size, {out_shift})
{call}
got = bytes(out[start : start + size])
want = (HERE / "{name}.want.bin").read_bytes()
spilled = any(b != 0xC5 for b in bytes(out[start - GUARD : start]) + bytes(out[start + size : start + size + GUARD]))
differ = [i for i in range(size) if got[i] != want[i]]
spilled = spilled or any(bytes(room[at : at + len(data)]) != data for room, at, _, data in ({inputs_used}))
if spilled:
    print("bytes outside the output were written")
for i in differ[:8]:
    print(f"byte {{i}}: {{got[i]:02x}}, must be {{want[i]:02x}}")
print(f"{{len(differ)}} of {{size}} bytes differ")
sys.exit(1 if spilled or differ{wrong_value} else 0)
'''


def save(folder: Path, library: Path, symbol: Symbol, trial: Trial, result: Result) -> Path:
    """Write the program and its inputs to a folder; the program's path."""
    folder.mkdir(parents=True, exist_ok=True)
    fmt, name = symbol.format, symbol.name
    arrays = {k: np.ascontiguousarray(a) for k, a in trial.inputs.items()}
    for key, array in arrays.items():
        (folder / f"{name}.{key}.bin").write_bytes(array.tobytes())
    want = b"" if result.want is None else result.want.tobytes()
    (folder / f"{name}.want.bin").write_bytes(want)
    n = trial.blocks * fmt.weights
    decode = symbol.kind == "decode"
    alignment = _shift(symbol)
    shifts = {"blocks": alignment, "x": 4, "imatrix": 4} if trial.shifted else {}
    lines = [f'{k} = place((HERE / "{name}.{k}.bin").read_bytes(), {shifts.get(k, 0)})' for k in arrays]
    arguments = [f"{k}[2]" for k in arrays]
    types = ["c_void_p"] * len(arrays)
    if symbol.kind == "encode":
        rest = [str(trial.rows), str(n // trial.rows), arguments[1] if "imatrix" in arrays else "None"]
        arguments = [arguments[0], "address", *rest]
        types = ["c_void_p", "c_void_p", "c_int64", "c_int64", "c_void_p"]
    else:
        arguments, types = [arguments[0], "address", str(n)], ["c_void_p", "c_void_p", "c_int64"]
    call = [
        f"library.{name}.restype = ctypes.c_size_t"
        if symbol.kind == "encode"
        else f"library.{name}.restype = None",
        f"library.{name}.argtypes = [{', '.join('ctypes.' + t for t in types)}]",
        f"value = library.{name}({', '.join(arguments)})",
    ]
    text = PROGRAM.format(
        symbol=name,
        name=name,
        problem=result.problem,
        inputs="\n".join(f"{k}: {a.dtype} {list(a.shape)}" for k, a in arrays.items()) + "\n",
        library=str(library),
        inputs_used=" ".join(f"{k}," for k in arrays),
        prepare="\n".join(lines),
        size=4 * n if decode else n // fmt.weights * fmt.block.itemsize,
        out_shift=(4 if decode else alignment) if trial.shifted else 0,
        call="\n".join(call),
        wrong_value=" or value != size" if symbol.kind == "encode" else "",
    )
    path = folder / f"{name}.py"
    path.write_text(text, encoding="utf-8")
    return path


def _shift(symbol: Symbol) -> int:
    names: Any = symbol.format.block.names
    return max(symbol.format.block[n].base.itemsize for n in names) if names else symbol.format.block.itemsize
