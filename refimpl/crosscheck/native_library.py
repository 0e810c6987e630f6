"""A ggml shared library in a process of its own, and the memory that both sides share.

Every buffer of a call lies between guard bytes; outputs are poisoned first. A crash, a hang and a write
outside an output are answers like any other.
"""

import importlib.util
import json
import mmap
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.errors import BadFile, Usage

Bytes = NDArray[np.uint8]

WORKER = Path(__file__).with_name("native_worker.py")
GUARD, GUARD_BYTE, POISON = 4096, 0xC5, 0xAA
START_LIMIT = 60.0  # seconds to load a library
SUFFIXES = (".so", ".dylib", ".dll", ".pyd")


@dataclass(frozen=True)
class Buffer:
    """An argument in shared memory: bytes to read, or the number of bytes that are to be written."""

    data: Bytes | int
    shift: int = 0  # bytes past a multiple of 64
    stride: int = 0  # how far each further call moves on


@dataclass(frozen=True)
class Outcome:
    """What one call did: the value returned and the bytes written, or how it went wrong."""

    value: int | None = None
    output: Bytes | None = None
    crash: str | None = None  # "crashes: SIGSEGV", "hangs: …"
    spill: str | None = None  # what was written outside the output


def find_libraries(target: str) -> list[Path]:
    """The shared libraries that a path or an installed package's name stands for; the package isn't imported."""
    path = Path(target)
    if path.exists():
        if path.is_dir():
            raise Usage(f"{target} is a directory; a shared library or the name of a package is needed")
        return [path.resolve()]
    if not target.isidentifier():
        raise BadFile(target, None, "no such file")
    spec = importlib.util.find_spec(target)
    if spec is None:
        raise Usage(f"{target} is neither a file nor an installed package")
    places = [Path(place) for place in spec.submodule_search_locations or []]
    places += [place.with_name(f"{target}.libs") for place in places]
    if spec.origin is not None and spec.origin.endswith(SUFFIXES):
        return [Path(spec.origin)]
    found = {p for place in places for p in place.rglob("*") if p.name.endswith(SUFFIXES) or ".so." in p.name}
    if not found:
        raise Usage(f"the package {target} carries no shared library")
    return sorted(found)


Argument = Buffer | tuple[str, int]  # memory, or a number with its C type
NULL = Buffer(np.empty(0, np.uint8), -1)


