"""The process that a stranger's library may crash: loads it, and calls its functions on shared memory.

    python -I native_worker.py ARENA LIBRARY

Runs alone, without refimpl. One JSON request a line on stdin, one JSON answer a line on stdout:

    {"find": [names]}                                    -> {"found": [names]}
    {"call": name, "returns": type, "args": [...], "times": n}   -> {"value": integer or null}

An argument is [type, value] or ["p", offset, stride]: a pointer into the arena, moved on by `stride` bytes
with each of the `times` calls; the null pointer has the offset null. What the library itself prints goes to stderr.
"""

import ctypes
import json
import mmap
import os
import sys
from typing import Any

TYPES: dict[str, Any] = {
    "v": None,
    "p": ctypes.c_void_p,
    "i": ctypes.c_int,
    "l": ctypes.c_int64,
    "z": ctypes.c_size_t,
}


def call(library: ctypes.CDLL, base: int, request: dict[str, Any]) -> int | None:
    """Call one function `times` times; the last value that it returned."""
    function = getattr(library, request["call"])
    function.restype = TYPES[request["returns"]]
    function.argtypes = [TYPES[arg[0]] for arg in request["args"]]
    value = None
    for turn in range(request["times"]):
        arguments = [
            arg[1] if arg[0] != "p" else None if arg[1] is None else base + arg[1] + turn * arg[2]
            for arg in request["args"]
        ]
        value = function(*arguments)
    return value if isinstance(value, int) else None


def main(arena: str, path: str) -> None:
    """Answer requests until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with open(arena, "r+b") as file:
        memory = mmap.mmap(file.fileno(), 0)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    try:
        library = ctypes.CDLL(path)
    except OSError as error:
        print(json.dumps({"error": str(error)}), file=answers, flush=True)
        return
    if hasattr(library, "ggml_cpu_init"):  # fills the tables that the vectorised functions read
        library.ggml_cpu_init()
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "find" in request:
            answer: dict[str, Any] = {"found": [name for name in request["find"] if hasattr(library, name)]}
        else:
            answer = {"value": call(library, base, request)}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