class Library:
    """A loaded library; restarts its process after a crash. Use as a context manager."""

    def __init__(self, path: Path, memory: int, limit: float) -> None:
        """memory: bytes of the arena; limit: seconds that a call may take. Raises BadFile where it cannot be loaded."""
        self.path, self.limit = path, limit
        self._scratch = tempfile.TemporaryDirectory(prefix="refimpl-native-")
        arena = Path(self._scratch.name) / "arena"
        with arena.open("wb") as file:
            file.truncate(memory)
        with arena.open("r+b") as file:
            self._mmap = mmap.mmap(file.fileno(), memory)
        self._arena, self._memory = arena, np.frombuffer(self._mmap, np.uint8)
        self._process: subprocess.Popen[bytes] | None = None
        self._answers: queue.Queue[bytes] = queue.Queue()
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Library":
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the process and free the memory."""
        self._stop()
        self._memory = np.empty(0, np.uint8)
        self._mmap.close()
        self._scratch.cleanup()

    def find(self, names: list[str]) -> set[str]:
        """Those of the names that the library exports."""
        answer = self._ask({"find": names}, START_LIMIT)
        if isinstance(answer, str):
            raise BadFile(str(self.path), None, f"the library {answer} while its symbols are looked up")
        return set(answer["found"])

    def call(self, name: str, returns: str, arguments: Sequence[Argument], times: int = 1) -> Outcome:
        """Call a function; at most one of the buffers is an output, `times` strides long."""
        placed: list[tuple[int, int]] = []  # start, end of every buffer
        wire: list[list[Any]] = []
        out = slice(0)
        end = 0
        for argument in arguments:
            if not isinstance(argument, Buffer):
                wire.append(list(argument))
                continue
            if argument is NULL:
                wire.append(["p", None, 0])
                continue
            size = argument.data if isinstance(argument.data, int) else argument.data.size
            start = -(-(end + GUARD) // 64) * 64 + argument.shift
            self._memory[end:start] = GUARD_BYTE
            end = start + size
            if isinstance(argument.data, int):
                out = slice(start, end)
                self._memory[out] = POISON
            else:
                self._memory[start:end] = argument.data.reshape(-1)
            placed.append((start, end))
            wire.append(["p", start, argument.stride])
        self._memory[end : end + GUARD] = GUARD_BYTE
        answer = self._ask({"call": name, "returns": returns, "args": wire, "times": times}, self.limit)
        if isinstance(answer, str):
            return Outcome(crash=answer)
        return Outcome(answer["value"], self._memory[out].copy(), spill=self._find_spill(placed, arguments))

    def _find_spill(self, placed: list[tuple[int, int]], arguments: Sequence[Argument]) -> str | None:
        buffers = [a for a in arguments if isinstance(a, Buffer) and a is not NULL]
        before = 0
        for (start, end), buffer in zip(placed, buffers, strict=True):
            kind = "output" if isinstance(buffer.data, int) else "input"
            hit = np.flatnonzero(self._memory[before:start] != GUARD_BYTE)
            if len(hit):
                return f"writes {start - before - int(hit[0])} bytes before its {kind}"
            if (
                not isinstance(buffer.data, int)
                and (self._memory[start:end] != buffer.data.reshape(-1)).any()
            ):
                return "writes into its input"
            behind = self._memory[end : end + GUARD - 64]
            hit = np.flatnonzero(behind != GUARD_BYTE)
            if len(hit):
                return f"writes past the end of its {kind}: {int(hit[-1]) + 1} bytes"
            before = end
        return None

    def _start(self) -> None:
        self._log = tempfile.TemporaryFile(dir=self._scratch.name)  # noqa: SIM115 - lives as long as the process
        self._process = subprocess.Popen(
            [sys.executable, "-I", str(WORKER), str(self._arena), str(self.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
        )
        self._answers = queue.Queue()
        threading.Thread(target=_forward, args=(self._process.stdout, self._answers), daemon=True).start()
        answer = self._receive(START_LIMIT)
        if isinstance(answer, str):
            raise BadFile(str(self.path), None, f"the library {answer} while it is loaded")
        if "error" in answer:
            raise BadFile(str(self.path), None, f"cannot be loaded: {answer['error']}")

    def _ask(self, request: dict[str, Any], limit: float) -> dict[str, Any] | str:
        if self._process is None:
            self._start()
        assert self._process is not None and self._process.stdin is not None
        with suppress(BrokenPipeError):  # it died between two calls: the answer says how
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        return self._receive(limit)

    def _receive(self, limit: float) -> dict[str, Any] | str:
        """The next answer, or how the process failed to give one."""
        assert self._process is not None
        try:
            line = self._answers.get(timeout=limit)
        except queue.Empty:
            self._stop()
            return f"hangs: no answer within {limit:g} s"
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        code = self._process.wait()
        said = self._last_words()
        self._stop()
        how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        return f"crashes: {how}{said}"

    def _last_words(self) -> str:
        """The last line that the process wrote to stderr, such as a failed assertion."""
        self._log.seek(0)
        lines = [
            line.strip() for line in self._log.read().decode(errors="replace").splitlines() if line.strip()
        ]
        said = next((line for line in lines if "ASSERT" in line.upper()), None)
        return f" ({said[:200]})" if said else ""

    def _stop(self) -> None:
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):  # what it did not read is lost with it
                    pipe.close()
        self._process = None
        self._log.close()


def _forward(pipe: Any, answers: "queue.Queue[bytes]") -> None:
    """Move lines from the process to the queue; an empty one says that it has ended."""
    try:
        for line in pipe:
            answers.put(line)
    except ValueError:  # closed while it was read: nobody waits any more
        return
    answers.put(b"")
